"""BBQ against its paper: thresholds, levels, entropy, initial scale; its gradient against autograd of the formula."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitbell.layers import Recipe
from bitbell.quantizers import BBQ, entropy_of

THRESHOLDS = {  # of the paper: the quantiles of a normal at i / 2**bits, upper half
    1: [0.0],
    2: [0.0, 0.6744898],
    3: [0.0, 0.3186394, 0.6744898, 1.1503494],
    4: [0.0, 0.1573107, 0.3186394, 0.4887764, 0.6744898, 0.8871466, 1.1503494, 1.5341205],
}
GROUPS = ("row", "tensor", "token")
quick = settings(derandomize=True, max_examples=40, deadline=None)


def sylvester(order: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix / math.sqrt(order)


def plain_bbq(x: Tensor, scale: Tensor, bits: int, z: float, group: str, rotation: int | None) -> Tensor:
    """The formula as the paper prints it, float64, straight through the rounding; autograd does the rest."""
    h = x if rotation is None else x @ torch.block_diag(*[sylvester(rotation)] * (x.shape[-1] // rotation))
    sigma = h.square().mean().sqrt() if group == "tensor" else h.square().mean(-1, keepdim=True).sqrt()
    n = 2**bits
    place = n * torch.special.ndtr(h / sigma) - 0.5
    k = place + (place.round().clamp(0, n - 1) - place).detach()
    damping = 1 / math.sqrt(x.numel())
    damped = scale * damping + (scale - scale * damping).detach()
    return damped / 2 ** (bits - 1) * (k - n / 2 - z)


def make(bits: int, group: str = "tensor", rows: int | None = None, **options: object) -> BBQ:
    """A float64 quantizer, in training mode."""
    if group == "row":
        return BBQ(bits, rows=rows, **options).double()
    return BBQ(bits, rms=group, **options).double()


def unit_rms_quantizer(bits: int, **options: object) -> BBQ:
    """A quantizer whose statistics are frozen at one, so that v = x."""
    q = BBQ(bits, rms="running", rotation=None, **options).double().eval()
    q.calibrated.fill_(True)
    return q


# Forward ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_codes_change_at_the_published_thresholds(bits: int) -> None:
    upper = THRESHOLDS[bits]
    thresholds = torch.tensor(sorted({-t for t in upper} | set(upper)), dtype=torch.float64)
    q = unit_rms_quantizer(bits)
    assert q.encode(thresholds - 1e-6).tolist() == list(range(2**bits - 1))
    assert q.encode(thresholds + 1e-6).tolist() == list(range(1, 2**bits))


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_change_exactly_at_the_quantiles_of_a_normal(bits: int) -> None:
    thresholds = torch.special.ndtri(torch.arange(1, 2**bits, dtype=torch.float64) / 2**bits)
    q = unit_rms_quantizer(bits)
    assert q.encode(thresholds - 1e-9).tolist() == list(range(2**bits - 1))
    assert q.encode(thresholds + 1e-9).tolist() == list(range(1, 2**bits))


@pytest.mark.parametrize("bits", range(1, 9))
def test_ten_standard_deviations_stay_inside_the_codes(bits: int) -> None:
    codes = unit_rms_quantizer(bits).encode(torch.linspace(-10, 10, 20_001, dtype=torch.float64))
    assert codes.unique().tolist() == list(range(2**bits))
    far = unit_rms_quantizer(bits).encode(torch.tensor([-1e30, -40.0, 40.0, 1e30], dtype=torch.float64))
    assert far.tolist() == [0, 0, 2**bits - 1, 2**bits - 1]


@pytest.mark.parametrize(
    ("bits", "zero_point", "levels"),
    [
        (1, None, [-0.5, 0.5]),
        (2, None, [-1.5, -0.5, 0.5, 1.5]),
        (3, None, [-4, -3, -2, -1, 0, 1, 2, 3]),
        (3, -0.5, [-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5]),
        (4, None, list(range(-8, 8))),
        (2, 0.25, [-2.25, -1.25, -0.25, 0.75]),
    ],
)
def test_levels_are_the_papers(bits: int, zero_point: float | None, levels: list[float]) -> None:
    q = BBQ(bits, zero_point=zero_point)
    assert q.levels.tolist() == levels
    assert q.zero_point == (zero_point if zero_point is not None else (-0.5 if bits <= 2 else 0.0))


@quick
@given(
    bits=st.integers(1, 8),
    group=st.sampled_from(GROUPS),
    rotation=st.sampled_from([None, 16, 32]),
    rows=st.integers(1, 5),
    blocks=st.integers(1, 3),
    z=st.sampled_from([None, -0.5, 0.0, 0.3]),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients_are_those_of_the_plain_formula(
    bits: int, group: str, rotation: int | None, rows: int, blocks: int, z: float | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    columns = blocks * (rotation or 7)
    x = torch.randn(rows, columns, dtype=torch.float64, generator=generator) * 3
    q = make(bits, group, rows, rotation=rotation, zero_point=z)
    q.calibrate(x)
    with torch.no_grad():
        q.scale.mul_(0.5 + torch.rand(q.scale.shape, generator=generator))
    g = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = q(ours)
    y.backward(g)
    scale = q.scale.detach().clone().requires_grad_()
    plain = plain_bbq(theirs, scale, bits, q.zero_point, group, rotation)
    plain.backward(g)
    torch.testing.assert_close(y, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(q.scale.grad, scale.grad, rtol=1e-10, atol=1e-12)


# Ablations --------------------------------------------------------------------------------------------------


def masked_where(h: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """`values`, with the gradient of h where the mask holds."""
    return h * mask + (values - h * mask).detach()


CLIPS = {1: 0.7978845608, 2: 1.4935346, 3: 2.0510684, 4: 2.5139306}  # QuEST's, in standard deviations


def window(estimator: str, bits: int) -> float:
    """Up to where a masked estimator passes the gradient, in units of the RMS."""
    n = 2**bits
    if estimator == "trust":
        return CLIPS[bits] * n / (n - 1)
    if bits == 1:
        return 2.0
    outermost, inner = (torch.special.ndtri(torch.tensor(1 - i / n, dtype=torch.float64)).item() for i in (1, 2))
    return outermost + (outermost - inner)


def plain_ablation(x: Tensor, scale: Tensor, offset: Tensor | None, q: BBQ, group: str) -> Tensor:
    """BBQ with its options, float64, by autograd."""
    rotated = q.rotation is not None
    h = x @ torch.block_diag(*[sylvester(q.rotation)] * (x.shape[-1] // q.rotation)) if rotated else x
    axis = None if group == "tensor" else -1
    sigma = h.square().mean(axis, keepdim=axis is not None).sqrt() if q.normalise else torch.ones((), dtype=h.dtype)
    v = h / (sigma if q.rms_gradient else sigma.detach())
    n, damping = 2**q.bits, 1 / math.sqrt(x.numel())
    place = n * torch.special.ndtr(v) - 0.5
    code = place.round().clamp(0, n - 1).detach()
    damped = scale * damping + (scale - scale * damping).detach()
    if q.estimator == "bell":
        values = damped / (n / 2) * (place + (code - place).detach() - n / 2 - q.zero_point)
        if q.restore_rms:
            values = values * (sigma if q.rms_gradient else sigma.detach())
    else:
        inside = v.detach().abs() <= (math.inf if q.estimator == "identity" else window(q.estimator, q.bits))
        values = damped / (n / 2) * (code - n / 2 - q.zero_point) * (sigma.detach() if q.restore_rms else 1)
        values = values + (masked_where(h, h, inside) - h.detach())
    return values if offset is None else values + offset * damping + (offset - offset * damping).detach()


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    bits=st.integers(1, 4),
    group=st.sampled_from(GROUPS),
    rotation=st.sampled_from([None, 16, 32]),
    normalise=st.booleans(),
    estimator=st.sampled_from(["bell", "trust", "clip", "identity"]),
    rms_gradient=st.booleans(),
    learn_scale=st.booleans(),
    learn_offset=st.booleans(),
    start=st.sampled_from([None, 0.7]),
    restore_rms=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_ablations_are_those_of_the_plain_formula(
    bits: int, group: str, rotation: int | None, seed: int, start: float | None, **options: bool | str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 2 * (rotation or 9), dtype=torch.float64, generator=generator) * 1.5
    q = make(bits, group, 4, rotation=rotation, start=start, **options)
    q.calibrate(x)
    in_units_of_rms = options["restore_rms"] and options["normalise"]
    expected_start = 1.694 * (1 if in_units_of_rms else x.square().mean().sqrt()) if start is None else start
    torch.testing.assert_close(q.scale.detach(), torch.ones_like(q.scale) * expected_start, rtol=1e-12, atol=0)
    assert (q.offset is not None) == options["learn_offset"]
    with torch.no_grad():
        q.scale.mul_(0.5 + torch.rand(q.scale.shape, generator=generator))
        if q.offset is not None:
            assert float(q.offset.abs().max()) == 0
            q.offset.copy_(torch.randn(q.offset.shape, generator=generator))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    g = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    y = q(ours)
    y.backward(g)
    scale = q.scale.detach().clone().requires_grad_()
    offset = None if q.offset is None else q.offset.detach().clone().requires_grad_()
    plain = plain_ablation(theirs, scale, offset, q, group)
    plain.backward(g)
    torch.testing.assert_close(y, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    if options["learn_scale"]:
        torch.testing.assert_close(q.scale.grad, scale.grad, rtol=1e-10, atol=1e-12)
    else:
        assert q.scale.grad is None
        assert not q.scale.requires_grad
    if offset is not None:
        torch.testing.assert_close(q.offset.grad, offset.grad, rtol=1e-10, atol=1e-12)


# BBQ-Vision -------------------------------------------------------------------------------------------------


@quick
@given(
    bits=st.integers(1, 4),
    shape=st.sampled_from([(3, 64), (2, 3, 32)]),
    learned=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_bbq_vision_is_the_published_formula(bits: int, shape: tuple[int, ...], learned: bool, seed: int) -> None:
    """gamma sigma q / 2**(bits-1), sigma over the last dimension and differentiated in both places."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x *= torch.arange(1, x.shape[-2] + 1)[:, None]  # groups of different sizes
    q = Recipe.parse(f"bbq-vision-w{bits}a{bits}:learn_scale={learned}").quantizers_for(3, 32)
    weights, activations = q[0].double(), q[1].double()
    quantizer = activations if x.dim() == 3 else weights
    quantizer.calibrate(x)
    assert quantizer.scale.flatten().tolist() == [pytest.approx(2.45)] * quantizer.scale.numel()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    h = theirs @ torch.block_diag(*[sylvester(32)] * (x.shape[-1] // 32))
    sigma, n, z = h.square().mean(-1, keepdim=True).sqrt(), 2**bits, quantizer.zero_point
    place = n * torch.special.ndtr(h / sigma) - 0.5
    k = place + (place.round().clamp(0, n - 1) - place).detach()
    gamma = quantizer.scale.detach().clone().requires_grad_()
    expected = gamma * sigma * (k - n / 2 - z) / 2 ** (bits - 1)
    g = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    y = quantizer(ours)
    y.backward(g)
    expected.backward(g)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-11)
    if learned:
        torch.testing.assert_close(quantizer.scale.grad * math.sqrt(x.numel()), gamma.grad, rtol=1e-10, atol=1e-11)
    else:
        assert quantizer.scale.grad is None


def test_a_restored_rms_makes_values_as_large_as_the_input() -> None:
    x = torch.randn(4, 128) * torch.tensor([[1e-3], [1], [30], [0]])
    for factor in (1.0, 7.0):
        q = BBQ(2, rows=4, restore_rms=True)
        q.calibrate(x)
        torch.testing.assert_close(q(factor * x), factor * q(x), rtol=1e-5, atol=1e-7)
        assert torch.isfinite(q(x)).all()
    with pytest.raises(ValueError, match=r"the step of bbq with restore_rms holds .* pass step="):
        q.decode(q.encode(x))
    assert torch.equal(q.decode(q.encode(x), q.quantize(x).step), q(x))
    running = BBQ(2, rms="running", restore_rms=True)
    running.calibrate(x)
    running.eval()
    assert torch.equal(running.decode(running.encode(x)), running(x))
    assert not torch.isfinite(q(torch.full((4, 128), torch.nan))).any()


@pytest.mark.parametrize(("bits", "clip"), [(1, 2.0), (2, 1.3489795), (3, 1.6262094), (4, 1.9178917)])
def test_the_clip_estimator_cuts_off_one_bin_beyond_the_outermost_threshold(bits: int, clip: float) -> None:
    assert window("clip", bits) == pytest.approx(clip, abs=1e-6)
    x = torch.tensor([-9, -clip - 1e-5, -clip + 1e-5, 0, clip - 1e-5, clip + 1e-5, 9], dtype=torch.float64)
    x.requires_grad_()
    unit_rms_quantizer(bits, estimator="clip")(x).sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 1, 1, 0, 0]


