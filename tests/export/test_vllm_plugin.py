"""The plug-in for vLLM, against an imitation of vLLM's interfaces (fake_vllm.py): vLLM itself has not run it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import LinearBase, imitate, load_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import bitbell
from bitbell.export.vllm_registration import register
from bitbell.packing import PackedFileError


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The imitation in the place of vLLM; gives the registered methods by name."""
    yield imitate(monkeypatch)
    sys.modules.pop("bitbell.export.vllm_plugin", None)


LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj")


def packed_directory(folder: Path, rules: Any = "bbq-w2a2", **fields: Any) -> tuple[Any, Any, dict[str, Tensor]]:
    """A packed LLaMA, its configuration as it lies in the file, and its tensors."""
    settings: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**(settings | fields)))
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) if name.endswith("bias") else 0)
        bitbell.calibrate(bitbell.quantize(model, rules), torch.randint(0, 96, (4, 16)))
    packed = bitbell.pack(model.eval())
    packed.save(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return packed.model, config["quantization_config"], load_file(folder / "model.safetensors")


def outputs(blocks: nn.ModuleList, model: Any) -> list[tuple[Tensor, Tensor]]:
    """Of every joined layer, and of the packed model's layers side by side, for the same random inputs."""
    found = []
    for block, ours in zip(blocks, model.model.layers, strict=True):
        for part, joined, names in (
            ("self_attn", "qkv_proj", LAYERS[:3]),
            ("self_attn", "o_proj", LAYERS[3:]),
            ("mlp", "gate_up_proj", ("gate_proj", "up_proj")),
            ("mlp", "down_proj", ("down_proj",)),
        ):
            layers: list[Any] = [ours.get_submodule(f"{part}.{name}") for name in names]
            x = torch.randn(2, 7, layers[0].in_features, generator=torch.Generator().manual_seed(len(found)))
            found.append((block.get_submodule(f"{part}.{joined}")(x), torch.cat([layer(x) for layer in layers], -1)))
    return found


RECIPES: list[Any] = ["bbq-w2a2", "bbq-token-w3a4", "bbq-w2a16", "lsq-plus-w4a4:w.asymmetric=true", "nf-w4a4"]
RECIPES += [{"*.mlp.*": "bbq-w1a1", "*.k_proj": "absmax-w4a8", "*": "bbq-w2a2"}]
RECIPES += [{"*.gate_proj": None, "*.up_proj": None, "*.o_proj": None, "*": "bbq-w2a2"}]


@pytest.mark.parametrize("rules", RECIPES)
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_joined_layers_give_what_the_packed_layers_give(rules: Any, bias: bool, tmp_path: Path, vllm: Any) -> None:
    register()
    model, fields, tensors = packed_directory(tmp_path / "packed", rules, attention_bias=bias)
    blocks = load_model(model.config, vllm["bitbell"].from_config(fields), tensors)
    for found, expected in outputs(blocks, model):
        assert torch.equal(found, expected)
    assert not [name for name, _ in blocks.named_parameters() if "weight_packed" in name]


@torch.no_grad()
def test_scales_stay_float32_in_a_model_of_bfloat16(tmp_path: Path, vllm: Any) -> None:
    register()
    model, fields, tensors = packed_directory(tmp_path / "packed")
    torch.set_default_dtype(torch.bfloat16)
    try:
        blocks: Any = load_model(model.config, vllm["bitbell"].from_config(fields), tensors)
    finally:
        torch.set_default_dtype(torch.float32)
    joined, x = blocks[1].mlp.gate_up_proj, torch.randn(3, 64).bfloat16()
    assert joined.packed[0].weight_scale.dtype == torch.float32
    ours = model.model.layers[1].mlp
    assert torch.equal(joined(x), torch.cat([ours.gate_proj(x), ours.up_proj(x)], -1))
    assert joined(x).dtype == torch.bfloat16


@torch.no_grad()
def test_the_shared_input_is_quantized_once(tmp_path: Path, vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    model, fields, tensors = packed_directory(tmp_path / "packed")
    blocks: Any = load_model(model.config, vllm["bitbell"].from_config(fields), tensors)
    joined = blocks[0].self_attn.qkv_proj
    quantizer, calls = joined.packed[0].activation_quantizer, []
    assert joined.packed[2].activation_quantizer is quantizer
    quantize = quantizer.quantize
    monkeypatch.setattr(quantizer, "quantize", lambda x: calls.append(1) or quantize(x))
    joined(torch.randn(3, 64))
    assert len(calls) == 1


def test_only_all_parts_of_a_joined_layer_can_be_packed(tmp_path: Path, vllm: Any) -> None:
    register()
    model, fields, tensors = packed_directory(tmp_path / "packed", {"*.k_proj": None, "*": "bbq-w2a2"})
    with pytest.raises(ValueError, match=r"vLLM joins .*k_proj.*, of which only .*q_proj, .*v_proj are packed: all"):
        load_model(model.config, vllm["bitbell"].from_config(fields), tensors)


def test_several_gpus_and_packed_heads_are_refused(tmp_path: Path, vllm: Any) -> None:
    register()
    _, fields, _ = packed_directory(tmp_path / "packed", {"lm_head": "bbq-w4a8", "*": "bbq-w2a2"})
    config, name = vllm["bitbell"].from_config(fields), "model.layers.0.mlp.down_proj"
    with pytest.raises(ValueError, match=f"{name}: packed layers are not split over several GPUs"):
        LinearBase(96, [64], config, name, False, ranks=2)
    with pytest.raises(ValueError, match=r"have shapes \[\(64, 96\)\] in the file, but \[\(32, 96\)\] in vLLM"):
        LinearBase(96, [32], config, name, False)
    with pytest.raises(ValueError, match="lm_head is packed, but a Embedding in vLLM"):
        config.get_quant_method(nn.Embedding(4, 4), "lm_head")
    assert config.get_quant_method(nn.Embedding(4, 4), "model.embed_tokens") is None


DAMAGE: dict[str, tuple[str, Any, str]] = {
    "missing": ("o_proj.weight_scale", None, "o_proj.weight_scale is missing"),
    "shape": (
        "o_proj.weight_packed",
        torch.zeros(64, 3, dtype=torch.int32),
        r"is torch.int32 \(64, 3\) in the file, but",
    ),
    "type": ("o_proj.weight_packed", torch.zeros(64, 4), "is torch.float32 .* in the file, but torch.int32"),
    "nan": ("q_proj.activation_quantizer.scale", torch.tensor([torch.nan]), "scale holds NaN"),
    "scale": ("q_proj.activation_quantizer.calibrated", torch.tensor([False]), "so the quantizer has no scale"),
    "place": ("k_proj.activation_quantizer.scale", torch.tensor([1.0]), "in the file, but not wanted there"),
    "size": ("v_proj.weight_shape", torch.tensor([32, 65]), r"v_proj.weight_shape is \[32, 65\]"),
    "bias": ("o_proj.bias", None, "o_proj has a bias in the file, but no bias in vLLM"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_a_packed_layer_cannot_have_is_found_and_named(what: str, tmp_path: Path, vllm: Any) -> None:
    register()
    model, fields, tensors = packed_directory(tmp_path / "packed", attention_bias=what == "bias")
    name, tensor, message = DAMAGE[what]
    name = f"model.layers.1.self_attn.{name}"
    tensors = {k: v for k, v in tensors.items() if k != name} | ({} if tensor is None else {name: tensor})
    if what == "bias":
        model.config.attention_bias = False
        tensors = {k: v for k, v in tensors.items() if not k.endswith(".bias")}
        message = "proj has a bias in the file, but no bias in vLLM"
    with pytest.raises(PackedFileError, match=message):
        load_model(model.config, vllm["bitbell"].from_config(fields), tensors)


@pytest.mark.parametrize("change", [{"quant_method": "awq"}, {"format_version": 99}, {"layers": {}}])
def test_another_configuration_is_refused(change: dict[str, Any], tmp_path: Path, vllm: Any) -> None:
    register()
    _, fields, _ = packed_directory(tmp_path / "packed")
    with pytest.raises(PackedFileError, match=r"config\.json: "):
        vllm["bitbell"].from_config(fields | change)


def test_a_rotation_other_than_the_recipe_gives_is_refused(tmp_path: Path, vllm: Any) -> None:
    register()
    _, fields, _ = packed_directory(tmp_path / "packed")
    fields["layers"]["model.layers.0.self_attn.o_proj"]["rotation"] = 16
    config = vllm["bitbell"].from_config(fields)
    with pytest.raises(PackedFileError, match="rotation and zero point are not those of its recipe"):
        LinearBase(64, [64], config, "model.layers.0.self_attn.o_proj", False)


def test_registering_twice_changes_nothing(vllm: Any) -> None:
    register()
    kind = vllm["bitbell"]
    register()
    assert vllm == {"bitbell": kind}
    assert kind.get_name(kind.__new__(kind)) == "bitbell"


def test_the_entry_point_is_harmless_without_vllm(caplog: pytest.LogCaptureFixture) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    group = "vllm.general_plugins"
    assert EntryPoint("bitbell", project["entry-points"][group]["bitbell"], group).load() is register
    with caplog.at_level(logging.WARNING):
        register()
    assert "cannot be served by this vLLM: No module named 'vllm'" in caplog.text
    script = "import sys, bitbell.export.vllm_registration; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_vllm_that_is_too_old_costs_a_warning(vllm: Any, caplog: pytest.LogCaptureFixture) -> None:
    del sys.modules["vllm.model_executor.layers.quantization"].register_quantization_config  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING):
        register()
    assert "cannot be served by this vLLM: cannot import name 'register_quantization_config'" in caplog.text
    assert not vllm
