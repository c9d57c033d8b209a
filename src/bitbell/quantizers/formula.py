"""A method as one differentiable formula over the rotated input; everything around the formula is here.

    x --rotate--> h --measure--> size          (methods whose scale is computed)
    formula(h, size) -> values, codes, step, offset

A subclass writes `formula` from the steps of `bitbell.quantizers.steps`. Its gradient is autograd's own. Nothing of the
formula is kept for the backward pass but the input: the formula is run once more instead.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bitbell.kernels import product_dtype, rotate, rotate_gradient, triton
from bitbell.quantizers.base import Quantized, Quantizer, is_recomputing, wide
from bitbell.quantizers.steps import RUNNING_DECAY, SMALLEST_SIZE, size_of


class FormulaQuantizer(Quantizer):
    """A quantizer made of a formula. `statistic`: what is measured of every input ("rms", "absmax", "absmean"), so
    that the scale is computed; None: the scale is learned.

    granularity (of a computed scale, activations only; weights with `rows` have one a row): "token" over the last
    dimension, "tensor" over all of it, or "running": the batch's in training, a running average of it in evaluation.
    """

    statistic: ClassVar[str | None] = None
    grid_zero_point: ClassVar[float] = -0.5  # of the centred codes, where there is no table
    running_size: Tensor

    def __init__(
        self,
        bits: int,
        rows: int | None = None,
        granularity: str | None = None,
        rotation: int | None = None,
    ) -> None:
        super().__init__(bits, rows, rotation, self.grid_zero_point)
        allowed = ("token", "tensor", "running") if rows is None else ()
        if granularity is not None and granularity not in allowed:
            why = f"be one of {', '.join(allowed)}" if allowed else "not be given with rows: one scale a row"
            raise ValueError(f"granularity must {why}; got granularity={granularity!r}")
        self.granularity = "row" if rows is not None else granularity or "token"
        if self.granularity == "running" and self.statistic is not None:
            self.register_buffer("running_size", torch.ones(1))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.scale_is_learned = cls.statistic is None

    @abstractmethod
    def formula(self, h: Tensor, size: Tensor) -> Quantized:
        """Values, codes, step and offset of the rotated input `h`, differentiable in `h` and in every parameter.

        `size`: what `statistic` says, of each group of `h`; a constant to the gradient. Codes are centred.
        """

    def quantize(self, x: Tensor) -> Quantized:
        self.check_input(x)
        if self.statistic is None or self.granularity == "running":
            self.require_calibrated()
        fused = self.fuse(x)
        if fused is not None:
            return fused[0]
        frozen = self.given_size()
        if torch.compiler.is_compiling():
            *quantized, size = checkpoint(self._evaluate, x, frozen, use_reentrant=False)
        else:
            *quantized, size = _Formula.apply(self, x, frozen, *self.parameters(recurse=False))
        if self.granularity == "running" and self.statistic is not None and self.training:
            self._update_running_size(size)
        return Quantized(*quantized)

    def fuse(self, x: Tensor, wants_values: bool = True) -> tuple[Quantized, Tensor] | None:
        if self.granularity == "running" and triton.computes(x):
            self.require_calibrated()
        fused = super().fuse(x, wants_values)
        if fused is not None and self.granularity == "running" and self.statistic is not None and self.training:
            self._update_running_size(fused[1])
        return fused

    def given_size(self) -> Tensor | None:
        measures_by_average = self.statistic is not None and self.granularity == "running" and not self.training
        return self.running_size if measures_by_average else None

    def measured(self) -> dict[str, Any] | None:
        """The part of a plan that says what is measured; None for what one process cannot measure alone."""
        if self.statistic is None or self.given_size() is not None:
            return {"statistic": "given", "smallest": SMALLEST_SIZE}
        by_row = self.granularity in ("row", "token")
        if not by_row and self.ranks.group is not None:
            return None
        return {"statistic": self.statistic, "by_row": by_row, "smallest": SMALLEST_SIZE}

    def _evaluate(self, x: Tensor, frozen: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        h = rotate(wide(x), self.rotation)
        size = self._measure(h, frozen)
        q = self.formula(h, size)
        # Not finite wherever its part of h is not: integer codes cannot say so, nor values behind a learned clip.
        step = q.step.detach() + 0 * size
        values = q.values if self.statistic is not None else q.values + size
        return values, q.codes, step, None if q.offset is None else q.offset.detach(), size

    def _measure(self, h: Tensor, frozen: Tensor | None) -> Tensor:
        if frozen is not None:
            return frozen.to(h.dtype) + 0 * h.detach().sum()
        if self.statistic is None:
            return 0 * h.detach().sum().reshape(1)  # nothing but the trace of NaN
        return size_of(h.detach(), self.statistic, self.granularity in ("row", "token"), self.ranks)

    @torch.no_grad()
    def _update_running_size(self, size: Tensor) -> None:
        """An average step, but for a batch that says nothing: all zero, or not finite."""
        if is_recomputing():
            return
        running = self.running_size
        usable = torch.isfinite(size) & (size > 1e-7)
        running.lerp_(torch.where(usable, size.to(running.dtype), running), 1 - RUNNING_DECAY)

    def initial_scale(self, x: Tensor) -> Tensor:
        """Of a computed scale: the statistic, as `decode` without a step needs it."""
        assert self.statistic is not None
        size = size_of(rotate(wide(x), self.rotation), self.statistic, self.rows is not None, self.ranks)
        if self.granularity == "running":
            self.running_size.copy_(size)
        return size

    def step(self) -> Tensor:
        """The value of one level, from the stored scale, as the formula has it for a tensor of that size."""
        size = self.running_size if self.granularity == "running" else self.scale
        with torch.no_grad():
            return self.formula(size.new_zeros((*size.shape[:-1], 1)), size).step

    def decode(self, codes: Tensor, step: Tensor | None = None) -> Tensor:
        """Values of `codes`. With one scale per token the step belongs to the input: pass `quantize(x).step`."""
        if step is None and self.statistic is not None and self.granularity == "token":
            why = f"{self.method} with granularity='token' has a step for each token"
            raise ValueError(f"{why}: pass step=quantizer.quantize(x).step")
        return super().decode(codes, step)

    def options(self) -> dict[str, Any]:
        found = {name: value for name, value in super().options().items() if name != "zero_point"}
        if self.statistic is not None:
            found["granularity"] = None if self.granularity == "row" else self.granularity
        return found


class _Formula(torch.autograd.Function):
    """The formula in eager mode. Keeps the input for the backward pass, and runs the formula once more there."""

    @staticmethod
    def forward(
        ctx: Any, quantizer: FormulaQuantizer, x: Tensor, frozen: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor | None, ...]:
        values, codes, step, offset, size = quantizer._evaluate(x, frozen)
        ctx.quantizer, ctx.narrow = quantizer, product_dtype(x)  # the type that gradients come in
        ctx.save_for_backward(x, size, *parameters)
        ctx.mark_non_differentiable(*(t for t in (codes, step, offset, size) if t is not None))
        return values, codes, step, offset, size

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, size, *parameters = ctx.saved_tensors
        quantizer = ctx.quantizer
        wanted = [need for i, need in enumerate(ctx.needs_input_grad) if i not in (0, 2)]
        with torch.enable_grad():
            h = rotate(wide(x.detach()), quantizer.rotation).requires_grad_(wanted[0])
            values = quantizer.formula(h, size).values
            sources = [h, *parameters]
            asked = [s for s, need in zip(sources, wanted, strict=True) if need]
            found = iter(torch.autograd.grad(values, asked, g, allow_unused=True))
        grads = [next(found) if need else None for need in wanted]
        if grads[0] is not None:
            grads[0] = rotate_gradient(grads[0], quantizer.rotation, ctx.narrow).to(x.dtype)
        return None, grads[0], None, *grads[1:]
