"""QuantLinear: the product of what its two quantizers give, exactly; and nothing else new."""

import copy
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitbell.kernels import rotate
from bitbell.layers import QuantLinear, Recipe
from bitbell.layers.product import integer_linear, levels_of
from bitbell.layers.recipes import VARIANTS
from bitbell.quantizers import METHODS, Quantized, QuEST

quick = settings(derandomize=True, max_examples=30, deadline=None)
RECIPES = ["bbq-w2a2", "bbq-tensor-w4a4", "bbq-token-w3a1", "quest-w2a3", "quest-tuned-w1a1", "lsq-w2a2", "lsq-w1a1"]
# Every variant that there is, and options that change what a layer computes.
VARIANT_RECIPES = [
    f"{v}-w{b}a{b}" for v, (m, _, _) in VARIANTS.items() for b in [METHODS[m].widths[len(v) % 2 - 1]]
] + [
    "bbq-w3a2:learn_offset=true",
    "bbq-w2a2:w.learn_offset=true,zero_point=-0.25",
    "bbq-w4a4:normalise=false,estimator=clip,w.granularity=tensor",
    "lsq-plus-w2a2:w.asymmetric=true,w.granularity=row",
    "lsq-plus-w2a3:w.asymmetric=true,a.asymmetric=false,rotation=64",
    "quest-w2a2:estimator=bell,granularity=tensor",
    "quest-fp4-w4a4:a.granularity=running",
    "nf-w2a4:granularity=tensor",
    "nf-w3a3:activation_method=lsq-plus",
    "ternary-w2a2:w.granularity=row,activation_method=quest",
    "n2uq-w2a2:activation_method=nf",
]
WEIGHT_ONLY = ["bbq-w2a16", "quest-w4a16", "lsq-w3a16", "nf-w4a16", "ternary-w2a16", "bbq-w2a16:learn_offset=true"]


def calibrated(recipe: str | Recipe, width: int = 128, out: int = 5, bias: bool = True, seed: int = 0) -> QuantLinear:
    torch.manual_seed(seed)
    layer = QuantLinear(width, out, recipe, bias=bias)
    layer.weight_quantizer.calibrate(layer.weight)
    if layer.activation_quantizer is not None:
        layer.activation_quantizer.calibrate(torch.randn(7, width))
    return layer


def moved_from_start(layer: QuantLinear) -> QuantLinear:
    """`layer` with scales, offsets and thresholds as training might leave them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "quantizer" in name:
                noise = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.mul_(1 + 0.2 * noise).add_(0.01)
    return layer


def composition(layer: QuantLinear, x: Tensor) -> Tensor:
    """The layer written out with its quantizers' values, which live in one rotated domain."""
    w = layer.weight_quantizer(layer.weight)
    a = (
        rotate(x, layer.weight_quantizer.rotation)
        if layer.activation_quantizer is None
        else layer.activation_quantizer(x)
    )
    return a @ w.T if layer.bias is None else a @ w.T + layer.bias


# Values and gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("recipe", [*RECIPES, *VARIANT_RECIPES, *WEIGHT_ONLY])
def test_output_and_gradients_are_those_of_the_composition(recipe: str, bias: bool, training: bool) -> None:
    layer = moved_from_start(calibrated(recipe, bias=bias).double().train(training))
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 3, 128, dtype=torch.float64)
    g = torch.randn(2, 3, 5, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, plain = layer(ours), composition(twin, theirs)
    y.backward(g)
    plain.backward(g)
    torch.testing.assert_close(y, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-12)
    for (name, p), other in zip(layer.named_parameters(), twin.parameters(), strict=True):
        if not p.requires_grad:
            assert p.grad is None, name
            continue
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, other.grad, rtol=1e-11, atol=1e-12, msg=name)


