"""PACT as its paper has it: the input learns inside the clip, the clip from what it cuts off."""

import math

import pytest
import torch
from agreement import Situation, assert_agrees, quick, shake, situations, through
from hypothesis import given
from torch import Tensor

from bitbell.quantizers import PACT


def plain_pact(h: Tensor, scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The nearest of 2**bits even levels in [-a, a], straight through to (|h + a| - |h - a|) / 2: the clip, as PACT
    writes it."""
    clipped = ((h + scale).abs() - (h - scale).abs()) / 2
    step = 2 * scale.detach() / (2**bits - 1)
    codes = ((h.detach() + scale.detach()) / step).round().clamp(0, 2**bits - 1)
    return through(codes * step - scale.detach(), clipped), codes


@quick
@given(at=situations(range(1, 9), ("row", "tensor")))
def test_values_codes_and_gradients_are_those_of_the_plain_formula(at: Situation) -> None:
    q = PACT(**at.options()).double()
    q.calibrate(at.draw())
    shake(q, at.seed)
    with torch.no_grad():
        q.scale.mul_(0.6)  # so that something is clipped at every width
    assert_agrees(q, at.draw(), lambda h, scale: plain_pact(h, scale, at.bits))


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_outermost_level_starts_where_lsqs_does(bits: int) -> None:
    w = torch.randn(6, 100, dtype=torch.float64) * torch.arange(1, 7)[:, None]
    levels_to_top, root = (2**bits - 1) / 2, math.sqrt(max(2 ** (bits - 1) - 1, 1))
    tensor, rows = PACT(bits).double(), PACT(bits, rows=6).double()
    tensor.calibrate(w)
    rows.calibrate(w)
    assert tensor.scale.item() == pytest.approx(levels_to_top * 2 * w.abs().mean().item() / root, rel=1e-12)
    start = levels_to_top * 2 * w.abs().mean(1, keepdim=True) / root
    torch.testing.assert_close(rows.scale.detach(), start, rtol=1e-12, atol=0)


def clip_at_three() -> PACT:
    q = PACT(2).double()
    q.calibrate(torch.ones(2, dtype=torch.float64))
    with torch.no_grad():
        q.scale.fill_(3.0)
    return q


def test_inside_the_clip_the_input_learns_and_beyond_it_the_clip() -> None:
    q = clip_at_three()
    x = torch.tensor([-9.0, -3.1, -3.0, -2.9, 0.1, 2.9, 3.0, 3.1, 9.0], dtype=torch.float64, requires_grad=True)
    y = q(x)
    assert y.tolist() == [-3, -3, -3, -3, 1, 3, 3, 3, 3]
    y.backward(torch.tensor([1.0, 2, 4, 8, 16, 32, 64, 128, 256], dtype=torch.float64))
    assert x.grad.tolist() == [0, 0, 4, 8, 16, 32, 64, 0, 0]  # the clip itself is inside
    assert q.scale.grad.tolist() == [128 + 256 - 1 - 2]


def test_values_inside_the_clip_teach_it_nothing() -> None:
    q = clip_at_three()
    x = torch.linspace(-2.99, 2.99, 50, dtype=torch.float64, requires_grad=True)
    q(x).sum().backward()
    assert q.scale.grad.tolist() == [0.0]
    assert torch.equal(x.grad, torch.ones(50, dtype=torch.float64))


def test_a_clip_driven_below_zero_acts_as_a_tiny_one_and_can_come_back() -> None:
    x = torch.randn(10)
    q = PACT(2)
    q.calibrate(x)
    with torch.no_grad():
        q.scale.fill_(-1.0)
    y = q(x)
    assert y.abs().max() < 1e-7
    (y - x).square().sum().backward()
    assert q.scale.grad.item() < 0  # descent makes the clip wider
