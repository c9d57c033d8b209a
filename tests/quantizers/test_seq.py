"""SEQ (ParetoQ) against its closed-form gradients, its stretched clip, and its 1-bit case."""

import math

import pytest
import torch
from agreement import Situation, assert_agrees, quick, shake, situations
from hypothesis import given
from torch import Tensor

from bitbell.quantizers import SEQ


def plain_seq(h: Tensor, scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Values, plus terms that are zero and have the closed-form derivatives: dL/dx inside, t / sqrt(numel Qp) for a."""
    m = 2 ** (bits - 1)
    u = (h / scale).detach()
    inside = u.abs() <= 0.99
    if bits == 1:
        codes = (u > 0).double()
        level = t = u.sign()
    else:
        codes = (u.clamp(-0.99, 0.99) * m - 0.5).round() + m
        level = (codes - m + 0.5) / m
        outside = level if bits == 8 else u.sign() * (m - 0.5) / m  # at 8 bits 0.99 m does not reach the last level
        t = torch.where(inside, level - u, outside)
    damping = 1 / math.sqrt(h.numel() * max(m - 1, 1))
    learning = inside * (h - h.detach()) + damping * t * (scale - scale.detach())
    return level * scale.detach() + learning, codes


@quick
@given(at=situations(range(1, 9), ("row", "tensor")))
def test_values_codes_and_gradients_are_those_of_the_plain_formula(at: Situation) -> None:
    q = SEQ(**at.options()).double()
    q.calibrate(at.draw())
    shake(q, at.seed)
    assert_agrees(q, at.draw(), lambda h, scale: plain_seq(h, scale, at.bits))


def test_the_range_starts_at_the_largest_magnitude() -> None:
    w = torch.tensor([[1.0, -3.0, 0.0], [0.5, 0.25, 0.5], [0.0, 0.0, 0.0]])
    rows, tensor = SEQ(2, rows=3), SEQ(2)
    rows.calibrate(w)
    tensor.calibrate(w)
    assert rows.scale.flatten().tolist() == pytest.approx([3.0, 0.5, 1e-5])
    assert tensor.scale.tolist() == [3.0]
    sign = SEQ(1, rows=3)  # at 1 bit the range is the value: the mean magnitude
    sign.calibrate(w)
    assert sign.scale.flatten().tolist() == pytest.approx([4 / 3, 1.25 / 3, 1e-5])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_largest_magnitude_itself_is_clipped_and_learns_nothing(bits: int) -> None:
    """The outermost level is half a step inside the range, and the gradient ends at 0.99 of it."""
    m = 2 ** (bits - 1)
    q = SEQ(bits).double()
    q.calibrate(torch.tensor([2.0]).double())
    x = torch.tensor([-2.0, -1.981, -1.979, 1.979, 1.981, 2.0], dtype=torch.float64, requires_grad=True)
    y = q(x)
    top = 2 * (m - 0.5) / m
    assert y.tolist() == pytest.approx([-top] * 3 + [top] * 3, rel=1e-12)
    y.sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 1, 0, 0]


def test_one_bit_is_the_sign_times_the_range() -> None:
    q = SEQ(1).double()
    q.calibrate(torch.tensor([2.0]).double())
    x = torch.tensor([-5.0, -1.99, -1.97, -0.01, 0.01, 1.97, 1.99, 5.0], dtype=torch.float64, requires_grad=True)
    y = q(x)
    assert y.tolist() == [-2, -2, -2, -2, 2, 2, 2, 2]
    y.backward(torch.tensor([1.0, 2, 4, 8, 16, 32, 64, 128], dtype=torch.float64))
    assert x.grad.tolist() == [0, 0, 4, 8, 16, 32, 0, 0]
    assert q.scale.grad.item() == pytest.approx((16 + 32 + 64 + 128 - 1 - 2 - 4 - 8) / math.sqrt(8), rel=1e-12)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_range_driven_below_zero_acts_as_a_tiny_one_and_can_come_back(bits: int) -> None:
    x = torch.randn(10)
    q = SEQ(bits)
    q.calibrate(x)
    with torch.no_grad():
        q.scale.fill_(-1.0)
    y = q(x)
    assert y.abs().max() <= 1.001e-5
    (y - x).square().sum().backward()
    assert q.scale.grad.item() < 0  # descent makes the range wider
