"""Ternary (TriLM, BitNet b1.58), against its formula and the integrals of a Gaussian."""

import math
from statistics import NormalDist

import pytest
import torch
from agreement import Situation, assert_computed_scale_agrees, quick, situations, through
from hypothesis import given
from torch import Tensor

from bitbell.quantizers import Ternary

GROUPS = ("row", "token", "tensor", "running")


def plain_ternary(h: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The sign where the magnitude exceeds half the mean magnitude."""
    level = h.detach().sign() * (h.detach().abs() > size / 2)
    return through(level * size, h), level + 2


@quick
@given(at=situations(range(2, 3), GROUPS))
def test_values_codes_and_gradients_are_those_of_the_plain_formula(at: Situation) -> None:
    assert_computed_scale_agrees(Ternary, at, "absmean", plain_ternary)


def test_a_gaussian_gives_what_its_integrals_say() -> None:
    """s = sqrt(2/pi), cut at s/2: shares, entropy, error before and after the best rescale, cosine."""
    gauss, s = NormalDist(), math.sqrt(2 / math.pi)
    outer = 1 - gauss.cdf(s / 2)
    shares = [outer, 1 - 2 * outer, outer]
    cross, square = 2 * s * gauss.pdf(s / 2), 2 * s**2 * outer
    entropy = -sum(p * math.log2(p) for p in shares)
    error, cosine = 1 - 2 * cross + square, cross / math.sqrt(square)
    assert [entropy, error, 1 - cosine**2, cosine] == pytest.approx([1.583183, 0.263382, 0.213042, 0.887106], abs=1e-6)

    x = torch.special.ndtri((torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000)
    q = Ternary(granularity="tensor")
    y = q(x)
    assert (torch.bincount(q.encode(x).long(), minlength=4) / len(x)).tolist() == pytest.approx([0, *shares], abs=2e-5)
    assert q.entropy(x) == pytest.approx(entropy, abs=2e-5)
    assert (y - x).square().mean().item() == pytest.approx(error, abs=2e-5)
    assert (x @ y / (x.norm() * y.norm())).item() == pytest.approx(cosine, abs=1e-5)


def test_the_fourth_code_of_two_bits_is_never_used_and_zero_is_a_level() -> None:
    q = Ternary()
    assert q.levels.tolist() == [-2, -1, 0, 1]
    x = torch.tensor([[-50.0, -0.1, 0.0, 0.1, 50.0], [0.0] * 5])
    assert q.encode(x).tolist() == [[1, 2, 2, 2, 3], [2] * 5]
    assert q(x)[0].tolist() == pytest.approx([-20.04, 0, 0, 0, 20.04], rel=1e-6)
    assert q(x)[1].tolist() == [0.0] * 5


def test_the_scale_is_the_mean_magnitude_of_a_row_or_of_the_tensor() -> None:
    w = torch.tensor([[1.0, -3.0], [0.5, 0.5]])
    rows, tensor = Ternary(rows=2), Ternary(granularity="tensor")
    assert rows.quantize(w).step.tolist() == [[2.0], [0.5]]
    assert tensor.quantize(w).step.tolist() == [1.25]
    rows.calibrate(w)
    tensor.calibrate(w)
    assert (rows.step().tolist(), tensor.step().tolist()) == ([[2.0], [0.5]], [1.25])


@pytest.mark.parametrize("bits", [1, 3])
def test_ternary_is_stored_in_two_bits(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"bits must be 2 bits for ternary, got bits={bits}"):
        Ternary(bits)
