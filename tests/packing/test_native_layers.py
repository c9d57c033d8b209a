"""Packed layers on the C++ kernels against the same layers on the definitions, and what may happen to them later."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitbell
from bitbell.kernels import native
from bitbell.layers import QuantLinear, Recipe
from bitbell.layers.recipes import VARIANTS
from bitbell.packing import PackedLinear
from bitbell.quantizers import METHODS

pytestmark = pytest.mark.skipif(native.extension is None, reason="installed without the C++ extension")

MakeLayer = Callable[..., QuantLinear]
MakeLlama = Callable[..., Any]
TABLES = ("nf", "quest-fp4")
OPTIONS = [
    "bbq-w2a2:learn_offset=true",
    "bbq-w3a2:w.learn_offset=true",
    "bbq-w2a4:a.learn_offset=true,zero_point=-0.25,a.granularity=token",
    "bbq-w4a4:normalise=false,start=2,estimator=clip",
    "lsq-plus-w2a2:w.asymmetric=true,w.granularity=row",
    "lsq-plus-w3a3:a.asymmetric=false,rotation=32",
    "ternary-w2a4:w.granularity=row,activation_method=quest,rotation=16",
    "n2uq-w2a2:activation_method=absmax,a.granularity=running",
    "lsq-w8a8",
    "absmax-w5a7",
    "bbq-w6a16:learn_offset=true",
]


@pytest.fixture(autouse=True)
def fastest_kernels() -> Iterator[None]:
    with native.using("auto"):
        yield


def recipes_of(variant: str) -> Iterator[str]:
    """W1 to W4 by A1 to A4, A8 and A16, as far as the method has them."""
    method = METHODS[VARIANTS[variant][0]]
    of_inputs = METHODS[method.activation_method or method.method].widths
    for weights in set(method.widths) & {1, 2, 3, 4}:
        yield from (f"{variant}-w{weights}a{a}" for a in (1, 2, 3, 4, 8, 16) if a in of_inputs or a == 16)


def pack_layer(trained: QuantLinear) -> PackedLinear:
    return PackedLinear.from_trained(trained, trained.activation_quantizer)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_reference(packed: nn.Module, x: Tensor) -> Tensor:
    with native.using("reference"), torch.no_grad():
        return packed(x)


def suits(recipe: Recipe) -> bool:
    """Whether the C++ kernels have a way: uniform grids on both sides, no statistic over a whole tensor."""
    if recipe.activations is None:
        return True
    own = METHODS[recipe.method].activation_method or recipe.method
    return not {recipe.method, recipe.activation_method or own} & set(TABLES) and (
        recipe.activation_options.get("granularity") != "tensor"
    )


def agreeing(packed: PackedLinear, x: Tensor) -> Tensor:
    """Rows whose input codes are the same on both ways; all of them but for values on a threshold."""
    quantizer = packed.activation_quantizer
    if quantizer is None:
        return torch.ones(len(x), dtype=torch.bool)
    layer = packed.native_layer()
    assert layer is not None
    assert layer.plan is not None
    same = (native.quantize(layer.plan, x)[0] == quantizer.quantize(x).codes).all(-1)
    assert int((~same).sum()) <= 1
    return same


def check(packed: PackedLinear, x: Tensor) -> None:
    expected = by_reference(packed, x)
    got = packed(x)
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    if not suits(packed.recipe):
        assert packed.native_layer() is None
        assert torch.equal(got, expected)
        return
    assert packed.native_layer() is not None
    same = agreeing(packed, x)
    assert float((got - expected)[same].abs().max()) <= 1e-5 * float(expected.abs().max()), packed.recipe.name


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_are_those_of_the_definitions_for_all_bits(make_layer: MakeLayer, variant: str) -> None:
    for place, name in enumerate(recipes_of(variant)):
        packed = pack_layer(make_layer(name, rows=70, bias=place % 2 == 0))
        check(packed, randn(place, 5, 64))
        check(packed, randn(place, 1, 64))


@pytest.mark.parametrize("name", OPTIONS)
def test_outputs_are_those_of_the_definitions_for_options(make_layer: MakeLayer, name: str) -> None:
    packed = pack_layer(make_layer(name, width=192, rows=70, bias=True))
    check(packed, randn(0, 7, 192))


@pytest.mark.parametrize("variant", VARIANTS)
def test_unrotated_layers_of_any_width(make_layer: MakeLayer, variant: str) -> None:
    for width in (37, 100):
        name = list(recipes_of(variant))[-2]
        check(pack_layer(make_layer(f"{name}:rotation=none", width=width, bias=True)), randn(width, 9, width))


def test_every_level_gives_the_same_outputs(make_layer: MakeLayer) -> None:
    packed, x = pack_layer(make_layer("quest-w3a4", bias=True)), randn(0, 20, 64)
    expected = packed(x)
    for name, why in native.level_names().items():
        if not why:
            with native.using(name):
                assert torch.equal(packed(x), expected), name


def test_nan_shows_in_the_rows_that_hold_it(make_layer: MakeLayer) -> None:
    x = randn(0, 3, 64)
    x[1, 5] = float("nan")
    for name in (*OPTIONS, "bbq-w2a2", "quest-w2a2", "narrow-w3a3", "absmax-w4a8", "bbq-w2a16"):
        packed = pack_layer(make_layer(name))
        assert torch.equal(packed(x).isnan(), by_reference(packed, x).isnan()), name
        assert bool(packed(x)[1].isnan().all()), name


# What is kept is never stale ------------------------------------------------------------------------------------------


def fresh(packed: PackedLinear, x: Tensor) -> Tensor:
    """What a layer with this state and nothing kept computes."""
    other = PackedLinear(packed.in_features, packed.out_features, packed.recipe, packed.bias is not None)
    other.load_state_dict(packed.state_dict())
    assert other.activation_quantizer is None or not other.eval().activation_quantizer.training
    return other(x)


def used(make_layer: MakeLayer, name: str = "lsq-w2a3", **options: Any) -> tuple[PackedLinear, Tensor, Tensor]:
    """A layer after its first call, an input and the output."""
    packed, x = pack_layer(make_layer(name, bias=True, **options)), randn(0, 4, 64)
    return packed, x, packed(x)


CHANGES: dict[str, Callable[[PackedLinear], object]] = {
    "scale in place": lambda p: p.weight_scale.mul_(2),
    "codes in place": lambda p: p.weight_packed.copy_(p.weight_packed.flip(0)),
    "bias in place": lambda p: p.bias.add_(1),
    "input scale in place": lambda p: p.activation_quantizer.scale.mul_(2),
    "scale replaced": lambda p: setattr(p, "weight_scale", p.weight_scale * 2),
    "codes replaced": lambda p: setattr(p, "weight_packed", p.weight_packed.flip(0)),
    "bias replaced": lambda p: setattr(p, "bias", p.bias + 1),
    "input scale replaced": lambda p: setattr(
        p.activation_quantizer, "scale", nn.Parameter(p.activation_quantizer.scale * 2, requires_grad=False)
    ),
    "one row of the scale": lambda p: p.weight_scale[3].zero_(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_takes_effect_at_once(make_layer: MakeLayer, change: str) -> None:
    packed, x, before = used(make_layer)
    with torch.no_grad():
        CHANGES[change](packed)
    assert not torch.equal(packed(x), before)
    assert torch.equal(packed(x), fresh(packed, x))
    check(packed, x)


def test_loading_another_state_takes_effect_at_once(make_layer: MakeLayer) -> None:
    packed, x, before = used(make_layer)
    other, _, _ = used(make_layer)
    with torch.no_grad():
        other.weight_packed.copy_(other.weight_packed.flip(0))
        other.activation_quantizer.scale.mul_(0.7)
    for assign in (False, True):
        packed, x, before = used(make_layer)
        packed.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(packed(x), other(x))
        assert not torch.equal(packed(x), before)
    # The quantizer's state alone, as of a group of layers that share it.
    packed, x, before = used(make_layer)
    packed.activation_quantizer.load_state_dict(other.activation_quantizer.state_dict())
    assert torch.equal(packed(x), fresh(packed, x))
    assert not torch.equal(packed(x), before)


def test_a_new_tensor_where_an_old_one_lay_is_noticed(make_layer: MakeLayer) -> None:
    """Python gives a new object the address, and so the id, of one that is gone."""
    packed, x, _ = used(make_layer)
    for turn in range(4):
        version = packed.bias._version
        packed.bias = None
        bias = torch.full((packed.out_features,), float(turn))
        while bias._version < version:
            bias.add_(0)
        packed.bias = bias
        assert torch.equal(packed(x), fresh(packed, x)), turn


@pytest.mark.parametrize("kind", [torch.Tensor.clone, lambda t: nn.Parameter(t, requires_grad=False)])
def test_a_bias_given_later_is_added(make_layer: MakeLayer, kind: Callable[[Tensor], Tensor]) -> None:
    packed, x = pack_layer(make_layer("lsq-w2a3")), randn(0, 4, 64)
    before, bias = packed(x), randn(1, 24)
    packed.bias = kind(bias)
    torch.testing.assert_close(packed(x), before + bias, rtol=1e-5, atol=1e-5)


def test_another_quantizer_of_inputs_takes_effect_at_once(make_layer: MakeLayer) -> None:
    packed, x, before = used(make_layer)
    other = copy.deepcopy(packed.activation_quantizer)
    other.scale.mul_(2)
    packed.activation_quantizer = other
    assert not torch.equal(packed(x), before)
    check(packed, x)


def test_a_layer_without_its_bias_adds_none(make_layer: MakeLayer) -> None:
    packed, x, before = used(make_layer)
    bias = packed.bias
    packed.bias = None
    torch.testing.assert_close(packed(x), before - bias, rtol=1e-5, atol=1e-5)


def test_layers_of_a_llama_share_inputs_and_agree(make_llama: MakeLlama, tokens: Tensor) -> None:
    packed = bitbell.pack(make_llama("bbq-w3a4"))
    with torch.no_grad():
        got = packed(tokens).logits
    with native.using("reference"), torch.no_grad():
        expected = packed(tokens).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        quantizers = [m.activation_quantizer for m in packed.model.modules() if isinstance(m, PackedLinear)]
        assert len(set(map(id, quantizers))) < len(quantizers)
        for quantizer in {id(q): q for q in quantizers}.values():
            quantizer.scale.mul_(1.5)
        changed = packed(tokens).logits
        with native.using("reference"):
            torch.testing.assert_close(changed, packed(tokens).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(changed, got, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_type_changes_nothing(make_layer: MakeLayer, dtype: torch.dtype) -> None:
    for name in ("bbq-w2a3", "absmax-w3a8", "nf-w4a16"):
        packed, x, expected = used(make_layer, name)
        packed._native = None
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            got = packed(x), packed(x)
        finally:
            torch.set_default_dtype(default)
        assert all(torch.equal(y, expected) for y in got)


# Copies --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bbq-w2a2", "quest-w3a4", "bbq-w2a16", "nf-w4a16", "nf-w3a3"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_model_in_use_can_be_copied(name: str, copied: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 24), nn.Linear(24, 32)), randn(0, 4, 64)
    bitbell.calibrate(bitbell.quantize(model, {"0": name, "*": None}), x)
    packed = bitbell.pack(model.eval())
    before = packed(x)
    twin = copied(packed)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        for layer in twin.model.modules():
            if isinstance(layer, PackedLinear):
                layer.weight_scale.mul_(3)
    assert torch.equal(packed(x), before)
    assert not torch.equal(twin(x), before)


@pytest.mark.parametrize("name", ["bbq-w2a2", "lsq-w4a8", "nf-w4a16", "absmax-w1a4"])
def test_saving_and_loading_keeps_the_outputs(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 24)), randn(0, 4, 64)
    bitbell.calibrate(bitbell.quantize(model, name), x)
    packed = bitbell.pack(model.eval())
    expected = packed(x)
    packed.save(tmp_path / "packed")
    again = bitbell.load(tmp_path / "packed", model=nn.Sequential(nn.Linear(64, 24)))
    assert torch.equal(again(x), expected)
    assert again.model[0].native_layer() is not None


# Where the definitions are used instead -------------------------------------------------------------------------------


def takes_native(packed: PackedLinear, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a call goes to the C++ kernels."""
    calls = []
    real = native.NativeLayer.__call__
    with monkeypatch.context() as patch:
        patch.setattr(native.NativeLayer, "__call__", lambda layer, x: calls.append(1) or real(layer, x))
        packed(x)
    return bool(calls)


