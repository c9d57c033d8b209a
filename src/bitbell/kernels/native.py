"""The C++ kernels: which there are, which is in use, and calls that take tensors.

BITBELL_KERNELS chooses: "auto" (the fastest that the machine runs), "reference" (none: plain PyTorch everywhere), or a
level by name: "portable", "avx2", "avxvnni", "avx512", "avx512vbmi", "amx" ("amx-emulated" only tests). Every level
computes the same codes and integer sums. Threads: `set_threads`, by default as many as torch's own (OMP_NUM_THREADS).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

try:
    from bitbell.kernels import _native as extension

    missing: str | None = None
except ImportError as error:  # everything runs on the definitions in plain PyTorch
    extension = None  # type: ignore[assignment]
    if find_spec("bitbell.kernels._native") is None:
        missing = "bitbell was installed without a C++ compiler that builds its kernels (see docs/cpu.md)"
    else:
        missing = f"bitbell's C++ kernels cannot be loaded: {error}"

REFERENCE = "reference"
VARIABLE = "BITBELL_KERNELS"
MOST_THREADS = 256
STATISTICS = ("none", "rms", "absmax", "absmean")
# Of what the extension fills: whatever torch.set_default_dtype and torch.device say.
FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
INTEGERS: dict[str, Any] = {"dtype": torch.int32, "device": "cpu"}
_level: str | None = None
_asked = "auto"
_threads: int | None = None


@dataclass(frozen=True, eq=False)
class InputPlan:
    """How rows of floats become codes; the quantizers' formulas in the few numbers that a kernel needs.

    h = rotate(x), size = max(statistic(h), smallest) over the row (0 for "none"), v = h / (size * divisor +
    divisor_plus); code = -2**(bits-1) + how many `thresholds` (2**bits - 1, rising, float32) are at most v, or without
    thresholds clip(round(v - 1/2)). step = size * step_factor + step_plus; value = (code - zero_point) * step + offset.
    """

    bits: int
    rotation: int | None = None
    statistic: str = "none"
    smallest: float = 0.0
    divisor: float = 0.0
    divisor_plus: float = 1.0
    step_factor: float = 0.0
    step_plus: float = 0.0
    thresholds: Tensor | None = None
    zero_point: float = 0.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        if self.statistic not in STATISTICS:
            raise ValueError(f"statistic must be one of {', '.join(STATISTICS)}, got {self.statistic!r}")
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be 1 to 8, got {self.bits}")
        _check_power_of_two(self.rotation)
        t, wanted = self.thresholds, 2**self.bits - 1
        if t is None:
            return
        if t.dtype != torch.float32 or tuple(t.shape) != (wanted,) or t.device.type != "cpu":
            got = f"{t.dtype} of shape {tuple(t.shape)} on {t.device}"
            raise ValueError(f"thresholds must be {wanted} float32 numbers on the CPU, got {got}")
        object.__setattr__(self, "thresholds", t.contiguous())  # what the kernels read lies together

    def same_as(self, other: InputPlan) -> bool:
        """Whether both choose the same codes and steps for every row."""
        mine, others = ({**plan.__dict__, "thresholds": None} for plan in (self, other))
        a, b = self.thresholds, other.thresholds
        return mine == others and (a is b or (a is not None and b is not None and torch.equal(a, b)))

    def fields(self) -> dict[str, Any]:
        """What the extension takes. Addresses are those of tensors of this plan, which must outlive their use."""
        return self.__dict__ | {
            "rotation": self.rotation or 1,
            "statistic": STATISTICS.index(self.statistic),
            "thresholds": 0 if self.thresholds is None else self.thresholds.data_ptr(),
        }


# Which kernels -------------------------------------------------------------------------------------------------------


def level_names() -> dict[str, str]:
    """Every level compiled in -> "" if the machine runs it, or what is missing; slowest first."""
    return {} if extension is None else {name: "" if usable else why for name, usable, why in extension.levels()}


def level() -> str:
    """The level in use; "reference" where there is none."""
    global _level
    if _level is None:
        _use(os.environ.get(VARIABLE) or "auto", VARIABLE)
    assert _level is not None
    return _level


def set_level(name: str) -> None:
    """Use a level from now on, "auto" or "reference". Raises ValueError for one that is not there."""
    _use(name, "level")


def _use(name: str, source: str) -> None:
    """source: what a message calls the name."""
    global _level, _asked
    if name == REFERENCE or (name == "auto" and extension is None):
        _level, _asked = REFERENCE, name
        return
    if extension is None:
        raise ValueError(f"{source}={name!r}: {missing}; there is only {REFERENCE!r}")
    names = level_names()
    if name != "auto" and names.get(name, "unknown"):
        usable = ["auto", REFERENCE, *(n for n, why in names.items() if not why)]
        why = f" ({names[name]})" if name in names else ""
        raise ValueError(f"{source} must be one of {', '.join(usable)} on this machine, got {name!r}{why}")
    _level, _asked = extension.best_level() if name == "auto" else name, name


@contextmanager
def using(name: str) -> Iterator[None]:
    """Use a level inside a `with`."""
    global _level, _asked
    before = level(), _asked
    set_level(name)
    try:
        yield
    finally:
        _level, _asked = before


def available() -> bool:
    """Whether C++ kernels are in use."""
    return level() != REFERENCE


def reason() -> str:
    """Why the level in use is the one in use, in words."""
    in_use = level()
    if extension is None:
        return missing or ""
    if _asked != "auto":
        return f"{VARIABLE}={in_use}" if os.environ.get(VARIABLE) == _asked else f"{in_use} was asked for"
    lacking = [f"{name}: {why}" for name, why in level_names().items() if why]
    return "the fastest that this machine runs" + (f" ({'; '.join(lacking)})" if lacking else "")


def set_threads(count: int | None) -> None:
    """Threads of every call; None: as many as torch has at that time. Raises ValueError for less than 1."""
    global _threads
    if count is not None and not 1 <= count <= MOST_THREADS:
        raise ValueError(f"threads must be 1 to {MOST_THREADS}, or None, got {count}")
    _threads = count


def threads() -> int:
    """How many threads a call uses."""
    return min(torch.get_num_threads(), MOST_THREADS) if _threads is None else _threads


def stream_rate(megabytes: int = 64, threads: int = 1, passes: int = 8) -> float:
    """Bytes a second that this machine reads from a buffer of that size, the best of `passes`."""
    return _loaded().stream_rate(megabytes * 10**6 // 512 * 512, passes, threads)


# Calls ---------------------------------------------------------------------------------------------------------------


def arrange(words: Tensor, bits: int, columns: int) -> tuple[Tensor, Tensor]:
    """Packed codes (rows, words) int32 -> what the products read (uint8, 64-byte aligned) and the codes' row sums."""
    words = _on_cpu("words", words, torch.int32)
    native, rows = _loaded(), words.shape[0]
    if words.dim() != 2 or words.shape[1] != (columns * bits + 31) // 32 or not 1 <= bits <= 8:
        raise ValueError(f"words must be (rows, {(columns * bits + 31) // 32}) for {columns} codes of {bits} bits")
    arranged = aligned_bytes(native.arranged_bytes(rows, columns, bits))
    sums = torch.empty(rows, **INTEGERS)
    native.arrange(words.data_ptr(), rows, columns, bits, arranged.data_ptr(), sums.data_ptr(), threads())
    return arranged, sums


