"""Plans choose the very codes of the quantizers that they are made from, for every method, granularity and width."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bitbell.kernels import native
from bitbell.kernels.native import InputPlan
from bitbell.layers import Recipe
from bitbell.packing.plans import find_thresholds, input_plan
from bitbell.quantizers import METHODS, Quantizer

ULP = 2.0**-23
OPTIONS = {
    "bbq": [{"normalise": False}, {"learn_offset": True}, {"zero_point": -0.25, "granularity": "token"}],
    "lsq-plus": [{"asymmetric": False}],
    "quest": [{"mask_scale": 1.3}],
}


def activations(method: str, bits: int, rotation: int | None = None, **options: object) -> Quantizer:
    """The quantizer of a recipe's inputs, calibrated and drifted, in evaluation mode. Raises ValueError."""
    recipe = Recipe("bbq", 2, bits, activation_method=method, activation_options=options, rotation=rotation)
    quantizer = recipe.quantizers_for(8, 64)[1]
    assert quantizer is not None
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(bits)
        quantizer.train().calibrate(3 * torch.randn(16, 64) + 0.5)
        for name, parameter in quantizer.named_parameters():
            parameter.mul_(0.7 + 0.6 * torch.rand(parameter.shape)).add_(0.1 if name == "offset" else 0.0)
        quantizer(2 * torch.randn(16, 64))  # moves running statistics
    return quantizer.eval().requires_grad_(False)


def accepted() -> list[tuple[str, int, dict[str, object]]]:
    """What a recipe accepts of every method x width x granularity, and some further options."""
    found = []
    for method, kind in METHODS.items():
        granular = [{}, *({"granularity": g} for g in ("token", "tensor", "running"))]
        for bits, options in itertools.product(kind.widths, [*granular, *OPTIONS.get(method, [])]):
            try:
                activations(method, bits, **options)
            except ValueError:
                continue
            found.append((method, bits, options))
    return found


ACCEPTED = accepted()
IDS = [f"{method}-{bits}-{','.join(map(str, options.values()))}" for method, bits, options in ACCEPTED]


