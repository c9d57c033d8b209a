"""FOGZO, First-Order-Guided Zeroth-Order gradients (Yang and Aamodt, NeurIPS 2025, arXiv 2510.23926).

A straight-through gradient g is the gradient of another loss, one without rounding. Two evaluations of the true loss
along it tell how much of it is real:

    g^ = g / |g|                                    the straight-through direction
    v  = sqrt(beta) g^ + sqrt(1 - beta) u           u: symmetric noise of variance 1
    G  = (L(w + eps v) - L(w - eps v)) / (2 eps) v  takes the place of g

beta = 1 keeps the direction and measures its slope; beta < 1 also explores: E[G] is beta g^ (g^ . true gradient) plus
1 - beta of the true gradient. eps and the shape of u are those that smooth rounding into the straight-through
surrogate, E[round(x + eps u)] = x. (The paper's random sign of g^ is left out: G is the same for v and -v.)

Every row of a weight has bins of its own width and so an eps of its own. The formulas then hold for weights in units
of eps: there the gradient is eps g, and G comes back divided by eps. Bins lie in the rotated domain, so the noise is
drawn there and rotated back.

Only quantized weights are moved and corrected, and of these only such with a gradient: beyond a clip, where it is
zero, the smoothed rounding is flat too. AdamW divides by a gradient's usual size, so that noise alone, however
small, would send such weights on a random walk in full steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bitbell.data.shuffle import draw
from bitbell.kernels import rotate
from bitbell.layers import quantized_layers
from bitbell.layers.linear import TrainedLayer
from bitbell.training.health import TrainingDiverged

# eps, in bin widths, at which noise of each shape smooths a staircase into a surrogate. The values of a sign, -1 and
# 1, are one bin of width 2 apart, which gives the paper's 1/sqrt(3), pi/sqrt(12) and 1/sqrt(6).
EPS = {
    "uniform": 1 / math.sqrt(12),  # rounding: the identity; sign: clip(x, -1, 1)
    "logistic": math.pi / math.sqrt(48),  # sign: tanh(x)
    "triangular": 1 / math.sqrt(24),  # sign: ApproxSign, 2x - x|x| inside -1 .. 1
}

Loss = Callable[[], Tensor | float]


class Correction(NamedTuple):
    """What the probes of one step saw.

    loss: their mean. agreement: the slope they measured over the one that the straight-through gradient predicts (1:
    it is right along the probe; 0: useless; below 0: it points uphill); 0 if it predicts none.
    """

    loss: float
    agreement: float


class Fogzo:
    """Corrects the gradients of a model's quantized weights, between backward() and the optimizer's step.

    noise: "uniform", "logistic" or "triangular". samples: pairs of forward passes a step. seed: decides the noise,
    with the number of the step. Raises ValueError for a model without quantized layers, for weights narrower than
    float32 (which would swallow the probes), and for other options.

    >>> from bitbell.layers import QuantLinear
    >>> model, x = QuantLinear(16, 4, "quest-w2a16"), torch.randn(8, 16)
    >>> fogzo = Fogzo(model)
    >>> loss = lambda: model(x).square().mean()
    >>> loss().backward()
    >>> fogzo.correct(loss, beta=0.99, step=0).loss > 0
    True
    """

    def __init__(self, model: nn.Module, *, noise: str = "uniform", samples: int = 1, seed: int = 0) -> None:
        if noise not in EPS:
            raise ValueError(f"noise must be one of {', '.join(EPS)}, got noise={noise!r}")
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got samples={samples}")
        self.model, self.noise, self.samples, self.seed = model, noise, samples, seed
        self.layers = _trained_layers(model)

    @property
    def num_weights(self) -> int:
        """How many numbers are moved and corrected."""
        return sum(layer.weight.numel() for layer in self.layers)

    @torch.no_grad()
    def correct(self, loss: Loss, *, beta: float, step: int) -> Correction:
        """Put G in the place of the gradients of the quantized weights; all other gradients stay.

        loss: evaluates, on the same batch, the loss that was differentiated. It is called twice a sample, without
        gradients and each time from the same random state. Afterwards weights, buffers and random state are what they
        were, bit for bit. Where a gradient is None or zero it stays so. One that is not finite is left as it is, for
        the caller's own check to find. Raises ValueError for a beta outside 0 .. 1 or if nothing has a gradient,
        TrainingDiverged if a probe's loss is not finite.
        """
        if not 0 <= beta <= 1:
            raise ValueError(f"beta must be from 0 to 1, got beta={beta}")
        weights = [_Weight.of(layer, EPS[self.noise]) for layer in self.layers if layer.weight.grad is not None]
        if not weights:
            raise ValueError("no quantized weight has a gradient; call correct() after backward()")
        length = math.hypot(*(float(torch.linalg.vector_norm(w.eps * w.gradient)) for w in weights))
        if not math.isfinite(length):
            return Correction(math.nan, math.nan)
        with _left_as_they_were(self.model, weights):
            estimates, found = self._estimate(loss, weights, length, beta, step)
        for w, scaled in zip(weights, estimates, strict=True):
            w.gradient.copy_(scaled / w.eps)
        return found

    def _estimate(
        self, loss: Loss, weights: list[_Weight], length: float, beta: float, step: int
    ) -> tuple[list[Tensor], Correction]:
        """eps G of every weight, the mean over the samples. `length`: |eps g| of all weights together."""
        estimates = [torch.zeros_like(w.value) for w in weights]
        losses, measured, predicted = [], 0.0, 0.0
        for sample in range(self.samples):
            v = self._directions(weights, length, beta, draw(self.seed, step, sample))
            up, down = _loss_at(loss, weights, v, 1), _loss_at(loss, weights, v, -1)
            slope = (up - down) / 2
            expected = sum(float((d * w.eps * w.gradient).sum()) for d, w in zip(v, weights, strict=True))
            for estimate, direction in zip(estimates, v, strict=True):
                estimate.add_(direction, alpha=slope / self.samples)
            losses += [up, down]
            measured, predicted = measured + slope * expected, predicted + expected**2
        return estimates, Correction(sum(losses) / len(losses), measured / predicted if predicted else 0.0)

    def _directions(self, weights: list[_Weight], length: float, beta: float, random: int) -> list[Tensor]:
        """v of every weight; the number `random` decides u."""
        along = math.sqrt(beta) / length if length else 0.0
        v = [w.eps * w.gradient * along for w in weights]
        if beta < 1:
            generator = torch.Generator(weights[0].value.device).manual_seed(random)
            for direction, w in zip(v, weights, strict=True):
                u = draw_noise(self.noise, direction, generator)
                direction.add_(rotate(u, w.rotation) * (w.gradient != 0), alpha=math.sqrt(1 - beta))
        return v


def draw_noise(shape: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of mean 0 and variance 1 with the size, type and device of `like`: "uniform" between -+sqrt(3),
    "logistic", or "triangular" between -+sqrt(6)."""
    share = torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=generator)
    if shape == "uniform":
        return (2 * share - 1) * math.sqrt(3)
    if shape == "logistic":
        return torch.logit(share, eps=2**-24) * (math.sqrt(3) / math.pi)  # a share of 0 would be infinite
    other = torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=generator)
    return (share + other - 1) * math.sqrt(6)


