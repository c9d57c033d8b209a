"""Recipes: names, options, and what they refuse."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitbell.layers import Recipe, as_recipe
from bitbell.layers.recipes import VARIANTS
from bitbell.quantizers import BBQ, LSQ, METHODS, N2UQ, AbsMax, LSQPlus, N2UQActivations, QuEST, Ternary, known_options

# Names and notation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("weights", "activations"), [(1, 1), (2, 4), (2, 2), (3, 16), (4, 4), (8, 8)])
def test_a_name_parses_to_a_recipe_of_that_name_or_names_the_widths(
    variant: str, weights: int, activations: int
) -> None:
    name, method = f"{variant}-w{weights}a{activations}", METHODS[VARIANTS[variant][0]]
    of_activations = METHODS[method.activation_method or method.method]
    if weights not in method.widths or (activations != 16 and activations not in of_activations.widths):
        with pytest.raises(ValueError, match=r"(weights|activations) must be .* bits for [a-z0-9-]+, got "):
            Recipe.parse(name)
        return
    recipe = Recipe.parse(name)
    assert Recipe.parse(recipe.name) == recipe
    assert recipe.weights == weights
    assert recipe.activations == (None if activations == 16 else activations)
    if recipe.activations is not None or variant == "quest-tuned":
        assert recipe.name == name
        assert recipe.variant == variant


FLOATS = st.one_of(st.none(), st.integers(-3, 3), st.floats(-8, 8), st.sampled_from([-0.5, -0.25, 0.0, 1e-7]))
POSITIVE = st.one_of(st.none(), st.integers(1, 3), st.floats(1e-6, 8))
CHOICES: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "bbq": {
        "zero_point": FLOATS,
        "normalise": st.booleans(),
        "estimator": st.sampled_from(["bell", "trust", "clip", "identity"]),
        "rms_gradient": st.booleans(),
        "restore_rms": st.booleans(),
        "learn_scale": st.booleans(),
        "learn_offset": st.booleans(),
        "start": POSITIVE,
    },
    "quest": {"mask_scale": POSITIVE, "estimator": st.just("trust")},
    "quest-fp4": {},
    "lsq": {},
    "lsq-plus": {"asymmetric": st.booleans()},
    "pact": {},
    "seq": {},
    "n2uq": {"estimator": st.sampled_from(["published", "identity"])},
    "n2uq-activations": {},
    "nf": {},
    "absmax": {},
    "narrow": {},
    "ternary": {},
}
TOKEN_GROUPS = {"bbq": ["tensor", "running", "token"], "quest": ["token", "tensor"]}


def groups_of_activations(method: str) -> list[str]:
    """What may share a scale, over the activations of a method."""
    computed = "granularity" in known_options(METHODS[method])
    return TOKEN_GROUPS.get(method, ["token", "tensor", "running"] if computed else ["tensor"])


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Any recipe: every method, with any of its options for either operand."""
    method = draw(st.sampled_from([method for method, kind in METHODS.items() if kind.for_weights]))
    other = draw(st.sampled_from([None, None, *METHODS]))
    activation_method = other or METHODS[method].activation_method or method

    def options(of: str, groups: list[str]) -> dict[str, Any]:
        choices = CHOICES[of] | {"granularity": st.sampled_from(groups)}
        return draw(st.fixed_dictionaries({}, optional=choices))

    activations = draw(st.sampled_from([None, *METHODS[activation_method].widths]))
    return Recipe(
        method,
        draw(st.sampled_from(METHODS[method].widths)),
        activations,
        rotation=draw(st.sampled_from(["auto", "vision", None, 16, 128])),
        weight_options=options(method, ["row", "tensor"]),
        activation_options=options(activation_method, groups_of_activations(activation_method)) if activations else {},
        activation_method=other if activations else None,
    )


def test_every_option_of_every_method_has_values_to_choose_from() -> None:
    assert CHOICES.keys() == METHODS.keys()
    for method, kind in METHODS.items():
        own = {name for name in known_options(kind) if name not in ("bits", "rows", "rotation")}
        assert CHOICES[method].keys() == own - {kind.granularity_option}


def states(recipe: Recipe) -> list[dict[str, Any] | None]:
    return [q and q.options() for q in recipe.quantizers_for(4, 128)]


