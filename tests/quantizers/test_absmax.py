"""Absmax with the plain straight-through estimator, against its formula and at its extremes."""

import pytest
import torch
from agreement import Situation, assert_computed_scale_agrees, quick, situations, through
from hypothesis import given
from torch import Tensor

from bitbell.quantizers import AbsMax

GROUPS = ("row", "token", "tensor", "running")


def plain_absmax(h: Tensor, size: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """2**bits even levels from -max|h| to max|h|; the nearest one, by looking at all of them."""
    levels = torch.linspace(-1, 1, 2**bits, dtype=torch.float64) * size.unsqueeze(-1)
    codes = (h.detach().unsqueeze(-1) - levels).abs().argmin(-1)
    return through(levels.expand(*h.shape, -1).gather(-1, codes.unsqueeze(-1)).squeeze(-1), h), codes


@quick
@given(at=situations(range(1, 9), GROUPS))
def test_values_codes_and_gradients_are_those_of_the_plain_formula(at: Situation) -> None:
    assert_computed_scale_agrees(AbsMax, at, "absmax", lambda h, size: plain_absmax(h, size, at.bits))


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_largest_magnitude_is_kept_and_no_error_exceeds_half_a_step(bits: int) -> None:
    x = torch.randn(50, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(bits))
    y = AbsMax(bits, rows=50)(x)
    largest = x.abs().max(1, keepdim=True)
    torch.testing.assert_close(y.gather(1, largest.indices), x.gather(1, largest.indices), rtol=1e-14, atol=0)
    assert ((y - x).abs() <= (1 + 1e-12) * largest.values / (2**bits - 1)).all()


def test_one_outlier_leaves_two_codes_to_all_the_others_that_share_its_scale() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    x[1, 3] = 100.0
    assert AbsMax(3, granularity="tensor").encode(x).unique().tolist() == [3, 4, 7]
    by_token = AbsMax(3, granularity="token").encode(x)
    assert by_token[1].unique().tolist() == [3, 4, 7]
    assert all(by_token[row].unique().numel() > 5 for row in (0, 2, 3))


def test_the_gradient_passes_unchanged_even_to_the_outlier() -> None:
    x = torch.tensor([[1e6, -1.0, 0.0, 1e-6]], requires_grad=True)
    g = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    AbsMax(2, rows=1)(x).backward(g)
    assert torch.equal(x.grad, g)
