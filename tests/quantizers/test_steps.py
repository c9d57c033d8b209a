"""The steps of formulas, each against arithmetic."""

import math

import pytest
import torch
from agreement import quick, size
from hypothesis import given
from hypothesis import strategies as st

from bitbell.quantizers.steps import (
    at_least,
    look_up,
    mid_rise,
    nearest,
    round_through,
    scale_gradient,
    size_of,
    straight_through,
)


@quick
@given(
    statistic=st.sampled_from(["rms", "absmax", "absmean"]),
    by_row=st.booleans(),
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    seed=st.integers(0, 2**31),
)
def test_sizes_are_those_of_plain_arithmetic_and_constants_to_the_gradient(
    statistic: str, by_row: bool, shape: list[int], seed: int
) -> None:
    h = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    measured = size_of(h, statistic, by_row)
    assert measured.shape == ((*shape[:-1], 1) if by_row else (1,))
    assert not measured.requires_grad
    torch.testing.assert_close(measured, size(h, statistic, "token" if by_row else "tensor"), rtol=1e-14, atol=0)


@pytest.mark.parametrize("statistic", ["rms", "absmax", "absmean"])
def test_sizes_of_nothing_zeros_and_nan(statistic: str) -> None:
    rows = torch.tensor([[0.0, 0.0], [math.nan, 1.0], [-math.inf, 1.0], [3.0, -3.0]])
    measured = size_of(rows, statistic, by_row=True).flatten()
    assert measured[[0, 3]].tolist() == pytest.approx([1e-8, 3.0])
    assert not measured[1:3].isfinite().any()
    assert not size_of(rows, statistic, by_row=False).isfinite().any()
    assert size_of(torch.empty(3, 0), statistic, by_row=True).flatten().tolist() == pytest.approx([1e-8] * 3)
    assert size_of(torch.empty(0, 4), statistic, by_row=False).tolist() == pytest.approx([1e-8])


def test_rounding_is_exact_breaks_ties_to_even_and_passes_the_gradient() -> None:
    x = torch.tensor([-2.5, -0.51, 0.5, 1.5, 2.4999], requires_grad=True)
    g = torch.arange(5.0)
    y = round_through(x)
    y.backward(g)
    assert y.tolist() == [-2, -1, 0, 2, 2]
    assert torch.equal(x.grad, g)


def test_straight_through_gives_the_values_and_hands_the_gradient_on_where_the_mask_holds() -> None:
    x, values, g = torch.zeros(3, requires_grad=True), torch.tensor([1.0, 1e20, -3.0]), torch.tensor([4.0, 5.0, 6.0])
    for mask, expected in ((None, [4, 5, 6]), (torch.tensor([True, False, True]), [4, 0, 6])):
        x.grad = None
        y = straight_through(values, x, mask)
        y.backward(g)
        assert torch.equal(y, values)  # exactly, also where x + (values - x) would round
        assert x.grad.tolist() == expected


def test_a_scaled_gradient_leaves_the_value_alone() -> None:
    x = torch.tensor([1.1, -2.3], requires_grad=True)
    y = scale_gradient(x, 0.25)
    y.backward(torch.tensor([4.0, 8.0]))
    assert torch.equal(y, x)
    assert x.grad.tolist() == [1, 2]


def test_a_scale_below_its_floor_stays_at_it_and_keeps_learning() -> None:
    scale = torch.tensor([-1.0, 0.0, 0.5, 2.0], requires_grad=True)
    y = at_least(scale, 0.5)
    y.backward(torch.tensor([1.0, 2, 3, 4]))
    assert y.tolist() == [0.5, 0.5, 0.5, 2.0]
    assert scale.grad.tolist() == [1, 2, 3, 4]


@quick
@given(bits=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_mid_rise_finds_the_nearest_half_integer_level(bits: int, seed: int) -> None:
    half = 2 ** (bits - 1)
    ratio = half * torch.randn(60, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    levels = torch.arange(-half, half) + 0.5
    expected = (ratio.unsqueeze(-1) - levels).abs().argmin(-1) - half
    assert torch.equal(mid_rise(ratio, bits).long(), expected)


@quick
@given(count=st.integers(2, 20), seed=st.integers(0, 2**31))
def test_nearest_finds_the_nearest_level_of_any_table(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randn(count, dtype=torch.float64, generator=generator).sort().values
    ratio = 2 * torch.randn(4, 15, dtype=torch.float64, generator=generator)
    expected = (ratio.unsqueeze(-1) - levels).abs().argmin(-1)
    assert torch.equal(nearest(ratio, levels)[0], expected)
    assert torch.equal(nearest(ratio.T, levels)[0], expected.T)  # of a tensor that is not contiguous


@pytest.mark.parametrize("count", [2, 5, 16, 40])
def test_look_up_is_the_same_compiled(count: int) -> None:
    """Comparisons instead of a search, and above sixteen entries the search."""
    torch._dynamo.reset()
    edges = torch.randn(count - 1, dtype=torch.float64).sort().values
    x = torch.cat([3 * torch.randn(200, dtype=torch.float64), edges])  # an edge belongs to the segment below it
    given = torch.randn(len(x), dtype=torch.float64)
    results = []
    for function in (look_up, torch.compile(look_up, fullgraph=True, backend="aot_eager")):
        table = torch.arange(count, dtype=torch.float64).sin().requires_grad_()
        index, entry = function(x, edges, table)
        entry.backward(given)
        results.append((index.long(), entry.detach(), table.grad))
    assert torch.equal(results[0][0], (x.unsqueeze(-1) > edges).sum(-1))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_nearest_takes_the_lower_level_on_a_tie() -> None:
    assert nearest(torch.tensor([-0.5, 0.5, 2.0]), torch.tensor([-1.0, 0.0, 1.0, 3.0]))[0].tolist() == [0, 1, 2]
