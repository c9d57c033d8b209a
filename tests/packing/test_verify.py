"""verify() passes for a faithful twin and names the layer for any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitbell
from bitbell.packing import VerificationError

MakeLlama = Callable[..., Any]


@pytest.fixture
def pair(make_llama: MakeLlama) -> tuple[Any, Any]:
    model = make_llama("bbq-w2a2")
    return model, bitbell.pack(model)


@pytest.mark.parametrize(
    "recipe",
    [
        "bbq-w2a2",
        "bbq-tensor-w3a3",
        "quest-w1a1",
        "lsq-w4a4",
        "bbq-w8a8",
        "bbq-w4a16",
        "nf-w4a4",
        "lsq-plus-w2a2",
        "n2uq-w2a2",
    ],
)
def test_a_faithful_twin_passes_and_the_result_says_what_was_compared(make_llama: MakeLlama, recipe: str) -> None:
    model = make_llama(recipe)
    result = bitbell.verify(model, bitbell.pack(model))
    assert result.layers == 7
    assert result.codes == 4 * 64 * 64 + 3 * 64 * 128
    assert result.layer_difference <= 1e-6
    assert result.logit_difference is not None
    assert result.logit_difference <= 1e-4
    assert "verified 7 layers: 40,960 weight codes equal, input codes equal, outputs within" in str(result)


def test_a_batch_of_your_own_and_the_module_inside_are_accepted(pair: tuple[Any, Any], tokens: Tensor) -> None:
    model, packed = pair
    assert bitbell.verify(model, packed, tokens) == bitbell.verify(model, packed.model, tokens)


def test_models_that_take_no_tokens_are_compared_on_random_inputs() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
    bitbell.quantize(model, "bbq-w2a2")
    bitbell.calibrate(model, torch.randn(8, 64))
    result = bitbell.verify(model, bitbell.pack(model))
    assert result.layers == 2
    assert result.logit_difference is None
    assert str(result).endswith("logits not compared")


def test_verifying_leaves_both_models_in_their_modes(pair: tuple[Any, Any]) -> None:
    model, packed = pair
    model.train()
    model.model.norm.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bitbell.verify(model, packed)
    assert model.training
    assert not model.model.norm.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_flipped_code_is_found(pair: tuple[Any, Any]) -> None:
    model, packed = pair
    packed.model.model.layers[0].mlp.up_proj.weight_packed[5, 1] ^= 1 << 7
    with pytest.raises(VerificationError, match=r"layers.0.mlp.up_proj: 1 of 8192 weight codes differ"):
        bitbell.verify(model, packed)


def test_a_changed_weight_scale_is_found(pair: tuple[Any, Any]) -> None:
    model, packed = pair
    packed.model.model.layers[0].self_attn.v_proj.weight_scale[3] *= 1 + 2e-7
    with pytest.raises(VerificationError, match=r"self_attn.v_proj: the weight scales differ"):
        bitbell.verify(model, packed)


def test_a_changed_weight_offset_is_found(make_llama: MakeLlama) -> None:
    model = make_llama("bbq-w2a2:learn_offset=true")
    packed = bitbell.pack(model)
    projection = packed.model.model.layers[0].self_attn.v_proj
    projection.weight_offset[3] += 1e-9
    with pytest.raises(VerificationError, match=r"self_attn.v_proj: the weight offsets differ"):
        bitbell.verify(model, packed)
    projection.weight_offset = None
    with pytest.raises(VerificationError, match=r"self_attn.v_proj: only one of the two has a weight offset"):
        bitbell.verify(model, packed)


def test_a_changed_activation_scale_is_found(pair: tuple[Any, Any]) -> None:
    model, packed = pair
    packed.model.model.layers[0].mlp.down_proj.activation_quantizer.scale *= 1.0001
    with pytest.raises(VerificationError, match=r"mlp.down_proj: outputs differ by 1.00e-04 of the largest, allowed"):
        bitbell.verify(model, packed)


def test_changed_running_statistics_are_found(pair: tuple[Any, Any]) -> None:
    model, packed = pair
    packed.model.model.layers[0].self_attn.o_proj.activation_quantizer.running_inverse_rms *= 1.01
    with pytest.raises(VerificationError, match=r"self_attn.o_proj: \d+ of 8192 input codes differ"):
        bitbell.verify(model, packed)


def test_a_changed_head_is_found_in_the_logits(pair: tuple[Any, Any]) -> None:
    model, packed = pair
    packed.model.lm_head.weight[7] += 0.1
    with pytest.raises(VerificationError, match=r"logits differ by .* of the largest, allowed are 0.0001"):
        bitbell.verify(model, packed)


def test_nan_is_a_difference(pair: tuple[Any, Any]) -> None:
    model, packed = pair
    packed.model.lm_head.weight[7] = float("nan")
    with pytest.raises(VerificationError, match=r"logits differ by nan"):
        bitbell.verify(model, packed)


def test_a_missing_layer_is_named(pair: tuple[Any, Any]) -> None:
    model, packed = pair
    packed.model.model.layers[0].mlp.gate_proj = nn.Linear(64, 128, bias=False)
    with pytest.raises(VerificationError, match=r"different quantized layers: model.layers.0.mlp.gate_proj$"):
        bitbell.verify(model, packed)


def test_a_layer_of_another_shape_is_named() -> None:
    models = [bitbell.quantize(nn.Sequential(nn.Linear(64, rows)), "bbq-w2a2") for rows in (16, 24)]
    for model in models:
        bitbell.calibrate(model, torch.randn(8, 64))
    with pytest.raises(VerificationError, match=r"^0: the weight is \(16, 64\), packed \(24, 64\)"):
        bitbell.verify(models[0], bitbell.pack(models[1]))


def test_models_without_quantized_layers_are_refused() -> None:
    with pytest.raises(VerificationError, match=r"different quantized layers: none at all"):
        bitbell.verify(nn.Linear(4, 4), nn.Linear(4, 4))


def test_a_bfloat16_model_verifies_within_its_own_rounding() -> None:
    import torch
    from torch import nn

    from bitbell.layers import calibrate, quantize
    from bitbell.packing import pack, verify

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16)).to(torch.bfloat16)
    quantize(model, "bbq-w2a2")
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    calibrate(model, x)
    assert verify(model.eval(), pack(model), x).logit_difference is None


def test_a_layer_that_the_batch_does_not_reach_is_named() -> None:
    import torch
    from torch import nn

    from bitbell.layers import calibrate, quantize
    from bitbell.packing import VerificationError, pack, verify

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare, self.all = nn.Linear(64, 64), nn.Linear(64, 64), True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x) + self.spare(x) if self.all else self.used(x)

    model = Branching()
    quantize(model, "bbq-w2a2")
    x = torch.randn(4, 64)
    calibrate(model, x)
    model.all = False
    with pytest.raises(VerificationError, match="the batch does not reach spare"):
        verify(model.eval(), pack(model), x)
