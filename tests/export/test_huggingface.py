"""Packed directories through `from_pretrained` and `save_pretrained` of `transformers`, and back through bitbell."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitbell
from bitbell.export import BitbellConfig
from bitbell.packing import PackedFileError, PackedLinear


def open_it(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, **options)


def same(directory: Path, tokens: Tensor) -> Any:
    """The model as `transformers` opens the directory, after a comparison with bitbell's own."""
    model, ours = open_it(directory), bitbell.load(directory)
    assert torch.equal(model(tokens).logits, ours(tokens).logits)
    assert model.state_dict().keys() == ours.model.state_dict().keys()
    return model


def packed(tmp_path: Path, rules: Any, preset: str = "tiny", **fields: Any) -> Path:
    config = bitbell.models.preset_config(preset, vocab_size=96, sequence_length=32)  # type: ignore[attr-defined]
    sizes = {"gpt-tiny": {"n_embd": 64, "n_inner": 128, "n_layer": 1, "n_head": 2}}
    sizes["tiny"] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    for name, value in ({"num_attention_heads": 2, "num_key_value_heads": 2} | sizes[preset] | fields).items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        bitbell.calibrate(bitbell.quantize(model, rules), torch.randint(0, 96, (4, 16)))
    return bitbell.pack(model.eval()).save(tmp_path / "packed")


def test_a_run_packed_by_the_command_opens_with_its_tokenizer_and_generates(directory: Path, run: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer("In the beginning", return_tensors="pt")
    model = same(directory, inputs.input_ids)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert isinstance(model.model.layers[1].mlp.up_proj, PackedLinear)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    made = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=256)
    assert torch.equal(made, bitbell.load(directory).generate(**inputs, max_new_tokens=5, pad_token_id=256))
    assert tokenizer.decode(made[0]).startswith("In the beginning")
    trained, _, _ = bitbell.training.load_run(run)  # type: ignore[attr-defined]
    assert bitbell.verify(trained, model).layers == 14


