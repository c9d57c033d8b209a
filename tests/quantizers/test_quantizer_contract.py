"""What every quantizer promises, whatever the method: codes give the values, state survives, nothing fails silently."""

import copy
import inspect
import itertools
import json
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitbell.quantizers import (
    BBQ,
    METHODS,
    Quantizer,
    code_histogram,
    entropy_of,
    find_method,
    known_options,
    make_quantizer,
)
from bitbell.quantizers.base import check_bits
from bitbell.quantizers.formula import FormulaQuantizer

ROWS = 6
quick = settings(derandomize=True, max_examples=150, deadline=None)

# What shares a scale or a statistic, for every method that there is.
COMPUTED = ("row", "token", "tensor", "running")
GRANULARITIES: dict[str, tuple[str, ...]] = {
    "bbq": ("row", "tensor", "running", "token"),
    "quest": ("row", "token", "tensor"),
    "quest-fp4": COMPUTED,
    "lsq": ("tensor", "row"),
    "lsq-plus": ("tensor", "row"),
    "pact": ("tensor", "row"),
    "seq": ("tensor", "row"),
    "n2uq": COMPUTED,
    "n2uq-activations": ("tensor",),
    "nf": COMPUTED,
    "absmax": COMPUTED,
    "narrow": COMPUTED,
    "ternary": COMPUTED,
}
ONE_LEARNED_SCALE = ("lsq", "lsq-plus", "pact", "seq", "n2uq-activations")  # nothing to choose without rows


def arguments_of(method: str, group: str) -> dict[str, Any]:
    if group == "row":
        return {"rows": ROWS}
    return {} if method in ONE_LEARNED_SCALE else {METHODS[method].granularity_option: group}


# "method granularity" -> the arguments of its quantizer of a (6, C) matrix.
KINDS = {
    f"{method} {group}": arguments_of(method, group) for method in GRANULARITIES for group in GRANULARITIES[method]
}
KINDS |= {
    "bbq row, offset": {"rows": ROWS, "learn_offset": True},
    "bbq running, offset": {"rms": "running", "learn_offset": True},
    "lsq-plus row, offset": {"rows": ROWS, "asymmetric": True},
    "lsq-plus tensor, offset": {"asymmetric": True},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def method_of(kind: str) -> type[Quantizer]:
    return METHODS[kind.split()[0]]


def group_of(kind: str) -> str:
    return kind.split()[1].rstrip(",")


def width(kind: str, wanted: int) -> int:
    """The width nearest to `wanted` that the method has."""
    return min(method_of(kind).widths, key=lambda bits: abs(bits - wanted))


def build(kind: str, bits: int = 3, **options: Any) -> Quantizer:
    return make_quantizer(kind.split()[0], bits=width(kind, bits), **(KINDS[kind] | options))


def needs_calibration(kind: str) -> bool:
    return method_of(kind).scale_is_learned or group_of(kind) == "running"


def groups_are_apart(kind: str) -> bool:
    """Whether a row's values depend on that row alone, and not even on the trace of a NaN elsewhere."""
    of_its_own = method_of(kind).method == "bbq" or not method_of(kind).scale_is_learned
    return of_its_own and group_of(kind) in ("row", "token")


def test_every_method_is_here() -> None:
    assert GRANULARITIES.keys() == METHODS.keys()


def random_input(seed: int = 0, columns: int = 128) -> Tensor:
    return torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(seed))


def calibrated(kind: str, bits: int = 3, x: Tensor | None = None, **options: Any) -> Quantizer:
    q = build(kind, bits, **options)
    q.calibrate(random_input() if x is None else x)
    return q


def outlier(x: Tensor) -> Tensor:
    x = x.clone()
    x[1, 2] = 1e4
    return x


def drifted(q: Quantizer, generator: torch.Generator) -> Quantizer:
    """`q` after something like training: other parameters, other running statistics."""
    with torch.no_grad():
        for p in q.parameters():
            p.mul_(1 + 0.2 * torch.rand(p.shape, generator=generator)).add_(0.01)
    q.train()(torch.randn(ROWS, 128, generator=generator) * 3)
    return q


# Codes and values -------------------------------------------------------------------------------------------


