"""A packed layer computes what the trained layer computes: the same codes, and the same output to the last bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from bitbell.layers import QuantLinear, Recipe
from bitbell.layers.recipes import VARIANTS
from bitbell.packing import PackedLinear
from bitbell.quantizers import METHODS, Quantizer

MakeLayer = Callable[..., QuantLinear]
# Of the largest output, above 4 bits: there a float32 sum of levels may round, while the integer sum does not.
WIDE_TOLERANCE = 1e-6
TABLES = ("nf", "quest-fp4")  # sums of their levels round in float32, in whatever order a matrix product takes
OPTIONS = [
    "bbq-w2a2:learn_offset=true",
    "bbq-w3a2:w.learn_offset=true",
    "bbq-w2a4:a.learn_offset=true,zero_point=-0.25,granularity=tensor",
    "bbq-w4a4:normalise=false,start=2,estimator=clip",
    "lsq-plus-w2a2:w.asymmetric=true,w.granularity=row",
    "lsq-plus-w3a3:a.asymmetric=false,rotation=32",
    "quest-w2a2:granularity=tensor,estimator=bell",
    "quest-fp4-w4a4:a.granularity=running",
    "nf-w2a4:granularity=tensor,rotation=64",
    "nf-w3a3:activation_method=lsq-plus",
    "lsq-plus-w2a3:w.asymmetric=true,activation_method=nf",
    "ternary-w2a4:w.granularity=row,activation_method=quest,rotation=16",
    "n2uq-w2a2:activation_method=absmax,a.granularity=running",
]


ALONE = {"activations": None, "activation_options": {}, "activation_method": None}


def widths(variant: str) -> tuple[list[int], list[int]]:
    """The widths of weights and of activations that a variant has."""
    method = METHODS[VARIANTS[variant][0]]
    return list(method.widths), list(METHODS[method.activation_method or method.method].widths)


def named(variant: str, weights: int, activations: int) -> str:
    """The recipe of a variant with the widths nearest to these; 16 stays."""
    of_weights, of_activations = widths(variant)
    near = min(of_activations, key=lambda b: abs(b - activations)) if activations < 16 else 16
    return f"{variant}-w{min(of_weights, key=lambda b: abs(b - weights))}a{near}"


def is_exact(recipe: Recipe) -> bool:
    """Whether trained and packed layers agree to the last bit, rather than up to float32's rounding."""
    of_activations = METHODS[recipe.method].activation_method or recipe.method
    uniform = not {recipe.method, recipe.activation_method or of_activations} & set(TABLES)
    return recipe.activations is None or (uniform and max(recipe.weights, recipe.activations) <= 4)


def pack_layer(trained: QuantLinear) -> PackedLinear:
    return PackedLinear.from_trained(trained, trained.activation_quantizer)


def assert_equal_outputs(
    trained: QuantLinear, packed: PackedLinear, x: torch.Tensor, exact: bool | None = None
) -> None:
    exact = is_exact(trained.recipe) if exact is None else exact
    with torch.no_grad():
        expected, got = trained(x), packed(x)
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    if exact:
        assert torch.equal(got, expected), (trained.recipe.name, float((got - expected).abs().max()))
    else:
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        assert bool(((got - expected).abs() <= WIDE_TOLERANCE * largest).all()), trained.recipe.name


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_packed_output_is_the_trained_output_for_all_bits(make_layer: MakeLayer, variant: str) -> None:
    for weights in widths(variant)[0]:
        x = torch.randn(7, 64, generator=torch.Generator().manual_seed(weights))
        for activations in (weights, 9 - weights, 16):
            trained = make_layer(named(variant, weights, activations), bias=activations < 16)
            packed = pack_layer(trained)
            assert torch.equal(packed.weight_codes(), trained.weight_codes())
            assert_equal_outputs(trained, packed, x)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_packed_too(make_layer: MakeLayer, name: str) -> None:
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))
    for recipe in (Recipe.parse(name), Recipe(**(Recipe.parse(name).to_dict() | ALONE))):
        trained = make_layer(recipe, bias=True)
        packed = pack_layer(trained)
        assert torch.equal(packed.weight_codes(), trained.weight_codes())
        for part in ("weight_offset", "weight_scale"):
            assert (getattr(packed, part) is None) == (part == "weight_offset" and trained.weight_offset is None)
        assert_equal_outputs(trained, packed, x)


