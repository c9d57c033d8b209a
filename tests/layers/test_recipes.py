"""Recipes: names, options, and what they refuse."""

import json
from typing import Any

import pytest

from bitbell.layers import Recipe, as_recipe
from bitbell.layers.recipes import VARIANTS
from bitbell.quantizers import BBQ, LSQ, QuEST


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", ["w1a1", "w2a4", "w3a16", "w8a8"])
def test_a_name_parses_to_a_recipe_of_that_name(variant: str, bits: str) -> None:
    recipe = Recipe.parse(f"{variant}-{bits}")
    assert Recipe.parse(recipe.name) == recipe
    assert recipe.weights == int(bits[1])
    assert recipe.activations == (None if bits.endswith("a16") else int(bits[-1]))
    if recipe.activations is not None or variant == "quest-tuned":
        assert recipe.name == f"{variant}-{bits}"


def test_weight_only_variants_that_differ_in_activations_alone_are_the_same_recipe() -> None:
    assert Recipe.parse("bbq-token-w2a16") == Recipe.parse("bbq-w2a16")
    assert Recipe.parse("bbq-token-w2a16").name == "bbq-w2a16"


def test_a_recipe_that_no_name_covers_gets_a_plus() -> None:
    assert Recipe("bbq", 2, 2, rotation=64).name == "bbq-w2a2+"
    assert Recipe("lsq", 2, rotation=128).name == "lsq-w2a16+"
    assert Recipe("bbq", 2, 2, weight_options={"zero_point": 0.0}).name == "bbq-w2a2+"


def test_options_of_variants_reach_the_quantizers() -> None:
    weight, activation = Recipe.parse("quest-tuned-w1a1").quantizers_for(5, 256)
    assert isinstance(weight, QuEST)
    assert isinstance(activation, QuEST)
    assert weight.mask_scale == activation.mask_scale == 1.30
    for name, rms in (("bbq-w2a4", "running"), ("bbq-tensor-w2a4", "tensor"), ("bbq-token-w2a4", "token")):
        weight, activation = Recipe.parse(name).quantizers_for(5, 256)
        assert isinstance(weight, BBQ)
        assert isinstance(activation, BBQ)
        assert (weight.rms, activation.rms, weight.bits, activation.bits) == ("row", rms, 2, 4)
        assert (weight.scale.shape, activation.scale.shape) == ((5, 1), (1,))


def test_lsq_has_one_scale_for_a_weight_unless_told_otherwise() -> None:
    weight, activation = Recipe.parse("lsq-w2a2").quantizers_for(5, 100)
    assert isinstance(weight, LSQ)
    assert (weight.rows, weight.rotation) == (None, None)
    assert activation is not None
    by_row, _ = Recipe("lsq", 2, weight_options={"rows": 5}).quantizers_for(5, 100)
    assert by_row.scale.shape == (5, 1)


@pytest.mark.parametrize(("width", "block"), [(640, 128), (192, 64), (48, 16)])
def test_both_operands_are_rotated_by_the_largest_block_that_divides_the_width(width: int, block: int) -> None:
    weight, activation = Recipe.parse("bbq-w2a2").quantizers_for(3, width)
    assert activation is not None
    assert weight.rotation == activation.rotation == block


@pytest.mark.parametrize(("rotation", "expected"), [(None, None), (32, 32), (1, 1)])
def test_a_rotation_can_be_chosen(rotation: int | None, expected: int | None) -> None:
    for method in ("bbq", "lsq"):
        weight, activation = Recipe(method, 2, 2, rotation=rotation).quantizers_for(3, 640)
        assert activation is not None
        assert weight.rotation == activation.rotation == expected


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("bbq", 2),
        Recipe("bbq", 2, 3, rotation=None, weight_options={"zero_point": 0.5}, activation_options={"rms": "token"}),
        Recipe.parse("quest-tuned-w1a16"),
    ],
)
def test_a_recipe_survives_json(recipe: Recipe) -> None:
    assert Recipe(**json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert hash(Recipe(**recipe.to_dict())) == hash(recipe)


def test_its_repr_is_the_call_that_makes_it() -> None:
    for recipe in (Recipe("bbq", 2, 2), Recipe("lsq", 3, rotation=None), Recipe.parse("bbq-token-w2a2")):
        assert eval(repr(recipe)) == recipe
    assert repr(Recipe.parse("bbq-w2a2")) == "Recipe(method='bbq', weights=2, activations=2)"


def test_names_of_nothing_are_none() -> None:
    assert as_recipe(None) is None
    assert as_recipe("none") is None
    assert as_recipe("Full-Precision") is None
    assert as_recipe("bbq-w2a2") == Recipe("bbq", 2, 2)
    recipe = Recipe("bbq", 2, 2)
    assert as_recipe(recipe) is recipe


# What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", "bbq", "bbq-2", "bbq-w2", "bbq_w2a2", "BBQ-w2a2", "bbq-w2a2-x", "w2a2", "bbq-w2a2+"]
)
def test_a_name_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"a recipe is named like 'bbq-w2a2' or 'quest-w4a16' .*, got '"):
        Recipe.parse(name)