def quantize(plan: InputPlan, x: Tensor) -> tuple[Tensor, Tensor]:
    """Centred codes (rows, columns) int8 and steps (rows, 1) float32 of `x` (rows, columns) float32."""
    x = _on_cpu("x", x, torch.float32)
    if x.dim() != 2:
        raise ValueError(f"x must be (rows, columns), got {tuple(x.shape)}")
    _check_rotation(plan.rotation, x.shape[1])
    native, (rows, columns) = _loaded(), x.shape
    stride = native.padded_k(columns)
    codes = torch.empty(rows, stride, dtype=torch.int8, device="cpu")
    step, sums = torch.empty(rows, 1, **FLOATS), torch.empty(rows, **INTEGERS)
    if x.numel():
        places = codes.data_ptr(), stride, step.data_ptr(), sums.data_ptr()
        native.quantize(level(), plan.fields(), x.data_ptr(), rows, columns, *places, threads())
    return codes[:, :columns], step


def sums_fit(columns: int, bits: int, x_bits: int) -> bool:
    """Whether int32 holds every sum of products on the way: unsigned weight codes times centred input codes."""
    return columns < 2**17 and columns * (2**bits - 1) * 2 ** (x_bits - 1) < 2**31


def product(codes: Tensor, arranged: Tensor, bits: int, outputs: int, x_bits: int = 8) -> Tensor:
    """Centred input codes (rows, columns) int8 times unsigned weight codes, exactly: (rows, outputs) int32.

    x_bits: how many bits the input codes need; fewer allow faster kernels.
    """
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise ValueError(f"codes must be an int8 matrix, got {codes.dtype} of shape {tuple(codes.shape)}")
    codes, arranged = _on_cpu("codes", codes, torch.int8), _on_cpu("arranged", arranged, torch.uint8)
    native, (rows, columns) = _loaded(), codes.shape
    if arranged.numel() != native.arranged_bytes(outputs, columns, bits):
        raise ValueError(f"arranged has {arranged.numel()} bytes, not those of ({outputs}, {columns}) at {bits} bits")
    if not 1 <= x_bits <= 8:
        raise ValueError(f"x_bits must be 1 to 8, got {x_bits}")
    if not sums_fit(columns, bits, x_bits):
        raise ValueError(f"{columns} columns of {bits} and {x_bits} bits are too many for sums of int32")
    low, high = -(2 ** (x_bits - 1)), 2 ** (x_bits - 1) - 1
    if codes.numel() and (int(codes.min()) < low or int(codes.max()) > high):
        raise ValueError(f"codes must be {low} to {high} for x_bits={x_bits}")
    stride = native.padded_k(columns)
    padded = torch.nn.functional.pad(codes, (0, stride - columns)).contiguous()
    out = torch.empty(rows, outputs, **INTEGERS)
    shape = bits, outputs, columns, padded.data_ptr(), stride, x_bits, rows
    native.product(level(), arranged.data_ptr(), *shape, out.data_ptr(), threads())
    return out


