"""GPT-2 of `transformers` through packing: the same numbers, the bytes it should cost, and text from a directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bitbell
from bitbell.evaluation import layer_codes
from bitbell.packing import PackedFileError, PackedLinear, VerificationError


def gpt(rules: Any, *, tied: bool = False) -> Any:
    """A GPT-2 of a few thousand weights with fewer positions than verify() would like, quantized, calibrated."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=2, n_positions=20, tie_word_embeddings=tied)
        ).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_()
        bitbell.calibrate(bitbell.quantize(model, rules), torch.randint(0, 96, (4, 16)))
    model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("recipe", ["bbq-w2a2", "bbq-tensor-w3a4", "quest-w1a1", "lsq-w4a4", "bbq-w2a16"])
def test_packed_saved_and_loaded_it_gives_the_numbers_and_text_of_the_trained_model(
    tokens: Tensor, tmp_path: Path, recipe: str, tied: bool
) -> None:
    model = gpt(recipe, tied=tied)
    packed = bitbell.pack(model)
    assert bitbell.verify(model, packed).codes == 12 * 64**2
    loaded = bitbell.load(packed.save(tmp_path / "packed"))
    for twin in (packed, loaded):
        assert isinstance(twin.model.transformer.h[0].attn.c_attn, PackedLinear)
        assert (twin.model.lm_head.weight is twin.model.transformer.wte.weight) == tied
        torch.testing.assert_close(twin(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
        said = twin.generate(tokens[:1, :5], max_new_tokens=6, do_sample=False)
        assert torch.equal(said, model.generate(tokens[:1, :5], max_new_tokens=6, do_sample=False))
    for ours, theirs in zip(layer_codes(loaded, [tokens]), layer_codes(model, [tokens]), strict=True):
        assert ours == theirs


@pytest.mark.parametrize("tied", [False, True])
def test_the_reported_size_is_that_of_the_file(tmp_path: Path, tied: bool) -> None:
    model = gpt({"*.c_proj": None, "*": "bbq-w3a3"}, tied=tied)
    file = bitbell.pack(model).save(tmp_path / "packed") / "model.safetensors"
    data = file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
    assert 0 <= data - bitbell.report(model).bytes_packed <= 2 * (16 + 4 + 4 + 1)  # shapes, input quantizers


def test_verify_names_the_layer_that_differs() -> None:
    model = gpt("bbq-w2a2")
    packed = bitbell.pack(model)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.neg_()
    with pytest.raises(VerificationError, match=r"transformer\.h\.0\.mlp\.c_fc: \d+ of 16384 weight codes differ"):
        bitbell.verify(model, packed)


def test_shapes_in_the_configuration_are_outputs_by_inputs(tmp_path: Path) -> None:
    folder = bitbell.pack(gpt("bbq-w2a2")).save(tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    entry = config["quantization_config"]["layers"]["transformer.h.0.attn.c_attn"]
    assert entry["shape"] == [192, 64]
    entry["shape"] = [64, 192]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PackedFileError, match=r"c_attn has shape \[64, 192\] there, but \[192, 64\] in the model"):
        bitbell.load(folder)