@settings(derandomize=True, max_examples=200, deadline=None)
@given(recipes())
def test_name_repr_and_json_of_any_recipe_are_the_recipe_again(recipe: Recipe) -> None:
    named, called = Recipe.parse(recipe.name), eval(repr(recipe))
    loaded = Recipe(**json.loads(json.dumps(recipe.to_dict())))
    for again in (named, called, loaded):
        assert again == recipe
        assert hash(again) == hash(recipe)
        assert again.name == recipe.name
        assert states(again) == states(recipe)
    plain, colon, options = recipe.variant.partition(":")
    bits = f"-w{recipe.weights}a{recipe.activations or 16}"
    assert recipe.name == f"{plain}{bits}{colon}{options}"


@settings(derandomize=True, max_examples=100, deadline=None)
@given(recipes(), recipes())
def test_different_recipes_have_different_names(first: Recipe, second: Recipe) -> None:
    assert (first.name == second.name) == (first == second)
    near = {"row": "tensor", "tensor": "row", None: "row"}[first.weight_options.get("granularity")]
    for change in ({"rotation": 32}, {"weight_options": {**first.weight_options, "granularity": near}}):
        other = Recipe(**(first.to_dict() | change))
        assert other != first
        assert other.name != first.name


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("bbq-w2a2:rotation=64", Recipe("bbq", 2, 2, rotation=64)),
        ("lsq-w2a16:rotation=128", Recipe("lsq", 2, rotation=128)),
        ("bbq-w2a2:rotation=none", Recipe("bbq", 2, 2, rotation=None)),
        ("bbq-w2a2:w.zero_point=0.0", Recipe("bbq", 2, 2, weight_options={"zero_point": 0.0})),
        (
            "bbq-w2a2:zero_point=-0.25",
            Recipe("bbq", 2, 2, weight_options={"zero_point": -0.25}, activation_options={"zero_point": -0.25}),
        ),
        (
            "bbq-w2a2:zero_point=none,w.learn_offset=true,a.start=2",
            Recipe(
                "bbq",
                2,
                2,
                weight_options={"zero_point": None, "learn_offset": True},
                activation_options={"zero_point": None, "start": 2},
            ),
        ),
        ("bbq-w2a16:learn_scale=false", Recipe("bbq", 2, weight_options={"learn_scale": False})),
        ("bbq-token-w2a2", Recipe("bbq", 2, 2, activation_options={"granularity": "token"})),
        ("lsq-w2a2:w.granularity=row", Recipe("lsq", 2, 2, weight_options={"granularity": "row"})),
        ("quest-tuned-w1a16", Recipe("quest", 1, weight_options={"mask_scale": 1.3})),
        ("quest-w1a1:w.mask_scale=1.3", Recipe("quest", 1, 1, weight_options={"mask_scale": 1.3})),
        ("ternary-w2a4:activation_method=lsq", Recipe("ternary", 2, 4, activation_method="lsq")),
        (
            "ternary-w2a8:activation_method=lsq-plus,a.asymmetric=false",
            Recipe("ternary", 2, 8, activation_method="lsq-plus", activation_options={"asymmetric": False}),
        ),
        ("n2uq-w2a2:w.estimator=identity", Recipe("n2uq", 2, 2, weight_options={"estimator": "identity"})),
    ],
)
def test_options_are_part_of_the_name(name: str, recipe: Recipe) -> None:
    assert recipe.name == name
    assert Recipe.parse(name) == recipe


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        # In any order; words in any case; an option that one operand knows needs no letter.
        ("bbq-w2a2:a.granularity=token,rotation=None", Recipe.parse("bbq-token-w2a2:rotation=none")),
        ("bbq-w2a2:start=2,learn_scale=FALSE", "bbq-w2a2:learn_scale=false,start=2"),
        ("n2uq-w2a2:estimator=identity", "n2uq-w2a2:w.estimator=identity"),
        (
            "ternary-w2a8:a.asymmetric=false,activation_method=lsq-plus",
            "ternary-w2a8:activation_method=lsq-plus,a.asymmetric=false",
        ),
        # What the method or the variant does anyway.
        ("bbq-w2a2:rotation=auto", "bbq-w2a2"),
        ("n2uq-w2a2:activation_method=n2uq-activations", "n2uq-w2a2"),
        ("lsq-w2a2:activation_method=none", "lsq-w2a2"),
        ("ternary-w2a16:activation_method=absmax", "ternary-w2a16"),
        ("bbq-tensor-w2a2:a.granularity=tensor", "bbq-tensor-w2a2"),
    ],
)
def test_one_recipe_may_be_written_in_several_ways(name: str, recipe: Recipe | str) -> None:
    assert Recipe.parse(name) == as_recipe(recipe)