@pytest.mark.parametrize("variant", VARIANTS)
def test_wide_layers_are_equal_too(make_layer: MakeLayer, variant: str) -> None:
    x = torch.randn(5, 1536, generator=torch.Generator().manual_seed(0))
    for bits in (2, 4, 8):
        trained = make_layer(named(variant, bits, bits), width=1536, rows=40)
        assert_equal_outputs(trained, pack_layer(trained), x)


@pytest.mark.parametrize("options", [{"learn_offset": True}, {"learn_offset": True, "zero_point": 0.0}])
def test_offsets_of_both_operands_add_four_products(make_layer: MakeLayer, options: dict[str, bool | float]) -> None:
    trained = make_layer(Recipe("bbq", 3, 3, weight_options=options, activation_options=options))
    packed, x = pack_layer(trained), torch.randn(5, 64)
    assert isinstance(trained.activation_quantizer, Quantizer)
    assert float(trained.weight_quantizer.offset.detach().abs().min()) > 0.01
    w = trained.weight_quantizer.double().eval()(trained.weight.double())
    a = trained.activation_quantizer.double()(x.double())
    torch.testing.assert_close(packed(x), (a @ w.T).float(), rtol=1e-5, atol=1e-5)


def test_sums_beyond_the_integers_of_float32_are_rounded_once(make_layer: MakeLayer) -> None:
    trained = make_layer("lsq-w8a8", width=8192, rows=8)
    packed, x = pack_layer(trained), 40 * trained.weight[:5].detach().sign()  # aligned, so that sums are large
    assert isinstance(trained.activation_quantizer, Quantizer)
    levels = trained.weight_codes().double() - 127.5, trained.activation_quantizer.encode(x).double() - 127.5
    exact = levels[1] @ levels[0].T
    assert float(exact.abs().max()) > 2**22
    assert torch.equal(packed(x), exact.float() * packed.weight_scale.T * trained.activation_quantizer.step())