def test_an_unknown_variant_is_refused_with_a_suggestion() -> None:
    with pytest.raises(
        ValueError, match=r"unknown method 'bqq' in recipe 'bqq-w2a2'; there are .*Did you mean 'bbq'\?"
    ):
        Recipe.parse("bqq-w2a2")
    with pytest.raises(ValueError, match=r"unknown method 'bbqq'.*Did you mean 'bbq'"):
        Recipe("bbqq", 2)


@pytest.mark.parametrize(
    ("name", "argument", "bits"),
    [("bbq-w0a2", "weights", 0), ("bbq-w16a16", "weights", 16), ("bbq-w2a9", "activations", 9)],
)
def test_bits_outside_one_to_eight_are_refused(name: str, argument: str, bits: int) -> None:
    with pytest.raises(ValueError, match=rf"{argument} must be an integer from 1 to 8 bits, got {argument}={bits}"):
        Recipe.parse(name)


def test_zero_activation_bits_do_not_mean_none() -> None:
    with pytest.raises(ValueError, match=r"activations must be an integer from 1 to 8 bits, got activations=0"):
        Recipe.parse("bbq-w2a0")


@pytest.mark.parametrize("bits", [2.0, "2", True])
def test_bits_that_are_no_integers_are_refused(bits: Any) -> None:
    with pytest.raises(ValueError, match=r"weights must be an integer from 1 to 8 bits"):
        Recipe("bbq", bits)


def test_weights_cannot_be_left_alone() -> None:
    with pytest.raises(ValueError, match=r"weights must be an integer from 1 to 8 bits, got weights=None"):
        Recipe("bbq", None, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("rotation", [0, -128, 96, "128", 2.0, True])
def test_a_rotation_that_cannot_be_is_refused(rotation: Any) -> None:
    with pytest.raises(ValueError, match=r"rotation must be 'auto', a power of two or None, got"):
        Recipe("bbq", 2, 2, rotation=rotation)


def test_a_chosen_rotation_that_does_not_divide_the_width_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"rotation=128 does not divide the layer's input width 192; use 'auto' or None"
    ):
        Recipe("bbq", 2, 2, rotation=128).quantizers_for(4, 192)


def test_a_width_that_cannot_be_rotated_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a width of 100 cannot be rotated"):
        Recipe("bbq", 2, 2).quantizers_for(4, 100)
    assert Recipe("lsq", 2, 2).quantizers_for(4, 100)[0].rotation is None


def test_wrong_options_are_refused_where_they_are_written() -> None:
    with pytest.raises(ValueError, match=r"lsq has no option 'rms'; it has bits, rows, rotation"):
        Recipe("lsq", 2, 2, activation_options={"rms": "token"})
    with pytest.raises(ValueError, match=r"rms must be one of tensor, running, token, got rms='batch'"):
        Recipe("bbq", 2, 2, activation_options={"rms": "batch"})


@pytest.mark.parametrize("argument", ["weight_options", "activation_options"])
@pytest.mark.parametrize("option", ["bits", "rotation"])
def test_options_may_not_contradict_the_fields(argument: str, option: str) -> None:
    with pytest.raises(ValueError, match=rf"{argument} may not hold '{option}': it is a field of the recipe itself"):
        Recipe("bbq", 2, 2, **{argument: {option: 4}})


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Recipe("bbq", 2).weights = 3  # type: ignore[misc]
