"""Packed layers on Triton's kernels: through the interpreter here, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bitbell.kernels import triton


@pytest.mark.skipif(not triton._installed, reason="Triton is not installed")
def test_layers_of_every_method_through_the_interpreter(pass_interpreted: Callable[[Path, int], None]) -> None:
    pass_interpreted(Path(__file__).with_name("interpreted_layers.py"), 25)