def beta_at(step: int, *, steps: int, start: float, last: float) -> float | None:
    """beta of a step, counted from 0: None, no correction, before `start` of the steps; then from 1 straight down to
    `last` at the end."""
    first = round(start * steps)
    if step < first:
        return None
    return 1 - (1 - last) * (step - first) / max(steps - 1 - first, 1)


@dataclass(frozen=True)
class _Weight:
    """A weight as its quantizer sees it, rows first and what is rotated last (of a convolution the channels): views of
    value and gradient, a copy, and eps of its rows."""

    value: Tensor
    gradient: Tensor
    kept: Tensor
    eps: Tensor
    rotation: int | None

    @classmethod
    def of(cls, layer: TrainedLayer, bins: float) -> _Weight:
        """Of a layer with a gradient; `bins`: eps in bin widths."""
        parameter: Any = layer.weight
        value, gradient = layer.in_rows(parameter.detach()), layer.in_rows(parameter.grad)
        eps = (bins * layer.weight_quantizer.bin_width(layer.matrix)).to(value.dtype)
        eps = eps.reshape(-1, *[1] * (value.dim() - 1))
        return cls(value, gradient, value.clone(), eps, layer.weight_quantizer.rotation)


def _loss_at(loss: Loss, weights: list[_Weight], v: list[Tensor], side: int) -> float:
    """L(w + side eps v), from the random state that it leaves behind too."""
    for w, direction in zip(weights, v, strict=True):
        w.value.copy_(torch.addcmul(w.kept, direction, w.eps, value=side))
    devices = sorted({w.value.device.index for w in weights if w.value.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        value = float(loss())
    if not math.isfinite(value):
        raise TrainingDiverged(f"the loss of a FOGZO probe is {value}")
    return value


@contextmanager
def _left_as_they_were(model: nn.Module, weights: list[_Weight]) -> Iterator[None]:
    """Whatever happens inside, weights and buffers (running statistics) are afterwards what they were before."""
    buffers = [
        (module._buffers, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for w in weights:
            w.value.copy_(w.kept)
        for owner, name, buffer, kept in buffers:
            owner[name] = buffer
            buffer.copy_(kept)


def _trained_layers(model: nn.Module) -> list[TrainedLayer]:
    """The quantized layers of `model`, one for each weight."""
    found: dict[int, TrainedLayer] = {}
    for name, layer in quantized_layers(model):
        if not isinstance(layer, TrainedLayer):
            continue
        if (dtype := layer.weight.dtype).itemsize < 4:
            raise ValueError(f"{name}: FOGZO's probes vanish in weights of {dtype}; keep float32 weights, use autocast")
        found.setdefault(id(layer.weight), layer)
    if not found:
        raise ValueError("FOGZO corrects the gradients of quantized weights, and this model has none")
    return list(found.values())