def test_estimators_differ_in_the_gradient_alone() -> None:
    x, g = torch.randn(6, 128), torch.randn(6, 128)
    values, gradients = [], []
    for estimator in ("bell", "trust", "clip", "identity"):
        q, leaf = BBQ(2, estimator=estimator), x.clone().requires_grad_()
        q.calibrate(x)
        y = q(leaf)
        y.backward(g)
        values.append((y.detach(), q.scale.grad))
        gradients.append(leaf.grad)
    for other in values[1:]:
        assert torch.equal(other[0], values[0][0])
        assert torch.equal(other[1], values[0][1])
    assert all(not torch.equal(a, b) for i, a in enumerate(gradients) for b in gradients[:i])


def test_without_its_rms_a_quantizer_answers_to_the_size_of_its_input() -> None:
    x = torch.randn(4, 128)
    for rms in ("tensor", "running", "token"):
        q = BBQ(4, rms=rms, normalise=False)
        q.calibrate(x)
        for mode in (True, False):
            assert not torch.equal(q.train(mode).encode(x), q.encode(3 * x))
            assert torch.equal(q.encode(x)[:1], q.encode(x[:1]))  # and to nothing but itself
    q = BBQ(3, normalise=False, rotation=None)
    q.calibrate(x)
    thresholds = torch.special.ndtri(torch.arange(1, 8, dtype=torch.float64) / 8)
    assert q.encode(thresholds - 1e-9).tolist() == list(range(7))
    assert q.encode(thresholds + 1e-9).tolist() == list(range(1, 8))


