"""What every quantizer promises, whatever the method: codes give the values, state survives, nothing fails silently."""

import copy
import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitbell.quantizers import (
    BBQ,
    LSQ,
    METHODS,
    Quantizer,
    QuEST,
    code_histogram,
    entropy_of,
    find_method,
    make_quantizer,
)

ROWS = 6
quick = settings(derandomize=True, max_examples=60, deadline=None)

# Every method at every granularity: bits -> quantizer of a (6, C) matrix.
KINDS: dict[str, Callable[..., Quantizer]] = {
    "bbq row": lambda bits, **o: BBQ(bits, rows=ROWS, **o),
    "bbq tensor": lambda bits, **o: BBQ(bits, rms="tensor", **o),
    "bbq running": lambda bits, **o: BBQ(bits, rms="running", **o),
    "bbq token": lambda bits, **o: BBQ(bits, rms="token", **o),
    "quest row": lambda bits, **o: QuEST(bits, rows=ROWS, **o),
    "quest token": lambda bits, **o: QuEST(bits, rms="token", **o),
    "quest tensor": lambda bits, **o: QuEST(bits, rms="tensor", **o),
    "lsq tensor": lambda bits, **o: LSQ(bits, **o),
    "lsq row": lambda bits, **o: LSQ(bits, rows=ROWS, **o),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
learned_kinds = pytest.mark.parametrize("kind", [kind for kind in KINDS if "quest" not in kind])


def random_input(seed: int = 0, columns: int = 128) -> Tensor:
    return torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(seed))


def calibrated(kind: str, bits: int = 3, x: Tensor | None = None, **options: Any) -> Quantizer:
    q = KINDS[kind](bits, **options)
    q.calibrate(random_input() if x is None else x)
    return q


def outlier(x: Tensor) -> Tensor:
    x = x.clone()
    x[1, 2] = 1e4
    return x


# Codes and values -------------------------------------------------------------------------------------------