def by_plan(plan: InputPlan, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and steps by the docstring of InputPlan, of inputs that are rotated already, and the thresholds there."""
    by_row = {
        "none": lambda: torch.zeros(len(h), 1),
        "rms": lambda: h.square().mean(-1, keepdim=True).sqrt(),
        "absmax": lambda: h.abs().amax(-1, keepdim=True),
        "absmean": lambda: h.abs().mean(-1, keepdim=True),
    }
    size, half = by_row[plan.statistic]().clamp_min(plan.smallest), 2 ** (plan.bits - 1)
    divisor = size * plan.divisor + plan.divisor_plus
    if plan.thresholds is None:
        codes, thresholds = (h / divisor - 0.5).round().clamp(-half, half - 1), torch.arange(1 - half, half) * divisor
    else:
        thresholds = plan.thresholds * divisor
        codes = (h[..., None] >= thresholds[:, None]).sum(-1) - half
    return codes.to(torch.int8), size * plan.step_factor + plan.step_plus, thresholds


def inputs(plan: InputPlan) -> Tensor:
    """Rows of many sizes; where nothing is measured, also the thresholds themselves and their neighbours."""
    generator = torch.Generator().manual_seed(plan.bits)
    x = torch.randn(24, 64, generator=generator) * torch.logspace(-3, 2, 24)[:, None]
    x[0], x[1, 1:] = 0, 0
    if plan.statistic != "none":
        return x
    t = by_plan(plan, torch.zeros(1, 64))[2].flatten()
    infinite = torch.tensor(torch.inf)
    near = torch.cat([t, torch.nextafter(t, infinite), torch.nextafter(t, -infinite)])
    near = near[near.isfinite()]
    return torch.cat([x, torch.nn.functional.pad(near, (0, -len(near) % 64)).view(-1, 64)])


@pytest.mark.parametrize(("method", "bits", "options"), ACCEPTED, ids=IDS)
def test_plans_choose_the_codes_of_the_quantizer(method: str, bits: int, options: dict[str, object]) -> None:
    quantizer = activations(method, bits, **options)
    plan = input_plan(quantizer)
    if quantizer.table is not None or (options.get("granularity") == "tensor" and METHODS_MEASURE[method]):
        assert plan is None
        return
    assert plan is not None
    assert (plan.bits, plan.rotation, plan.zero_point) == (bits, None, quantizer.zero_point)
    assert plan.offset == (0.0 if quantizer.offset is None else float(quantizer.offset))
    x = inputs(plan)
    found = quantizer.quantize(x)
    computed = [by_plan(plan, x)[:2]]
    if native.extension is not None:
        with native.using("auto"):
            computed.append(native.quantize(plan, x))
    thresholds = by_plan(plan, x)[2]
    for codes, step in computed:
        torch.testing.assert_close(step, found.step.float().expand(step.shape), rtol=1e-6, atol=0)
        differs = codes != found.codes
        if plan.statistic == "none":
            assert not bool(differs.any()), int(differs.sum())
        # The measured size may round another way: 2 ulp of it move every threshold as far.
        gaps = (x[..., None] - thresholds[:, None]).abs() - 2 * ULP * thresholds[:, None].abs()
        assert not bool((differs & (gaps > 0).all(-1)).any())
        assert float(differs.float().mean()) < 0.01


# Which methods measure each input; "tensor" is then a statistic that a row alone does not have.
METHODS_MEASURE = {
    **dict.fromkeys(("bbq", "quest", "quest-fp4", "n2uq", "nf", "absmax", "narrow", "ternary"), True),
    **dict.fromkeys(("lsq", "lsq-plus", "pact", "seq", "n2uq-activations"), False),
}


def test_every_method_has_been_thought_of() -> None:
    assert set(METHODS_MEASURE) == set(METHODS)
    assert {method for method, _, _ in ACCEPTED} == set(METHODS)
    tried = {(method, options.get("granularity")) for method, _, options in ACCEPTED}
    for method in ("bbq", "narrow", "absmax", "ternary"):
        assert {(method, g) for g in (None, "token", "tensor", "running")} <= tried


@pytest.mark.parametrize("method", ["bbq", "quest", "narrow", "absmax", "lsq-plus", "n2uq-activations"])
def test_a_rotation_is_part_of_the_plan(method: str) -> None:
    if native.extension is None:
        pytest.skip("installed without the C++ extension")
    quantizer = activations(method, 3, rotation=32)
    plan = input_plan(quantizer)
    assert plan is not None
    assert plan.rotation == 32
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    with native.using("auto"):
        codes, step = native.quantize(plan, x)
    found = quantizer.quantize(x)
    torch.testing.assert_close(step, found.step.float().expand(step.shape), rtol=1e-6, atol=0)
    assert int((codes != found.codes).sum()) <= 1


def test_a_normalised_bbq_over_the_tensor_has_no_plan_but_one_that_measures_nothing_has() -> None:
    assert input_plan(activations("bbq", 2, granularity="tensor")) is None
    assert input_plan(activations("bbq", 2, granularity="tensor", normalise=False)) is not None


def test_inputs_that_count_downwards_are_not_given_rising_thresholds() -> None:
    quantizer = activations("n2uq-activations", 2)
    quantizer.input_scale.neg_()  # learned, so nothing keeps it positive
    x, plan = torch.randn(9, 64), input_plan(quantizer)
    assert plan is None or torch.equal(by_plan(plan, x)[0], quantizer.quantize(x).codes)


# Thresholds ----------------------------------------------------------------------------------------------------------


def steps_at(places: Tensor) -> Callable[[Tensor], Tensor]:
    """Centred codes: how many of `places` are at most v."""
    return lambda v: (v[:, None] >= places).sum(-1) - (len(places) + 1) // 2


SMALLEST = 2.0**-149


@pytest.mark.parametrize(
    "places",
    [
        [0.0],
        [-1.5, 0.25, 3.0],
        [-SMALLEST, SMALLEST, 2 * SMALLEST],
        [-1e29, -1e-30, 1e29],
        [0.1, 0.1, 0.1],
        [float("-inf"), 0.0, float("inf")],
        [float("-inf")] * 3,
        [float("inf")] * 3,
    ],
)
def test_thresholds_of_known_steps_are_found_to_the_last_bit(places: list[float]) -> None:
    wanted = torch.tensor(places)
    found = find_thresholds(steps_at(wanted), (len(places) + 1).bit_length() - 1)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("bits", range(1, 9))
def test_thresholds_of_random_steps_are_found_to_the_last_bit(bits: int) -> None:
    wanted = torch.randn(2**bits - 1, generator=torch.Generator().manual_seed(bits)).mul(10).sort().values
    assert torch.equal(find_thresholds(steps_at(wanted), bits), wanted)


# State ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bbq", "lsq", "lsq-plus", "pact", "seq", "n2uq-activations"])
def test_plans_follow_the_state(method: str) -> None:
    first, second = activations(method, 3), activations(method, 3)
    with torch.no_grad():
        for tensor in (*second.parameters(), *second.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.5)
    before, other = input_plan(first), input_plan(second)
    assert before is not None
    assert other is not None
    assert not torch.equal(before.thresholds, other.thresholds)
    first.load_state_dict(second.state_dict())
    after = input_plan(first)
    assert after is not None
    assert torch.equal(after.thresholds, other.thresholds)
    assert (after.step_plus, after.offset) == (other.step_plus, other.offset)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_type_changes_nothing(dtype: torch.dtype) -> None:
    quantizers = [activations(*case) for case in (("bbq", 3), ("absmax", 2), ("quest", 4), ("lsq", 3), ("narrow", 2))]
    expected = [input_plan(quantizer) for quantizer in quantizers]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = [input_plan(quantizer) for quantizer in quantizers]
    finally:
        torch.set_default_dtype(before)
    for a, b in zip(found, expected, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a.thresholds, b.thresholds)
        assert (a.divisor, a.divisor_plus, a.step_factor, a.step_plus) == (
            b.divisor,
            b.divisor_plus,
            b.step_factor,
            b.step_plus,
        )


def test_making_a_plan_leaves_the_quantizer_as_it_was() -> None:
    for method, bits, options in ACCEPTED[::7]:
        quantizer = activations(method, bits, **options).train()
        before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
        rotation = quantizer.rotation
        input_plan(quantizer)
        assert quantizer.training
        assert quantizer.rotation == rotation
        assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.state_dict().items())
