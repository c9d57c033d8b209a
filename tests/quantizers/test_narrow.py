"""Narrow: its two steps by a search and by integrals, and the formula with them."""

import math
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch
from agreement import Situation, assert_computed_scale_agrees, quick, situations
from hypothesis import given
from torch import Tensor

from bitbell.quantizers import Narrow
from bitbell.quantizers.narrow import WIDEST_ENTROPY_STEP

GROUPS = ("row", "token", "tensor", "running")
gauss = NormalDist()


def shares(step: float, bits: int) -> list[float]:
    """Probability of each cell of a standard normal that is cut at every whole step within the outermost codes."""
    half = 2 ** (bits - 1)
    below = [0.0, *(gauss.cdf(k * step) for k in range(1 - half, half)), 1.0]
    return [b - a for a, b in pairwise(below)]


def entropy(step: float, bits: int) -> float:
    return -sum(p * math.log2(p) for p in shares(step, bits))


def output_step(step: float, bits: int) -> float:
    """Least squares of x on the half-integer of its code, with the integral of x phi(x) over a cell: phi - phi."""
    half = 2 ** (bits - 1)
    density = [0.0, *(gauss.pdf(k * step) for k in range(1 - half, half)), 0.0]
    levels = [k + 0.5 for k in range(-half, half)]
    cross = sum(level * (density[i] - density[i + 1]) for i, level in enumerate(levels))
    return cross / sum(level**2 * p for level, p in zip(levels, shares(step, bits), strict=True))


def plain_narrow(h: Tensor, size: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    half, step = 2 ** (bits - 1), WIDEST_ENTROPY_STEP[bits]
    place = (h.detach() / (step * size)).floor().clamp(-half, half - 1)
    inside = h.detach().abs() <= half * step * size
    passing = torch.where(inside, h, h.detach())
    return passing + ((place + 0.5) * output_step(step, bits) * size - passing).detach(), place + half


@quick
@given(at=situations(range(1, 5), GROUPS))
def test_values_codes_and_gradients_are_those_of_the_plain_formula(at: Situation) -> None:
    assert_computed_scale_agrees(Narrow, at, "rms", lambda h, size: plain_narrow(h, size, at.bits))


@pytest.mark.parametrize(("bits", "step"), [(2, 0.67449), (3, 0.36949), (4, 0.19994)])
def test_no_step_has_a_greater_entropy(bits: int, step: float) -> None:
    assert WIDEST_ENTROPY_STEP[bits] == pytest.approx(step, abs=6e-6)
    best = entropy(WIDEST_ENTROPY_STEP[bits], bits)
    for other in (0.5, 0.9, 0.99, 0.999, 1.001, 1.01, 1.1, 2.0):
        assert entropy(other * WIDEST_ENTROPY_STEP[bits], bits) < best


def test_two_bits_cut_at_the_quartiles_as_bbq_does() -> None:
    assert WIDEST_ENTROPY_STEP[2] == pytest.approx(gauss.inv_cdf(0.75), abs=1e-7)


@pytest.mark.parametrize(("bits", "step"), [(1, 1.595769), (2, 0.827596), (3, 0.42645), (4, 0.221518)])
def test_the_levels_have_the_step_of_least_error(bits: int, step: float) -> None:
    x = torch.special.ndtri((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)
    q = Narrow(bits, granularity="tensor", rotation=None).double()
    assert float(q.quantize(x).step) == pytest.approx(step, abs=2e-4)
    y = q(x)
    assert (x @ y / (y @ y)).item() == pytest.approx(1, abs=2e-4)


def test_nothing_passes_beyond_the_outermost_cell() -> None:
    edge = 4 * WIDEST_ENTROPY_STEP[3]
    x = torch.tensor([[-9.0, -1.001, -0.999, 0.0, 0.999, 1.001, 9.0]]) * edge
    q = Narrow(3, granularity="running", rotation=None)
    q.calibrate(torch.ones(1, 4))
    x.requires_grad_()
    q.eval()(x).sum().backward()
    assert x.grad.tolist() == [[0, 0, 1, 1, 1, 0, 0]]
