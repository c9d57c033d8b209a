"""LSQ+: step and offset against autograd of the plain formula, where both start, and what teaches the offset."""

import math

import pytest
import torch
from agreement import Situation, assert_agrees, quick, shake, situations, through
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitbell.quantizers import LSQPlus

GAUSSIAN_CLIP = [0.7978846, 1.4935346, 2.0510684, 2.5139306, 2.9160939, 3.2765973, 3.6010497, 3.8849387]


def plain_lsq_plus(h: Tensor, scale: Tensor, offset: Tensor | None = None, *, bits: int) -> tuple[Tensor, Tensor]:
    """s (round(clip((x - b)/s - 1/2, -Qn, Qp)) + 1/2) + b, both gradients damped by 1 / sqrt(numel Qp)."""
    bottom, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    damping = 1 / math.sqrt(h.numel() * max(top, 1))
    s = through(scale, scale * damping)
    b = 0.0 if offset is None else through(offset, offset * damping)
    place = torch.clamp((h - b) / s - 0.5, bottom, top)
    place = through(place.round(), place)
    return s * (place + 0.5) + b, place.detach() - bottom


@quick
@given(at=situations(range(1, 9), ("row", "tensor")), asymmetric=st.booleans())
def test_values_codes_and_gradients_are_those_of_the_plain_formula(at: Situation, asymmetric: bool) -> None:
    q = LSQPlus(**at.options(), asymmetric=asymmetric).double()
    q.calibrate(at.draw())
    shake(q, at.seed)
    assert_agrees(q, at.draw(), lambda h, **p: plain_lsq_plus(h, **p, bits=at.bits))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("by_row", [False, True])
def test_step_and_offset_start_at_the_gaussian_optimum_and_the_mean(bits: int, by_row: bool) -> None:
    x = torch.randn(5, 80, dtype=torch.float64) * torch.arange(1, 6)[:, None] - 2
    groups = x if by_row else x.reshape(1, -1)
    q = LSQPlus(bits, rows=5 if by_row else None, asymmetric=True).double()
    q.calibrate(x)
    mean, deviation = groups.mean(1), groups.std(1, correction=0)
    torch.testing.assert_close(q.offset.detach().flatten(), mean, rtol=1e-10, atol=0)
    step = 2 * GAUSSIAN_CLIP[bits - 1] / (2**bits - 1) * deviation
    torch.testing.assert_close(q.scale.detach().flatten(), step, rtol=1e-6, atol=0)


def test_without_an_offset_the_step_starts_from_the_mean_square() -> None:
    x = torch.randn(100, dtype=torch.float64) + 3
    q = LSQPlus(2).double()
    q.calibrate(x)
    assert q.offset is None
    assert q.scale.item() == pytest.approx(2 * GAUSSIAN_CLIP[1] / 3 * x.square().mean().sqrt().item(), rel=1e-6)


def test_values_off_centre_are_quantized_as_if_they_were_centred() -> None:
    x = torch.randn(500, dtype=torch.float64)
    centred, moved = LSQPlus(3, asymmetric=True).double(), LSQPlus(3, asymmetric=True).double()
    centred.calibrate(x)
    moved.calibrate(x + 1000)
    torch.testing.assert_close(moved(x + 1000), centred(x) + 1000, rtol=1e-12, atol=0)
    assert torch.equal(moved.encode(x + 1000), centred.encode(x))


def test_only_clipped_values_teach_the_offset() -> None:
    q = LSQPlus(2, asymmetric=True).double()
    q.calibrate(torch.ones(2, dtype=torch.float64))
    with torch.no_grad():
        q.scale.fill_(1.0)
        q.offset.fill_(10.0)
    x = torch.tensor([7.0, 8.1, 8.6, 10.0, 11.4, 11.6, 99.0], dtype=torch.float64, requires_grad=True)
    y = q(x)
    assert y.tolist() == [8.5, 8.5, 8.5, 10.5, 11.5, 11.5, 11.5]
    y.backward(torch.tensor([1.0, 2, 4, 8, 16, 32, 64], dtype=torch.float64))
    assert x.grad.tolist() == [0, 0, 4, 8, 16, 0, 0]
    assert q.offset.grad.item() == pytest.approx((1 + 2 + 32 + 64) / math.sqrt(7), rel=1e-12)


def test_a_step_driven_below_zero_acts_as_a_tiny_one_and_can_come_back() -> None:
    x = torch.randn(10)
    q = LSQPlus(2, asymmetric=True)
    q.calibrate(x)
    with torch.no_grad():
        q.scale.fill_(-1.0)
    y = q(x)
    assert (y - q.offset).abs().max() < 1e-6
    (y - x).square().sum().backward()
    assert q.scale.grad.item() < 0  # descent makes the step larger