def test_weight_only_variants_that_differ_in_activations_alone_are_the_same_recipe() -> None:
    assert Recipe.parse("bbq-token-w2a16") == Recipe.parse("bbq-w2a16")
    assert Recipe.parse("bbq-token-w2a16").name == "bbq-w2a16"


def test_the_word_for_one_operand_wins_over_the_word_for_both() -> None:
    for name in ("bbq-w2a2:a.estimator=clip,estimator=trust", "bbq-w2a2:estimator=trust,a.estimator=clip"):
        recipe = Recipe.parse(name)
        assert recipe.weight_options == {"estimator": "trust"}
        assert recipe.activation_options == {"estimator": "clip"}


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
    for method in ("lsq", "lsq-plus", "pact", "ternary"):
        for group, shape in (("row", (5, 1)), ("tensor", (1,))):
            q, _ = Recipe(method, 2, weight_options={"granularity": group}).quantizers_for(5, 100)
            assert q.scale.shape == shape
        assert Recipe(method, 2).quantizers_for(5, 100)[0].scale.shape == (1,)


def test_weights_have_a_statistic_a_row_or_one_for_the_tensor() -> None:
    x = torch.randn(5, 128) * torch.arange(1, 6)[:, None]
    for method in ("bbq", "quest", "n2uq", "nf", "absmax", "narrow", "seq"):
        by_row, _ = Recipe(method, 2).quantizers_for(5, 128)
        whole, _ = Recipe(method, 2, weight_options={"granularity": "tensor"}).quantizers_for(5, 128)
        for q, shape in ((by_row, (5, 1)), (whole, (1,))):
            q.calibrate(x)
            assert q.quantize(x).step.shape == shape
        assert not torch.equal(by_row.encode(x), whole.encode(x))


def test_the_group_that_shares_a_statistic_is_called_granularity_whatever_the_method_calls_it() -> None:
    for method in ("bbq", "quest"):
        old = Recipe(method, 2, 2, activation_options={"rms": "tensor"})
        assert old == Recipe(method, 2, 2, activation_options={"granularity": "tensor"})
        assert old.activation_options == {"granularity": "tensor"}
        assert old.quantizers_for(4, 128)[1].options()["rms"] == "tensor"
    for method in ("absmax", "nf", "ternary"):
        recipe = Recipe(method, 2, 2, activation_options={"granularity": "running"})
        assert recipe.quantizers_for(4, 128)[1].options()["granularity"] == "running"


def test_layers_get_the_methods_own_defaults_for_activations() -> None:
    assert Recipe.parse("bbq-w2a2").quantizers_for(4, 128)[1].options()["rms"] == "running"
    weight, activation = Recipe.parse("lsq-plus-w2a2").quantizers_for(4, 128)
    assert isinstance(activation, LSQPlus)
    assert (weight.offset, activation.offset.shape) == (None, (1,))
    assert Recipe.parse("lsq-plus-w2a2:a.asymmetric=false").quantizers_for(4, 128)[1].offset is None
    for method, kinds in (("n2uq", (N2UQ, N2UQActivations)), ("ternary", (Ternary, AbsMax))):
        assert tuple(type(q) for q in Recipe(method, 2, 2).quantizers_for(4, 128)) == kinds
    weight, activation = Recipe("bbq", 2, 3, activation_method="quest").quantizers_for(4, 128)
    assert (type(weight), type(activation), activation.bits) == (BBQ, QuEST, 3)
    assert weight.rotation == activation.rotation == 128


