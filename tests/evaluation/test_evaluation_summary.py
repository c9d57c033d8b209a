"""One call gives every number, from a data set on disk, for full-precision, quantized and packed models alike."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bitbell
from bitbell.data import TokenDataset, tokenize, windows
from bitbell.evaluation import evaluate, layer_codes, measure_loss

MakeLlama = Callable[..., Any]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    """Byte tokens, two-byte characters among them; a few hundred held out."""
    folder = tmp_path_factory.mktemp("dataset")
    source = folder / "text.txt"
    source.write_text(
        "".join(f"{n} Schafe gingen \u00fcber den H\u00fcgel {n * n}.\n" for n in range(90)), encoding="utf-8"
    )
    return tokenize([str(source)], folder / "tokens", tokenizer="bytes", valid_fraction=0.2)


@pytest.mark.parametrize("recipe", ["bbq-w2a2", "quest-w1a1", "lsq-w3a16"])
def test_every_number_is_that_of_the_single_functions(
    make_llama: MakeLlama, dataset: TokenDataset, recipe: str
) -> None:
    model = make_llama(recipe)
    data = windows(dataset, "valid", sequence_length=24, limit=5)
    result = evaluate(model, dataset, sequence_length=24, limit=5, batch_size=2)
    per_token = dataset.num_bytes("valid") / dataset.num_tokens("valid")
    loss = measure_loss(model, data, bytes_per_token=per_token, batch_size=2)
    assert (result.loss, result.perplexity, result.bits_per_byte, result.tokens) == (
        loss.loss,
        loss.perplexity,
        loss.bits_per_byte,
        5 * 24,
    )
    rows = layer_codes(model, [data[:, :-1]])
    assert result.weight_entropy == pytest.approx(sum(row.weight_entropy for row in rows) / len(rows))
    if recipe.endswith("a16"):
        assert result.activation_entropy is None
    else:
        entropies = [row.activation_entropy for row in rows if row.activation_entropy is not None]
        assert result.activation_entropy == pytest.approx(sum(entropies) / len(rows), rel=1e-3)


def test_a_sequence_longer_than_the_models_positions_is_refused(make_llama: MakeLlama, dataset: TokenDataset) -> None:
    with pytest.raises(ValueError, match="sequence_length must be at most the model's 128 positions, got 129"):
        evaluate(make_llama("bbq-w2a2"), dataset, sequence_length=129)


@pytest.mark.parametrize("recipe", ["bbq-w2a2", "bbq-w4a4", "quest-w3a3", "lsq-w2a2", "bbq-w3a16"])
def test_a_packed_model_has_the_numbers_of_the_trained_one(
    make_llama: MakeLlama, dataset: TokenDataset, tmp_path: Path, recipe: str
) -> None:
    model = make_llama(recipe)
    packed = bitbell.load(bitbell.pack(model).save(tmp_path / "packed"))
    trained, ours = (evaluate(m, dataset, sequence_length=16, limit=6) for m in (model, packed))
    assert ours.loss == trained.loss
    assert (ours.weight_entropy, ours.activation_entropy) == (trained.weight_entropy, trained.activation_entropy)
    for a, b in zip(ours.layers, trained.layers, strict=True):
        assert dataclasses.replace(a, name=b.name) == b


def test_the_whole_split_and_the_training_split_can_be_evaluated(make_llama: MakeLlama, dataset: TokenDataset) -> None:
    model = make_llama("bbq-w2a2")
    whole = evaluate(model, dataset, sequence_length=32)
    assert whole.tokens == (dataset.num_tokens("valid") - 1) // 32 * 32
    assert evaluate(model, dataset, sequence_length=32, split="train", limit=3).tokens == 96


def test_an_untrained_full_precision_model_is_about_as_good_as_guessing(
    make_llama: MakeLlama, dataset: TokenDataset
) -> None:
    result = evaluate(make_llama(initializer_range=0.02), dataset, sequence_length=32, limit=4)
    assert result.loss == pytest.approx(math.log(300), abs=0.1)
    assert result.weight_entropy is None
    assert result.activation_entropy is None
    assert result.layers == ()


def test_the_result_is_plain_json(make_llama: MakeLlama, dataset: TokenDataset) -> None:
    result = evaluate(make_llama("bbq-w2a2"), dataset, sequence_length=16, limit=2)
    again = json.loads(json.dumps(result.to_dict()))
    assert again["loss"] == result.loss
    assert len(again["layers"]) == 14
    assert again["layers"][0]["weight_histogram"] == result.layers[0].weight_histogram


def test_a_model_with_a_smaller_vocabulary_than_the_data_is_refused(
    make_llama: MakeLlama, dataset: TokenDataset
) -> None:
    model = make_llama("bbq-w2a2", vocab_size=200)
    for candidate in (model, bitbell.pack(model)):
        with pytest.raises(ValueError, match=r"tokens go up to 256, the model's vocabulary has only 200"):
            evaluate(candidate, dataset, sequence_length=16)


def test_a_split_shorter_than_a_sequence_is_refused(make_llama: MakeLlama, dataset: TokenDataset) -> None:
    with pytest.raises(ValueError, match=r"split 'valid' .* tokens, but a window of"):
        evaluate(make_llama(), dataset, sequence_length=100_000)


def test_an_unknown_split_and_a_limit_of_none_at_all_are_refused(make_llama: MakeLlama, dataset: TokenDataset) -> None:
    with pytest.raises(ValueError, match=r"unknown split 'test'"):
        evaluate(make_llama(), dataset, sequence_length=8, split="test")
    with pytest.raises(ValueError, match=r"limit must be at least 1, got limit=0"):
        evaluate(make_llama(), dataset, sequence_length=8, limit=0)


def test_a_model_that_gives_nan_is_reported_as_nan(make_llama: MakeLlama, dataset: TokenDataset) -> None:
    model = make_llama("bbq-w2a2")
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    result = evaluate(model, dataset, sequence_length=16, limit=2)
    assert math.isnan(result.loss)
    assert math.isnan(result.perplexity)
    assert math.isnan(result.bits_per_byte)