def test_gradients_come_from_the_definitions(make_layer: MakeLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x, _ = used(make_layer, "bbq-w2a16")
    assert takes_native(packed, x, monkeypatch)
    asking = x.clone().requires_grad_()
    assert not takes_native(packed, asking, monkeypatch)
    y = packed(asking)
    y.sum().backward()
    assert asking.grad is not None
    assert float(asking.grad.abs().min()) > 0
    with torch.no_grad():
        assert takes_native(packed, asking, monkeypatch)
        torch.testing.assert_close(packed(asking), y.detach(), rtol=1e-5, atol=1e-5)


def test_other_types_other_kernels_and_training_go_to_the_definitions(
    make_layer: MakeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, x, y = used(make_layer, "lsq-w2a3")
    assert takes_native(packed, x, monkeypatch)
    assert takes_native(packed, x.bfloat16(), monkeypatch)
    assert takes_native(packed, x.half(), monkeypatch)
    assert not takes_native(packed, x.double(), monkeypatch)
    torch.testing.assert_close(packed(x.double()).float(), y, rtol=1e-5, atol=1e-5)
    with native.using("reference"):
        assert not takes_native(packed, x, monkeypatch)
    packed.activation_quantizer.train()
    assert not takes_native(packed, x, monkeypatch)
    packed.activation_quantizer.eval()
    assert takes_native(packed, x, monkeypatch)


@pytest.mark.parametrize("level", ["auto", "portable"])
def test_many_rows_of_floats_go_to_the_definitions_where_those_are_faster(
    make_layer: MakeLayer, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    packed, _, _ = used(make_layer, "bbq-w2a16")
    with native.using(level):
        assert takes_native(packed, randn(0, 16, 64), monkeypatch)
        assert takes_native(packed, randn(0, 17, 64), monkeypatch) == (native.level() != "portable")
        check(packed, randn(0, 17, 64))


@pytest.mark.parametrize("level", ["auto", "reference"])
@pytest.mark.parametrize("name", ["bbq-w2a2", "bbq-w2a16"])
def test_inputs_of_another_width_are_refused_naming_the_layer(make_layer: MakeLayer, name: str, level: str) -> None:
    packed, _, _ = used(make_layer, name)
    message = rf"PackedLinear\(in_features=64, .*recipe={name}\) takes inputs of shape \(\.\.\., 64\), got "
    with native.using(level):
        for shape in ((2, 32), (64, 2), (128,), ()):
            with pytest.raises(ValueError, match=message):
                packed(torch.zeros(shape))


def test_sums_beyond_int32_go_to_the_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    width = 2**16 + 300  # times 255 times 128 is more than 2**31
    packed = PackedLinear(width, 2, Recipe.parse("lsq-w8a8"), bias=False).eval()
    with torch.no_grad():
        packed.weight_packed.fill_(-1)
        packed.weight_scale.fill_(1)
        packed.activation_quantizer.scale.fill_(1)
        packed.activation_quantizer.calibrated.fill_(True)
    x = torch.full((1, width), -1000.0)
    assert not takes_native(packed, x, monkeypatch)
    assert packed(x).unique().tolist() == [float(torch.tensor(-127.5 * 127.5 * width))]


@pytest.mark.parametrize("name", ["bbq-w2a2", "bbq-w2a16"])
def test_compiled_layers_use_the_definitions(make_layer: MakeLayer, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x, before = used(make_layer, name)
    expected = by_reference(packed, x)

    def refuse(*_: object) -> Tensor:
        raise AssertionError("the C++ kernels were called")

    torch._dynamo.reset()
    compiled = torch.compile(packed, backend="eager", fullgraph=True)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(native.NativeLayer, "__call__", refuse)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(packed(x), before)


def test_what_traces_or_differentiates_through_functions_takes_the_definition() -> None:
    """A C++ call leaves nothing in a trace, and no tangent."""
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(64, 8)), torch.randn(3, 64)
    bitbell.calibrate(bitbell.quantize(model, "bbq-w2a16"), x)
    layer = bitbell.pack(model.eval()).model[0]
    expected = layer(2 * x)
    traced = torch.jit.trace(lambda a: layer(a), x, check_trace=False)
    assert torch.allclose(traced(2 * x), expected, atol=1e-5)
    assert torch.allclose(torch.func.vmap(layer)(2 * x), expected, atol=1e-5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent is not None