@quick
@given(
    kind=st.sampled_from(list(KINDS)),
    bits=st.integers(1, 8),
    columns=st.sampled_from([1, 5, 16, 48]),
    shape=st.sampled_from(["normal", "outlier", "zeros", "constant", "tiny", "uniform"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    trained=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_decoding_the_codes_gives_the_values_of_evaluation(
    kind: str, bits: int, columns: int, shape: str, dtype: torch.dtype, trained: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, columns, generator=generator)
    x = {
        "normal": x,
        "outlier": torch.where(torch.arange(columns) == 0, 1e4, x),
        "zeros": 0 * x,
        "constant": torch.full_like(x, 0.37),
        "tiny": x * 1e-5,
        "uniform": torch.rand(ROWS, columns, generator=generator),
    }[shape].to(dtype)
    q = calibrated(kind, bits, x, rotation=16 if columns % 16 == 0 else None)
    if trained and columns % 16 == 0:
        drifted(q, generator)
    quantized, codes = q.eval().quantize(x), q.encode(x)
    assert codes.dtype == torch.uint8
    assert codes.shape == quantized.values.shape == quantized.codes.shape == x.shape
    assert int(codes.max()) < 2**q.bits
    assert quantized.codes.dtype == torch.int8
    assert torch.equal(quantized.codes.to(torch.int16) + 2 ** (q.bits - 1), codes.to(torch.int16))
    assert torch.equal(q.decode(codes, quantized.step), quantized.values)
    if group_of(kind) != "token" or method_of(kind).scale_is_learned:  # elsewhere the step is the input's own
        stored = q.decode(codes)
        torch.testing.assert_close(stored, quantized.values.to(stored.dtype), rtol=1e-6, atol=1e-12)
    assert quantized.values.isfinite().all()
    assert quantized.values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("method", METHODS)
def test_uniform_levels_are_codes_less_the_zero_point_and_tables_rise_from_end_to_end(method: str) -> None:
    for bits in METHODS[method].widths:
        q = make_quantizer(method, bits=bits)
        assert (q.bits, q.levels.dtype, q.levels.shape) == (bits, torch.float32, (2**bits,))
        if q.table is None:
            assert q.levels.tolist() == [code - 2 ** (bits - 1) - q.zero_point for code in range(2**bits)]
        else:
            assert (q.levels.diff() >= 0).all()
            assert q.levels.tolist() == pytest.approx(list(q.table), abs=1e-7)


@pytest.mark.parametrize("kind", ["nf row", "nf tensor", "quest-fp4 row"])
def test_tables_are_as_precise_as_the_input(kind: str) -> None:
    x = random_input().double()
    q = calibrated(kind, x=x).double()
    assert torch.equal(q.decode(q.encode(x), q.quantize(x).step), q(x))


def test_the_tables_are_the_published_ones() -> None:
    nf2, nf3, nf4 = (make_quantizer("nf", bits=bits).levels.tolist() for bits in (2, 3, 4))
    assert nf2 == pytest.approx([-1, 0, 0.435818, 1], abs=5e-7)
    assert nf3 == pytest.approx([-1, -0.535023, -0.246931, 0, 0.183337, 0.381994, 0.622986, 1], abs=5e-7)
    below = [-1, -0.696193, -0.525073, -0.394917, -0.284441, -0.184773, -0.091050, 0]
    above = [0.079580, 0.160930, 0.246112, 0.337915, 0.440710, 0.562617, 0.722957, 1]
    assert nf4 == pytest.approx(below + above, abs=5e-7)
    half = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert make_quantizer("quest-fp4", bits=4).levels.tolist() == [-v for v in reversed(half)] + half


@every_kind
def test_values_are_levels_times_step_plus_offset(kind: str) -> None:
    q = drifted(calibrated(kind, rotation=None), torch.Generator().manual_seed(0))
    quantized = q.quantize(random_input())
    levels = q.levels[quantized.codes.long() + 2 ** (q.bits - 1)]
    expected = levels * quantized.step
    if "offset" in kind:
        assert quantized.offset is not None
        assert quantized.offset.shape == q.scale.shape
        assert not quantized.offset.requires_grad
        assert quantized.offset.abs().min() > 0
        expected = expected + quantized.offset
    else:
        assert quantized.offset is None
    assert torch.equal(quantized.values, expected)
    assert (quantized.step > 0).all()
    assert quantized.step.shape == ((ROWS, 1) if group_of(kind) in ("row", "token") else (1,))
    assert not quantized.step.requires_grad


@pytest.mark.parametrize("group", COMPUTED)
def test_ternary_uses_three_of_its_four_codes(group: str) -> None:
    codes = calibrated(f"ternary {group}").encode(random_input() * torch.tensor([1e-3, 1e3] * 64))
    assert codes.unique().tolist() == [1, 2, 3]


@every_kind
def test_codes_grow_with_the_input(kind: str) -> None:
    x = torch.randn(ROWS, 64).sort(dim=1).values
    codes = calibrated(kind, 4, x, rotation=None).encode(x).long()
    assert (codes.diff(dim=1) >= 0).all()


@every_kind
def test_scales_and_buffers_are_never_without_dimensions(kind: str) -> None:
    q = build(kind, 2)
    assert q.scale.shape == ((ROWS, 1) if group_of(kind) == "row" else (1,))
    for name, tensor in q.state_dict().items():
        assert tensor.dim() >= 1, name
        assert tensor.numel() >= 1, name


@every_kind
def test_narrow_inputs_are_quantized_in_float32_and_get_narrow_gradients(kind: str) -> None:
    x = random_input().bfloat16().requires_grad_()
    q = calibrated(kind, 2, x.detach())
    y = q(x)
    assert y.dtype == torch.float32
    assert torch.equal(q.encode(x), q.encode(x.float()))  # what is stored narrowly is computed widely
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert x.grad.isfinite().all()


@every_kind
def test_the_training_forward_leaves_codes_of_evaluation_to_encode(kind: str) -> None:
    q = calibrated(kind).train()
    codes = q.encode(random_input(1))
    assert q.training
    assert torch.equal(codes, q.eval().encode(random_input(1)))


# Extreme inputs ---------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("training", [True, False])
def test_a_nan_shows_in_step_and_values(kind: str, training: bool) -> None:
    q = calibrated(kind).train(training)
    x = random_input()
    x[2, 5] = float("nan")
    quantized = q.quantize(x)
    assert quantized.step.expand(ROWS, 1)[2].isnan().all()
    assert quantized.values[2, 5].isnan()
    assert quantized.values[2].isnan().any()
    if groups_are_apart(kind):
        kept = [0, 1, 3, 4, 5]
        assert quantized.values[kept].isfinite().all()  # the other groups have nothing to do with it


@every_kind
@pytest.mark.parametrize("rotation", [128, None])
def test_an_infinity_shows_in_step_and_values(kind: str, rotation: int | None) -> None:
    x = random_input()
    for training, sign in itertools.product((True, False), (1, -1)):
        q = calibrated(kind, rotation=rotation).train(training)
        x[2, 5] = sign * float("inf")
        quantized = q.quantize(x)
        assert not quantized.step.expand(ROWS, 1)[2].isfinite().any()
        assert not quantized.values[2].isfinite().all()


@every_kind
@pytest.mark.parametrize("training", [True, False])
def test_zeros_give_finite_values_and_gradients(kind: str, training: bool) -> None:
    q = calibrated(kind).train(training)
    x = torch.zeros(ROWS, 128, requires_grad=True)
    y = q(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in q.parameters())
    assert all(tensor.isfinite().all() for tensor in q.state_dict().values())


@every_kind
def test_calibrating_on_zeros_gives_a_usable_scale(kind: str) -> None:
    q = calibrated(kind, 2, torch.zeros(ROWS, 128))
    assert (q.scale > 0).all()
    assert q(random_input()).isfinite().all()


@every_kind
def test_one_outlier_leaves_everything_finite(kind: str) -> None:
    x = outlier(random_input()).requires_grad_()
    q = calibrated(kind, 2)
    y = q(x)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if group_of(kind) != "row"])
def test_empty_tensors_pass_through(kind: str) -> None:
    for shape, training in itertools.product([(0, 128), (2, 0, 128), (3, 0)], [True, False]):
        q = calibrated(kind, 2).train(training)
        x = torch.empty(shape, requires_grad=True)
        quantized = q.quantize(x)
        quantized.values.sum().backward()
        assert quantized.values.shape == quantized.codes.shape == x.grad.shape == shape
        assert q.encode(x).shape == shape


def test_an_empty_tensor_has_no_entropy() -> None:
    with pytest.raises(ValueError, match=r"an empty tensor has no entropy"):
        calibrated("bbq tensor").entropy(torch.empty(0, 128))


def test_entropy_counts_codes() -> None:
    codes = torch.tensor([[0, 1, 2], [3, 3, 3]], dtype=torch.uint8)
    histogram = code_histogram(codes, 3)
    assert histogram.tolist() == [1, 1, 1, 3, 0, 0, 0, 0]
    assert entropy_of(histogram) == pytest.approx(1.792481250360578, abs=1e-12)
    assert entropy_of(torch.tensor([7, 0])) == 0.0


# Calibration and state --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if needs_calibration(kind)])
def test_use_before_calibration_is_refused_with_the_remedy(kind: str) -> None:
    q = build(kind, 2)
    x = random_input()
    codes = torch.zeros(ROWS, 4, dtype=torch.uint8)
    for use in (q, q.encode, q.quantize, q.entropy, lambda x: q.decode(codes)):
        with pytest.raises(RuntimeError, match=rf"this {q.method} quantizer has no scale yet: call bitbell.calibrate"):
            use(x)
    q.calibrate(x)
    assert q(x).isfinite().all()


@every_kind
def test_state_survives_a_round_trip(kind: str) -> None:
    x = random_input()
    q = drifted(calibrated(kind, 3, x), torch.Generator().manual_seed(1))
    fresh = build(kind, 3)
    assert not fresh.calibrated.item()
    fresh.load_state_dict(q.state_dict())
    assert fresh.calibrated.item()
    for mode in (True, False):
        assert torch.equal(fresh.train(mode).encode(x), q.train(mode).encode(x))
        assert torch.equal(fresh.eval()(x), q.eval()(x))


def test_the_running_average_is_part_of_the_state() -> None:
    assert "running_inverse_rms" in BBQ(2, rms="running").state_dict()
    assert "running_inverse_rms" not in BBQ(2, rms="tensor").state_dict()
    for method in (method for method, groups in GRANULARITIES.items() if groups == COMPUTED):
        assert "running_size" in build(f"{method} running").state_dict()
        assert "running_size" not in build(f"{method} tensor").state_dict()


@pytest.mark.parametrize("method", [method for method, groups in GRANULARITIES.items() if groups == COMPUTED])
def test_a_running_size_is_the_batchs_in_training_and_moves_by_a_hundredth(method: str) -> None:
    x, y = random_input().double(), 5 * random_input(1).double()
    q = calibrated(f"{method} running", x=x).double()
    start = q.running_size.clone()
    batch = build(f"{method} tensor").double()
    batch.calibrate(y)
    assert torch.equal(q(y), batch(y))
    torch.testing.assert_close(q.running_size, 0.99 * start + 0.01 * batch.scale, rtol=1e-6, atol=0)
    before = q.running_size.clone()
    for nothing in (torch.zeros(ROWS, 128), torch.full((ROWS, 128), float("nan")), torch.empty(0, 128)):
        q(nothing)
    q.eval()(y)
    assert torch.equal(q.running_size, before)
    assert torch.equal(q(y)[:1], q(y[:1]))  # evaluation knows the average alone, and not the rest of the batch


def test_loading_an_uncalibrated_state_makes_the_quantizer_uncalibrated() -> None:
    q = calibrated("bbq tensor")
    q(random_input())
    q.load_state_dict(BBQ(3).state_dict())
    with pytest.raises(RuntimeError, match=r"no scale yet"):
        q(random_input())


@every_kind
def test_quantizers_are_built_without_memory_on_the_meta_device(kind: str) -> None:
    with torch.device("meta"):
        q = build(kind, 2)
        y = q(torch.empty(ROWS, 128))
    assert all(tensor.is_meta for tensor in q.state_dict().values())
    assert (y.shape, y.is_meta) == ((ROWS, 128), True)
    real = calibrated(kind, 2)
    q.to_empty(device="cpu").load_state_dict(real.state_dict())
    assert torch.equal(q(random_input()), real(random_input()))


@every_kind
def test_a_deep_copy_is_equal_and_independent(kind: str) -> None:
    x = random_input()
    q = calibrated(kind).eval()
    twin = copy.deepcopy(q)
    assert torch.equal(twin(x), q(x))
    before = q(x).detach().clone()
    with torch.no_grad():
        twin.scale.mul_(2)
    assert torch.equal(q(x), before)


@every_kind
def test_calibration_twice_gives_the_same_as_once(kind: str) -> None:
    q = calibrated(kind)
    first = {name: tensor.clone() for name, tensor in q.state_dict().items()}
    q.calibrate(random_input())
    assert all(torch.equal(tensor, first[name]) for name, tensor in q.state_dict().items())
    assert q.scale.requires_grad == method_of(kind).scale_is_learned


@every_kind
def test_calibration_on_nothing_or_on_nan_is_refused(kind: str) -> None:
    q = build(kind, 2)
    with pytest.raises(ValueError, match=rf"cannot calibrate {q.method} on an empty tensor of shape \(6, 0\)"):
        q.calibrate(torch.zeros(ROWS, 0))
    for value in (float("nan"), float("inf")):
        message = rf"cannot calibrate {q.method} on a tensor with NaN or infinity of shape \(6, 128\)"
        with pytest.raises(ValueError, match=message):
            q.calibrate(torch.full((ROWS, 128), value))
    assert not q.calibrated.item()


SQUARES = ("bbq", "quest", "quest-fp4", "lsq-plus", "narrow", "n2uq-activations")  # start from a mean square


@pytest.mark.parametrize("kind", [kind for kind in KINDS if method_of(kind).method in SQUARES])
def test_a_calibration_that_overflows_is_refused_and_leaves_everything_as_it_was(kind: str) -> None:
    for options in ({}, {"start": 0.5}) if method_of(kind) is BBQ else ({},):
        q = calibrated(kind, **options)
        before = {name: tensor.clone() for name, tensor in q.state_dict().items()}
        with pytest.raises(ValueError, match=rf"cannot calibrate {q.method}: values up to 1e\+30 overflow"):
            q.calibrate(torch.full((ROWS, 128), 1e30))
        assert all(torch.equal(tensor, before[name]) for name, tensor in q.state_dict().items())
        assert q(random_input()).isfinite().all()


@every_kind
def test_options_rebuild_the_quantizer_through_json(kind: str) -> None:
    q = build(kind, 3, rotation=32)
    options = json.loads(json.dumps(q.options()))
    assert set(options) == set(known_options(type(q)))  # one that is missing would come back as its default
    again = make_quantizer(q.method, **options)
    assert type(again) is type(q)
    assert again.options() == q.options()
    assert repr(again) == repr(q)
    assert f"bits={width(kind, 3)}" in repr(q)
    again.load_state_dict(drifted(calibrated(kind, 3, rotation=32), torch.Generator().manual_seed(0)).state_dict())


# Wrong use --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [0, 9, -1, 2.0, True, "2", None])
def test_bits_that_no_method_has_are_refused(method: str, bits: Any) -> None:
    with pytest.raises(ValueError, match=rf"^bits must be .*, got bits={bits!r}$"):
        make_quantizer(method, bits=bits)


@pytest.mark.parametrize(
    ("method", "bits", "widths"),
    [
        ("bbq", 9, "an integer from 1 to 8 bits"),
        ("n2uq-activations", 0, "an integer from 1 to 8 bits"),
        ("nf", 1, "an integer from 2 to 4 bits for nf"),
        ("nf", 5, "an integer from 2 to 4 bits for nf"),
        ("narrow", 5, "an integer from 1 to 4 bits for narrow"),
        ("quest-fp4", 3, "4 bits for quest-fp4"),
        ("ternary", 1, "2 bits for ternary"),
        ("ternary", 3, "2 bits for ternary"),
    ],
)
def test_bits_that_a_method_lacks_are_refused_with_those_it_has(method: str, bits: int, widths: str) -> None:
    for argument in ("bits", "weights"):
        with pytest.raises(ValueError) as caught:
            check_bits(argument, METHODS[method], bits)
        assert str(caught.value) == f"{argument} must be {widths}, got {argument}={bits}"


@pytest.mark.parametrize("method", METHODS)
def test_rows_and_rotations_that_cannot_be_are_refused(method: str) -> None:
    bits = width(method, 2)
    if METHODS[method].for_weights:
        with pytest.raises(ValueError, match=r"rows must be positive or None \(one scale for the tensor\), got rows=0"):
            make_quantizer(method, bits=bits, rows=0)
    for rotation in (0, -2, 12):
        with pytest.raises(ValueError, match=rf"rotation must be a power of two or None, got rotation={rotation}"):
            make_quantizer(method, bits=bits, rotation=rotation)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if group_of(kind) == "row"])
