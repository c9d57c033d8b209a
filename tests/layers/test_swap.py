"""quantize(): which layers are swapped, by which rule, and what is refused."""

import copy
import re
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitbell.layers import QuantLinear, Recipe, calibrate, quantize, quantized_layers, report
from bitbell.layers.swap import quantizers, replace_module


class Block(nn.Module):
    """One attention-like and one feed-forward part with the names of LLaMA."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self.attn, name, nn.Linear(width, width, bias=False))
        self.mlp = nn.Module()
        self.mlp.gate_proj, self.mlp.up_proj = nn.Linear(width, 48), nn.Linear(width, 48)
        self.mlp.down_proj = nn.Linear(48, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        a = self.attn
        x = x + a.o_proj(torch.tanh(a.q_proj(y) * a.k_proj(y)) + a.v_proj(y))
        y = self.norm(x)
        return x + self.mlp.down_proj(torch.relu(self.mlp.gate_proj(y)) * self.mlp.up_proj(y))


class Model(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 32)
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])
        self.lm_head = nn.Linear(32, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


def recipes(model: nn.Module) -> dict[str, str]:
    return {name: layer.recipe.name for name, layer in quantized_layers(model)}


def kept(model: nn.Module) -> dict[str, str]:
    return model.__dict__["kept_in_full_precision"]


# Rules ------------------------------------------------------------------------------------------------------


def test_a_recipe_swaps_every_linear_layer_but_the_head_in_place() -> None:
    model = Model()
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    before = {name: model.get_submodule(name).weight for name in linears}
    assert quantize(model, "bbq-w2a2") is model
    assert set(recipes(model)) == linears - {"lm_head"}
    assert all(model.get_submodule(name).weight is weight for name, weight in before.items())
    assert type(model.embed) is nn.Embedding
    assert type(model.blocks[0].norm) is nn.LayerNorm
    assert type(model.lm_head) is nn.Linear
    assert kept(model) == {
        "embed": "embeddings keep full precision",
        "lm_head": "the output head keeps full precision unless a rule names it",
    }


def test_a_recipe_object_and_its_name_are_the_same_rule() -> None:
    assert recipes(quantize(Model(), Recipe("bbq", 2, 2))) == recipes(quantize(Model(), "bbq-w2a2"))


def test_the_first_match_wins_whatever_comes_later() -> None:
    rules = {"*.mlp.down_proj": "quest-w4a4", "*.mlp.*": Recipe("bbq", 2, 4), "blocks.0.*": None, "*": "lsq-w3a3"}
    model = quantize(Model(), rules)
    assert recipes(model) == {
        "blocks.0.mlp.gate_proj": "bbq-w2a4",
        "blocks.0.mlp.up_proj": "bbq-w2a4",
        "blocks.0.mlp.down_proj": "quest-w4a4",
        "blocks.1.attn.q_proj": "lsq-w3a3",
        "blocks.1.attn.k_proj": "lsq-w3a3",
        "blocks.1.attn.v_proj": "lsq-w3a3",
        "blocks.1.attn.o_proj": "lsq-w3a3",
        "blocks.1.mlp.gate_proj": "bbq-w2a4",
        "blocks.1.mlp.up_proj": "bbq-w2a4",
        "blocks.1.mlp.down_proj": "quest-w4a4",
    }
    assert kept(model)["blocks.0.attn.q_proj"] == "rule 'blocks.0.*' leaves it alone"


def test_patterns_are_full_matches_and_may_be_regular_expressions() -> None:
    model = quantize(Model(), {r"re:blocks\.[01]\.attn\.(q|k)_proj": "bbq-w2a2", "*.o_proj": "lsq-w4a4"})
    assert set(recipes(model)) == {f"blocks.{i}.attn.{p}_proj" for i in (0, 1) for p in "qko"}
    assert kept(model)["blocks.0.mlp.up_proj"] == "no rule matches it"


def test_the_head_is_quantized_when_a_rule_names_it() -> None:
    model = quantize(Model(), {"lm_head": "bbq-w4a4", "*": "bbq-w2a2"})
    assert recipes(model)["lm_head"] == "bbq-w4a4"
    assert "lm_head" in recipes(quantize(Model(), {"re:.*": "bbq-w2a2"}))


def test_none_leaves_layers_alone_and_may_be_written_as_a_word() -> None:
    for nothing in (None, "none", "full-precision"):
        model = quantize(Model(), {"blocks.1.*": nothing, "*": "bbq-w2a2"})
        assert all(name.startswith("blocks.0.") for name in recipes(model))


def test_a_rule_may_leave_alone_what_is_never_swapped() -> None:
    quantize(Model(), {"embed": None, "*.norm": None, "*": "bbq-w2a2"})


@pytest.mark.parametrize("pattern", ["blocks.1", "mlp.*"])
def test_leaving_alone_a_container_or_a_part_of_a_name_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=rf"rule '{re.escape(pattern)}' matches no linear layer of the model"):
        quantize(Model(), {pattern: None, "*": "bbq-w2a2"})


@pytest.mark.parametrize("pattern", ["*.attention.*", "re:.*attention.*"])
def test_a_rule_that_matches_nothing_is_refused_with_a_layer_to_compare(pattern: str) -> None:
    with pytest.raises(
        ValueError, match=r"rule '.*attention.*' matches no linear layer of the model. .* called e.g. 'blocks"
    ):
        quantize(Model(), {pattern: "bbq-w2a2", "*": "bbq-w4a4"})


def test_a_misspelt_layer_gets_the_layer_that_was_meant() -> None:
    with pytest.raises(ValueError, match=r"rule 'blocks.0.attn.qproj' matches .* e.g. 'blocks.0.attn.q_proj'"):
        quantize(Model(), {"blocks.0.attn.qproj": "bbq-w2a2"})


def test_a_refused_call_leaves_the_model_as_it_was() -> None:
    model = Model()
    for rules in ({"nothing": "bbq-w2a2"}, {"*.o_proj": "bbq-w2a2", "*": Recipe("bbq", 2, 2, rotation=128)}):
        with pytest.raises(ValueError):
            quantize(model, rules)
        assert not recipes(model)
    quantize(model, "bbq-w2a2")


@pytest.mark.parametrize("rules", [{}, None, 3, ["bbq-w2a2"]])
def test_rules_of_another_type_are_refused(rules: Any) -> None:
    with pytest.raises(ValueError, match=r"rules must be a recipe, its name, or a mapping of patterns to recipes, got"):
        quantize(Model(), rules)


def test_a_rule_that_gives_no_recipe_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rule '\*' must give a Recipe, a recipe's name or None, got 4"):
        quantize(Model(), {"*": 4})  # type: ignore[dict-item]


def test_a_broken_regular_expression_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rule 're:\(q' is not a regular expression: missing \)"):
        quantize(Model(), {"re:(q": "bbq-w2a2"})


def test_a_quantized_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"this model is quantized already"):
        quantize(quantize(Model(), "bbq-w2a2"), "bbq-w2a2")


def test_a_model_without_layers_to_quantize_is_refused_with_the_reasons() -> None:
    with pytest.raises(ValueError, match=r"has no layer to quantize: it has no nn.Linear"):
        quantize(nn.Sequential(nn.ReLU()), {"0": None})
    with pytest.raises(ValueError, match=r"no layer to quantize: head: the output head keeps full precision"):
        quantize(nn.Sequential(OrderedDict(head=nn.Linear(32, 2))), "bbq-w2a2")


def test_a_single_layer_is_refused_with_the_way_to_do_it() -> None:
    with pytest.raises(ValueError, match=r"for a single layer use QuantLinear.from_linear"):
        quantize(nn.Linear(32, 2), "bbq-w2a2")


def test_a_width_that_cannot_be_rotated_is_refused_naming_the_layer_and_the_ways_out() -> None:
    model = nn.Sequential(OrderedDict(first=nn.Linear(32, 100), second=nn.Linear(100, 32)))
    message = r"second: a width of 100 cannot be rotated.*rotation=None.*\(a rule 'second': None would leave it"
    with pytest.raises(ValueError, match=message):
        quantize(model, "bbq-w2a2")
    quantize(model, {"second": Recipe("bbq", 2, 2, rotation=None), "*": "bbq-w2a2"})
    calibrate(model, torch.randn(3, 32))
    assert model(torch.randn(3, 32)).shape == (3, 32)
    assert model.second.weight_quantizer.rotation is None
    assert model.first.weight_quantizer.rotation == 32


# What is not a plain linear layer ---------------------------------------------------------------------------


def test_the_hidden_linear_of_multihead_attention_is_left_alone_with_the_reason() -> None:
    model = nn.TransformerDecoderLayer(32, 2, 64, batch_first=True)
    quantize(model, "bbq-w2a2")
    assert set(recipes(model)) == {"linear1", "linear2"}
    reason = "a NonDynamicallyQuantizableLinear is not a plain nn.Linear"
    assert kept(model) == {"self_attn.out_proj": reason, "multihead_attn.out_proj": reason}
    x = torch.randn(2, 5, 32)
    calibrate(model, (x, x))
    assert model(x, x).shape == (2, 5, 32)


def test_subclasses_of_linear_are_left_alone() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(Special(32, 32), nn.Linear(32, 32))
    assert set(recipes(quantize(model, "bbq-w2a2"))) == {"1"}
    assert kept(model) == {"0": "a Special is not a plain nn.Linear"}


def test_the_last_linear_is_the_head_only_if_it_is_called_like_one() -> None:
    body = nn.Sequential(OrderedDict(classifier=nn.Linear(32, 32), last=nn.Linear(32, 4)))
    assert set(recipes(quantize(body, "bbq-w2a2"))) == {"classifier", "last"}
    body = nn.Sequential(OrderedDict(first=nn.Linear(32, 32), classifier=nn.Linear(32, 4)))
    assert set(recipes(quantize(body, "bbq-w2a2"))) == {"first"}


def test_a_layer_that_hangs_in_two_places_is_swapped_in_both() -> None:
    layer = nn.Linear(32, 32)
    model = quantize(nn.Sequential(layer, nn.ReLU(), layer), "bbq-w2a2")
    assert isinstance(model[0], QuantLinear)
    assert model[2] is model[0]


def test_tied_weights_stay_tied() -> None:
    model = Model()
    model.lm_head.weight = model.embed.weight
    quantize(model, {"lm_head": "bbq-w4a4", "*": "bbq-w2a2"})
    assert model.lm_head.weight is model.embed.weight


# State ------------------------------------------------------------------------------------------------------


def test_a_float_checkpoint_loads_into_the_quantized_model() -> None:
    model, quantized = Model(), quantize(Model(), "bbq-w2a2")
    missing, unexpected = quantized.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert all("_quantizer." in key for key in missing)
    assert torch.equal(quantized.blocks[1].mlp.up_proj.weight, model.blocks[1].mlp.up_proj.weight)


def test_modes_and_frozen_parameters_are_kept() -> None:
    model = Model().eval()
    model.blocks[0].mlp.up_proj.weight.requires_grad_(False)
    quantize(model, "bbq-w2a2")
    assert not any(module.training for module in model.modules())
    assert not model.blocks[0].mlp.up_proj.weight.requires_grad
    assert model.blocks[0].mlp.up_proj.weight_quantizer.scale.requires_grad


def test_quantizing_on_the_meta_device_makes_no_memory() -> None:
    with torch.device("meta"):
        model = Model()
    quantize(model, "bbq-w2a2")
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert model(torch.zeros(2, 3, dtype=torch.long, device="meta")).shape == (2, 3, 11)


def test_a_deep_copy_has_layers_of_its_own() -> None:
    model = calibrate(quantize(Model(), "bbq-w2a2"), torch.arange(6)[None])
    twin = copy.deepcopy(model)
    tokens = torch.arange(8)[None]
    model.eval(), twin.eval()
    assert torch.equal(model(tokens), twin(tokens))
    with torch.no_grad():
        for _, q in quantizers(twin):
            q.scale.mul_(2)
    assert not torch.equal(model(tokens), twin(tokens))


@pytest.mark.parametrize("recipe", ["bbq-w2a16", "quest-w4a16", "lsq-w2a16"])
def test_weight_only_recipes_have_no_activation_quantizers(recipe: str) -> None:
    model = quantize(Model(), recipe)
    assert all(layer.activation_quantizer is None for _, layer in quantized_layers(model))
    assert all(layer.shared_input is None for _, layer in quantized_layers(model))
    calibrate(model, torch.arange(6)[None])
    loss = model(torch.arange(6)[None]).square().mean()
    loss.backward()
    assert model.blocks[0].attn.q_proj.weight.grad.isfinite().all()


def test_replace_module_puts_a_module_at_a_path() -> None:
    model = Model()
    replace_module(model, "blocks.1.mlp.up_proj", nn.Identity())
    assert isinstance(model.blocks[1].mlp.up_proj, nn.Identity)
    replace_module(model, "lm_head", nn.Identity())
    assert isinstance(model.lm_head, nn.Identity)


def test_a_rule_that_earlier_rules_leave_nothing_to_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with pytest.raises(ValueError, match="rule '1' never applies: the first match wins"):
        quantize(model, {"*": "bbq-w2a2", "1": None})


def test_an_encoder_layer_that_bypasses_its_linear_layers_is_left_alone_and_says_so() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0), nn.Linear(64, 64))
    quantize(model, "bbq-w2a2")
    kept = [row for row in report(model).rows if row.name == "0.linear1"]
    assert "past its forward" in kept[0].reason
    calibrate(model, x := torch.randn(2, 5, 64))
    encoder = model.eval()[0]
    with torch.no_grad():
        fast = encoder(x)
    torch.testing.assert_close(encoder(x), fast)


def test_a_calibration_that_fails_leaves_no_scale_behind() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    quantize(model, "bbq-w2a2")
    model.append(nn.Linear(99, 5))  # fails on its input
    with pytest.raises(RuntimeError):
        calibrate(model, 1000 * torch.randn(8, 64))
    assert not bool(model[0].activation_quantizer.calibrated)
    del model[2]
    calibrate(model, torch.randn(8, 64))
    assert float(model[0].activation_quantizer.scale.detach()) < 3
