"""The contract of every quantizer: a tensor -> integer codes, their values, and a gradient.

    x --rotate--normalise--compand--round--> codes  --(code - zero point) * step-->  values

A quantizer owns its scale and its statistics, all of them shaped parameters and persistent buffers from construction
on. It knows nothing of layers, models or files. A method is one file with one subclass: it says how codes are chosen
(`quantize`), where its scale starts (`initial_scale`) and how a scale becomes a step (`step`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from bitbell.kernels import ROTATION_BLOCK, product_dtype, triton
from bitbell.kernels.quantize import Plan, quantize_plan, serves
from bitbell.quantizers.ranks import ALONE, Ranks, largest_over


class Quantized(NamedTuple):
    """What `Quantizer.quantize(x)` returns.

    values: level times step plus offset, the shape of x, float; differentiable.
    codes:  centred integer codes `-2**(bits-1) .. 2**(bits-1) - 1`, the shape of x, int8. level = code - zero point,
            or the quantizer's table at the code.
    step:   value of one level, float, broadcastable to x: one a row, one a token, or one in all. Not finite wherever
            its part of x holds NaN or infinity, so that integer codes cannot hide them.
    offset: what is added to every value, float, shaped like the quantizer's scale; None for nothing.
    bins:   codes of 8 bits, int8, of which `codes` are the upper bits, where they are what is kept; else None.
    """

    values: Tensor
    codes: Tensor
    step: Tensor
    offset: Tensor | None = None
    bins: Tensor | None = None


class Quantizer(nn.Module):
    """A tensor quantizer. Weights: `rows` says how many rows share nothing. Activations: `rows=None`, one scale in all.

    bits: 1 to 8, or what the method has of that. rotation: block of the Hadamard rotation of the last dimension, or
    None. zero_point: of the centred codes, so that level = code - zero_point (-0.5: levels symmetric around zero).
    table: the levels, for a method whose grid is not uniform. Raises ValueError for bits that the method does not have.
    """

    method: ClassVar[str]
    widths: ClassVar[Sequence[int]] = range(1, 9)
    for_weights: ClassVar[bool] = True
    granularity_option: ClassVar[str] = "granularity"  # what the method calls the group that shares a statistic
    scale_is_learned: ClassVar[bool] = True
    scale_decays: ClassVar[bool] = False  # whether weight decay applies to the scale
    rotates: ClassVar[bool] = True  # whether the method rotates unless told otherwise
    weights_share_scale: ClassVar[bool] = False  # one scale for a whole weight matrix instead of one a row
    layer_activation_options: ClassVar[dict[str, Any]] = {}  # what a layer's activation quantizer differs in by default
    activation_method: ClassVar[str | None] = None  # a layer's activations' method, where it is not this one

    bits: int
    scale: Tensor
    calibrated: Tensor
    offset: Tensor | None
    table: tuple[float, ...] | None = None
    ranks: Ranks = ALONE  # processes that share what this quantizer is fed, see `bitbell.quantizers.ranks`

    def __init__(self, bits: int, rows: int | None, rotation: int | None, zero_point: float) -> None:
        super().__init__()
        check_bits("bits", type(self), bits)
        if rows is not None and rows < 1:
            raise ValueError(f"rows must be positive or None (one scale for the tensor), got rows={rows}")
        if rotation is not None and (rotation < 1 or rotation & (rotation - 1)):
            raise ValueError(f"rotation must be a power of two or None, got rotation={rotation}")
        self.bits, self.rows, self.rotation, self.zero_point = bits, rows, rotation, zero_point
        scale = torch.ones((1,) if rows is None else (rows, 1))
        if self.scale_is_learned:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)
        self.register_parameter("offset", None)
        self.register_buffer("calibrated", torch.zeros(1, dtype=torch.bool))
        self._seen_calibrated = False  # spares later calls the look at the buffer, which would wait for a GPU

    # What a method defines -------------------------------------------------------------------------------------------

    @abstractmethod
    def quantize(self, x: Tensor) -> Quantized:
        """Values (differentiable), centred codes and step of `x`."""

    @abstractmethod
    def initial_scale(self, x: Tensor) -> Tensor:
        """The scale to start from, given data `x`; broadcast to the scale's shape."""

    def step(self) -> Tensor:
        """The value of one level, from the stored scale; shaped like `scale`."""
        return self.scale

    def plan(self) -> Plan | None:
        """All of this quantizer in numbers, as it is now, for kernels that do it in one pass (`kernels.quantize`); None
        where only `quantize` can."""
        return None

    def given_size(self) -> Tensor | None:
        """What a plan whose statistic is "given" measures by, (1,) or (rows, 1); None: the scale."""
        return None

    def quantize_codes(self, x: Tensor) -> Quantized:
        """`quantize` for who multiplies codes: values are there for their gradient only (`gradient_carrier`)."""
        fused = self.fuse(x, wants_values=False)
        if fused is not None:
            return fused[0]
        found = self.quantize(x)
        return found._replace(values=_Carrier.apply(found.values))

    def keep_bins(self) -> None:
        """From now on `quantize_codes` keeps one byte an element for its gradient. Raises ValueError for a method whose
        gradient needs more."""
        raise ValueError(f"compact is for activations of bbq, whose codes tell the slope; these are of {self.method}")

    # What every method shares ----------------------------------------------------------------------------------------

    def fuse(self, x: Tensor, wants_values: bool = True) -> tuple[Quantized, Tensor] | None:
        """`quantize` by the Triton kernels, and the size that they measured (empty where it was given); None where
        they do not compute for `x`, or have not got this method. Without wants_values, values carry only a gradient.
        """
        if not triton.computes(x):
            return None
        self.check_input(x)
        if self.scale_is_learned:
            self.require_calibrated()
        plan = self.plan()
        if plan is None or not serves(plan, x) or (self.rows is not None and x.dim() != 2):
            return None
        scale, size = self.scale if self.scale_is_learned else None, self.given_size()
        found = quantize_plan(x, scale, size, self.offset, *plan.encoded(), product_dtype(x), wants_values)
        values, codes, step, measured = found
        return Quantized(values, codes, step, None if self.offset is None else self.offset.detach()), measured

    def forward(self, x: Tensor) -> Tensor:
        return self.quantize(x).values

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the scale (and running statistics) from data `x`, and remember that it has happened.

        Raises ValueError, and leaves everything as it was, if `x` is empty, not finite, or so large that its mean
        square overflows. Under `ranks` all processes call it, each with its share, and all raise if one has to.
        """
        self.check_input(x)
        usable = x.numel() > 0 and bool(torch.isfinite(x).all())
        if bool(largest_over(torch.tensor([float(not usable)], device=x.device), self.ranks)):
            what = "an empty tensor" if not x.numel() else "a tensor with NaN or infinity"
            raise ValueError(f"cannot calibrate {self.method} on {what} of shape {tuple(x.shape)}")
        before = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        scale = self.initial_scale(x).to(self.scale.dtype)
        if not bool(torch.isfinite(scale).all()):
            self.load_state_dict(before)
            raise ValueError(
                f"cannot calibrate {self.method}: values up to {float(x.abs().max()):.3g} overflow {scale.dtype}"
            )
        self.scale.copy_(scale.expand(self.scale.shape))
        self.calibrated.fill_(True)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Codes 0 .. 2**bits - 1 of `x`, uint8, the same shape. Packing stores exactly these."""
        return (self._quantize_as_packed(x).codes.to(torch.int16) + 2 ** (self.bits - 1)).to(torch.uint8)

    @torch.no_grad()
    def bin_width(self, x: Tensor) -> Tensor:
        """Mean width of the bins of codes in the rotated `x`, shaped like the step. Thresholds lie midway between
        levels; a method that puts them elsewhere has its own."""
        levels = self.levels
        return self._quantize_as_packed(x).step * (float(levels[-1] - levels[0]) / (len(levels) - 1))

    def _quantize_as_packed(self, x: Tensor) -> Quantized:
        """`quantize` in evaluation mode: by running statistics, which stay as they are."""
        was_training, self.training = self.training, False
        try:
            return self.quantize(x)
        finally:
            self.training = was_training

    def decode(self, codes: Tensor, step: Tensor | None = None) -> Tensor:
        """Values of `codes` (uint8). `step` defaults to the stored one, which must have been set."""
        if step is None:
            self.require_calibrated()
            step = self.step()
        levels = self.levels.to(step.device, step.dtype) if self.table is None else table_like(self.table, step)
        values = levels[codes.long()] * step
        return values if self.offset is None else values + self.offset

    @property
    def levels(self) -> Tensor:
        """The table code -> level, float32 of shape (2**bits,), in units of the step."""
        if self.table is not None:
            return table_like(self.table, torch.empty(0, dtype=torch.float32, device="cpu")).clone()
        return torch.arange(2**self.bits, dtype=torch.float32) - 2 ** (self.bits - 1) - self.zero_point

    def entropy(self, x: Tensor) -> float:
        """Shannon entropy of the codes of `x`, in bits; at most `bits`."""
        return entropy_of(code_histogram(self.encode(x), self.bits))

    def check_input(self, x: Tensor) -> None:
        """Raise ValueError, naming what is wrong, unless `x` is a float tensor with the rows this quantizer was made
        for."""
        if not x.is_floating_point():
            raise ValueError(f"{self.method} quantizes float tensors, got {x.dtype}")
        if x.dim() == 0:
            raise ValueError(f"{self.method} quantizes the last dimension of a tensor, got one without dimensions")
        if self.rows is not None and (x.dim() != 2 or x.shape[0] != self.rows):
            raise ValueError(
                f"this {self.method} quantizer was made for (rows={self.rows}, columns), got {tuple(x.shape)}"
            )

    def require_calibrated(self) -> None:
        """Raise RuntimeError unless the scale has been set. Skipped while compiling, where it would break the graph."""
        if torch.compiler.is_compiling() or self._seen_calibrated or self.calibrated.is_meta:
            return
        self._seen_calibrated = bool(self.calibrated)
        if not self._seen_calibrated:
            raise RuntimeError(
                f"this {self.method} quantizer has no scale yet: call bitbell.calibrate(model, batch), or "
                ".calibrate(x) on the quantizer, before the first forward pass, or load a checkpoint"
            )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._seen_calibrated = False
        super()._load_from_state_dict(*args, **kwargs)

    def options(self) -> dict[str, Any]:
        """What rebuilds this quantizer: `Method(**options)`, all of it JSON."""
        return {"bits": self.bits, "rows": self.rows, "rotation": self.rotation, "zero_point": self.zero_point}

    def _apply(self, fn: Any, recurse: bool = True) -> Quantizer:
        """Move with the model, but stay in float32 at least: a running average would stand still in bfloat16."""

        def moved(t: Tensor) -> Tensor:
            result: Tensor = fn(t)
            return t.to(result.device) if result.is_floating_point() and result.element_size() < 4 else result

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options().items())