def test_a_weight_of_other_rows_is_refused(kind: str) -> None:
    for shape in ((5, 128), (2, 6, 128), (6,)):
        q = build(kind)
        message = rf"this {q.method} quantizer was made for \(rows=6, columns\), got \({shape[0]}"
        with pytest.raises(ValueError, match=message):
            q.calibrate(torch.zeros(shape))
        q.calibrate(random_input())
        with pytest.raises(ValueError, match=message):
            q(torch.zeros(shape))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if group_of(kind) == "token" and kind != "bbq token"])
def test_decoding_tokens_needs_the_steps_of_the_input(kind: str) -> None:
    q = calibrated(kind)
    with pytest.raises(ValueError, match=r"has a step for each token: pass step=quantizer.quantize\(x\).step"):
        q.decode(q.encode(random_input()))


@pytest.mark.parametrize("method", [method for method, groups in GRANULARITIES.items() if groups == COMPUTED])
def test_a_granularity_that_cannot_be_is_refused(method: str) -> None:
    bits = width(method, 2)
    with pytest.raises(ValueError, match=r"granularity must be one of token, tensor, running; got granularity='row'"):
        make_quantizer(method, bits=bits, granularity="row")
    with pytest.raises(ValueError, match=r"granularity must not be given with rows: one scale a row; got granularity="):
        make_quantizer(method, bits=bits, rows=ROWS, granularity="token")