@quick
@given(
    shape=st.sampled_from([(), (1,), (4,), (0,), (2, 3), (2, 0, 3), (1, 2, 3)]),
    out=st.integers(1, 9),
    recipe=st.sampled_from([*RECIPES, "bbq-w2a16"]),
)
def test_inputs_of_any_rank_give_the_shape_of_a_linear_layer(shape: tuple[int, ...], out: int, recipe: str) -> None:
    layer = calibrated(recipe, out=out)
    x = torch.randn(*shape, 128, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (*shape, out)
    assert x.grad is not None
    assert x.grad.shape == x.shape
    torch.testing.assert_close(y, composition(layer, x), rtol=1e-4, atol=1e-4)


def exact_product(x_codes: Tensor, w_codes: Tensor, x_zero: float, w_zero: float) -> list[list[Fraction]]:
    rows = [[Fraction(c) - Fraction(x_zero) for c in row] for row in x_codes.tolist()]
    columns = [[Fraction(c) - Fraction(w_zero) for c in row] for row in w_codes.tolist()]
    return [[sum((a * b for a, b in zip(r, c, strict=True)), Fraction(0)) for c in columns] for r in rows]


@quick
@given(
    bits=st.tuples(st.integers(1, 4), st.integers(1, 8)),
    zeros=st.tuples(st.sampled_from([0.0, -0.5, 0.25]), st.sampled_from([0.0, -0.5])),
    width=st.integers(1, 200),
    seed=st.integers(0, 2**31),
)
def test_half_integer_levels_multiply_exactly_in_float32(
    bits: tuple[int, int], zeros: tuple[float, float], width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = [
        torch.randint(-(2 ** (b - 1)), 2 ** (b - 1), (3, width), dtype=torch.int8, generator=generator) for b in bits
    ]
    one = torch.ones(1)
    x, w = (Quantized(c.float(), c, one) for c in codes)
    product = integer_linear(x, w, (zeros[0], None), (zeros[1], None), torch.float32)
    assert [[Fraction(v) for v in row] for row in product.tolist()] == exact_product(*codes, *zeros)


def test_wide_layers_of_half_integers_multiply_exactly_in_float32() -> None:
    width = 8192
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-8, 8, (2, width), dtype=torch.int8, generator=generator) for _ in range(2))
    w[0], x[0] = -8, -8  # the largest sum there is
    quantized = [Quantized(c.float(), c, torch.ones(1)) for c in (x, w)]
    product = integer_linear(*quantized, (0.5, None), (-0.5, None), torch.float32)
    assert [[Fraction(v) for v in row] for row in product.tolist()] == exact_product(x, w, 0.5, -0.5)


def test_steps_of_rows_and_tokens_land_on_the_right_axes() -> None:
    x_codes, w_codes = torch.ones(2, 3, 4, dtype=torch.int8), torch.ones(5, 4, dtype=torch.int8)
    x_step, w_step = torch.arange(6.0).view(2, 3, 1), torch.arange(5.0).view(5, 1)
    x, w = Quantized(x_codes.float(), x_codes, x_step), Quantized(w_codes.float(), w_codes, w_step)
    grid = (0.0, None)
    assert torch.equal(integer_linear(x, w, grid, grid, torch.float32), 4 * x_step * w_step.view(5))