MODELS = {
    "LLaMA": ("bbq-w2a2", "tiny", {}),
    "tied": ("quest-w3a3", "tiny", {"tie_word_embeddings": True}),
    "tied, with a packed head": ({"lm_head": "bbq-w4a4", "*": "bbq-w2a2"}, "tiny", {"tie_word_embeddings": True}),
    "mixed, with biases": ({"*.mlp.*": "lsq-plus-w3a8", "*": "bbq-w4a16"}, "tiny", {"attention_bias": True}),
    "GPT-2": ("bbq-w2a4", "gpt-tiny", {}),
    "tied GPT-2": ("bbq-w1a1", "gpt-tiny", {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_saves_opens_both_ways(tmp_path: Path, tokens: Tensor, name: str) -> None:
    rules, preset, fields = MODELS[name]
    first = packed(tmp_path, rules, preset, **fields)
    model = same(first, tokens)
    model.save_pretrained(tmp_path / "from_pretrained")
    bitbell.load(first).model.save_pretrained(tmp_path / "load")  # type: ignore[operator]
    expected = json.loads((first / "config.json").read_text())["quantization_config"]
    for again in (tmp_path / "from_pretrained", tmp_path / "load"):
        assert json.loads((again / "config.json").read_text())["quantization_config"] == expected
        assert torch.equal(same(again, tokens)(tokens).logits, model(tokens).logits)


def test_the_configuration_goes_round(directory: Path) -> None:
    fields = json.loads((directory / "config.json").read_text())["quantization_config"]
    config = open_it(directory).config.quantization_config
    assert isinstance(config, BitbellConfig)
    assert config.to_dict() == fields
    assert BitbellConfig.from_dict(fields).to_dict() == fields


def test_several_files_of_tensors_are_one_model(tmp_path: Path, tokens: Tensor) -> None:
    model = open_it(packed(tmp_path, "bbq-w2a2"))
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(open_it(tmp_path / "shards")(tokens).logits, model(tokens).logits)
    with pytest.raises(PackedFileError, match=r"model.safetensors does not exist"):
        bitbell.load(tmp_path / "shards")


def test_another_dtype_is_for_the_rest_of_the_model(tmp_path: Path, tokens: Tensor) -> None:
    model = open_it(packed(tmp_path, "bbq-w2a2"), dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == model(tokens).logits.dtype == torch.bfloat16
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.weight_scale.dtype == layer.activation_quantizer.scale.dtype == torch.float32


def test_a_model_packed_in_bfloat16_stays_in_it(tmp_path: Path, tokens: Tensor) -> None:
    model = open_it(packed(tmp_path, "bbq-w2a2")).to(torch.bfloat16)
    again = bitbell.packing.PackedModel(model).save(tmp_path / "narrow")  # type: ignore[attr-defined]
    assert json.loads((again / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("version", [1, 2])
def test_earlier_versions_open_without_a_word_about_missing_tensors(
    tmp_path: Path, tokens: Tensor, capfd: pytest.CaptureFixture[str], version: int
) -> None:
    directory = packed(tmp_path, "bbq-w2a2")
    expected = open_it(directory)(tokens).logits
    tensors = {name: t for name, t in load_file(directory / "model.safetensors").items() if t.numel()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    edit(directory, lambda q: q.update(format_version=version))
    capfd.readouterr()
    assert torch.equal(open_it(directory)(tokens).logits, expected)
    assert "MISSING" not in capfd.readouterr().err


# Refusals ------------------------------------------------------------------------------------------------------------

WITHOUT = """
import sys, torch
from transformers import AutoModelForCausalLM
for directory in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(directory)
        print("loaded")
    except RuntimeError as error:
        print("refused:", "ignore_mismatched_sizes" in str(error))
assert "bitbell" not in sys.modules
"""


def test_without_the_import_the_weights_are_refused(directory: Path, tmp_path: Path) -> None:
    open_it(directory).save_pretrained(tmp_path / "again")
    command = [sys.executable, "-c", WITHOUT, str(directory), str(tmp_path / "again")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["refused: True"] * 2
    assert "Unknown quantization type, got bitbell" in done.stderr


@pytest.mark.parametrize("order", ["bitbell, transformers", "transformers.quantizers, bitbell"])
def test_the_order_of_the_imports_does_not_matter(directory: Path, order: str) -> None:
    script = f"import sys\nimport {order}\nfrom transformers import AutoModelForCausalLM\n"
    script += "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1]).model.layers[0].mlp.up_proj).__name__)"
    out = subprocess.run([sys.executable, "-c", script, str(directory)], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["PackedLinear"]


def edit(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (lambda q: q.update(format_version=99), "format_version is 99"),
    "no layers": (lambda q: q.update(layers={}), "needs recipes, layers"),
    "no such layer": (lambda q: q["layers"].update(model_x=q["layers"].popitem()[1]), "has no layer 'model_x'"),
    "recipe": (lambda q: q["recipes"][0].update(weights=3), "zero point|weight_packed"),
    "a tie": (lambda q: q["tied_tensors"].update(x="lm_head.weight"), "not all tied by LlamaForCausalLM itself"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_configuration_that_is_wrong_is_refused(directory: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    change, match = DAMAGE[name]
    edit(copy, change)
    with pytest.raises(PackedFileError, match=match):
        open_it(copy)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight_scale"])
def test_a_missing_tensor_is_refused(directory: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    del tensors[name]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PackedFileError, match=f"the tensor {name} is missing"):
        open_it(copy)


def test_a_value_that_no_packed_model_has_is_refused(directory: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_scale"][0] = torch.nan
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PackedFileError, match=r"up_proj.weight_scale holds NaN"):
        open_it(copy)


def test_full_precision_weights_are_not_quantized_on_the_way(tmp_path: Path) -> None:
    model = bitbell.build_model("tiny", vocab_size=96)
    model.save_pretrained(tmp_path / "full")  # type: ignore[operator]
    with pytest.raises(ValueError, match="pre-quantized"):
        open_it(tmp_path / "full", quantization_config=BitbellConfig())