@pytest.mark.parametrize("method", ["bbq", "quest"])
def test_an_rms_of_rows_is_not_chosen(method: str) -> None:
    with pytest.raises(ValueError, match=r"rms must be left out with rows, which have an RMS each, got rms='token'"):
        make_quantizer(method, bits=2, rows=ROWS, rms="token")


@every_kind
def test_tensors_that_are_no_floats_are_refused(kind: str) -> None:
    q = calibrated(kind)
    dtypes = (torch.int8, torch.int64, torch.bool, torch.complex64)
    for use, dtype in itertools.product((q, q.encode, q.calibrate), dtypes):
        with pytest.raises(ValueError, match=rf"{q.method} quantizes float tensors, got {dtype}"):
            use(torch.zeros(ROWS, 128, dtype=dtype))


def test_a_number_without_dimensions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"quantizes the last dimension of a tensor, got one without dimensions"):
        calibrated("bbq tensor")(torch.tensor(1.0))


def test_a_width_that_the_rotation_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot rotate a last dimension of 100 in blocks of 128"):
        calibrated("bbq tensor")(torch.zeros(2, 100))


@pytest.mark.parametrize(
    ("name", "hint"), [("bqq", "Did you mean 'bbq'?"), ("QUEST", "Did you mean 'quest'?"), ("xyz", "")]
)
def test_an_unknown_method_is_refused_with_a_suggestion(name: str, hint: str) -> None:
    with pytest.raises(ValueError) as caught:
        find_method(name)
    known = ", ".join(sorted(METHODS))
    assert str(caught.value) == f"unknown method {name!r}; there are {known}.{' ' + hint if hint else ''}"


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"lsq has no option 'rms'; it has bits, rows, rotation"):
        make_quantizer("lsq", bits=2, rms="token")
    with pytest.raises(
        ValueError, match=r"absmax has no option 'zero_point'; it has bits, rows, granularity, rotation"
    ):
        make_quantizer("absmax", bits=2, zero_point=0.0)


