"""A packed layer computes what the trained layer computes: the same codes, and the same output to the last bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from bitbell.layers import QuantLinear, Recipe
from bitbell.packing import PackedLinear
from bitbell.quantizers import Quantizer

MakeLayer = Callable[..., QuantLinear]
VARIANTS = ("bbq", "bbq-tensor", "bbq-token", "quest", "quest-tuned", "lsq")
# Of the largest output, above 4 bits: there a float32 sum of levels may round, while the integer sum does not.
WIDE_TOLERANCE = 1e-6


def pack_layer(trained: QuantLinear) -> PackedLinear:
    return PackedLinear.from_trained(trained, trained.activation_quantizer)


def assert_equal_outputs(trained: QuantLinear, packed: PackedLinear, x: torch.Tensor, exact: bool = True) -> None:
    with torch.no_grad():
        expected, got = trained(x), packed(x)
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    if exact:
        assert torch.equal(got, expected), (trained.recipe.name, float((got - expected).abs().max()))
    else:
        assert float((got - expected).abs().max()) <= WIDE_TOLERANCE * float(expected.abs().max()), trained.recipe.name


@pytest.mark.parametrize("weights", range(1, 9))
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_packed_output_is_the_trained_output_for_all_bits(
    make_layer: MakeLayer, variant: str, weights: int
) -> None:
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(weights))
    for activations in (weights, 9 - weights, 16):
        trained = make_layer(f"{variant}-w{weights}a{activations}", bias=activations < 16)
        packed = pack_layer(trained)
        assert torch.equal(packed.weight_codes(), trained.weight_codes())
        assert_equal_outputs(trained, packed, x, exact=max(weights, activations % 16) <= 4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_wide_layers_are_equal_too(make_layer: MakeLayer, variant: str) -> None:
    x = torch.randn(5, 1536, generator=torch.Generator().manual_seed(0))
    for bits, exact in ((2, True), (4, True), (8, False)):
        trained = make_layer(f"{variant}-w{bits}a{bits}", width=1536, rows=40)
        assert_equal_outputs(trained, pack_layer(trained), x, exact)


def test_sums_beyond_the_integers_of_float32_are_rounded_once(make_layer: MakeLayer) -> None:
    trained = make_layer("lsq-w8a8", width=8192, rows=8)
    packed, x = pack_layer(trained), 40 * trained.weight[:5].detach().sign()  # aligned, so that sums are large
    assert isinstance(trained.activation_quantizer, Quantizer)
    levels = trained.weight_codes().double() - 127.5, trained.activation_quantizer.encode(x).double() - 127.5
    exact = levels[1] @ levels[0].T
    assert float(exact.abs().max()) > 2**22
    assert torch.equal(packed(x), exact.float() * packed.weight_scale.T * trained.activation_quantizer.step())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 64), (2, 5, 64), (0, 64), (2, 0, 64), (2, 1, 3, 64)])
def test_inputs_of_any_number_of_dimensions_keep_them(
    make_layer: MakeLayer, variant: str, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    for recipe in (f"{variant}-w2a3", f"{variant}-w3a16"):
        trained = make_layer(recipe, bias=True)
        assert_equal_outputs(trained, pack_layer(trained), x)


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


@pytest.mark.parametrize("method", ["bbq", "quest", "lsq"])
@pytest.mark.parametrize("width", [37, 64, 100])
def test_unrotated_layers_of_any_width_are_packed(make_layer: MakeLayer, method: str, width: int) -> None:
    trained = make_layer(Recipe(method, 3, 3, rotation=None), width=width)
    packed = pack_layer(trained)
    assert packed.rotation is None
    assert_equal_outputs(trained, packed, torch.randn(9, width))


@pytest.mark.parametrize("variant", VARIANTS)
def test_input_codes_are_those_of_training(make_layer: MakeLayer, variant: str) -> None:
    x = torch.randn(11, 64)
    trained = make_layer(f"{variant}-w2a4")
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
    assert set(packed.state_dict()) == {
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "bias",
        "activation_quantizer.scale",
        "activation_quantizer.calibrated",
        "activation_quantizer.running_inverse_rms",
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
    for variant in VARIANTS:
        packed = pack_layer(make_layer(f"{variant}-w2a2"))
        assert bool(packed(x)[1].isnan().all()), variant


def test_half_precision_inputs_give_half_precision_outputs(make_layer: MakeLayer) -> None:
    trained = make_layer("bbq-w2a2", bias=True)
    x = torch.randn(5, 64).to(torch.bfloat16)
    y = pack_layer(trained)(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), trained(x.float()), rtol=1e-2, atol=1e-2)


def test_its_repr_names_the_recipe(make_layer: MakeLayer) -> None:
    text = repr(nn.Sequential(pack_layer(make_layer("bbq-w2a2"))))
    assert "in_features=64, out_features=24, recipe=bbq-w2a2" in text
