"""The C++ kernels, every level that this machine runs: integers exactly, floats against float64, all levels alike."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitbell.kernels import hadamard, native, pack_codes, rotate, unpack_codes
from bitbell.kernels.native import InputPlan, NativeLayer
from bitbell.quantizers.normal_float import normal_float_levels
from bitbell.quantizers.quest_fp4 import E2M1

pytestmark = pytest.mark.skipif(native.extension is None, reason="installed without the C++ extension")

LEVELS = [name for name, why in native.level_names().items() if not why]
STATISTICS = native.STATISTICS
FEW = [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 130]  # around what vectors and panels hold
quick = settings(derandomize=True, max_examples=30, deadline=None)
few = settings(derandomize=True, max_examples=6, deadline=None)
seeds = st.integers(0, 2**31)
sizes = st.one_of(st.sampled_from(FEW), st.integers(1, 300))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    native.set_threads(1)
    yield
    native.set_threads(None)


def each_level(compute: Callable[[], Any]) -> dict[str, Any]:
    found = {}
    for name in LEVELS:
        with native.using(name):
            found[name] = compute()
    return found


def same_bits(compute: Callable[[], Any]) -> Any:
    """What every level computes; fails where one of them differs in a bit."""
    found = each_level(compute)
    first = found[LEVELS[0]]
    for name, other in found.items():
        for a, b in zip(first, other, strict=True) if isinstance(first, tuple) else [(first, other)]:
            assert (a.dtype, a.shape) == (b.dtype, b.shape), name
            if a.is_floating_point():  # bits of NaN are nobody's business
                assert torch.equal(a.isnan(), b.isnan()), name
                a, b = a.nan_to_num(nan=0.0).view(torch.int32), b.nan_to_num(nan=0.0).view(torch.int32)
            assert torch.equal(a, b), (name, int((a != b).sum()))
    return first


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def whole(seed: int, low: int, high: int, shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> Tensor:
    """Integers low .. high, "random" or all at one end."""
    if kind != "random":
        return torch.full(shape, low if kind == "lowest" else high, dtype=dtype)
    return torch.randint(low, high + 1, shape, dtype=dtype, generator=generator(seed))


def weight_codes(seed: int, outputs: int, columns: int, bits: int, kind: str = "random") -> Tensor:
    return whole(seed, 0, 2**bits - 1, (outputs, columns), kind, torch.uint8)


def input_codes(seed: int, rows: int, columns: int, bits: int, kind: str = "random") -> Tensor:
    return whole(seed, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, (rows, columns), kind, torch.int8)


# Arranging and products ----------------------------------------------------------------------------------------------


@quick
@given(outputs=sizes, columns=sizes, bits=st.integers(1, 8), seed=seeds)
def test_arranging_sums_the_codes_of_each_row(outputs: int, columns: int, bits: int, seed: int) -> None:
    codes = weight_codes(seed, outputs, columns, bits)
    arranged, sums = native.arrange(pack_codes(codes, bits), bits, columns)
    assert arranged.data_ptr() % 64 == 0
    assert sums.dtype == torch.int32
    assert torch.equal(sums.long(), codes.long().sum(-1))


def test_what_pads_the_last_word_is_ignored() -> None:
    codes = weight_codes(0, 5, 11, 3)
    words = pack_codes(codes, 3)
    dirty = words.clone()
    dirty[:, -1] |= -2  # code 10 ends with the lowest bit of the second word
    assert torch.equal(unpack_codes(dirty, 3, 11), codes)
    x = input_codes(1, 2, 11, 8)
    clean, other = (native.arrange(w, 3, 11) for w in (words, dirty))
    assert torch.equal(clean[1], other[1])
    for name in LEVELS:
        with native.using(name):
            assert torch.equal(native.product(x, clean[0], 3, 5), native.product(x, other[0], 3, 5))


def check_product(rows: int, outputs: int, columns: int, bits: int, x_bits: int, w_kind: str, x_kind: str) -> None:
    seed = rows * 7919 + outputs * 104729 + columns
    w, x = weight_codes(seed, outputs, columns, bits, w_kind), input_codes(seed + 1, rows, columns, x_bits, x_kind)
    expected = (x.double() @ w.double().T).long()  # exact: far below 2**53
    arranged, _ = native.arrange(pack_codes(w, bits), bits, columns)
    for name in LEVELS:
        with native.using(name):
            got = native.product(x, arranged, bits, outputs, x_bits)
        assert (got.dtype, got.shape) == (torch.int32, (rows, outputs))
        assert torch.equal(got.long(), expected), (name, rows, outputs, columns, bits, x_bits)


kinds = st.sampled_from(["random", "random", "lowest", "highest"])
bits_of_codes = st.integers(1, 8)


@settings(quick, max_examples=60)
@given(
    rows=st.integers(1, 40), outputs=sizes, columns=sizes, bits=bits_of_codes, x_bits=bits_of_codes, w=kinds, x=kinds
)
def test_products_equal_their_definition(
    rows: int, outputs: int, columns: int, bits: int, x_bits: int, w: str, x: str
) -> None:
    check_product(rows, outputs, columns, bits, x_bits, w, x)


@pytest.mark.parametrize("bits", range(1, 9))
def test_products_of_one_row_equal_their_definition_for_all_bits_of_inputs(bits: int) -> None:
    for x_bits in range(1, 9):
        for kind in ("random", "lowest", "highest"):
            check_product(1, 65, 333, bits, x_bits, "random" if kind == "random" else "highest", kind)


@few
@given(rows=st.sampled_from([1, 2, 19, 49]), columns=st.integers(300, 5000), bits=bits_of_codes, x_bits=bits_of_codes)
def test_wide_products_equal_their_definition(rows: int, columns: int, bits: int, x_bits: int) -> None:
    check_product(rows, 67, columns, bits, x_bits, "random", "random")


def test_products_of_more_rows_than_are_taken_at_a_time() -> None:
    for threads in (1, 2):
        native.set_threads(threads)
        check_product(523, 70, 90, 3, 8, "random", "random")


@pytest.mark.parametrize(("bits", "x_bits"), [(1, 5), (1, 8), (2, 6), (2, 8), (3, 8), (4, 8), (8, 8)])
def test_accumulators_hold_the_largest_sums(bits: int, x_bits: int) -> None:
    columns, w = 2**16, 2**bits - 1
    arranged, sums = native.arrange(pack_codes(weight_codes(0, 3, columns, bits, "highest"), bits), bits, columns)
    assert sums.tolist() == [w * columns] * 3
    for kind in ("lowest", "highest"):
        x = input_codes(0, 17, columns, x_bits, kind)
        expected = int(x[0, 0]) * w * columns
        assert abs(expected) < 2**31
        for name in LEVELS:
            with native.using(name):
                for rows in (1, 17):
                    got = native.product(x[:rows], arranged, bits, 3, x_bits)
                    assert got.unique().tolist() == [expected], (name, rows, kind)


def test_a_product_without_rows_is_empty() -> None:
    arranged, _ = native.arrange(pack_codes(weight_codes(0, 5, 20, 2), 2), 2, 20)
    assert same_bits(lambda: native.product(torch.empty(0, 20, dtype=torch.int8), arranged, 2, 5)).shape == (0, 5)


# Rotation ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [2**e for e in range(11)])
def test_rotations_agree_with_the_definition(block: int) -> None:
    for columns, rows in ((block, 1), (3 * block, 5), (block * (19 if block < 64 else 2), 3)):
        x = randn(block, rows, columns)
        expected = rotate(x.double(), block)
        got = same_bits(lambda x=x: native.rotate(x, block))
        assert float((got - expected).abs().max()) <= 1e-6 * float(x.abs().max()) * max(1, math.log2(block))


def test_a_rotation_takes_strided_and_empty_inputs() -> None:
    x = randn(0, 64, 6).T
    assert torch.equal(same_bits(lambda: native.rotate(x, 32)), native.rotate(x.contiguous(), 32))
    assert native.rotate(torch.empty(0, 64), 64).shape == (0, 64)
    assert native.rotate(torch.empty(2, 3, 64), 64).shape == (2, 3, 64)
    assert native.rotate(x, None) is x


# Quantization --------------------------------------------------------------------------------------------------------


def definition(plan: InputPlan, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and step by the docstring of InputPlan, in float64, and where codes may be one off."""
    h = x.double() @ torch.block_diag(
        *[hadamard(plan.rotation or 1, dtype=torch.float64)] * (x.shape[1] // (plan.rotation or 1))
    )
    measure = {
        "none": lambda: torch.zeros(len(h), 1, dtype=torch.float64),
        "rms": lambda: h.square().mean(-1, keepdim=True).sqrt(),
        "absmax": lambda: h.abs().amax(-1, keepdim=True),
        "absmean": lambda: h.abs().mean(-1, keepdim=True),
    }[plan.statistic]
    size = measure().clamp_min(plan.smallest)
    v, half = h / (size * plan.divisor + plan.divisor_plus), 2 ** (plan.bits - 1)
    if plan.thresholds is None:
        thresholds = torch.arange(1 - half, half, dtype=torch.float64)
        codes = (v - 0.5).round().clamp(-half, half - 1)
    else:
        thresholds = plan.thresholds.double()
        codes = torch.searchsorted(thresholds, v, right=True) - half
    # A rotation rounds as its largest input does, and v - 1/2 in float32 as 1/2 does.
    blur = 0.0 if plan.rotation is None else 1e-6 * float(v.abs().max())
    blur += 1e-7 if plan.thresholds is None else 0.0
    gaps = (v[..., None] - thresholds).abs() - 1e-5 * thresholds.abs() - blur
    return codes, size * plan.step_factor + plan.step_plus, (gaps < 0).any(-1)


def random_plan(seed: int, bits: int, statistic: str, uniform: bool, rotation: int | None = None) -> InputPlan:
    numbers = torch.rand(4, generator=generator(seed)).tolist()
    table = None if uniform else randn(seed + 1, 2**bits - 1).sort().values
    plan = InputPlan(bits, rotation, thresholds=table, step_factor=numbers[2], step_plus=numbers[3])
    if statistic == "none":
        return replace(plan, divisor_plus=0.1 + numbers[0])
    return replace(plan, statistic=statistic, smallest=1e-8, divisor=0.1 + numbers[0], divisor_plus=1e-3 * numbers[1])


def check_quantization(plan: InputPlan, x: Tensor) -> None:
    codes, step = same_bits(lambda: native.quantize(plan, x))
    assert (codes.dtype, codes.shape, step.dtype, step.shape) == (torch.int8, x.shape, torch.float32, (len(x), 1))
    expected, expected_step, unsure = definition(plan, x)
    differs = codes != expected
    assert not bool((differs & ~unsure).any()), (plan, int((differs & ~unsure).sum()))
    assert bool(((codes - expected).abs() <= 1).all())
    torch.testing.assert_close(step.double(), expected_step, rtol=1e-6, atol=0)


@quick
@given(
    rows=st.integers(1, 5),
    columns=sizes,
    bits=bits_of_codes,
    statistic=st.sampled_from(STATISTICS),
    uniform=st.booleans(),
    size=st.sampled_from([1e-4, 1.0, 1e4]),
    seed=seeds,
)
def test_codes_and_steps_follow_the_plan(
    rows: int, columns: int, bits: int, statistic: str, uniform: bool, size: float, seed: int
) -> None:
    check_quantization(random_plan(seed, bits, statistic, uniform), size * randn(seed, rows, columns))


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("block", [2, 8, 16, 32, 64, 128, 256])
def test_inputs_are_rotated_first(statistic: str, block: int) -> None:
    for bits, uniform in ((1, False), (3, False), (8, True)):
        check_quantization(random_plan(block, bits, statistic, uniform, block), randn(block, 3, 3 * block))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_unusual_rows_are_quantized_like_any_other(statistic: str) -> None:
    x = torch.zeros(7, 83)
    x[1], x[2] = 3.25, -0.0
    x[3] = randn(0, 83)
    x[3, 82] = 1e6
    x[4, 0] = -1e-12
    x[5] = 1e-40 * randn(1, 83)
    x[6] = 1e15 * randn(2, 83)
    for bits in (1, 2, 3, 4, 5, 8):
        for uniform in (False, True):
            check_quantization(random_plan(bits, bits, statistic, uniform), x)
            check_quantization(random_plan(bits, bits, statistic, uniform), x[:, :1])


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_value_on_a_threshold_has_the_code_above_it(bits: int) -> None:
    thresholds = randn(bits, 2**bits - 1).sort().values
    lower = torch.nextafter(thresholds, torch.tensor(-torch.inf))
    codes, _ = same_bits(
        lambda: native.quantize(InputPlan(bits, thresholds=thresholds), torch.stack([thresholds, lower]))
    )
    above = torch.arange(1, 2**bits) - 2 ** (bits - 1)
    assert torch.equal(codes[0].long(), above)
    assert torch.equal(codes[1].long(), above - 1)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_is_how_many_thresholds_are_reached(bits: int) -> None:
    thresholds = randn(bits, 2**bits - 1)
    thresholds[::3] = thresholds[0]  # as many codes are never reached as thresholds are equal
    thresholds = thresholds.sort().values
    around = [torch.nextafter(thresholds, torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    x = torch.cat([thresholds, *around, randn(bits, 1000)])[None]
    for scale in (1.0, 0.3):
        plan = InputPlan(bits, divisor_plus=scale, thresholds=thresholds)
        codes, _ = same_bits(lambda plan=plan: native.quantize(plan, x))
        reached = (x[..., None] >= thresholds * scale).sum(-1)
        assert torch.equal(codes.long(), reached - 2 ** (bits - 1))


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_infinite_thresholds_are_always_or_never_reached(bits: int) -> None:
    thresholds = torch.zeros(2**bits - 1)
    thresholds[0], thresholds[-1] = -torch.inf, torch.inf
    x = torch.tensor([[-1e38, -1.0, 1.0, 1e38]])
    half = 2 ** (bits - 1)
    for plan in (
        InputPlan(bits, thresholds=thresholds),
        InputPlan(bits, None, "absmax", 1e-8, 0.5, 0.0, thresholds=thresholds),
    ):
        codes, _ = same_bits(lambda plan=plan: native.quantize(plan, x))
        assert codes.tolist() == [[1 - half, 1 - half, half - 2, half - 2]]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_uniform_codes_break_ties_to_even(bits: int) -> None:
    half = 2 ** (bits - 1)
    x = torch.arange(-half - 2, half + 3).float()[None]
    codes, _ = same_bits(lambda: native.quantize(InputPlan(bits), x))
    assert codes.tolist() == [[min(max(round(v - 0.5), -half), half - 1) for v in x[0].tolist()]]


@pytest.mark.parametrize("rotation", [None, 16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_steps_show_what_codes_cannot(bad: float, rotation: int | None) -> None:
    for columns in (48, 80) if rotation else (1, 17, 83):
        x = randn(0, 4, columns)
        x[2, columns - 1] = bad
        for statistic in STATISTICS:
            for bits, uniform in ((1, False), (4, False), (6, False), (8, True)):
                plan = random_plan(bits, bits, statistic, uniform, rotation)
                codes, step = same_bits(lambda plan=plan, x=x: native.quantize(plan, x))
                wrong = [True] * 4 if statistic == "none" else [False, False, True, False]
                assert (~step.isfinite())[:, 0].tolist() == wrong, plan
                clean, clean_step = native.quantize(plan, x[[0, 1, 3]])
                assert torch.equal(codes[[0, 1, 3]], clean)
                assert statistic == "none" or torch.equal(step[[0, 1, 3]], clean_step)


def test_no_rows_have_no_codes() -> None:
    codes, step = same_bits(lambda: native.quantize(random_plan(0, 3, "rms", False), torch.empty(0, 20)))
    assert (codes.shape, step.shape) == ((0, 20), (0, 1))


@pytest.mark.parametrize("threads", [2, 3, 9])
def test_threads_do_not_change_codes(threads: int) -> None:
    plan, x = random_plan(0, 4, "rms", False, 32), randn(0, 7, 96)
    alone = native.quantize(plan, x)
    native.set_threads(threads)
    for got, expected in zip(same_bits(lambda: native.quantize(plan, x)), alone, strict=True):
        assert torch.equal(got, expected)


# Layers --------------------------------------------------------------------------------------------------------------


class Made:
    """A layer of random codes, and what docs/file-format.md says that it computes."""

    def __init__(self, outputs: int, columns: int, bits: int, plan: InputPlan | None, **options: Any) -> None:
        self.codes, self.columns, self.bits, self.plan = weight_codes(1, outputs, columns, bits), columns, bits, plan
        self.scale = 0.1 + torch.rand(outputs, 1, generator=generator(2))
        self.zero_point = options.pop("zero_point", -0.5)
        self.rotation, self.table = options.get("rotation"), options.get("table")
        self.bias = options["bias"] = randn(3, outputs) if options.pop("with_bias", True) else None
        self.offset = options["offset"] = randn(4, outputs, 1) if options.pop("with_offset", False) else None
        words = pack_codes(self.codes, bits)
        self.layer = NativeLayer(words, bits, columns, self.scale, self.zero_point, plan=plan, **options)

    def expected(self, x: Tensor) -> Tensor:
        level_w = self.codes.double() - 2 ** (self.bits - 1) - self.zero_point
        if self.table is not None:
            level_w = torch.tensor(self.table, dtype=torch.float64)[self.codes.long()]
        scale, zero = self.scale.double(), torch.zeros(1, dtype=torch.float64)
        o_w = zero[None] if self.offset is None else self.offset.double()
        bias = zero if self.bias is None else self.bias.double()
        if self.plan is None:
            return rotate(x.double(), self.rotation) @ (level_w * scale + o_w).T + bias
        codes, step_x = (t.double() for t in native.quantize(self.plan, x))
        level_x, o_x = codes - self.plan.zero_point, self.plan.offset
        y = (level_x @ level_w.T) * scale.T * step_x + bias
        y = y + o_x * level_w.sum(-1) * scale.T + level_x.sum(-1, keepdim=True) * step_x * o_w.T
        return y + self.columns * o_x * o_w.T

    def check(self, x: Tensor) -> Tensor:
        y = same_bits(lambda: self.layer(x)) if self.plan is not None else each_level(lambda: self.layer(x))
        expected = self.expected(x)
        for got in [y] if self.plan is not None else y.values():
            assert (got.dtype, got.shape) == (torch.float32, expected.shape)
            assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
        return y


@settings(quick, max_examples=40)
@given(
    rows=st.sampled_from([1, 1, 2, 3, 18, 33]),
    outputs=sizes,
    columns=sizes,
    bits=bits_of_codes,
    x_bits=bits_of_codes,
    statistic=st.sampled_from(STATISTICS),
    uniform=st.booleans(),
    zero_points=st.tuples(*[st.sampled_from([-0.5, 0.0, -0.25, 1.5, 0.3, -2.7])] * 2),
    offsets=st.tuples(st.sampled_from([0.0, 0.7, -0.04]), st.booleans()),
    with_bias=st.booleans(),
)
def test_outputs_are_those_of_the_format(
    rows: int,
    outputs: int,
    columns: int,
    bits: int,
    x_bits: int,
    statistic: str,
    uniform: bool,
    zero_points: tuple[float, float],
    offsets: tuple[float, bool],
    with_bias: bool,
) -> None:
    plan = random_plan(columns, x_bits, statistic, uniform)
    plan = replace(plan, zero_point=zero_points[0], offset=offsets[0])
    made = Made(outputs, columns, bits, plan, zero_point=zero_points[1], with_offset=offsets[1], with_bias=with_bias)
    made.check(randn(rows, rows, columns))


@pytest.mark.parametrize("bits", range(1, 9))
def test_rotated_inputs_of_every_width_of_weights(bits: int) -> None:
    plan = replace(random_plan(bits, 9 - bits, "rms", bits < 5, 64), zero_point=-0.5)
    made = Made(130, 192, bits, plan, rotation=64)
    for rows in (1, 21):
        made.check(randn(0, rows, 192))


@settings(quick, max_examples=25)
@given(
    rows=st.one_of(st.integers(1, 9), st.sampled_from([16, 127, 131])),
    outputs=sizes,
    columns=sizes,
    bits=bits_of_codes,
    zero_point=st.sampled_from([-0.5, 0.0, -0.25, 0.3]),
    with_offset=st.booleans(),
    with_bias=st.booleans(),
)
def test_inputs_left_in_floats(
    rows: int, outputs: int, columns: int, bits: int, zero_point: float, with_offset: bool, with_bias: bool
) -> None:
    options = {"zero_point": zero_point, "with_offset": with_offset, "with_bias": with_bias}
    Made(outputs, columns, bits, None, **options).check(randn(rows, rows, columns))


@pytest.mark.parametrize("table", [*(normal_float_levels(bits) for bits in (2, 3, 4)), E2M1], ids=len)
def test_levels_of_a_table_are_looked_up(table: tuple[float, ...]) -> None:
    bits = len(table).bit_length() - 1
    for columns, rotation in ((37, None), (128, 64), (300, 4)):
        for with_offset in (False, True):
            made = Made(70, columns, bits, None, table=table, rotation=rotation, with_offset=with_offset)
            for rows in (1, 2, 3, 4, 5, 6):
                made.check(randn(rows, rows, columns))


def plain_layers() -> list[Made]:
    plan = replace(random_plan(0, 3, "rms", False, 32), zero_point=-0.5, offset=0.2)
    return [
        Made(150, 96, 2, plan, rotation=32, with_offset=True),
        Made(150, 96, 4, None, rotation=32, with_offset=True),
    ]


@pytest.mark.parametrize("which", [0, 1])
def test_inputs_of_any_shape_layout_and_type(which: int) -> None:
    layer = plain_layers()[which].layer
    x = randn(0, 6, 96)
    for name in LEVELS:
        with native.using(name):
            y = layer(x)
            assert torch.equal(layer(x.view(2, 3, 96)), y.view(2, 3, 150))
            assert torch.equal(layer(x.T.contiguous().T), y)
            assert torch.equal(layer(torch.stack([x, x], -1)[..., 0]), y)
            assert torch.equal(layer(x.expand(2, 6, 96)), y.expand(2, 6, 150))
            torch.testing.assert_close(layer(x[0]), y[0], rtol=1e-5, atol=1e-5)
            assert layer(x[:0]).shape == (0, 150)
            assert layer(torch.empty(2, 0, 96)).shape == (2, 0, 150)
            for narrow in (torch.bfloat16, torch.float16):
                got = layer(x.to(narrow))
                assert got.dtype == narrow
                assert torch.equal(got, layer(x.to(narrow).float()).to(narrow))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_type_changes_nothing(dtype: torch.dtype) -> None:
    def compute() -> list[Tensor]:
        x = torch.linspace(-2, 2, 96 * 5, dtype=torch.float32).view(5, 96)
        layer = NativeLayer(words, 4, 96, scale, 0.0, plan=None, table=E2M1)
        plan = InputPlan(4, 32, "rms", 1e-8, 1.0, 0.0, 0.3)
        return [layer(x), plain.layer(x), *native.quantize(plan, x)]

    words, scale, plain = pack_codes(weight_codes(0, 70, 96, 4), 4), torch.ones(70, 1), plain_layers()[0]
    expected = compute()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = compute()
        with torch.device("meta"):
            layer_on_default_device = plain.layer(
                torch.linspace(-2, 2, 480, device="cpu", dtype=torch.float32).view(5, 96)
            )
    finally:
        torch.set_default_dtype(before)
    for a, b in zip([*found, layer_on_default_device], [*expected, expected[1]], strict=True):
        assert (a.dtype, a.device) == (b.dtype, b.device)
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_outputs_show_what_is_not_finite(bad: float) -> None:
    x = randn(0, 3, 96)
    x[1, 40] = bad
    for made in plain_layers():
        clean = made.layer(x[[0, 2]])
        for y in each_level(lambda layer=made.layer: layer(x)).values():
            assert not bool(y[1].isfinite().any())
            torch.testing.assert_close(y[[0, 2]], clean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [2, 3, 64])
def test_threads_do_not_change_outputs(threads: int) -> None:
    for made in plain_layers():
        for rows in (1, 2, 40):
            x = randn(rows, rows, 96)
            native.set_threads(1)
            alone = each_level(lambda layer=made.layer, x=x: layer(x))
            native.set_threads(threads)
            for name, y in each_level(lambda layer=made.layer, x=x: layer(x)).items():
                assert torch.equal(y, alone[name]), (name, rows)


@pytest.mark.parametrize("threads", [1, 3])
def test_calls_from_several_python_threads_at_once(threads: int) -> None:
    native.set_threads(threads)
    layers = [made.layer for made in plain_layers()]
    inputs = [randn(seed, 1 + seed % 3 * 10, 96) for seed in range(6)]
    expected = [[layer(x) for layer in layers] for x in inputs]

    def work(worker: int) -> bool:
        for turn in range(30):
            place = (worker + turn) % len(inputs)
            outputs = [layer(inputs[place]) for layer in layers]
            if not all(torch.equal(a, b) for a, b in zip(outputs, expected[place], strict=True)):
                return False
        return True

    with ThreadPoolExecutor(4) as workers:
        assert all(workers.map(work, range(4)))


def exit_status(child: int, seconds: float) -> int:
    """How a forked child ended; one that hangs is ended, and counts as a failure."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes_too() -> None:
    native.set_threads(2)
    layers, x = [made.layer for made in plain_layers()], randn(0, 20, 96)
    expected = [layer(x) for layer in layers]  # the pool has its threads now, which a child does not inherit
    child = os.fork()
    if child == 0:
        same = False
        try:
            same = all(torch.equal(layer(x), y) for _ in range(3) for layer, y in zip(layers, expected, strict=True))
        finally:
            os._exit(0 if same else 1)
    assert exit_status(child, 30) == 0
    assert all(torch.equal(layer(x), y) for layer, y in zip(layers, expected, strict=True))


# Errors --------------------------------------------------------------------------------------------------------------


def test_a_level_that_is_not_there_is_refused() -> None:
    with native.using("portable"):
        with pytest.raises(ValueError, match=r"level must be one of auto, reference, portable.*got 'fastest'"):
            native.set_level("fastest")
        for name, why in native.level_names().items():
            if why:
                with pytest.raises(ValueError, match=rf"got '{name}' \({why}\)"):
                    native.set_level(name)
        assert native.level() == "portable"


def test_using_a_level_ends_with_the_block() -> None:
    before = native.level()

    def fail() -> None:
        with native.using("portable"):
            assert native.level() == "portable"
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert native.level() == before


def test_the_fastest_level_is_no_emulated_one() -> None:
    with native.using("auto"):
        assert native.level() == [name for name in LEVELS if "emulated" not in name][-1]
        assert native.available()
    with native.using("reference"):
        assert not native.available()


@pytest.mark.parametrize("count", [0, -1, 257])
def test_a_count_of_threads_out_of_range_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"threads must be 1 to 256, or None, got {count}"):
        native.set_threads(count)
    assert native.threads() == 1


def test_threads_are_torchs_own_unless_told() -> None:
    native.set_threads(7)
    assert native.threads() == 7
    native.set_threads(None)
    assert native.threads() == torch.get_num_threads()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 0}, r"bits must be 1 to 8, got 0"),
        ({"bits": 9}, r"bits must be 1 to 8, got 9"),
        ({"statistic": "median"}, r"statistic must be one of none, rms, absmax, absmean, got 'median'"),
        ({"thresholds": torch.zeros(2)}, r"thresholds must be 3 float32 numbers on the CPU, got .*shape \(2,\)"),
        ({"thresholds": torch.zeros(1, 3)}, r"thresholds must be 3 float32 numbers on the CPU, got .*shape \(1, 3\)"),
        ({"thresholds": torch.zeros(3, dtype=torch.float64)}, r"thresholds must be 3 float32 .* got .*float64"),
        ({"thresholds": torch.zeros(3, device="meta")}, r"thresholds must be 3 float32 numbers on the CPU, got .*meta"),
        ({"rotation": 3}, r"rotation must be a power of two or None, got 3"),
        ({"rotation": 0}, r"rotation must be a power of two or None, got 0"),
        ({"rotation": -16}, r"rotation must be a power of two or None, got -16"),
    ],
)
def test_a_plan_with_impossible_fields_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InputPlan(**{"bits": 2, **fields})


def test_thresholds_that_do_not_lie_together_are_read_right() -> None:
    scattered = torch.tensor([[-1.0, 9], [0, 9], [1, 9]])[:, 0]
    codes, _ = same_bits(
        lambda: native.quantize(InputPlan(2, thresholds=scattered), torch.tensor([[-2.0, -0.5, 0.5, 2]]))
    )
    assert codes.tolist() == [[-2, -1, 0, 1]]


@pytest.mark.parametrize(
    ("words", "bits"),
    [
        (torch.zeros(2, 1, dtype=torch.int32), 3),
        (torch.zeros(2, dtype=torch.int32), 3),
        (torch.zeros(2, 2, 2, dtype=torch.int32), 3),
        (torch.zeros(2, 5, dtype=torch.int32), 9),
        (torch.zeros(2, 0, dtype=torch.int32), 0),
    ],
)
def test_words_of_another_shape_are_refused(words: Tensor, bits: int) -> None:
    with pytest.raises(ValueError, match=rf"words must be \(rows, \d\) for 16 codes of {bits} bits"):
        native.arrange(words, bits, 16)


def test_tensors_of_another_type_or_place_are_refused() -> None:
    with pytest.raises(ValueError, match=r"words must be torch.int32 on the CPU, got torch.int64 on cpu"):
        native.arrange(torch.zeros(2, 1, dtype=torch.int64), 2, 16)
    with pytest.raises(ValueError, match=r"x must be torch.float32 on the CPU, got torch.float64 on cpu"):
        native.quantize(InputPlan(2), torch.zeros(2, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x must be torch.float32 on the CPU, got torch.float32 on meta"):
        native.rotate(torch.zeros(2, 16, device="meta"), 16)


@pytest.mark.parametrize("shape", [(16,), (2, 2, 16)])
def test_only_a_matrix_is_quantized(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x must be \(rows, columns\), got "):
        native.quantize(InputPlan(2), torch.zeros(shape))


@pytest.mark.parametrize(("block", "message"), [(32, "must divide the 48 columns, got 32"), (3, "power of two.*got 3")])
def test_a_rotation_that_does_not_fit_is_refused(block: int, message: str) -> None:
    with pytest.raises(ValueError, match=rf"rotation .*{message}"):
        native.rotate(torch.zeros(2, 48), block)
    with pytest.raises(ValueError, match=rf"rotation .*{message}"):
        native.quantize(InputPlan(2, block), torch.zeros(2, 48))
    words, scale = torch.zeros(2, 3, dtype=torch.int32), torch.ones(2, 1)
    with pytest.raises(ValueError, match=rf"rotation .*{message}"):
        NativeLayer(words, 2, 48, scale, 0.0, plan=InputPlan(2, block))
    with pytest.raises(ValueError, match=rf"rotation .*{message}"):
        NativeLayer(words, 2, 48, scale, 0.0, plan=None, rotation=block)


def test_products_of_what_does_not_fit_are_refused() -> None:
    arranged, _ = native.arrange(torch.zeros(3, 1, dtype=torch.int32), 2, 16)
    x = torch.zeros(2, 16, dtype=torch.int8)
    with native.using("portable"):
        for codes in (x.int(), x[0]):
            with pytest.raises(ValueError, match=r"codes must be an int8 matrix, got torch"):
                native.product(codes, arranged, 2, 3)
        with pytest.raises(ValueError, match=r"arranged has \d+ bytes, not those of \(100, 16\) at 2 bits"):
            native.product(x, arranged, 2, 100)
        for x_bits, value in ((2, 2), (2, -3), (1, 1), (7, 64)):
            with pytest.raises(ValueError, match=rf"codes must be -?\d+ to \d+ for x_bits={x_bits}"):
                native.product(x.clone().fill_(value), arranged, 2, 3, x_bits)
        for x_bits in (0, 9):
            with pytest.raises(ValueError, match=rf"x_bits must be 1 to 8, got {x_bits}"):
                native.product(x, arranged, 2, 3, x_bits)


def test_layers_of_what_does_not_fit_are_refused() -> None:
    words, scale = torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
    with pytest.raises(ValueError, match=r"table is for layers whose inputs stay floats"):
        NativeLayer(words, 2, 16, scale, 0.0, plan=InputPlan(2), table=(0, 1, 2, 3))
    with pytest.raises(ValueError, match=r"table must have 4 levels for 2 bits.*got 3"):
        NativeLayer(words, 2, 16, scale, 0.0, plan=None, table=(0, 1, 2))
    wide = torch.zeros(3, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"table must .* 4 bits"):
        NativeLayer(wide, 5, 16, scale, 0.0, plan=None, table=tuple(range(32)))
    for name in ("scale", "offset", "bias"):
        parts = {"offset": None, "bias": None, "scale": scale} | {name: torch.ones(2)}
        with pytest.raises(ValueError, match=rf"{name} must have 3 numbers, got 2"):
            NativeLayer(words, 2, 16, parts.pop("scale"), 0.0, plan=InputPlan(2), **parts)
    one_for_all = NativeLayer(words, 2, 16, torch.ones(1), 0.0, plan=InputPlan(2), offset=torch.ones(1, 1))
    repeated = NativeLayer(words, 2, 16, scale, 0.0, plan=InputPlan(2), offset=torch.ones(3, 1))
    assert torch.equal(one_for_all(randn(0, 2, 16)), repeated(randn(0, 2, 16)))
    for plan in (None, InputPlan(2)):
        layer = NativeLayer(words, 2, 16, scale, 0.0, plan=plan)
        for shape in ((2, 32), (16, 2), (8,), ()):
            with pytest.raises(ValueError, match=r"x must be \(\.\.\., 16\) on the CPU, got "):
                layer(torch.zeros(shape))
        with pytest.raises(ValueError, match=r"x must be .* on the CPU, got .* on meta"):
            layer(torch.zeros(2, 16, device="meta"))


def test_sums_that_int32_may_not_hold_are_refused() -> None:
    for bits, x_bits, columns in ((8, 8, 65794), (1, 1, 2**17), (7, 8, 2**17)):
        assert native.sums_fit(columns - 1, bits, x_bits)
        words, x = torch.zeros(1, (columns * bits + 31) // 32, dtype=torch.int32), torch.zeros(1, columns).char()
        arranged, _ = native.arrange(words, bits, columns)
        with pytest.raises(ValueError, match=rf"{columns} columns of {bits} and {x_bits} bits are too many"):
            native.product(x, arranged, bits, 1, x_bits)
        with pytest.raises(ValueError, match=rf"{columns} columns of {bits} and {x_bits} bits are too many"):
            NativeLayer(words, bits, columns, torch.ones(1), 0.0, plan=InputPlan(x_bits))


# The environment -----------------------------------------------------------------------------------------------------


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | environment
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=variables, timeout=120)


@pytest.mark.parametrize("name", ["reference", "portable"])
def test_the_environment_chooses_the_kernels(name: str) -> None:
    done = python("-m", "bitbell", "info", BITBELL_KERNELS=name)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("packed layers"))
    assert {"reference": "plain PyTorch", "portable": "C++ portable"}[name] in line
    assert f"BITBELL_KERNELS={name}" in line


def test_nonsense_in_the_environment_is_refused() -> None:
    done = python("-m", "bitbell", "info", BITBELL_KERNELS="nonsense")
    assert done.returncode != 0
    assert "BITBELL_KERNELS must be one of auto, reference, portable" in done.stderr
    assert "got 'nonsense'" in done.stderr
    assert "Traceback" not in done.stderr


WITHOUT = """
import sys
sys.modules["bitbell.kernels._native"] = None
import torch
import bitbell
from bitbell.kernels import kernel_paths, native

assert native.extension is None and native.level() == "reference" and native.level_names() == {}
assert native.missing.startswith("bitbell was installed without"), native.missing
assert kernel_paths()["packed layers"] == "plain PyTorch: " + native.missing
for name in ("portable", "fastest"):
    try:
        native.set_level(name)
    except ValueError as error:
        assert "there is only 'reference'" in str(error), error
    else:
        raise AssertionError(name)
native.set_level("auto")
model, x = torch.nn.Sequential(torch.nn.Linear(32, 8)), torch.randn(3, 32)
bitbell.calibrate(bitbell.quantize(model, "bbq-w2a2"), x)
packed = bitbell.pack(model.eval())
packed.save(sys.argv[1])
again = bitbell.load(sys.argv[1], model=torch.nn.Sequential(torch.nn.Linear(32, 8)))
assert torch.equal(packed(x), model(x)) and torch.equal(again(x), model(x))
"""


def test_everything_works_without_the_extension(tmp_path: Path) -> None:
    done = python("-c", WITHOUT, str(tmp_path / "packed"), BITBELL_KERNELS="")  # not this process's own level
    assert done.returncode == 0, done.stderr
