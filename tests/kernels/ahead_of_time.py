"""Compiling Triton's kernels where there is no GPU: the compiler needs none."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from bitbell.kernels import triton

needs_triton = pytest.mark.skipif(not triton._installed, reason="Triton is not installed")
compiles = pytest.mark.skipif(not triton._installed or triton._interprets, reason="Triton does not compile here")

POINTERS = {torch.int8: "*i8", torch.uint8: "*u8", torch.int32: "*i32", torch.float32: "*fp32", torch.bfloat16: "*bf16"}
LAUNCH_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def compile_launch(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], arch: int) -> Any:
    """The kernel as a launch with these arguments would compile it."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = dict(zip(kernel.arg_names, args, strict=False))
    given |= {name: value for name, value in options.items() if name not in LAUNCH_OPTIONS}
    constants, signature, attributes = {}, {}, {}
    is_constant = {parameter.name: parameter.is_constexpr for parameter in kernel.params}
    for place, name in enumerate(kernel.arg_names):
        value = given[name]
        if is_constant[name] or value is None or (type(value) is int and value == 1):
            constants[(place,)], signature[name] = value, "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(place,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    rest = {name: value for name, value in options.items() if name in LAUNCH_OPTIONS}
    return compile_kernel(source, target=GPUTarget("cuda", arch, 32), options=rest)


def resources(compiled: Any, folder: Path) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack (what does not fit into registers)."""
    import triton as package

    tool = Path(package.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    text = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None
    return int(found[1]), int(found[2])