@quick
@given(
    zeros=st.tuples(st.sampled_from([0.0, -0.5, 0.25]), st.sampled_from([0.0, -0.5])),
    offsets=st.tuples(st.sampled_from([None, 1, 3]), st.sampled_from([None, 1, 4])),
    width=st.integers(1, 50),
    seed=st.integers(0, 2**31),
)
def test_offsets_are_added_to_every_value(
    zeros: tuple[float, float], offsets: tuple[int | None, int | None], width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    operands, values = [], []
    for rows, zero, shared in zip((3, 4), zeros, offsets, strict=True):
        codes = torch.randint(-8, 8, (rows, width), dtype=torch.int8, generator=generator)
        step = torch.rand(rows, 1, dtype=torch.float64, generator=generator)
        offset = None if shared is None else torch.randn(shared, 1, dtype=torch.float64, generator=generator)
        values.append((codes - zero) * step + (0 if offset is None else offset))
        operands.append(Quantized(values[-1].clone().requires_grad_(), codes, step, offset))
    got = integer_linear(*operands, (zeros[0], None), (zeros[1], None), torch.float64)
    torch.testing.assert_close(got, values[0] @ values[1].T, rtol=1e-12, atol=1e-10)
    g = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    got.backward(g)
    torch.testing.assert_close(operands[0].values.grad, g @ values[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(operands[1].values.grad, g.T @ values[0], rtol=1e-12, atol=1e-12)


def test_levels_of_a_table_are_looked_up() -> None:
    table = (-6.0, -1.5, -0.0, 4.0)
    codes = torch.tensor([[-2, -1, 0, 1]], dtype=torch.int8)
    assert levels_of(codes, (-0.5, table), torch.float32).tolist() == [list(table)]
    x, w = Quantized(codes.float(), codes, torch.ones(1)), Quantized(codes.float(), codes, torch.full((1, 1), 0.5))
    assert integer_linear(x, w, (0.0, table), (-0.5, None), torch.float32).item() == (9.0 + 0.75 - 0.0 + 6.0) / 2


@pytest.mark.parametrize("recipe", [*RECIPES, *VARIANT_RECIPES])
def test_the_layer_keeps_codes_for_the_backward_pass_and_one_float_input(recipe: str) -> None:
    layer = calibrated(recipe, width=512, out=64, bias=False)
    x = torch.randn(32, 512, requires_grad=True)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x)
    known = {p.data_ptr() for p in layer.parameters()}
    extra = [t for pointer, t in kept.items() if pointer not in known and t.numel() > 64]
    # The input itself; BBQ the rotated input in its place (taking a weight without rows for one); QuEST a mask.
    operands = [(layer.weight_quantizer, layer.weight.shape)]
    if layer.activation_quantizer is not None:
        operands.append((layer.activation_quantizer, x.shape))
    rotated_weight = layer.recipe.method == "bbq" and layer.weight_quantizer.rows is None
    floats = [layer.weight.shape] * rotated_weight
    masked = [shape for q, shape in operands if isinstance(q, QuEST) and q.estimator != "bell"]
    slopes = [shape for q, shape in operands if isinstance(q, QuEST) and q.estimator == "bell"]
    floats += slopes if isinstance(layer.activation_quantizer, QuEST) else [x.shape]
    assert sorted(t.shape for t in extra if t.dtype == x.dtype) == sorted(floats)
    assert sorted(t.shape for t in extra if t.dtype == torch.bool) == sorted(masked)
    codes = [t for t in extra if t.dtype == torch.int8]
    assert sorted(t.shape[0] for t in codes) == [32, 64]


@pytest.mark.parametrize("recipe", ["bbq-w2a2", "quest-w2a2", "lsq-w2a2", *VARIANT_RECIPES])
@pytest.mark.parametrize("where", ["weight", "input"])
@pytest.mark.parametrize("training", [True, False])
def test_a_nan_reaches_the_output_through_the_integers(recipe: str, where: str, training: bool) -> None:
    layer = calibrated(recipe).train(training)
    x = torch.randn(3, 128)
    with torch.no_grad():
        (layer.weight if where == "weight" else x)[1, 7] = float("nan")
    y = layer(x)
    assert (y[:, 1] if where == "weight" else y[1]).isnan().all()


# Precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [*RECIPES, *VARIANT_RECIPES, "bbq-w2a16"])
def test_autocast_gives_bfloat16_close_to_float32(recipe: str) -> None:
    layer = calibrated(recipe)
    x = torch.randn(4, 128, requires_grad=True)
    y = layer(x)
    (full,) = torch.autograd.grad(y.square().sum(), x)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = layer(x)
        loss = narrow.float().square().sum()
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), y, rtol=0.02, atol=0.02 * y.abs().max().item())
    (grad,) = torch.autograd.grad(loss, x)
    assert grad.dtype == torch.float32
    assert (grad - full).norm() < 0.05 * full.norm()


def test_under_autocast_the_codes_are_those_of_float32() -> None:
    layer = calibrated("bbq-w4a4")
    x = torch.randn(4, 128)
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer.activation_quantizer.encode(x)
        weights = layer.weight_codes()
    assert torch.equal(inside, layer.activation_quantizer.encode(x))
    assert torch.equal(weights, layer.weight_codes())


@pytest.mark.parametrize("recipe", ["bbq-w2a2", "lsq-w2a2", "quest-w2a2", "bbq-w2a16", *VARIANT_RECIPES])
def test_a_bfloat16_layer_takes_and_gives_bfloat16(recipe: str) -> None:
    layer = calibrated(recipe).bfloat16()
    x = torch.randn(3, 128).bfloat16().requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == layer.weight.grad.dtype == torch.bfloat16
    assert layer.weight.grad.isfinite().all()


