"""NormalFloat: its tables against the published ones, and the look-up against a search through all levels."""

import pytest
import torch
from agreement import Situation, assert_computed_scale_agrees, quick, situations, through
from hypothesis import given
from torch import Tensor

from bitbell.quantizers import NormalFloat

GROUPS = ("row", "token", "tensor", "running")
TABLES = {
    2: [-1, 0, 0.435818, 1],
    3: [-1, -0.535023, -0.246931, 0, 0.183337, 0.381994, 0.622986, 1],
    4: [
        *(-1, -0.696193, -0.525073, -0.394917, -0.284441, -0.184773, -0.091050, 0),
        *(0.079580, 0.160930, 0.246112, 0.337915, 0.440710, 0.562617, 0.722957, 1),
    ],
}


def levels_of(bits: int) -> Tensor:
    """Quantiles of a Gaussian at even shares, the median among them, over the largest."""
    half = 2 ** (bits - 1)
    d = (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    below = torch.linspace(d, 0.5, half, dtype=torch.float64)
    above = torch.linspace(0.5, 1 - d, half + 1, dtype=torch.float64)[1:]
    quantiles = torch.special.ndtri(torch.cat([below, above]))
    return quantiles / quantiles.abs().max()


def plain_normal_float(h: Tensor, size: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    levels = levels_of(bits)
    codes = (h.detach() / size).unsqueeze(-1).sub(levels).abs().argmin(-1)
    return through(levels[codes] * size, h), codes


@quick
@given(at=situations(range(2, 5), GROUPS))
def test_values_codes_and_gradients_are_those_of_the_plain_formula(at: Situation) -> None:
    assert_computed_scale_agrees(NormalFloat, at, "absmax", lambda h, size: plain_normal_float(h, size, at.bits))


@pytest.mark.parametrize("bits", TABLES)
def test_the_tables_are_the_published_ones(bits: int) -> None:
    assert NormalFloat(bits).levels.tolist() == pytest.approx(TABLES[bits], abs=1e-6)
    assert NormalFloat(bits).levels.tolist() == pytest.approx(levels_of(bits).tolist(), abs=1e-7)


def test_zero_and_the_largest_magnitude_are_exact_and_a_tie_goes_down() -> None:
    q = NormalFloat(2)
    x = torch.tensor([[-2.0, 0.0, 1.0], [3.0, -1.5, 0.0], [-1.0, -0.5, -0.49]])
    assert q.encode(x).tolist() == [[0, 1, 2], [3, 0, 1], [0, 0, 1]]
    y = q(x)
    assert (y[0, 0], y[0, 1], y[1, 0], y[1, 2]) == (-2.0, 0.0, 3.0, 0.0)


def test_an_outlier_gets_the_gradient_of_every_other_value() -> None:
    x = torch.tensor([[1e6, -1.0, 0.0, 1e-6]], requires_grad=True)
    g = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    NormalFloat(4, rows=1)(x).backward(g)
    assert torch.equal(x.grad, g)


@pytest.mark.parametrize("bits", [1, 5])
def test_there_is_no_normal_float_of_other_widths(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"bits must be an integer from 2 to 4 bits for nf, got bits={bits}"):
        NormalFloat(bits)