def gradient_carrier(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of the shape of `like` that take no memory: something for a gradient to come back through."""
    return like.new_zeros((), dtype=dtype).expand(like.shape)


class _Carrier(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return gradient_carrier(values, values.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def check_bits(argument: str, method: type[Quantizer], bits: object, hint: str = "") -> None:
    """Raise ValueError, naming the argument and the widths that the method has, unless `bits` is one of them.

    hint: what follows in the message.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in method.widths:
        low, high = min(method.widths), max(method.widths)
        allowed = f"an integer from {low} to {high} bits" if low < high else f"{low} bits"
        of = "" if (low, high) == (1, 8) else f" for {method.method}"
        raise ValueError(f"{argument} must be {allowed}{of}, got {argument}={bits!r}{hint}")


def table_like(table: tuple[float, ...], like: Tensor) -> Tensor:
    """A table of levels as a tensor with the type and device of `like`."""
    if torch.compiler.is_compiling() or type(like) not in (Tensor, nn.Parameter):
        return torch.tensor(table, dtype=like.dtype, device=like.device)
    return _cached_table(table, like.dtype, like.device)


@lru_cache(maxsize=64)
def _cached_table(table: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor in the cache would fail the next backward pass
        return torch.tensor(table, dtype=dtype, device=device)


def code_histogram(codes: Tensor, bits: int) -> Tensor:
    """How often each code occurs: uint8 codes -> int64 counts of shape (2**bits,)."""
    return torch.bincount(codes.flatten().long(), minlength=2**bits)


def entropy_of(histogram: Tensor) -> float:
    """Shannon entropy, in bits, of counts. Raises ValueError if there are none."""
    total = float(histogram.sum())
    if total == 0:
        raise ValueError("an empty tensor has no entropy")
    share = histogram[histogram > 0].double() / total
    return max(0.0, -float((share * share.log2()).sum()))


def wide(x: Tensor) -> Tensor:
    """`x` in the precision that quantizers compute in: float32, or float64 if it has that already."""
    return x if x.dtype == torch.float64 else x.float()


def is_recomputing() -> bool:
    """Whether a backward pass runs a forward pass again, as gradient checkpointing does: statistics have moved by then.
    The compiler's own recomputation changes no buffer twice."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def sum_to(x: Tensor, like: Tensor) -> Tensor:
    """Sum `x` over whatever was broadcast, so that it takes the shape of `like`."""
    return x.sum_to_size(like.shape)


__all__ = [
    "ROTATION_BLOCK",
    "Quantized",
    "Quantizer",
    "code_histogram",
    "entropy_of",
    "sum_to",
    "table_like",
    "wide",
]