@quick
@given(
    kind=st.sampled_from(list(KINDS)),
    bits=st.integers(1, 8),
    columns=st.sampled_from([1, 5, 16, 48]),
    shape=st.sampled_from(["normal", "outlier", "zeros", "constant", "tiny", "uniform"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_decoding_the_codes_gives_the_values_of_evaluation(
    kind: str, bits: int, columns: int, shape: str, dtype: torch.dtype, seed: int
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
    q = calibrated(kind, bits, x, rotation=16 if columns % 16 == 0 else None).eval()
    quantized, codes = q.quantize(x), q.encode(x)
    assert codes.dtype == torch.uint8
    assert codes.shape == quantized.values.shape == quantized.codes.shape == x.shape
    assert int(codes.max()) < 2**bits
    assert quantized.codes.dtype == torch.int8
    assert torch.equal(quantized.codes.to(torch.int16) + 2 ** (bits - 1), codes.to(torch.int16))
    assert torch.equal(q.decode(codes, quantized.step), quantized.values)
    if kind != "quest token":
        stored = q.decode(codes)
        torch.testing.assert_close(stored, quantized.values.to(stored.dtype), rtol=1e-6, atol=0)
    assert quantized.values.isfinite().all()
    assert quantized.values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@every_kind
@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_are_the_values_of_the_codes_in_units_of_the_step(kind: str, bits: int) -> None:
    q = KINDS[kind](bits)
    assert q.levels.dtype == torch.float32
    assert q.levels.tolist() == [code - 2 ** (bits - 1) - q.zero_point for code in range(2**bits)]
    assert q.bits == bits


@every_kind
def test_values_are_levels_times_step(kind: str) -> None:
    x = random_input()
    quantized = calibrated(kind).quantize(x)
    levels = quantized.codes.float() - KINDS[kind](3).zero_point
    assert torch.equal(quantized.values, levels * quantized.step)
    assert (quantized.step > 0).all()
    assert quantized.step.dim() >= 1


@every_kind
def test_codes_grow_with_the_input(kind: str) -> None:
    x = torch.randn(ROWS, 64).sort(dim=1).values
    codes = calibrated(kind, 4, x, rotation=None).encode(x).long()
    assert (codes.diff(dim=1) >= 0).all()


@every_kind
def test_scales_and_buffers_are_never_without_dimensions(kind: str) -> None:
    q = KINDS[kind](2)
    assert q.scale.shape == ((ROWS, 1) if "row" in kind else (1,))
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
    if ("row" in kind and "lsq" not in kind) or "token" in kind:
        kept = [0, 1, 3, 4, 5]
        assert quantized.values[kept].isfinite().all()  # the other groups have nothing to do with it


@every_kind
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_infinity_shows_in_the_values_when_the_input_is_rotated(kind: str, training: bool, sign: int) -> None:
    q = calibrated(kind, rotation=128).train(training)
    x = random_input()
    x[2, 5] = sign * float("inf")
    quantized = q.quantize(x)
    assert not quantized.step.expand(ROWS, 1)[2].isfinite().any()
    assert not quantized.values[2].isfinite().all()


@pytest.mark.parametrize("rms", ["tensor", "token"])
def test_an_infinity_shows_in_the_step_of_bbq_without_rotation(rms: str) -> None:
    q = BBQ(2, rms=rms, rotation=None)
    q.calibrate(random_input())
    x = random_input()
    x[2, 5] = float("inf")
    assert q.quantize(x).step.expand(ROWS, 1)[2].isnan().all()


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


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "row" not in kind])
@pytest.mark.parametrize("shape", [(0, 128), (2, 0, 128), (3, 0)])
@pytest.mark.parametrize("training", [True, False])
def test_empty_tensors_pass_through(kind: str, shape: tuple[int, ...], training: bool) -> None:
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


@learned_kinds
def test_use_before_calibration_is_refused_with_the_remedy(kind: str) -> None:
    q = KINDS[kind](2)
    x = random_input()
    for use in (q, q.encode, q.quantize, q.entropy, lambda x: q.decode(torch.zeros(ROWS, 4, dtype=torch.uint8))):
        with pytest.raises(RuntimeError, match=rf"this {q.method} quantizer has no scale yet: call bitbell.calibrate"):
            use(x)
    q.calibrate(x)
    assert q(x).isfinite().all()


@every_kind
def test_state_survives_a_round_trip(kind: str) -> None:
    x = random_input()
    q = calibrated(kind, 3, x)
    q(2 * x)  # moves a running average
    fresh = KINDS[kind](3)
    assert not fresh.calibrated.item()
    fresh.load_state_dict(q.state_dict())
    assert fresh.calibrated.item()
    for mode in (True, False):
        assert torch.equal(fresh.train(mode).encode(x), q.train(mode).encode(x))
        assert torch.equal(fresh.eval()(x), q.eval()(x))


def test_the_running_average_is_part_of_the_state() -> None:
    assert "running_inverse_rms" in BBQ(2, rms="running").state_dict()
    assert "running_inverse_rms" not in BBQ(2, rms="tensor").state_dict()


def test_loading_an_uncalibrated_state_makes_the_quantizer_uncalibrated() -> None:
    q = calibrated("bbq tensor")
    q(random_input())
    q.load_state_dict(BBQ(3).state_dict())
    with pytest.raises(RuntimeError, match=r"no scale yet"):
        q(random_input())


@every_kind
def test_quantizers_are_built_without_memory_on_the_meta_device(kind: str) -> None:
    with torch.device("meta"):
        q = KINDS[kind](2)
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
    assert q.scale.requires_grad == ("quest" not in kind)


@every_kind
@pytest.mark.parametrize(
    ("x", "what"),
    [
        (torch.zeros(ROWS, 0), r"an empty tensor of shape \(6, 0\)"),
        (torch.full((ROWS, 128), float("nan")), r"a tensor with NaN or infinity of shape \(6, 128\)"),
        (torch.full((ROWS, 128), float("inf")), r"a tensor with NaN or infinity of shape \(6, 128\)"),
    ],
)
def test_calibration_on_nothing_or_on_nan_is_refused(kind: str, x: Tensor, what: str) -> None:
    q = KINDS[kind](2)
    method = kind.split()[0]
    with pytest.raises(ValueError, match=rf"cannot calibrate {method} on {what}"):
        q.calibrate(x)
    assert not q.calibrated.item()


@every_kind
def test_options_rebuild_the_quantizer_through_json(kind: str) -> None:
    q = KINDS[kind](3, rotation=32)
    options = json.loads(json.dumps(q.options()))
    again = make_quantizer(q.method, **options)
    assert type(again) is type(q)
    assert again.options() == q.options()
    assert repr(again) == repr(q)
    assert "bits=3" in repr(q)


# Wrong use --------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("bits", [0, 9, -1, 2.0, True, "2", None])
def test_bits_outside_one_to_eight_are_refused(kind: str, bits: Any) -> None:
    with pytest.raises(ValueError, match=r"bits must be an integer from 1 to 8, got bits="):
        KINDS[kind](bits)


@pytest.mark.parametrize("method", METHODS)
def test_rows_and_rotations_that_cannot_be_are_refused(method: str) -> None:
    with pytest.raises(ValueError, match=r"rows must be positive or None \(one scale for the tensor\), got rows=0"):
        make_quantizer(method, bits=2, rows=0)
    for rotation in (0, -2, 12):
        with pytest.raises(ValueError, match=rf"rotation must be a power of two or None, got rotation={rotation}"):
            make_quantizer(method, bits=2, rotation=rotation)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(5, 128), (2, 6, 128), (6,)])
