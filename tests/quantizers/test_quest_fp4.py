"""QuEST on the FP4 grid: the levels in units of a Gaussian, the nearest of them, and the trust mask."""

import pytest
import torch
from agreement import Situation, assert_computed_scale_agrees, quick, situations
from hypothesis import given
from torch import Tensor

from bitbell.quantizers import QuESTFP4

GROUPS = ("row", "token", "tensor", "running")
# In units of the RMS; the published table of the 8 magnitudes, 0.4870795 times those of E2M1.
MAGNITUDES = [0.0, 0.24353988, 0.48707976, 0.73061964, 0.97415952, 1.46123928, 1.94831904, 2.92247856]


def plain_fp4(h: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest magnitude with the sign of h; the gradient passes where the error is at most half the last gap."""
    step = 0.4870795
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64) * step
    v = h.detach() / size
    index = (v.abs().unsqueeze(-1) - magnitudes).abs().argmin(-1)
    nearest = magnitudes[index] * v.sign()
    trusted = (v - nearest).abs() <= step * (6 - 4) / 2
    passing = torch.where(trusted, h, h.detach())
    return passing + (nearest * size - passing).detach(), torch.where(v > 0, 8 + index, 7 - index)


@quick
@given(at=situations(range(4, 5), GROUPS))
def test_values_codes_and_gradients_are_those_of_the_plain_formula(at: Situation) -> None:
    assert_computed_scale_agrees(QuESTFP4, at, "rms", plain_fp4)


def test_the_levels_are_the_published_ones() -> None:
    q = QuESTFP4(granularity="tensor", rotation=None)
    q.calibrate(torch.ones(3, 7))
    assert (q.levels * q.step()).tolist() == pytest.approx([-m for m in MAGNITUDES[::-1]] + MAGNITUDES, abs=3e-6)


@pytest.mark.parametrize("factor", [0.97, 0.99, 1.01, 1.03])
def test_no_other_scale_has_a_lower_error_on_a_gaussian(factor: float) -> None:
    x = torch.special.ndtri((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)
    levels = QuESTFP4().levels.double().unique() * 0.4870795

    def error(levels: Tensor) -> float:
        return (x.unsqueeze(-1) - levels).abs().amin(-1).square().mean().item()

    assert error(levels) == pytest.approx(0.012685, abs=2e-5)
    assert error(levels * factor) > error(levels)


def test_every_product_of_two_levels_is_a_multiple_of_a_quarter() -> None:
    levels = QuESTFP4().levels
    products = (levels.unsqueeze(0) * levels.unsqueeze(1) * 4).flatten()
    assert torch.equal(products, products.round())


def test_trust_ends_half_a_gap_beyond_the_outermost_level() -> None:
    q = QuESTFP4(granularity="running", rotation=None)
    q.calibrate(torch.full((1, 4), 1 / 0.4870795))
    x = torch.tensor([[-60.0, -7.01, -6.99, -5.0, 0.0, 3.4, 6.99, 7.01, 60.0]], requires_grad=True)
    y = q.eval()(x)
    assert y[0].tolist() == pytest.approx([-6, -6, -6, -6, 0, 3, 6, 6, 6], rel=1e-6)
    y.sum().backward()
    assert x.grad.tolist() == [[0, 0, 1, 1, 1, 1, 1, 0, 0]]


def test_fp4_has_four_bits() -> None:
    with pytest.raises(ValueError, match=r"bits must be 4 bits for quest-fp4, got bits=3"):
        QuESTFP4(3)