@pytest.mark.parametrize("variant", VARIANTS)
def test_inputs_of_any_number_of_dimensions_keep_them(make_layer: MakeLayer, variant: str) -> None:
    for recipe in (named(variant, 2, 3), named(variant, 3, 16)):
        trained = make_layer(recipe, bias=True)
        packed = pack_layer(trained)
        for shape in ((64,), (1, 64), (3, 64), (2, 5, 64), (0, 64), (2, 0, 64), (2, 1, 3, 64)):
            assert_equal_outputs(trained, packed, torch.randn(shape, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("activation", [-0.25, 0.0, -0.5, 0.75])
@pytest.mark.parametrize("weight", [-0.25, 0.0, -0.5, 1.25])
def test_zero_points_of_your_own_are_folded_out_exactly(
    make_layer: MakeLayer, weight: float, activation: float
) -> None:
    options = {"weight_options": {"zero_point": weight}, "activation_options": {"zero_point": activation}}
    trained = make_layer(Recipe("bbq", 3, 2, **options), bias=True)
    packed = pack_layer(trained)
    assert packed.weight_zero_point == weight
    assert_equal_outputs(trained, packed, torch.randn(9, 64))


def test_a_zero_point_that_no_binary_fraction_hits_is_folded_out_up_to_rounding(make_layer: MakeLayer) -> None:
    options = {"weight_options": {"zero_point": 0.3}, "activation_options": {"zero_point": -0.1}}
    trained = make_layer(Recipe("bbq", 4, 4, **options))
    assert_equal_outputs(trained, pack_layer(trained), torch.randn(9, 64), exact=False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_unrotated_layers_of_any_width_are_packed(make_layer: MakeLayer, variant: str) -> None:
    for width in (37, 64, 100):
        trained = make_layer(f"{named(variant, 3, 3)}:rotation=none", width=width)
        packed = pack_layer(trained)
        assert packed.rotation is None
        assert_equal_outputs(trained, packed, torch.randn(9, width))


@pytest.mark.parametrize("variant", VARIANTS)
def test_input_codes_are_those_of_training(make_layer: MakeLayer, variant: str) -> None:
    x = torch.randn(11, 64)
    trained = make_layer(named(variant, 2, 4))
    packed = pack_layer(trained)
    assert isinstance(packed.activation_quantizer, Quantizer)
    assert isinstance(trained.activation_quantizer, Quantizer)
    assert torch.equal(packed.activation_quantizer.encode(x), trained.activation_quantizer.encode(x))


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_stored_at_their_true_width(make_layer: MakeLayer, bits: int) -> None:
    packed = pack_layer(make_layer(f"lsq-w{bits}a8", width=100, rows=6))
    assert packed.weight_packed.dtype == torch.int32
    assert packed.weight_packed.shape == (6, -(-100 * bits // 32))


def test_a_packed_layer_has_no_weight_and_nothing_to_train(make_layer: MakeLayer) -> None:
    packed = pack_layer(make_layer("bbq-w2a2", bias=True))
    assert not any(parameter.requires_grad for parameter in packed.parameters())
    assert packed.weight.shape == (0,)
    assert set(packed.state_dict()) == {
        "weight",
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "bias",
        "activation_quantizer.scale",
        "activation_quantizer.calibrated",
        "activation_quantizer.running_inverse_rms",
    }
    packed = pack_layer(make_layer("bbq-w2a2:learn_offset=true,a.granularity=token"))
    assert set(packed.state_dict()) == {
        "weight",
        "weight_packed",
        "weight_scale",
        "weight_offset",
        "weight_shape",
        "activation_quantizer.scale",
        "activation_quantizer.offset",
        "activation_quantizer.calibrated",
    }


def test_loading_other_codes_takes_effect_after_a_first_call(make_layer: MakeLayer) -> None:
    x = torch.randn(3, 64)
    first, second = pack_layer(make_layer("bbq-w2a2")), pack_layer(make_layer("bbq-w2a2"))
    second.weight_packed.copy_(second.weight_packed.flip(0))
    before = first(x)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), second(x))
    assert not torch.equal(first(x), before)


def test_nan_inputs_are_not_hidden_by_integer_codes(make_layer: MakeLayer) -> None:
    x = torch.randn(3, 64)
    x[1, 5] = float("nan")
    for recipe in (*(named(variant, 2, 2) for variant in VARIANTS), *OPTIONS):
        packed = pack_layer(make_layer(recipe))
        assert bool(packed(x)[1].isnan().all()), recipe


def test_half_precision_inputs_give_half_precision_outputs(make_layer: MakeLayer) -> None:
    trained = make_layer("bbq-w2a2", bias=True)
    x = torch.randn(5, 64).to(torch.bfloat16)
    y = pack_layer(trained)(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), trained(x.float()), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("recipe", ["bbq-w2a2", "lsq-plus-w2a2:w.asymmetric=true", "nf-w4a4", "bbq-w4a16"])
def test_autocast_changes_no_number(make_layer: MakeLayer, recipe: str) -> None:
    packed, x = pack_layer(make_layer(recipe, width=256, bias=True)), torch.randn(5, 256)
    with torch.no_grad():
        expected = packed(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(packed(x), expected)


def test_its_repr_names_the_recipe(make_layer: MakeLayer) -> None:
    text = repr(nn.Sequential(pack_layer(make_layer("bbq-w2a2"))))
    assert "in_features=64, out_features=24, recipe=bbq-w2a2" in text


GRADIENT_RECIPES = ["bbq-w2a2", "quest-w3a3", "lsq-plus-w4a4", "nf-w3a3", "n2uq-w2a2", "bbq-w2a16", "ternary-w2a8"]


@pytest.mark.parametrize("recipe", [*GRADIENT_RECIPES, "bbq-w3a3:learn_offset=true"])
def test_gradients_pass_through_as_through_the_trained_layer(make_layer: MakeLayer, recipe: str) -> None:
    trained = make_layer(recipe, bias=True)
    packed, x = pack_layer(trained), torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    g = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(x) for layer, x in zip((trained, packed), inputs, strict=True)]
    for y in outputs:
        y.backward(g)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-6, atol=1e-6)
    expected, got = inputs[0].grad, inputs[1].grad
    assert expected is not None
    assert float(expected.abs().max()) > 0
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_training_mode_moves_no_statistics_of_a_packed_layer(make_layer: MakeLayer) -> None:
    packed = pack_layer(make_layer("bbq-w2a2")).train()
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    packed(10 * torch.randn(4, 64))
    assert not packed.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in packed.state_dict().items())