@pytest.mark.parametrize(
    ("method", "option", "value", "wanted"),
    [
        *[
            ("bbq", "zero_point", value, "a number or none")
            for value in ("x", True, float("nan"), float("inf"), 10**400)
        ],
        ("bbq", "normalise", "maybe", "true or false"),
        ("bbq", "learn_scale", 0, "true or false"),
        ("bbq", "estimator", None, "a name"),
        ("bbq", "start", [1], "a number or none"),
        ("quest", "rms", 3, "a name or none"),
        ("quest", "mask_scale", "wide", "a number or none"),
        ("lsq-plus", "asymmetric", "yes", "true or false"),
        ("n2uq", "estimator", False, "a name"),
        ("absmax", "granularity", 1.0, "a name or none"),
        ("lsq", "rows", 2.0, "an integer or none"),
        ("lsq", "rotation", "128", "an integer or none"),
    ],
)
def test_an_option_of_another_type_is_refused(method: str, option: str, value: Any, wanted: str) -> None:
    with pytest.raises(ValueError) as caught:
        make_quantizer(method, bits=2, **{option: value})
    assert str(caught.value) == f"{option} of {method} must be {wanted}, got {option}={value!r}"


@pytest.mark.parametrize(
    ("method", "options"),
    [("bbq", {"estimator": "ste"}), ("quest", {"estimator": "bel"}), ("n2uq", {"estimator": "clip"})],
)
def test_an_unknown_estimator_is_refused_with_the_choice(method: str, options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=rf"estimator must be .*identity.*, got estimator='{options['estimator']}'"):
        make_quantizer(method, bits=2, **options)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_documents_its_source(method: str) -> None:
    module = inspect.getmodule(METHODS[method])
    assert module is not None
    assert "arXiv" in (module.__doc__ or "")