def rotate(x: Tensor, block: int | None) -> Tensor:
    """The Hadamard rotation of the last dimension of `x` float32, by butterflies."""
    if block is None or block == 1:
        return x
    x = _on_cpu("x", x, torch.float32)
    _check_rotation(block, x.shape[-1])
    y = torch.empty_like(x)
    _loaded().rotate(level(), x.data_ptr(), y.data_ptr(), x.numel(), block)
    return y


class NativeLayer:
    """A linear layer of packed codes in C++. Keeps what it borrows: the arranged codes, scales, and the plan's table.

    plan: how inputs become codes; None leaves them floats (rotated by `rotation`). zero_point: of the centred weight
    codes. table: the weight's levels where the grid is not uniform, only without a plan. Raises ValueError for parts
    that do not fit each other.
    """

    def __init__(
        self,
        words: Tensor,
        bits: int,
        columns: int,
        scale: Tensor,
        zero_point: float,
        *,
        plan: InputPlan | None,
        rotation: int | None = None,
        offset: Tensor | None = None,
        bias: Tensor | None = None,
        table: tuple[float, ...] | None = None,
    ) -> None:
        if plan is not None and table is not None:
            raise ValueError("table is for layers whose inputs stay floats (plan=None)")
        if table is not None and (len(table) != 2**bits or bits > 4):
            raise ValueError(f"table must have {2**bits} levels for {bits} bits, at most 4 bits, got {len(table)}")
        if plan is not None and not sums_fit(columns, bits, plan.bits):
            raise ValueError(f"{columns} columns of {bits} and {plan.bits} bits are too many for sums of int32")
        _check_rotation(rotation if plan is None else plan.rotation, columns)
        self.outputs, self.inputs, self.bits = words.shape[0], columns, bits
        self.plan, self.rotation = plan, rotation
        self.arranged, self.sums = arrange(words, bits, columns)
        self.scale = of_outputs("scale", scale, self.outputs)
        self.offset = None if offset is None else of_outputs("offset", offset, self.outputs)
        self.bias = None if bias is None else of_outputs("bias", bias, self.outputs)
        self.table = None if table is None else torch.tensor(table, **FLOATS)
        self.zero_point = zero_point + 2 ** (bits - 1)
        self.layer = _loaded().Layer(self.fields(), None if plan is None else plan.fields())

    def fields(self) -> dict[str, Any]:
        """The weights as the extension takes them."""
        tensors: dict[str, Tensor | None] = {"data": self.arranged, "sums": self.sums, "scale": self.scale}
        tensors |= {"offset": self.offset, "bias": self.bias, "table": self.table}
        shape = {"bits": self.bits, "rows": self.outputs, "k": self.inputs, "zero_point": self.zero_point}
        return shape | {name: 0 if t is None else t.data_ptr() for name, t in tensors.items()}

    def __call__(self, x: Tensor) -> Tensor:
        """(..., inputs) float -> (..., outputs), computed in float32 and returned in the type of `x`."""
        if x.shape[-1:] != (self.inputs,) or not x.is_cpu:
            raise ValueError(f"x must be (..., {self.inputs}) on the CPU, got {tuple(x.shape)} on {x.device}")
        rows = x.numel() // self.inputs
        flat = x if x.dtype == torch.float32 and x.is_contiguous() else x.detach().float().contiguous()
        if self.plan is None:
            flat = rotate(flat, self.rotation)
        y = torch.empty((*x.shape[:-1], self.outputs), **FLOATS)
        if rows:
            self.layer.forward(level(), flat.data_ptr(), rows, y.data_ptr(), threads())
        return y if x.dtype == torch.float32 else y.to(x.dtype)