def test_weight_only_recipes_have_no_quantizer_for_activations() -> None:
    for variant, (method, _, _) in VARIANTS.items():
        bits = METHODS[method].widths[0]
        weight, activation = Recipe.parse(f"{variant}-w{bits}a16").quantizers_for(4, 128)
        assert weight.method == method
        assert activation is None


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
    ("fields", "name"),
    [
        ({"method": "bbq", "weights": 3, "activations": 2}, "bbq-w3a2"),
        ({"method": "bbq", "weights": 2, "activations": 2, "activation_options": {"rms": "tensor"}}, "bbq-tensor-w2a2"),
        ({"method": "quest", "weights": 4, "activations": 4, "activation_options": {"rms": "token"}}, None),
        ({"method": "lsq", "weights": 4, "activations": None, "rotation": None}, "lsq-w4a16:rotation=none"),
    ],
)
def test_dictionaries_of_the_first_release_are_read(fields: dict[str, Any], name: str | None) -> None:
    older = {"rotation": "auto", "weight_options": {}, "activation_options": {}} | fields
    assert "activation_method" not in older
    recipe = Recipe(**json.loads(json.dumps(older)))
    assert recipe.name == (name or "quest-w4a4:a.granularity=token")
    assert Recipe(**recipe.to_dict()) == recipe


def test_options_tell_recipes_apart() -> None:
    recipe = Recipe("bbq", 2, 2, weight_options={"start": 1.0, "zero_point": 0.0})
    assert recipe == Recipe("bbq", 2, 2, weight_options={"zero_point": 0.0, "start": 1.0})
    assert recipe != Recipe("bbq", 2, 2, weight_options={"zero_point": 0.0})
    assert recipe != Recipe("bbq", 2, 2)
    assert len({recipe, Recipe("bbq", 2, 2), Recipe("bbq", 2, 2, activation_method="lsq"), Recipe("bbq", 2, 2)}) == 3


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
    "name", ["", "bbq", "bbq-2", "bbq-w2", "bbq_w2a2", "BBQ-w2a2", "bbq-w2a2-x", "w2a2", "bbq-w2a2+", ":rotation=none"]
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
    with pytest.raises(
        ValueError, match="'bbq-vision' is a method with options; give its name whole, as 'bbq-vision-w2a2'"
    ):
        Recipe("bbq-vision", 2)


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
    with pytest.raises(ValueError, match=r"rotation must be 'auto', 'vision', a power of two or None, got"):
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
    with pytest.raises(ValueError, match=r"granularity of weights must be 'row' or 'tensor', got 'token'"):
        Recipe("bbq", 2, 2, weight_options={"granularity": "token"})
    with pytest.raises(ValueError, match=r"granularity of lsq activations must be 'tensor', got 'token'"):
        Recipe("lsq", 2, 2, activation_options={"granularity": "token"})
    with pytest.raises(ValueError, match=r"activation_options holds both 'rms' and 'granularity'"):
        Recipe("bbq", 2, 2, activation_options={"rms": "token", "granularity": "tensor"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "estimatr=clip",
            r"has no option 'estimatr'; there are activation_method, .*zero_point. Did you mean 'estimator'\?",
        ),
        ("a.zeropoint=0", r"has no option 'zeropoint' of activations; .* Did you mean 'zero_point'\?"),
        ("w.granularty=row", r"has no option 'granularty' of weights; .* Did you mean 'granularity'\?"),
        ("rotatoin=none", r"Did you mean 'rotation'\?"),
        ("nothing_like_it=1", r"has no option 'nothing_like_it'; there are [a-z_, ]+\.$"),
        ("w.rotation=none", r"has no option 'rotation' of weights"),
        ("bits=3", r"has no option 'bits'"),
        ("rows=3", r"has no option 'rows'"),
        ("w.=3", r"has no option '' of weights"),
        ("", r"an option is written key=value, w.key=value or a.key=value, got ''"),
        ("rotation", r"an option is written key=value, .*, got 'rotation'"),
        ("start=1,,", r"an option is written key=value, .*, got ''"),
        ("x.start=3", r"an option is written key=value, .*, got 'x.start=3'"),
        ("a.w.start=3", r"an option is written key=value, .*, got 'a.w.start=3'"),
        ("start=1,start=1", r"gives the option 'start' twice"),
        ("rotation=96", r"rotation must be 'auto', 'vision', a power of two or None, got 96"),
        ("activation_method=bqq", r"unknown method 'bqq'.*Did you mean 'bbq'\?"),
        ("activation_method=7", r"unknown method 7"),
        ("activation_method=", r"unknown method ''"),
        ("normalise=maybe", r"normalise of bbq must be true or false, got normalise='maybe'"),
        ("zero_point=nan", r"zero_point of bbq must be a number or none, got zero_point=nan"),
        ("zero_point=1e999", r"zero_point of bbq must be a number or none, got zero_point=inf"),
        ("zero_point=", r"zero_point of bbq must be a number or none, got zero_point=''"),
        ("start=-1", r"start must be positive or None \(1.694 RMS\), got start=-1"),
        ("estimator=ste", r"estimator must be one of bell, trust, clip, identity, got estimator='ste'"),
    ],
)
def test_wrong_options_in_a_name_are_refused(options: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.parse(f"bbq-w2a2:{options}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bbq-w2a16:a.granularity=token", r"has no option 'granularity' of activations; there are none"),
        ("bbq-w2a16:activation_method=lsq", r"activations are left alone.*got {'activation_method': 'lsq'}"),
        ("lsq-w2a2:zero_point=0", r"has no option 'zero_point'; there are activation_method, granularity, rotation"),
        ("absmax-w2a2:zero_point=0", r"has no option 'zero_point'"),
        ("quest-tuned-w1a1:estimator=clip", r"mask_scale is of estimator='trust', got it with estimator='clip'"),
        ("bbq-token-w2a2:activation_method=lsq", r"granularity of lsq activations must be 'tensor', got 'token'"),
        ("n2uq-activations-w2a2", r"unknown method 'n2uq-activations' in recipe"),
        ("bbq-w2a8:activation_method=nf", r"activations must be an integer from 2 to 4 bits for nf, got activations=8"),
    ],
)
def test_options_that_do_not_go_together_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.parse(name)