# Memory and compilation -------------------------------------------------------------------------------------


@every_kind
def test_the_backward_pass_keeps_one_float_input_int8_codes_and_small_things_only(kind: str) -> None:
    x = torch.randn(ROWS, 4096, requires_grad=True)
    q = calibrated(kind, 2, x.detach())
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        y = q(x)
    big = [t for t in kept.values() if t.numel() > 16]
    inputs = [t for t in big if t.dtype == x.dtype]
    masks = [t for t in big if t.dtype == torch.bool]
    # Of a weight, which is there anyway, x itself; BBQ keeps activations rotated instead; QuEST needs its mask only.
    assert (len(inputs), len(masks)) == ((0, 1) if method_of(kind).method == "quest" else (1, 0))
    assert all(t.shape == x.shape for t in inputs + masks)
    if inputs and (group_of(kind) == "row" or issubclass(method_of(kind), FormulaQuantizer)):
        assert inputs[0].data_ptr() == x.data_ptr()
    codes = [t for t in big if t.dtype not in (x.dtype, torch.bool)]
    assert all(t.dtype == torch.int8 and t.shape == x.shape for t in codes)
    assert len(codes) <= 1
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("method", METHODS)
def test_the_rotated_input_of_a_narrow_activation_is_kept_narrow(method: str) -> None:
    x = torch.randn(ROWS, 4096).bfloat16().requires_grad_()
    q = calibrated(f"{method} {GRANULARITIES[method][1 if 'row' in GRANULARITIES[method] else 0]}", 2)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        q(x)
    assert all(t.element_size() <= 2 for t in kept if t.numel() > 16)


