"""Directories of compressed-tensors: the library alone, and transformers with it, get the packed model's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, LlamaConfig, LlamaForCausalLM

import bitbell
from bitbell.packing import PackedLinear, VerificationError
from bitbell.packing.layers import values_of

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from bitbell.export import compressed_tensors
from bitbell.export.refusals import Refused

TOKENS = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(3))


def packed_model(rules: Any, **fields: Any) -> Any:
    settings: dict[str, Any] = {"vocab_size": 96, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**(settings | fields)))
        bitbell.calibrate(bitbell.quantize(model, rules), torch.randint(0, 96, (4, 16)))
    return bitbell.pack(model.eval())


def difference(loaded: Any, model: Any) -> float:
    """Of logits, relative to the largest."""
    with torch.no_grad():
        expected = model(TOKENS).logits
        return float((loaded(TOKENS).logits - expected).abs().max() / expected.abs().max())


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]


# Recipe -> bits of the codes that hold its levels exactly.
RECIPES = {"bbq-w1a16": 2, "bbq-w2a16": 4, "bbq-w3a16": 4, "bbq-w4a16": 4, "ternary-w2a16": 2, "lsq-w3a16": 4}
RECIPES |= {"lsq-w4a16": 8, "quest-fp4-w4a16": 8, "absmax-w7a16": 8, "bbq-w2a16:w.zero_point=-0.25": 4}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_library_alone_reads_the_same_weights_and_logits(recipe: str, tmp_path: Path) -> None:
    model = packed_model(f"{recipe}{',' if ':' in recipe else ':'}rotation=none")
    written = compressed_tensors(model, tmp_path / "out")
    assert written.layers == {RECIPES[recipe]: 14}
    from safetensors.torch import load_file

    tensors, name = load_file(tmp_path / "out" / "model.safetensors"), "model.layers.1.mlp.down_proj"
    args = QuantizationArgs(num_bits=RECIPES[recipe], type="int", symmetric=True, strategy="channel")
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    parts = {part: tensors[f"{name}.{part}"] for part in ("weight_packed", "weight_scale", "weight_shape")}
    found = BaseCompressor.get_value_from_registry("pack-quantized").decompress(parts, scheme)["weight"]
    layer = model.model.get_submodule(name)
    centred = (layer.weight_codes().int() - 2 ** (layer.recipe.weights - 1)).to(torch.int8)
    assert torch.equal(found, values_of(centred, layer.weight_scale, None, layer.weight_grid))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float32
    assert difference(loaded, model) < 2e-6


def test_rotations_are_described_as_the_library_understands_them(tmp_path: Path) -> None:
    from compressed_tensors.transform import TransformConfig, apply_transform_config

    model = packed_model("bbq-w2a16")  # blocks of 32: 96 and 160 are multiples of it
    with pytest.raises(Refused, match=r"q_proj: its inputs are rotated in blocks of 32, and transformers ignores"):
        compressed_tensors(model, tmp_path / "out")
    written = compressed_tensors(model, tmp_path / "out", transforms=True)
    assert written.transforms
    assert "transformers ignores" in str(written)
    transforms = config_of(tmp_path / "out")["transform_config"]
    assert (
        difference(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model) > 0.05
    )  # why it has to be asked for
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    apply_transform_config(loaded, TransformConfig.model_validate(transforms))
    assert difference(loaded, model) < 2e-6


def test_mixtures_packed_heads_and_ties(tmp_path: Path) -> None:
    rules = {"lm_head": "bbq-w4a16", "*.mlp.*": "bbq-w1a16", "*.q_proj": None, "*": "absmax-w5a16"}
    rules = {name: recipe and f"{recipe}:rotation=none" for name, recipe in rules.items()}
    model = packed_model(rules, tie_word_embeddings=True, attention_bias=True)
    written = compressed_tensors(model, tmp_path / "out")
    assert written.layers == {2: 6, 4: 1, 8: 6}
    assert config_of(tmp_path / "out")["ignore"] == [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    assert difference(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model) < 2e-6


def test_a_vision_transformer(tmp_path: Path) -> None:
    from bitbell.models import build_model

    model: Any = build_model("vit-micro", labels=["cat", "owl"], image_size=8, channels=1)
    images = torch.randn(2, 1, 8, 8)
    bitbell.calibrate(bitbell.quantize(model, "bbq-w3a16:rotation=none"), images)
    packed = bitbell.pack(model.eval())
    assert compressed_tensors(packed, tmp_path / "out").layers == {4: 24}
    loaded, logits = AutoModelForImageClassification.from_pretrained(tmp_path / "out"), packed(images).logits
    assert loaded.config.id2label == {0: "cat", 1: "owl"}
    assert torch.allclose(loaded(images).logits, logits, atol=2e-6 * float(logits.detach().abs().max()))


def test_codes_are_as_wide_as_asked_but_hold_the_levels(tmp_path: Path) -> None:
    model = packed_model("bbq-w2a16:rotation=none")
    assert compressed_tensors(model, tmp_path / "8", code_bits=8).layers == {8: 14}
    with pytest.raises(ValueError, match=r"q_proj: the levels of bbq-w2a16.* need code_bits of 3 at least, got 2"):
        compressed_tensors(model, tmp_path / "2", code_bits=2)
    with pytest.raises(ValueError, match="code_bits must be 1 to 8"):
        compressed_tensors(model, tmp_path / "9", code_bits=9)
    assert compressed_tensors(model, tmp_path / "3", code_bits=3).layers == {3: 14}
    assert difference(AutoModelForCausalLM.from_pretrained(tmp_path / "3"), model) < 2e-6


def test_whole_levels_keep_the_very_words(tmp_path: Path) -> None:
    """The layout of packed directories is that of the format, so 4 bits without halves are copied as they are."""
    from safetensors.torch import load_file

    model = packed_model("bbq-w4a16:rotation=none")
    compressed_tensors(model, tmp_path / "out")
    tensors, layer = load_file(tmp_path / "out" / "model.safetensors"), model.model.model.layers[0].mlp.up_proj
    assert isinstance(layer, PackedLinear)
    assert torch.equal(tensors["model.layers.0.mlp.up_proj.weight_packed"], layer.weight_packed)
    assert torch.equal(tensors["model.layers.0.mlp.up_proj.weight_scale"], layer.weight_scale)


REFUSED = {
    "bbq-w2a2:rotation=none": r"q_proj: compressed-tensors rounds no inputs as bbq does \(bbq-w2a2.*weights only",
    "absmax-w8a16:rotation=none": r"q_proj: the levels of absmax-w8a16.* need codes of 9 bits",
    "nf-w4a16:rotation=none": r"q_proj: the levels of nf-w4a16.* are no multiples of a quarter step",
    "bbq-w2a16:w.zero_point=-0.3,rotation=none": "are no multiples of a quarter step; export it to ONNX",
    "bbq-w4a16:rotation=none,learn_offset=true": "q_proj: compressed-tensors has no offsets of rows",
}


@pytest.mark.parametrize("recipe", REFUSED)
def test_what_the_format_cannot_say_is_refused_by_name(recipe: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=REFUSED[recipe]):
        compressed_tensors(packed_model(recipe), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_other_layers_and_models_are_refused(tmp_path: Path) -> None:
    gpt: Any = bitbell.build_model("gpt-tiny", vocab_size=96, sequence_length=16)
    bitbell.calibrate(bitbell.quantize(gpt, "bbq-w4a16:rotation=none"), TOKENS)
    with pytest.raises(Refused, match=r"h\.0\.attn\.c_attn: compressed-tensors quantizes nn\.Linear only"):
        compressed_tensors(gpt, tmp_path / "out")
    plain = bitbell.quantize(nn.Sequential(nn.Linear(64, 8)), "bbq-w4a16:rotation=none")
    bitbell.calibrate(plain, torch.randn(4, 64))
    with pytest.raises(Refused, match="Sequential is no model of transformers"):
        compressed_tensors(plain, tmp_path / "out")
    with pytest.raises(Refused, match="no layer of this LlamaForCausalLM is quantized"):
        compressed_tensors(bitbell.build_model("mini", vocab_size=96), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_weight_that_reads_back_otherwise_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitbell.export import compressed_tensors_directory as module

    monkeypatch.setattr(
        module, "pack_codes", lambda codes, bits: torch.zeros_like(bitbell.kernels.pack_codes(codes, bits))
    )
    with pytest.raises(VerificationError, match="q_proj: compressed-tensors reads other weights back"):
        compressed_tensors(packed_model("bbq-w4a16:rotation=none"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_directories_of_others_stay(tmp_path: Path) -> None:
    model = packed_model("bbq-w4a16:rotation=none")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear", encoding="utf-8")
    model.save(tmp_path / "packed")
    for name in ("mine", "packed"):
        with pytest.raises(ValueError, match="exists and is no directory of compressed-tensors"):
            compressed_tensors(model, tmp_path / name, overwrite=True)
    compressed_tensors(model, tmp_path / "out")
    with pytest.raises(ValueError, match="exists already"):
        compressed_tensors(model, tmp_path / "out")
    compressed_tensors(model, tmp_path / "out", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out", "packed"]


def test_the_command_takes_the_tokenizer_along_and_names_what_is_missing(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitbell.cli.main import main

    out = str(tmp_path / "out")
    assert main(["export", "compressed-tensors", str(directory), "--out", out]) == 1
    assert "compressed-tensors rounds no inputs as bbq does" in capsys.readouterr().err
    packed_model("bbq-w2a16").save(tmp_path / "packed", tokenizer=directory)
    command = [
        "export",
        "compressed-tensors",
        str(tmp_path / "packed"),
        "--out",
        out,
        "--code-bits",
        "8",
        "--transforms",
    ]
    assert main(command) == 0
    assert "14 layers in 8-bit codes" in capsys.readouterr().out
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    assert main([*command, "--cache"]) == 1
    assert "--cache is for onnx" in capsys.readouterr().err
    assert main(["export", "onnx", str(directory), "--out", out, "--transforms"]) == 1
    assert "--transforms is for compressed-tensors" in capsys.readouterr().err
    monkeypatch.setattr("bitbell.export.compressed_tensors_directory.find_spec", lambda name: None)
    assert main([*command, "--overwrite"]) == 1
    assert "pip install 'bitbell[compressed-tensors]'" in capsys.readouterr().err