def test_a_weight_of_other_rows_is_refused(method: str, shape: tuple[int, ...]) -> None:
    q = make_quantizer(method, bits=2, rows=ROWS)
    message = rf"this {method} quantizer was made for \(rows=6, columns\), got \({shape[0]}"
    with pytest.raises(ValueError, match=message):
        q.calibrate(torch.zeros(shape))
    q.calibrate(random_input())
    with pytest.raises(ValueError, match=message):
        q(torch.zeros(shape))


@every_kind
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_tensors_that_are_no_floats_are_refused(kind: str, dtype: torch.dtype) -> None:
    q = calibrated(kind)
    for use in (q, q.encode, q.calibrate):
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
    assert str(caught.value) == f"unknown method {name!r}; there are bbq, lsq, quest.{' ' + hint if hint else ''}"


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"lsq has no option 'rms'; it has bits, rows, rotation"):
        make_quantizer("lsq", bits=2, rms="token")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_documents_its_source(method: str) -> None:
    module = inspect.getmodule(METHODS[method])
    assert module is not None
    assert "arXiv" in (module.__doc__ or "")


# Memory and compilation -------------------------------------------------------------------------------------


@every_kind
def test_the_backward_pass_keeps_the_input_int8_codes_and_small_things_only(kind: str) -> None:
    x = torch.randn(ROWS, 4096, requires_grad=True)
    q = calibrated(kind, 2, x.detach())
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = q(x)
    extra = [t for t in kept if t.data_ptr() != x.data_ptr()]
    assert all(t.dtype == torch.int8 or t.numel() <= ROWS for t in extra)
    assert sum(t.numel() * t.element_size() for t in extra) <= x.numel() + 16 * ROWS
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kind", ["bbq row", "bbq running", "quest token", "lsq tensor"])
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


def test_a_model_in_bfloat16_keeps_scales_and_statistics_in_float32() -> None:
    q = BBQ(bits=2, rms="running").to(torch.bfloat16)
    assert q.scale.dtype == q.running_inverse_rms.dtype == torch.float32
    assert BBQ(bits=2, rows=4).to(torch.float64).scale.dtype == torch.float64