def test_a_scale_that_is_not_learned_stays_a_parameter_of_the_state() -> None:
    q = BBQ(2, rows=3, learn_scale=False)
    assert "scale" in q.state_dict()
    q.calibrate(torch.randn(3, 128))
    q(torch.randn(3, 128, requires_grad=True)).sum().backward()
    assert q.scale.grad is None
    assert not BBQ(**q.options()).scale.requires_grad


def test_narrow_activations_lose_no_more_than_the_rounding_of_what_is_kept() -> None:
    x, g = torch.randn(64, 256).bfloat16(), torch.randn(64, 256)
    for estimator in ("bell", "identity"):
        narrow, wide = x.clone().requires_grad_(), x.float().requires_grad_()
        q, twin = (BBQ(4, rms="token", estimator=estimator) for _ in range(2))
        for quantizer, leaf in ((q, narrow), (twin, wide)):
            quantizer.calibrate(x)
            y = quantizer(leaf)
            y.backward(g)
        assert torch.equal(q(narrow), twin(wide))
        assert torch.equal(q.scale.grad, twin.scale.grad)
        assert (narrow.grad.float() - wide.grad).norm() < 0.005 * wide.grad.norm()


# The gradient -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(128,), (3, 128), (2, 3, 256), (2, 1, 3, 128)])
@pytest.mark.parametrize("group", ["tensor", "token"])
def test_activations_of_any_rank_agree_with_the_formula(shape: tuple[int, ...], group: str) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    q = make(3, group)
    q.calibrate(x)
    (ours,) = torch.autograd.grad(q(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(plain_bbq(x, q.scale, 3, 0.0, group, 128).square().sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_the_gradient_of_a_group_is_the_written_out_formula() -> None:
    x, g = torch.randn(4, 32, dtype=torch.float64, requires_grad=True), torch.randn(4, 32, dtype=torch.float64)
    q = make(2, "row", 4, rotation=32)
    q.calibrate(x)
    q(x).backward(g)
    h = x.detach() @ sylvester(32)
    sigma = h.square().mean(1, keepdim=True).sqrt()
    v = h / sigma
    u = 2 * q.scale.detach() * torch.exp(-v * v / 2) / math.sqrt(2 * math.pi) * g
    by_hand = (u - v * (u * v).mean(1, keepdim=True)) / sigma @ sylvester(32).T
    torch.testing.assert_close(x.grad, by_hand, rtol=0, atol=1e-13)


@pytest.mark.parametrize("group", GROUPS)
def test_the_gradient_is_orthogonal_to_the_input_in_every_group(group: str) -> None:
    x = torch.randn(6, 128, dtype=torch.float64, requires_grad=True)
    q = make(2, group, 6)
    q.calibrate(x)
    q(x).backward(torch.randn(6, 128, dtype=torch.float64))
    radial = (x.detach() * x.grad).sum(None if group == "tensor" else 1)
    assert radial.abs().max() < 1e-13
    assert x.grad.norm() > 0.1


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("factor", [1e-3, 0.5, 3.7, 1e4])
def test_values_do_not_change_when_the_input_is_scaled(factor: float, dtype: torch.dtype, limit: float) -> None:
    x = torch.randn(8, 256, dtype=torch.float64)
    for group in GROUPS:
        q = make(4, group, 8).to(dtype)
        q.calibrate(x.to(dtype))
        same = (q(x.to(dtype)) - q((x * factor).to(dtype))).abs() <= limit * q.scale.max()
        assert same.double().mean() >= (1 if dtype == torch.float64 else 0.999)  # float32 may fall across a threshold


def test_the_scale_gradient_is_damped_by_the_root_of_all_elements() -> None:
    x, g = torch.randn(5, 64, dtype=torch.float64), torch.randn(5, 64, dtype=torch.float64)
    for group, rows in (("row", 5), ("tensor", None)):
        q = make(3, group, rows, rotation=64)
        q.calibrate(x)
        q(x).backward(g)
        levels = q.levels.double()[q.encode(x).long()]
        per_row = (g * levels).sum(1, keepdim=True) / 2**2 / math.sqrt(5 * 64)
        expected = per_row if group == "row" else per_row.sum().reshape(1)
        torch.testing.assert_close(q.scale.grad, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(q(x), levels * q.scale / 4, rtol=1e-15, atol=0)  # damping leaves the value alone


def test_no_gradient_is_computed_that_is_not_asked_for() -> None:
    x = torch.randn(4, 128)
    q = BBQ(2)
    q.calibrate(x)
    q(x).sum().backward()
    assert q.scale.grad is not None
    q.scale.requires_grad_(False)
    assert not q(x).requires_grad
    x.requires_grad_()
    q.scale.grad = None
    q(x).sum().backward()
    assert q.scale.grad is None
    assert x.grad is not None


# Initial scale, entropy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_the_scale_starts_at_1_694_times_the_rms_of_the_whole_tensor(bits: int) -> None:
    w = torch.randn(6, 256, dtype=torch.float64) * torch.arange(1, 7)[:, None]
    expected = 1.694 * w.square().mean().sqrt()
    for q in (make(bits, "row", 6), make(bits), make(bits, "token"), make(bits, "running")):
        q.calibrate(w)
        torch.testing.assert_close(q.scale.detach(), expected.expand(q.scale.shape), rtol=1e-12, atol=0)
        assert q.scale.shape == ((6, 1) if q.rows else (1,))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_gaussian_rows_use_every_code_equally_often(bits: int) -> None:
    w = torch.randn(1600, 640, generator=torch.Generator().manual_seed(bits))
    q = BBQ(bits, rows=1600)
    q.calibrate(w)
    assert bits - 1e-4 <= q.entropy(w) <= bits


def test_entropy_is_that_of_the_codes() -> None:
    q = unit_rms_quantizer(2)
    assert q.entropy(torch.tensor([-2.0, -0.1, 0.1, 2.0], dtype=torch.float64)) == 2.0
    assert q.entropy(torch.tensor([1.0, 1.0], dtype=torch.float64)) == 0.0
    assert entropy_of(torch.tensor([3, 1, 0, 0])) == pytest.approx(0.25 * 2 + 0.75 * math.log2(4 / 3), abs=1e-15)


# BBQ-Fast ---------------------------------------------------------------------------------------------------


def test_the_running_average_starts_at_the_calibration_batch_and_moves_by_a_hundredth() -> None:
    q = make(2, "running")
    batches = [torch.randn(3, 128, dtype=torch.float64) * size for size in (1, 2, 5)]
    q.calibrate(batches[0])
    expected = 1 / batches[0].square().mean().sqrt()
    assert q.running_inverse_rms.item() == pytest.approx(expected.item(), rel=1e-12)
    for batch in batches:
        q(batch)
        expected = 0.99 * expected + 0.01 / batch.square().mean().sqrt()
        assert q.running_inverse_rms.item() == pytest.approx(expected.item(), rel=1e-12)


def test_in_training_bbq_fast_gives_exactly_what_bbq_gives() -> None:
    x = torch.randn(4, 128)
    outputs, gradients = [], []
    for rms in ("tensor", "running"):
        q, leaf = BBQ(2, rms=rms), x.clone().requires_grad_()
        q.calibrate(x[:1])
        y = q(leaf)
        y.square().sum().backward()
        outputs.append(y.detach())
        gradients.append((leaf.grad, q.scale.grad))
    assert torch.equal(*outputs)
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_evaluation_depends_on_the_buffer_alone() -> None:
    x = torch.randn(6, 3, 128)
    q = BBQ(3, rms="running")
    q.calibrate(x)
    q.eval()
    together = q(x)
    for i in range(6):
        assert torch.equal(q(x[i : i + 1])[0], together[i])
    before = q.running_inverse_rms.clone()
    assert torch.equal(q.running_inverse_rms, before)  # evaluation does not move it
    q.running_inverse_rms.mul_(2)
    assert torch.equal(q(x / 2), together)


def test_in_evaluation_the_gradient_treats_the_running_rms_as_a_constant() -> None:
    x, g = torch.randn(3, 64, dtype=torch.float64, requires_grad=True), torch.randn(3, 64, dtype=torch.float64)
    q = make(2, "running", rotation=64).eval()
    q.calibrate(x.detach() * 2)
    q(x).backward(g)
    inverse = q.running_inverse_rms.item()
    v = x.detach() @ sylvester(64) * inverse
    slope = 2 * q.scale.item() * inverse * torch.exp(-v * v / 2) / math.sqrt(2 * math.pi)
    torch.testing.assert_close(x.grad, (slope * g) @ sylvester(64), rtol=0, atol=1e-12)


def codes_of_first_token_depend_on_the_last(q: BBQ) -> bool:
    x = torch.randn(1, 8, 128, generator=torch.Generator().manual_seed(0))
    q.calibrate(x)
    q.eval()
    changed = x.clone()
    changed[:, -1] *= 20
    return not torch.equal(q.encode(x)[:, :-1], q.encode(changed)[:, :-1])


def test_the_rms_of_the_whole_tensor_lets_later_tokens_into_earlier_codes_and_the_others_do_not() -> None:
    assert codes_of_first_token_depend_on_the_last(BBQ(4, rms="tensor"))
    assert not codes_of_first_token_depend_on_the_last(BBQ(4, rms="running"))
    assert not codes_of_first_token_depend_on_the_last(BBQ(4, rms="token"))


@pytest.mark.parametrize(
    "batch",
    [torch.zeros(2, 128), torch.zeros(0, 128), torch.full((2, 128), float("nan")), torch.full((2, 128), 1e30)],
)
def test_a_batch_that_says_nothing_leaves_the_running_average_alone(batch: Tensor) -> None:
    q = BBQ(2, rms="running")
    q.calibrate(torch.randn(4, 128))
    before = q.running_inverse_rms.clone()
    q(batch)
    assert torch.equal(q.running_inverse_rms, before)


# Options ----------------------------------------------------------------------------------------------------


def test_an_unknown_rms_is_refused_with_the_choice() -> None:
    with pytest.raises(ValueError, match=r"rms must be one of tensor, running, token, got rms='batch'"):
        BBQ(2, rms="batch")


def test_values_whose_square_overflows_are_refused_or_shown() -> None:
    q = BBQ(2)
    huge = torch.full((2, 128), 1e30)
    with pytest.raises(ValueError, match=r"cannot calibrate bbq: values up to 1e\+30 overflow"):
        q.calibrate(huge)
    q.calibrate(torch.randn(2, 128))
    assert q(huge).isnan().all()
    assert q.quantize(huge).step.isnan().all()
