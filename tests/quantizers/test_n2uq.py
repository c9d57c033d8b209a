"""N2UQ: the weights' grid, and the activations' learned thresholds against a sum of ramps and finite differences."""

from itertools import accumulate

import pytest
import torch
from agreement import Situation, assert_agrees, assert_computed_scale_agrees, quick, shake, situations, through
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitbell.quantizers import N2UQ, N2UQActivations

GROUPS = ("row", "token", "tensor", "running")


# Weights ------------------------------------------------------------------------------------------------------------


def plain_weights(h: Tensor, mean: Tensor, bits: int, estimator: str) -> tuple[Tensor, Tensor]:
    top = 2**bits - 1
    s = top / 2 ** (bits - 1) * mean
    codes = ((torch.clamp(h.detach() / s, -1, 1) + 1) * top / 2).round()
    values = s * (codes * 2 / top - 1)
    return through(values, h / s if estimator == "published" else h), codes


@quick
@given(at=situations(range(1, 9), GROUPS), estimator=st.sampled_from(["published", "identity"]))
def test_weights_values_codes_and_gradients_are_those_of_the_plain_formula(at: Situation, estimator: str) -> None:
    def plain(h: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        return plain_weights(h, size, at.bits, estimator)

    assert_computed_scale_agrees(N2UQ, at, "absmean", plain, estimator=estimator)


def test_the_published_gradient_of_a_weight_is_divided_by_its_rows_scale_clipped_or_not() -> None:
    w = torch.tensor([[0.1, -0.1, 0.4, -0.2], [10.0, -10.0, 40.0, -20.0]], requires_grad=True)
    N2UQ(2, rows=2)(w).sum().backward()
    torch.testing.assert_close(w.grad, torch.tensor([[1 / 0.3], [1 / 30]]).expand(2, 4))


# Activations --------------------------------------------------------------------------------------------------------


def plain_activations(
    h: Tensor, scale: Tensor, input_scale: Tensor, start: Tensor, segments: Tensor, *, interval: Tensor
) -> tuple[Tensor, Tensor]:
    """s2 (z + D #{midpoints below s1 x}) with z = -K D / 2; backward each segment is a ramp from 0 to 1."""
    widths = torch.maximum(segments, 1e-3 * interval)
    begins = [start + begun for begun in accumulate(widths, initial=torch.zeros(()))]
    u = input_scale * h
    ramps = sum(torch.clamp((u - begin) / width, 0, 1) for begin, width in zip(begins[:-1], widths, strict=True))
    codes = sum(u.detach() > (begin + width / 2).detach() for begin, width in zip(begins[:-1], widths, strict=True))
    return scale * interval * (through(codes, ramps) - len(widths) / 2), codes


def trained(at: Situation) -> N2UQActivations:
    """Unequal segments, another start, other scales; every third segment below the floor."""
    q = N2UQActivations(**at.options()).double()
    q.calibrate(at.draw())
    shake(q, at.seed)
    with torch.no_grad():
        q.segments[2::3] = torch.tensor([-1.0, 0.0, 1e-4])[at.seed % 3] * q.interval
    return q


@quick
@given(at=situations(range(1, 7), ("tensor",)))
def test_activations_values_codes_and_gradients_are_those_of_the_plain_formula(at: Situation) -> None:
    q = trained(at)
    assert_agrees(q, at.draw(), lambda h, **p: plain_activations(h, **p, interval=q.interval))


def test_eight_bits_agree_as_well() -> None:
    at = Situation(8, "tensor", None, (7, 33), 3)
    q = trained(at)
    assert_agrees(q, at.draw(), lambda h, **p: plain_activations(h, **p, interval=q.interval))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_gradients_are_the_finite_differences_of_the_line_through_the_segments(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    x, g = (torch.randn(200, dtype=torch.float64, generator=generator) for _ in range(2))
    q = N2UQActivations(bits).double()
    q.calibrate(x)
    shake(q, bits)
    q(x).backward(g)

    def surrogate() -> float:
        """The bends of the line are joined by interpolation, without any clamp or ramp."""
        corners = torch.cat([q.start, q.start + q.segments.cumsum(0)])
        u = q.input_scale * x
        k = ((u.unsqueeze(-1) >= corners).sum(-1) - 1).clamp(0, 2**bits - 2)
        line = k + (u - corners[k]) / (corners[k + 1] - corners[k])
        line = torch.where(u < corners[0], 0.0, torch.where(u > corners[-1], 2.0**bits - 1, line))
        return (g * q.scale * q.interval * (line - (2**bits - 1) / 2)).sum().item()

    for name in ("input_scale", "start", "segments"):
        parameter = getattr(q, name)
        for i in range(len(parameter)):
            with torch.no_grad():
                parameter[i] += 1e-7
                above = surrogate()
                parameter[i] -= 2e-7
                below = surrogate()
                parameter[i] += 1e-7
            assert parameter.grad[i].item() == pytest.approx((above - below) / 2e-7, rel=1e-5, abs=1e-5), (name, i)
    assert q.segments.grad.abs().min() > 1e-3


def test_thresholds_lie_in_the_middles_of_the_segments_and_levels_stay_even() -> None:
    q = N2UQActivations(2).double()
    q.calibrate(torch.ones(4, dtype=torch.float64))  # D = 4/3
    with torch.no_grad():
        q.start.fill_(-3.0)
        q.segments.copy_(torch.tensor([4.0, 0.2, 1.0]))  # midpoints at -1, 1.1, 1.7
        q.input_scale.fill_(2.0)
    x = torch.tensor([-9.0, -0.501, -0.499, 0.549, 0.551, 0.849, 0.851, 9.0], dtype=torch.float64)
    assert q.encode(x).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert q(x).tolist() == pytest.approx([-2, -2, -2 / 3, -2 / 3, 2 / 3, 2 / 3, 2, 2], rel=1e-6)


def test_a_segment_below_its_floor_is_a_thousandth_of_a_step_wide_and_learns_no_more() -> None:
    q = N2UQActivations(2).double()
    q.calibrate(torch.full((4,), 0.75, dtype=torch.float64))  # D = 1, start -1.5
    with torch.no_grad():
        q.segments.copy_(torch.tensor([1.0, -5.0, 1.0]))  # midpoints at -1, -0.4995, 0.001
    x = torch.tensor([-1.01, -0.99, -0.4996, -0.4994, 0.0005, 0.0015], dtype=torch.float64, requires_grad=True)
    assert q.encode(x).tolist() == [0, 1, 1, 2, 2, 3]
    q(x).sum().backward()
    assert x.grad.tolist() == pytest.approx([1, 1, 1000, 1000, 1, 1], rel=1e-6)
    assert q.segments.grad[1].item() == 0
    assert q.segments.grad[[0, 2]].abs().min() > 0


def test_the_segments_start_as_an_even_grid_from_minus_two_to_two_rms() -> None:
    x = 3 * torch.tensor([1.0, -1.0, 1.0, -1.0])
    q = N2UQActivations(3)
    q.calibrate(x)
    assert q.segments.tolist() == pytest.approx([12 / 7] * 7)
    assert (q.start.item(), q.scale.item(), q.input_scale.item()) == (-6.0, 1.0, 1.0)
    assert q.interval.item() == pytest.approx(12 / 7)
    assert q(torch.tensor([-100.0, 100.0])).tolist() == pytest.approx([-6.0, 6.0])
