"""What the tests of single methods share: random situations, plain measurements, and the comparison with a formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from bitbell.quantizers import Quantizer

quick = settings(derandomize=True, max_examples=40, deadline=None)


@dataclass(frozen=True)
class Situation:
    """A width, what shares a statistic, and an input: its shape, its rotation, and its seed."""

    bits: int
    group: str
    rotation: int | None
    shape: tuple[int, ...]
    seed: int

    def draw(self) -> Tensor:
        """A random tensor with heavy tails, float64, whose rows differ in size and are off centre."""
        generator = torch.Generator().manual_seed(self.seed)
        x, size = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in (self.shape, self.shape))
        return 0.05 * (x + 0.1 * x**3 + 0.3) * size[..., :1].exp()

    def options(self) -> dict[str, Any]:
        return {"bits": self.bits, "rotation": self.rotation} | ({"rows": self.shape[0]} if self.group == "row" else {})


@st.composite
def situations(draw: st.DrawFn, bits: range, groups: tuple[str, ...]) -> Situation:
    """Matrices where every row has a scale of its own; else anything from a vector to three dimensions."""
    group, rotation = draw(st.sampled_from(groups)), draw(st.sampled_from([None, 16]))
    leading = draw(st.lists(st.integers(1, 5), min_size=group == "row", max_size=1 if group == "row" else 2))
    columns = 16 * draw(st.integers(1, 3)) if rotation else draw(st.integers(1, 37))
    width = draw(st.integers(bits[0], bits[-1]))
    return Situation(width, group, rotation, (*leading, columns), draw(st.integers(0, 2**31)))


def rotated(x: Tensor, block: int | None) -> Tensor:
    """`x` times the block-diagonal Hadamard matrix, by Sylvester's doubling."""
    if block is None:
        return x
    matrix = torch.ones(1, 1, dtype=x.dtype)
    while len(matrix) < block:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=x.dtype), matrix)
    return (x.unflatten(-1, (-1, block)) @ matrix / math.sqrt(block)).flatten(-2)


def size(h: Tensor, statistic: str, group: str) -> Tensor:
    """What a group of `h` measures, a constant to the gradient."""
    h = h.detach() if group in ("row", "token") else h.detach().flatten()
    return {
        "rms": lambda: h.square().mean(-1, keepdim=True).sqrt(),
        "absmax": lambda: h.abs().max(-1, keepdim=True).values,
        "absmean": lambda: h.abs().mean(-1, keepdim=True),
    }[statistic]()


def through(values: Tensor, x: Tensor) -> Tensor:
    """`values`, with the gradient of `x`."""
    return x + (values - x).detach()


def assert_agrees(q: Quantizer, x: Tensor, plain: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """`plain(h, **parameters)` gives the values and codes 0 .. n-1 of `q` and, by autograd, every gradient."""
    g = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(7))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    parameters = {name: p.detach().clone().requires_grad_() for name, p in q.named_parameters()}
    values, codes = plain(rotated(theirs, q.rotation), **parameters)
    values.backward(g)
    quantized = q.quantize(ours)
    quantized.values.backward(g)
    torch.testing.assert_close(quantized.values, values, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-12)
    assert torch.equal(quantized.codes.long() + 2 ** (q.bits - 1), codes.long())
    for name, p in q.named_parameters():
        torch.testing.assert_close(
            p.grad, parameters[name].grad, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_computed_scale_agrees(
    kind: type[Quantizer],
    at: Situation,
    statistic: str,
    plain: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    **options: Any,
) -> None:
    """`plain(h, size)` agrees with the quantizer, in training and, where it runs an average, in evaluation."""
    x = at.draw()
    named = at.options() | ({} if at.group == "row" else {"granularity": at.group})
    q = kind(**named, **options).double()
    q.calibrate(3 * x)
    assert_agrees(q, x, lambda h: plain(h, size(h, statistic, at.group)))
    if at.group == "running":
        batch = size(rotated(x, at.rotation), statistic, at.group)
        assert_agrees(q.eval(), x, lambda h: plain(h, (0.99 * 3 + 0.01) * batch))


def shake(q: Quantizer, seed: int) -> None:
    """Move every parameter away from its start by a factor from 1/2 to 3/2."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in q.parameters():
            p.mul_(0.5 + torch.rand(p.shape, dtype=p.dtype, generator=generator))