def of_outputs(name: str, x: Tensor, outputs: int) -> Tensor:
    """A number for each output, float32 (outputs,); one for all is repeated."""
    if x.numel() not in (1, outputs) or x.device.type != "cpu":
        raise ValueError(f"{name} must have {outputs} numbers, got {x.numel()} on {x.device}")
    return x.reshape(-1).float().expand(outputs).contiguous()


def aligned_bytes(count: int) -> Tensor:
    """An empty uint8 tensor that begins on a 64-byte boundary."""
    room = torch.empty(count + 63, dtype=torch.uint8, device="cpu")
    start = -room.data_ptr() % 64
    return room[start : start + count]


def _loaded() -> Any:
    if extension is None:
        raise RuntimeError(missing)
    return extension


def _on_cpu(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype != dtype or x.device.type != "cpu":
        raise ValueError(f"{name} must be {dtype} on the CPU, got {x.dtype} on {x.device}")
    return x.contiguous()


def _check_power_of_two(rotation: int | None) -> None:
    if rotation is not None and (rotation < 1 or rotation & (rotation - 1)):
        raise ValueError(f"rotation must be a power of two or None, got {rotation}")


def _check_rotation(block: int | None, columns: int) -> None:
    _check_power_of_two(block)
    if block is not None and columns % block:
        raise ValueError(f"rotation must divide the {columns} columns, got {block}")