def test_a_method_of_activations_is_none_for_weights() -> None:
    with pytest.raises(
        ValueError, match=r"method 'n2uq-activations' quantizes activations only; give it as activation_"
    ):
        Recipe("n2uq-activations", 2, 2)
    assert Recipe("bbq", 2, 2, activation_method="n2uq-activations").activations == 2


def test_options_of_activations_that_are_left_alone_are_refused() -> None:
    with pytest.raises(ValueError, match=r"activations are left alone, so nothing can be said about them; got {'rms'"):
        Recipe("bbq", 2, activation_options={"rms": "token"})
    assert Recipe("ternary", 2, activation_method="absmax") == Recipe("ternary", 2)


@pytest.mark.parametrize("argument", ["weight_options", "activation_options"])
@pytest.mark.parametrize("option", ["bits", "rotation", "rows"])
def test_options_may_not_contradict_the_fields(argument: str, option: str) -> None:
    with pytest.raises(ValueError, match=rf"{argument} may not hold '{option}': it is a field of the recipe itself"):
        Recipe("bbq", 2, 2, **{argument: {option: 4}})


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Recipe("bbq", 2).weights = 3  # type: ignore[misc]


def test_bbq_vision_is_what_the_paper_ran_on_images() -> None:
    recipe = Recipe.parse("bbq-vision-w2a2")
    weight, activation = recipe.quantizers_for(4, 256)
    assert (weight.rotation, activation.rotation) == (32, 32)
    assert [q.rotation for q in recipe.quantizers_for(4, 256, image=True)] == [64, 64]
    assert [q.rotation for q in recipe.quantizers_for(4, 48, image=True)] == [16, 16]
    for q in (weight, activation):
        options = q.options()
        assert (options["restore_rms"], options["start"], options["learn_scale"]) == (True, 2.45, False)
    assert (weight.rms, activation.rms) == ("row", "token")
    assert Recipe.parse("bbq-vision-w2a2:rotation=auto").rotation == "auto"
    assert Recipe.parse("bbq-w2a2:rotation=vision").quantizers_for(4, 256)[0].rotation == 32
    assert Recipe.parse("bbq-vision-w2a2:rotation=auto").name == "bbq-vision-w2a2:rotation=auto"
