"""GGUF files: the very levels of the packed weights, read back, and run in llama.cpp where that is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import bitbell

pytest.importorskip("gguf")

import gguf as package

from bitbell.export import gguf
from bitbell.export.gguf_blocks import choose_blocks
from bitbell.export.refusals import Refused

# Bits, zero point, ternary, and the type for a multiple of 256.
LEVELS = {
    "bbq 4": (4, 0.0, False, "Q4_0"),
    "bbq 3": (3, 0.0, False, "Q3_K"),
    "bbq 2": (2, -0.5, False, "Q2_K"),
    "bbq 1": (1, -0.5, False, "Q1_0"),
    "ternary": (2, 0.0, True, "TQ2_0"),
    "lsq 4": (4, -0.5, False, "Q4_K"),
    "lsq 3": (3, -0.5, False, "Q4_0"),
    "whole 2": (2, 0.0, False, "Q2_K"),
    "low 1": (1, 0.0, False, "Q2_K"),
}


def read(data: Any, kind: str, width: int) -> Any:
    """Values of packed rows."""
    if kind != "Q1_0":
        return package.quants.dequantize(data, package.GGMLQuantizationType[kind]).reshape(-1, width)
    octets = data.reshape(-1, 18)
    signs = np.unpackbits(octets[:, 2:], axis=1, bitorder="little") * 2.0 - 1
    return (signs * octets[:, :2].copy().view("<f2").astype(np.float32)).reshape(-1, width).astype(np.float32)


@pytest.mark.parametrize("width", [32, 128, 768])
@pytest.mark.parametrize("name", LEVELS)
def test_blocks_hold_every_level_exactly(name: str, width: int) -> None:
    bits, zero, ternary, kind = LEVELS[name]
    blocks = choose_blocks(bits, zero, ternary, width)
    if name == "lsq 4" and width < 256:
        assert blocks is None
        return
    assert blocks is not None
    assert blocks.type == (kind if width == 768 else {("bbq 1", 128): "Q1_0"}.get((name, width), "Q4_0"))
    random = np.random.default_rng(0)
    codes = random.integers(1 if ternary else 0, 2**bits, (5, width)).astype(np.uint8)
    step = random.uniform(1e-3, 3.0, (5, 1)).astype(np.float16)
    expected = (codes.astype(np.float32) - 2 ** (bits - 1) - zero) * step.astype(np.float32)
    data = blocks.pack(codes, step)
    block, size = package.GGML_QUANT_SIZES[package.GGMLQuantizationType[blocks.type]]
    assert data.shape == (5, width // block * size)
    assert np.array_equal(read(data, blocks.type, width), expected)


@pytest.mark.parametrize(("bits", "zero", "width"), [(2, -0.25, 256), (8, 0.0, 256), (4, 0.0, 48), (5, 0.0, 256)])
def test_other_levels_have_no_type(bits: int, zero: float, width: int) -> None:
    assert choose_blocks(bits, zero, False, width) is None


def packed_model(rules: Any, **fields: Any) -> Any:
    settings: dict[str, Any] = {"vocab_size": 96, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    settings |= {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**(settings | fields)))
        bitbell.calibrate(bitbell.quantize(model, rules), torch.randint(0, 96, (4, 16)))
    return bitbell.pack(model.eval())


def test_a_file_says_what_the_model_is_and_holds_its_values(tmp_path: Path) -> None:
    model = packed_model({"*.mlp.*": "bbq-w2a16:rotation=none", "*": "bbq-w4a16:rotation=none"})
    written = gguf(model, tmp_path / "model.gguf")
    assert written.types == {"Q4_0": 8, "Q2_K": 6}
    assert 0 < written.rounding <= 2**-11
    assert written.size == (tmp_path / "model.gguf").stat().st_size
    reader = package.GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["llama.attention.head_count_kv"].contents() == 2
    tensors = {t.name: t for t in reader.tensors}
    assert len(tensors) == 3 + 2 * 9
    up: Any = model.model.model.layers[1].mlp.up_proj
    codes, step = up.weight_codes().float() - 2 + 0.5, up.weight_scale.half().float()
    found = package.quants.dequantize(tensors["blk.1.ffn_up.weight"].data, tensors["blk.1.ffn_up.weight"].tensor_type)
    assert np.array_equal(found, (codes * step).numpy())
    key: Any = model.model.model.layers[0].self_attn.k_proj  # two heads of 64 rows, their halves interleaved
    codes, step = key.weight_codes().float() - 8, key.weight_scale.half().float()
    found = package.quants.dequantize(tensors["blk.0.attn_k.weight"].data, tensors["blk.0.attn_k.weight"].tensor_type)
    assert np.array_equal(found[[0, 1, 2, 64, 65]], (codes * step).numpy()[[0, 32, 1, 64, 96]])


RECIPES = ["bbq-w1a16", "bbq-w2a16", "bbq-w3a16", "bbq-w4a16", "ternary-w2a16", "lsq-w3a16", "quest-w4a16"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_llama_cpp_gives_the_logits_up_to_its_rounding_of_inputs(recipe: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model = packed_model(f"{recipe}:rotation=none")
    gguf(model, tmp_path / "model.gguf")
    tokens = torch.randint(0, 96, (1, 20), generator=torch.Generator().manual_seed(1))
    runtime = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    runtime.eval(tokens[0].tolist())
    found, expected = torch.from_numpy(np.array(runtime.scores[:20])), model(tokens).logits[0]
    error, other = ((found - logits).abs().max() / expected.abs().max() for logits in (expected, expected.roll(1, 0)))
    assert error < 0.04
    assert other > 4 * error  # what the logits of another place would be off by


def test_steps_may_be_tiny_or_negative_but_not_huge(tmp_path: Path) -> None:
    """A scale that training has driven through zero: a float16 of any size keeps its half exactly."""
    model = packed_model("bbq-w2a16:rotation=none")
    scale = model.model.model.layers[0].mlp.up_proj.weight_scale
    scale[:4, 0] = torch.tensor([-0.01234, 1e-5, 3.3e-8, 0.0])
    written = gguf(model, tmp_path / "model.gguf")
    assert written.rounding <= 2**-11
    scale[4] = 1e6
    with pytest.raises(Refused, match=r"mlp\.up_proj: a step of 1\.0e\+06 does not fit float16"):
        gguf(model, tmp_path / "other.gguf")


REFUSED = {
    "bbq-w2a16": r"layers\.0\.self_attn\.q_proj: llama\.cpp rotates no inputs of layers; export it to ONNX",
    "bbq-w2a2:rotation=none": r"q_proj: llama\.cpp has no operator that quantizes inputs as bbq does",
    "nf-w4a16:rotation=none": r"no type of GGUF has the levels of nf-w4a16",
    "lsq-w8a16": r"no type of GGUF has the levels of lsq-w8a16",
    "bbq-w4a16:rotation=none,learn_offset=true": r"no type of GGUF has the levels",
}


@pytest.mark.parametrize("recipe", REFUSED)
def test_what_llama_cpp_cannot_compute_is_refused_by_name(recipe: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=REFUSED[recipe]):
        gguf(packed_model(recipe), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_biases_positions_and_existing_files_are_refused(tmp_path: Path) -> None:
    recipe = "bbq-w4a16:rotation=none"
    with pytest.raises(Refused, match="q_proj: a bias has no GGUF export"):
        gguf(packed_model(recipe, attention_bias=True), tmp_path / "model.gguf")
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(Refused, match="rotary positions of type 'linear'"):
        gguf(packed_model(recipe, rope_parameters=linear), tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="exists already"):
        gguf(packed_model(recipe), tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_text(encoding="utf-8") == "mine"


def test_the_tokenizer_travels_and_gives_the_same_ids(small_text: Path, tmp_path: Path) -> None:
    from bitbell.data import load_tokenizer

    text = small_text.read_text(encoding="utf-8")
    tokenizer = load_tokenizer("bpe:300", [text])
    tokenizer.save(tmp_path / "tokenizer")
    model = packed_model("bbq-w4a16:rotation=none", vocab_size=320)
    gguf(model, tmp_path / "model.gguf", tokenizer=tmp_path / "tokenizer")
    fields = package.GGUFReader(tmp_path / "model.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    known = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert len(tokens) == 320
    assert all(tokens[number] == token for token, number in known.items())
    with pytest.raises(ValueError, match="the model a vocabulary of 96"):
        gguf(packed_model("bbq-w4a16:rotation=none"), tmp_path / "other.gguf", tokenizer=tmp_path / "tokenizer")
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    runtime = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    assert runtime.tokenize(text[:500].encode(), add_bos=False) == list(tokenizer.encode(text[:500]))


def test_the_command_refuses_a_rotated_model_and_options_of_onnx(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bitbell.cli.main import main

    assert main(["export", "gguf", str(directory), "--out", str(tmp_path / "model.gguf")]) == 1
    assert "llama.cpp has no operator that quantizes inputs as bbq does" in capsys.readouterr().err
    assert main(["export", "gguf", str(directory), "--out", str(tmp_path / "model.gguf"), "--cache"]) == 1
    assert "--cache is for onnx, not for gguf" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