# One granularity of each method, another for each, and what has code of its own.
COMPILED = [f"{method} {groups[i % len(groups)]}" for i, (method, groups) in enumerate(GRANULARITIES.items())]


@pytest.mark.parametrize("kind", [*COMPILED, "bbq running, offset", "lsq-plus tensor, offset", "absmax running"])
def test_quantizers_compile_into_one_graph_forward_and_backward(kind: str) -> None:
    """Traced and differentiated ahead of time; generated code is tested with the whole model."""
    torch._dynamo.reset()
    eager, traced = calibrated(kind).double(), calibrated(kind).double()
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    x = random_input(3).double()
    g = random_input(4).double()
    results = []
    for q in (eager, compiled):
        leaf = x.clone().requires_grad_()
        y = q(leaf)
        y.backward(g)
        results.append((y.detach(), leaf.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(traced.state_dict().values(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(traced.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


@every_kind
def test_a_model_in_bfloat16_keeps_scales_and_statistics_in_float32(kind: str) -> None:
    narrow, wide = build(kind).to(torch.bfloat16), build(kind).to(torch.float64)
    for q, dtype in ((narrow, torch.float32), (wide, torch.float64)):
        assert {t.dtype for t in q.state_dict().values()} == {dtype, torch.bool}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.endswith("running")])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(kind: str, reentrant: bool) -> None:
    plain, checkpointed = calibrated(kind).train(), calibrated(kind).train()
    results = []
    for q in (plain, checkpointed):
        x = (3 * random_input(3)).requires_grad_()
        y = q(x) if q is plain else torch.utils.checkpoint.checkpoint(q, x, use_reentrant=reentrant)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    assert all(map(torch.equal, *results))
    assert any(
        not torch.equal(t, before) for t, before in zip(plain.buffers(), calibrated(kind).buffers(), strict=True)
    )
    assert all(map(torch.equal, plain.state_dict().values(), checkpointed.state_dict().values()))