def test_a_layer_compiles_into_one_graph_of_generated_code_with_the_same_numbers() -> None:
    torch._dynamo.reset()
    eager = calibrated("bbq-w2a2").double()
    traced = copy.deepcopy(eager)
    compiled = torch.compile(traced, fullgraph=True)
    x, g = torch.randn(3, 128, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    results = []
    for layer in (eager, compiled):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(g)
        results.append((y.detach(), leaf.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)
    for (name, ours), theirs in zip(traced.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12, msg=name)
    moved, expected = (q.activation_quantizer.running_inverse_rms for q in (traced, eager))
    torch.testing.assert_close(moved, expected, rtol=1e-6, atol=0)


# A linear layer like any other ------------------------------------------------------------------------------


def test_it_is_a_linear_layer_around_the_same_parameters() -> None:
    linear = nn.Linear(128, 6).eval()
    layer = QuantLinear.from_linear(linear, "bbq-w2a2")
    assert isinstance(layer, nn.Linear)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training
    assert {"weight", "bias"} <= set(layer.state_dict())
    assert set(layer.state_dict()) - {"weight", "bias"} == {
        "weight_quantizer.scale",
        "weight_quantizer.calibrated",
        "activation_quantizer.scale",
        "activation_quantizer.calibrated",
        "activation_quantizer.running_inverse_rms",
    }


def test_the_weights_of_a_float_checkpoint_load() -> None:
    linear = nn.Linear(128, 6)
    layer = calibrated("bbq-w2a2", out=6)
    missing, unexpected = layer.load_state_dict(linear.state_dict(), strict=False)
    assert not unexpected
    assert all("quantizer" in key for key in missing)
    assert torch.equal(layer.weight, linear.weight)


def test_state_with_scales_and_averages_gives_the_same_output() -> None:
    layer, fresh = calibrated("bbq-w2a2"), QuantLinear(128, 5, "bbq-w2a2")
    layer(torch.randn(3, 128))
    fresh.load_state_dict(layer.state_dict())
    x = torch.randn(3, 128)
    assert torch.equal(layer.eval()(x), fresh.eval()(x))


def test_dtype_and_device_are_those_of_the_linear_layer() -> None:
    layer = QuantLinear.from_linear(nn.Linear(128, 6, dtype=torch.bfloat16, device="meta"), "bbq-w2a2")
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight_quantizer.scale.dtype == torch.float32
    assert all(tensor.is_meta for tensor in layer.state_dict().values())


@pytest.mark.parametrize("recipe", ["bbq-w2a2", "quest-w2a2", "lsq-w2a2", "bbq-w2a16", *VARIANT_RECIPES])
def test_on_the_meta_device_a_forward_pass_gives_the_shape(recipe: str) -> None:
    layer = QuantLinear(128, 6, recipe, device="meta")
    y = layer(torch.empty(2, 3, 128, device="meta"))
    assert (y.shape, y.is_meta) == ((2, 3, 6), True)


def test_weight_codes_are_those_of_the_weight_quantizer() -> None:
    layer = calibrated("bbq-w3a3")
    assert torch.equal(layer.weight_codes(), layer.weight_quantizer.encode(layer.weight))


def test_its_repr_names_the_recipe() -> None:
    assert "in_features=128, out_features=5, bias=True, recipe=bbq-w2a2" in repr(calibrated("bbq-w2a2"))


@pytest.mark.parametrize("recipe", ["bbq-w2a2", "lsq-w2a2"])
def test_use_before_calibration_is_refused(recipe: str) -> None:
    with pytest.raises(RuntimeError, match=r"quantizer has no scale yet: call bitbell.calibrate"):
        QuantLinear(128, 5, recipe)(torch.randn(2, 128))


def test_a_width_that_cannot_be_rotated_is_refused_and_opting_out_works() -> None:
    with pytest.raises(ValueError, match=r"a width of 100 cannot be rotated"):
        QuantLinear(100, 5, "bbq-w2a2")
    layer = calibrated(Recipe("bbq", 2, 2, rotation=None), width=100)
    assert layer(torch.randn(2, 100)).shape == (2, 5)


def test_wide_layers_do_not_overflow_in_float16() -> None:
    layer = QuantLinear(4096, 8, "bbq-w8a8", bias=False)
    x = torch.randn(2, 4096)
    layer.weight_quantizer.calibrate(layer.weight)
    layer.activation_quantizer.calibrate(x)
    with torch.no_grad():
        layer.weight.copy_(x[:1].expand(8, -1))  # aligned with the input: the largest sums of levels there are
        expected = layer(x)
        with torch.autocast("cpu", torch.float16):
            got = layer(x)
    assert got.dtype == torch.float16
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got.float(), expected, rtol=2e-3, atol=2e-3)
