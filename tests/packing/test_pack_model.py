"""A whole model is packed: the trained one stays as it is, the twin has its codes and nothing else of the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitbell
from bitbell.layers import QuantLinear
from bitbell.packing import PackedLinear, PackedModel
from bitbell.packing.files import describe

MakeLlama = Callable[..., Any]


@pytest.mark.parametrize(
    "recipe", ["bbq-w2a2", "bbq-tensor-w4a4", "bbq-token-w1a1", "quest-w3a3", "lsq-w4a4", "bbq-w3a16"]
)
def test_logits_of_the_packed_model_are_those_of_the_trained_one(
    make_llama: MakeLlama, tokens: Tensor, recipe: str
) -> None:
    model = make_llama(recipe)
    assert torch.equal(bitbell.pack(model)(tokens).logits, model(tokens).logits)


def test_packing_leaves_the_trained_model_as_it_was(make_llama: MakeLlama) -> None:
    model = make_llama("bbq-w2a2").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packed = bitbell.pack(model)
    after = model.state_dict()
    assert model.training
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    ours = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert not ours & {tensor.data_ptr() for tensor in (*packed.parameters(), *packed.buffers())}


def test_the_packed_model_holds_no_float_weights_of_quantized_layers(make_llama: MakeLlama) -> None:
    model = make_llama("bbq-w2a2")
    packed = bitbell.pack(model)
    names = set(packed.model.state_dict())
    layers = [name for name, layer in model.named_modules() if isinstance(layer, QuantLinear)]
    assert len(layers) == 7
    assert not any(packed.model.state_dict()[f"{name}.weight"].numel() for name in layers)
    assert {f"{name}.weight_packed" for name in layers} <= names
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= names


def test_layers_that_shared_an_input_quantizer_still_do(make_llama: MakeLlama) -> None:
    attention = bitbell.pack(make_llama("bbq-w2a2")).model.model.layers[0].self_attn
    assert attention.k_proj.activation_quantizer is attention.q_proj.activation_quantizer
    assert attention.k_proj.shared_input is attention.q_proj.shared_input is attention.v_proj.shared_input
    assert attention.o_proj.shared_input is None
    owners = [name for name in attention.state_dict() if name.endswith("activation_quantizer.scale")]
    assert owners == ["q_proj.activation_quantizer.scale", "o_proj.activation_quantizer.scale"]


def test_models_may_mix_recipes_and_leave_layers_alone(make_llama: MakeLlama, tokens: Tensor) -> None:
    rules = {"*.mlp.down_proj": None, "*.mlp.*": "lsq-w3a4", "lm_head": "bbq-w8a8", "*": "quest-w1a2"}
    model = make_llama(rules)
    packed = bitbell.pack(model)
    kinds = {name: layer.recipe.name for name, layer in packed.named_modules() if isinstance(layer, PackedLinear)}
    assert set(kinds.values()) == {"lsq-w3a4", "bbq-w8a8", "quest-w1a2"}
    assert len(describe(packed)["quantization_config"]["recipes"]) == 3
    torch.testing.assert_close(packed(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)


def test_three_bit_codes_cost_three_bits(make_llama: MakeLlama) -> None:
    state = bitbell.pack(make_llama("bbq-w3a3")).model.state_dict()
    for name, (rows, columns) in {"self_attn.q_proj": (64, 64), "mlp.down_proj": (64, 128)}.items():
        words = state[f"model.layers.0.{name}.weight_packed"]
        assert words.numel() * words.element_size() == rows * columns * 3 // 8


@pytest.mark.parametrize("recipe", ["bbq-w2a2", "bbq-w3a3", "lsq-w1a4"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_reported_packed_size_is_the_size_of_the_file(
    make_llama: MakeLlama, tmp_path: Path, recipe: str, tied: bool
) -> None:
    model = make_llama(recipe, tie_word_embeddings=tied)
    file = bitbell.pack(model).save(tmp_path / "packed") / "model.safetensors"
    data = file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
    # Beside codes, scales and what is left alone: shapes (16 bytes a layer) and the input quantizers' few numbers.
    assert 0 <= data - bitbell.report(model).bytes_packed <= 7 * (16 + 4 + 4 + 1)


def test_layers_with_a_bias_are_packed_with_it(make_llama: MakeLlama, tokens: Tensor) -> None:
    model = make_llama("bbq-w2a2", attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    assert torch.equal(bitbell.pack(model)(tokens).logits, model(tokens).logits)


def test_packing_a_model_that_is_not_quantized_says_so(make_llama: MakeLlama) -> None:
    with pytest.raises(ValueError, match=r"no quantized layer; quantize and train it first \(bitbell.quantize\)"):
        bitbell.pack(nn.Sequential(nn.Linear(4, 4)))


def test_packing_twice_says_so(make_llama: MakeLlama) -> None:
    with pytest.raises(ValueError, match=r"q_proj is a PackedLinear: the model is packed already"):
        bitbell.pack(bitbell.pack(make_llama("bbq-w2a2")))


def test_packing_before_calibration_names_the_layer() -> None:
    model = bitbell.quantize(nn.Sequential(nn.Linear(64, 8)), "bbq-w2a2")
    with pytest.raises(ValueError, match=r"0: the weight quantizer has no scale yet; train the model, or call"):
        bitbell.pack(model)
    model[0].weight_quantizer.calibrate(model[0].weight)
    with pytest.raises(ValueError, match=r"0: the input quantizer has no scale yet"):
        bitbell.pack(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(make_llama: MakeLlama, value: float) -> None:
    model = make_llama("bbq-w2a2")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(ValueError, match=r"mlp.up_proj.weight holds NaN or infinity and cannot be packed"):
        bitbell.pack(model)


def test_a_layer_that_hangs_in_two_places_is_packed_once(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        shared = nn.Linear(64, 64)
        return nn.Sequential(shared, nn.ReLU(), shared)

    model, x = build(), torch.randn(5, 64)
    bitbell.quantize(model, "bbq-w2a2")
    bitbell.calibrate(model, x)
    model.eval()
    packed = bitbell.pack(model)
    assert packed.model[0] is packed.model[2]
    directory = packed.save(tmp_path / "packed")
    loaded = bitbell.load(directory, model=build())
    assert loaded.model[0] is loaded.model[2]
    assert torch.equal(loaded(x), model(x))


def test_a_packed_model_stays_in_evaluation_mode_and_has_the_configuration(make_llama: MakeLlama) -> None:
    model = make_llama("bbq-w2a2")
    packed = bitbell.pack(model.train())
    assert isinstance(packed, PackedModel)
    assert not packed.model.training
    assert packed.config.hidden_size == 64
    assert not hasattr(bitbell.pack(nn.Sequential(model.model.layers[0].mlp.up_proj)), "config")
