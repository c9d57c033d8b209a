"""The operators of a training step: C++ at every level against the definitions, integers exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitbell.kernels import native
from bitbell.kernels.thresholds import bell_codes, bell_thresholds, bin_means, bin_thresholds
from bitbell.kernels.training import bell_gradient, bell_quantize, integer_linear

LEVELS = [name for name, why in native.level_names().items() if not why]
quick = settings(derandomize=True, max_examples=25, deadline=None)
needs_kernels = pytest.mark.skipif(native.extension is None, reason="installed without the C++ extension")
sizes = st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 100, 128, 130])
seeds = st.integers(0, 2**31)
types = st.sampled_from([torch.float32, torch.bfloat16])
SMALLEST = 1e-8


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    native.set_threads(1)
    yield
    native.set_threads(None)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes_of(seed: int, bits: int, *shape: int) -> Tensor:
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def equal_at_all_levels(compute: object) -> tuple[Tensor, ...]:
    """What every level computes, and three threads; fails where one of them differs in a bit."""
    found = []
    for name in LEVELS:
        with native.using(name):
            found.append(compute())  # type: ignore[operator]
    native.set_threads(3)
    found.append(compute())  # type: ignore[operator]
    native.set_threads(1)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            if a.is_floating_point():
                assert torch.equal(a.isnan(), b.isnan())
                a, b = a.nan_to_num(nan=0.0), b.nan_to_num(nan=0.0)
            assert torch.equal(a, b)
    return found[0]


# Products ----------------------------------------------------------------------------------------------------


@needs_kernels
@quick
@given(
    bits=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    zeros=st.tuples(st.sampled_from([0.0, -0.5, 0.5, -0.25, 0.375]), st.sampled_from([0.0, -0.5, -0.25])),
    shape=st.tuples(sizes, sizes, sizes),
    by_row=st.tuples(st.booleans(), st.booleans()),
    dtype=types,
    seed=seeds,
)
def test_outputs_are_the_exact_sums_times_the_steps(
    bits: tuple[int, int],
    zeros: tuple[float, float],
    shape: tuple[int, int, int],
    by_row: tuple[bool, bool],
    dtype: torch.dtype,
    seed: int,
) -> None:
    rows, columns, outputs = shape
    x, w = codes_of(seed, bits[0], rows, columns), codes_of(seed + 1, bits[1], outputs, columns)
    x_step = randn(seed, rows if by_row[0] else 1, 1).abs() + 0.1
    w_step = randn(seed + 1, outputs if by_row[1] else 1, 1).abs() + 0.1
    (got,) = equal_at_all_levels(lambda: (integer_linear(x, w, x_step, w_step, *zeros, dtype, *bits),))
    exact = (x.double() - zeros[0]) @ (w.double() - zeros[1]).T
    assert torch.equal(got, ((exact.float() * w_step.reshape(-1)) * x_step).to(dtype))


def test_many_rows_and_the_largest_sums_are_exact() -> None:
    x, w = torch.full((700, 9000), -128, dtype=torch.int8), torch.full((3, 9000), -128, dtype=torch.int8)
    x[::2, ::3] = 127
    y = integer_linear(x, w, torch.ones(700, 1), torch.ones(1), -0.5, -0.5, torch.float32)
    assert torch.equal(y, ((x.double() + 0.5) @ (w.double() + 0.5).T).float())


@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16), (2, 3, 0, 16)])
def test_products_of_nothing_have_their_shape(shape: tuple[int, ...]) -> None:
    x, w = torch.zeros(shape, dtype=torch.int8), torch.ones(4, 16, dtype=torch.int8)
    assert integer_linear(x, w, torch.ones(1), torch.ones(4, 1), 0, 0, torch.float32).shape == (*shape[:-1], 4)


def test_a_nan_step_is_a_nan_output() -> None:
    x, w = codes_of(0, 2, 3, 16), codes_of(1, 2, 4, 16)
    for dtype in (torch.float32, torch.bfloat16):
        y = integer_linear(x, w, torch.tensor([[1.0], [torch.nan], [1.0]]), torch.ones(4, 1), -0.5, -0.5, dtype)
        assert y.isnan().tolist() == [[row == 1] * 4 for row in range(3)]


def test_float64_steps_give_float64_outputs() -> None:
    x, w, step = codes_of(0, 4, 3, 16), codes_of(1, 4, 4, 16), torch.tensor([0.1], dtype=torch.float64)
    y = integer_linear(x, w, step, step, -0.5, -0.5, torch.float64)
    torch.testing.assert_close(y, (x + 0.5).double() @ (w + 0.5).double().T * 0.01, rtol=1e-15, atol=0)


# Quantizing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse_rms", [1.0, 0.37, 41.5])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_bell_thresholds_are_the_quantiles_where_codes_change(bits: int, inverse_rms: float) -> None:
    n, found = 2**bits, bell_thresholds(bits, inverse_rms)
    quantiles = [math.sqrt(2) * float(torch.tensor(2 * k / n - 1).double().erfinv()) for k in range(1, n)]
    torch.testing.assert_close(found * inverse_rms, torch.tensor(quantiles), rtol=1e-4, atol=1e-6)
    below = torch.nextafter(found, torch.tensor(-torch.inf))
    wanted = torch.arange(1, n) - n // 2
    assert torch.equal(bell_codes(found, torch.tensor([inverse_rms]), bits).int(), wanted.int())
    assert torch.equal(bell_codes(below, torch.tensor([inverse_rms]), bits).int(), wanted.int() - 1)


@needs_kernels
@quick
@given(
    bits=st.integers(1, 8),
    rotation=st.sampled_from([1, 16, 128]),
    group=st.sampled_from(["row", "tensor", "frozen"]),
    keep=st.sampled_from([None, torch.float32, torch.bfloat16]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3)),
    dtype=types,
    seed=seeds,
)
def test_codes_and_rms_are_those_of_the_definition(
    bits: int,
    rotation: int,
    group: str,
    keep: torch.dtype | None,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    seed: int,
) -> None:
    columns = shape[2] * rotation if rotation > 1 else 30 * shape[2] + 1
    x = (3 * randn(seed, *shape[:2], columns)).to(dtype)
    frozen = torch.tensor([0.4]) if group == "frozen" else None
    arguments = x, bits, rotation, "tensor" if group == "frozen" else group, frozen, SMALLEST, keep
    codes, inverse_rms, kept = equal_at_all_levels(lambda: bell_quantize(*arguments))
    wanted, wanted_inverse, wanted_kept = bell_quantize._init_fn(*arguments)
    torch.testing.assert_close(inverse_rms, wanted_inverse, rtol=1e-5, atol=0)
    torch.testing.assert_close(kept, wanted_kept, rtol=0.01 if keep == torch.bfloat16 else 1e-4, atol=1e-4)
    # A number within float rounding of a threshold may get the next code.
    turned = codes != wanted
    assert int(turned.sum()) <= 1 + 1e-3 * 2**bits / 16 * codes.numel()
    assert int((codes.int() - wanted.int()).abs().max()) <= 1


def test_a_frozen_rms_gives_the_very_codes_of_the_formula() -> None:
    inverse = torch.tensor([0.7318])
    x = torch.cat([(t := bell_thresholds(4, float(inverse))), torch.nextafter(t, torch.tensor(-9.0)), randn(0, 98)])
    codes, _, _ = bell_quantize(x.view(1, -1), 4, 1, "tensor", inverse, SMALLEST, None)
    assert torch.equal(codes[0].float(), bell_codes(x, inverse, 4))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("group", ["row", "tensor", "frozen"])
def test_nan_and_infinity_show_in_the_rms(group: str, bad: float) -> None:
    x = randn(0, 3, 128)
    x[1, 5] = bad
    frozen = torch.ones(1) if group == "frozen" else None
    for definition in (False, True):
        op = bell_quantize._init_fn if definition else bell_quantize
        codes, inverse_rms, _ = op(x, 2, 128, "row" if group == "row" else "tensor", frozen, SMALLEST, None)
        finite = torch.isfinite(0 / inverse_rms).flatten().tolist()
        assert finite == ([True, False, True] if group == "row" else [False])
        assert codes.dtype == torch.int8


@pytest.mark.parametrize("shape", [(0, 128), (2, 0, 128)])
def test_nothing_is_quantized_to_nothing(shape: tuple[int, ...]) -> None:
    for group in ("row", "tensor"):
        codes, inverse_rms, kept = bell_quantize(torch.zeros(shape), 2, 128, group, None, SMALLEST, torch.bfloat16)
        assert codes.shape == kept.shape == shape
        assert inverse_rms.shape == ((*shape[:-1], 1) if group == "row" else (1,))


def test_zeros_have_the_smallest_rms() -> None:
    for group in ("row", "tensor"):
        _, inverse_rms, _ = bell_quantize(torch.zeros(2, 128), 2, 128, group, None, SMALLEST, None)
        torch.testing.assert_close(inverse_rms, torch.full_like(inverse_rms, 1e8))


# The gradient ------------------------------------------------------------------------------------------------


@needs_kernels
@quick
@given(
    rotation=st.sampled_from([1, 16, 128]),
    radial=st.sampled_from(["row", "tensor", "none"]),
    by_row=st.booleans(),
    is_rotated=st.booleans(),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3)),
    dtypes=st.tuples(types, types, types),
    zero_point=st.sampled_from([-0.5, 0.0, 0.3]),
    seed=seeds,
)
def test_the_gradient_is_that_of_the_definition_in_float64(
    rotation: int,
    radial: str,
    by_row: bool,
    is_rotated: bool,
    shape: tuple[int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    zero_point: float,
    seed: int,
) -> None:
    columns = shape[2] * rotation if rotation > 1 else 30 * shape[2] + 1
    g, kept = (randn(seed + i, *shape[:2], columns).to(dtypes[i]) for i in range(2))
    codes = codes_of(seed, 3, *g.shape)
    of_rows = (*shape[:2], 1) if by_row else (1,)
    inverse_rms, factor = (randn(seed + i, *of_rows).abs() + 0.5 for i in (2, 3))
    rest = codes, inverse_rms, factor, zero_point, rotation, radial
    got, sums = equal_at_all_levels(lambda: bell_gradient(g, kept, is_rotated, *rest[:3], 3, *rest[3:], dtypes[2]))
    wanted, wanted_sums = definition_in_float64(g, kept, is_rotated, *rest)
    narrow = dtypes[2] == torch.bfloat16
    torch.testing.assert_close(got.double(), wanted, rtol=2**-8 if narrow else 1e-4, atol=1e-2 if narrow else 2e-5)
    torch.testing.assert_close(sums.double(), wanted_sums, rtol=1e-4, atol=1e-4)


def definition_in_float64(
    g: Tensor,
    kept: Tensor,
    is_rotated: bool,
    codes: Tensor,
    inverse_rms: Tensor,
    factor: Tensor,
    zero_point: float,
    rotation: int,
    radial: str,
) -> tuple[Tensor, Tensor]:
    from bitbell.kernels import rotate

    h, g = kept.double(), g.double()
    v = (h if is_rotated else rotate(h, rotation)) * inverse_rms.double()
    u = g * (-0.5 * v**2).exp()
    if radial != "none":
        u = u - v * ((u * v).mean(-1, keepdim=True) if radial == "row" else (u * v).mean())
    return rotate(u * factor.double(), rotation), (g * (codes.double() - zero_point)).sum(-1, keepdim=True)


def test_far_out_slopes_vanish_and_stay_finite() -> None:
    kept = torch.tensor([[0.0, 1.0, 13.0, 40.0, 1e4, 1e30, -1e30, -3.0]])
    arguments = torch.ones(1, 8), kept, True, torch.zeros(1, 8, dtype=torch.int8), torch.ones(1), torch.ones(1)
    got, _ = bell_gradient(*arguments, 1, 0.0, 1, "none", torch.float32)
    torch.testing.assert_close(got, (-0.5 * kept.double() ** 2).exp().float(), rtol=1e-6, atol=2e-38)


# One byte an element ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_bins_hold_the_code_in_their_upper_bits(bits: int) -> None:
    every = 2 ** (8 - bits)
    assert torch.equal(bin_thresholds(bits, 0.3)[every - 1 :: every], bell_thresholds(bits, 0.3))
    assert bool((bin_thresholds(bits).diff() > 0).all())
    x = randn(bits, 40, 128)
    for group, frozen in (("row", None), ("tensor", None), ("tensor", torch.tensor([0.7]))):
        for op in (bell_quantize, bell_quantize._init_fn):
            codes, _, bins = op(x, bits, 16, group, frozen, SMALLEST, torch.int8)
            plain, _, _ = op(x, bits, 16, group, frozen, SMALLEST, None)
            assert torch.equal(codes, plain)
            assert torch.equal(bins >> (8 - bits), codes)
            assert int(bins.unique().numel()) > 200


def test_bin_means_are_those_of_a_gaussian() -> None:
    v = torch.randn(4_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bins = bell_codes(v.float(), 1.0, 8).long() + 128
    count = torch.bincount(bins, minlength=256)
    found = bin_means(2, -0.5).double()
    for row, of in ((0, v), (1, (-0.5 * v**2).exp())):
        mean = torch.bincount(bins, weights=of, minlength=256) / count
        torch.testing.assert_close(found[row], mean, rtol=0, atol=0.01)
    assert found[2].tolist() == [level for level in (-1.5, -0.5, 0.5, 1.5) for _ in range(64)]


@needs_kernels
@quick
@given(
    bits=st.sampled_from([1, 2, 4]),
    rotation=st.sampled_from([1, 16]),
    radial=st.sampled_from(["row", "tensor", "none"]),
    dtype=types,
    columns=st.integers(1, 5),
    seed=seeds,
)
def test_the_gradient_by_bins_is_that_of_the_definition(
    bits: int, rotation: int, radial: str, dtype: torch.dtype, columns: int, seed: int
) -> None:
    width = 16 * columns if rotation > 1 else 13 * columns
    g, bins = randn(seed, 4, width).to(dtype), codes_of(seed, 8, 4, width)
    rest = torch.ones(1), torch.rand(4, 1), bits, -0.5, rotation, radial, torch.float32
    got = equal_at_all_levels(lambda: bell_gradient(g, bins, True, bins, *rest))
    wanted = bell_gradient._init_fn(g, bins, True, bins, *rest)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_the_gradient_by_bins_is_near_the_exact_one() -> None:
    x, g = randn(0, 64, 1024), randn(1, 64, 1024)
    gradients = []
    for keep in (torch.float32, torch.int8):
        codes, inverse_rms, kept = bell_quantize(x, 2, 128, "tensor", None, SMALLEST, keep)
        codes = kept if keep == torch.int8 else codes
        of = kept, True, codes, inverse_rms, inverse_rms, 2, -0.5, 128, "tensor", torch.float32
        gradients.append(bell_gradient(g, *of))
    (exact, levels), (near, same) = gradients
    torch.testing.assert_close(same, levels, rtol=1e-5, atol=1e-4)
    assert 0.001 < float((near - exact).norm() / exact.norm()) < 0.006
