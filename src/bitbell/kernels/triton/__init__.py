"""The Triton kernels: whether they are there, and which tensors they compute for.

BITBELL_TRITON chooses: "auto" (tensors on a GPU, where Triton is installed), "off" (none: the definitions in plain
PyTorch everywhere), or "interpret" (tensors on the CPU too, by Triton's interpreter: slow, and for tests). Triton
decides whether it interprets when it is imported, so that "interpret" has to be there from the start of the process:

    BITBELL_TRITON=interpret pytest tests/kernels

Kernels are in the modules of this package, which import Triton and must be imported only where `available()`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

VARIABLE = "BITBELL_TRITON"
MODES = ("auto", "off", "interpret")

_installed = find_spec("triton") is not None
_mode = os.environ.get(VARIABLE) or "auto"
if _mode == "interpret" and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
_interprets = _installed and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
_IS_ROCM = torch.version.hip is not None  # where tensors of AMD's GPUs say is_cuda too


def available() -> bool:
    """Whether Triton's kernels can run in this process: on a GPU, or by the interpreter."""
    return not why_not()


def why_not() -> str:
    """What is missing for Triton's kernels, in words; "" where nothing is."""
    if mode() == "off":
        return f"{VARIABLE}=off"
    if not _installed:
        return "Triton is not installed (pip install 'bitbell[gpu]', on Linux)"
    if mode() == "interpret" and not _interprets:
        return f"Triton does not interpret in this process: set {VARIABLE}=interpret before it starts"
    if mode() == "auto" and _interprets:
        return f"TRITON_INTERPRET is set, so that no kernel is compiled; {VARIABLE}=interpret uses the interpreter"
    if mode() == "auto" and not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    if mode() == "auto" and _IS_ROCM:
        return "the products are written for NVIDIA's GPUs"
    return ""


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return _mode == "interpret" and _interprets


def computes(x: Tensor) -> bool:
    """Whether Triton's kernels compute for `x`: it is on an NVIDIA GPU, or the interpreter is in use.

    Raises ValueError if the environment variable says anything but a mode.
    """
    if mode() == "off" or not _installed:
        return False
    return _interprets if _mode == "interpret" else x.is_cuda and not _interprets and not _IS_ROCM


def mode() -> str:
    """ "auto", "off" or "interpret". Raises ValueError if the environment variable says anything else."""
    if _mode not in MODES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(MODES)}, got {_mode!r}")
    return _mode


@contextmanager
def using(mode: str) -> Iterator[None]:
    """Use a mode inside a `with`: "auto", "off", or "interpret". Raises ValueError for one that is not to be had."""
    global _mode
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "interpret" and not _interprets:
        raise ValueError(f"Triton does not interpret in this process: set {VARIABLE}=interpret before it starts")
    before, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = before
