"""Histograms and entropies of codes are those of codes gathered by hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bitbell
from bitbell.evaluation import layer_codes, mean_entropy, weight_entropies
from bitbell.layers import quantized_layers

MakeLlama = Callable[..., Any]


def entropy_by_hand(codes: Tensor) -> float:
    counts = Counter(codes.flatten().tolist())
    return -sum(n / codes.numel() * math.log2(n / codes.numel()) for n in counts.values())


def histogram_by_hand(codes: Tensor, bits: int) -> list[int]:
    counts = Counter(codes.flatten().tolist())
    return [counts[code] for code in range(2**bits)]


@pytest.mark.parametrize("recipe", ["bbq-w2a3", "quest-w1a1", "lsq-w4a2", "bbq-w8a8"])
def test_weight_entropies_are_those_of_the_weight_codes(make_llama: MakeLlama, recipe: str) -> None:
    model = make_llama(recipe)
    by_hand = {name: entropy_by_hand(layer.weight_codes()) for name, layer in quantized_layers(model)}
    assert weight_entropies(model) == pytest.approx(by_hand)
    rows = {row.name: row for row in layer_codes(model)}
    assert {name: row.weight_entropy for name, row in rows.items()} == pytest.approx(by_hand)
    for name, layer in quantized_layers(model):
        bits = layer.recipe.weights
        assert rows[name].weight_histogram == histogram_by_hand(layer.weight_codes(), bits)
        assert rows[name].activation_entropy is None
        assert rows[name].activation_histogram == []


@pytest.mark.parametrize("recipe", ["bbq-w2a3", "bbq-token-w2a2", "quest-w2a1", "lsq-w2a4"])
@pytest.mark.parametrize("packed", [False, True])
def test_activation_histograms_are_those_of_every_layers_inputs(
    make_llama: MakeLlama, ids: Tensor, recipe: str, packed: bool
) -> None:
    model = make_llama(recipe)
    batches = ids[:, :-1].split(3)
    inputs = record_inputs(model, batches)
    measured = layer_codes(bitbell.pack(model).model if packed else model, batches)
    assert [row.name for row in measured] == list(inputs)
    for row, (_, layer) in zip(measured, quantized_layers(model), strict=True):
        codes = torch.cat([layer.activation_quantizer.encode(x).flatten() for x in inputs[row.name]])
        assert row.activation_histogram == histogram_by_hand(codes, layer.recipe.activations)
        assert row.activation_entropy == pytest.approx(entropy_by_hand(codes))
        assert sum(row.activation_histogram) == 7 * 16 * row.shape[1]


def record_inputs(model: Any, batches: Any) -> dict[str, list[Tensor]]:
    """Run each layer's input through by hand: what a forward hook sees."""
    seen: dict[str, list[Tensor]] = {name: [] for name, _ in quantized_layers(model)}
    hooks = [
        layer.register_forward_hook(lambda _, args, __, name=name: seen[name].append(args[0]))
        for name, layer in quantized_layers(model)
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return seen


def test_a_row_describes_its_layer(make_llama: MakeLlama, ids: Tensor) -> None:
    model = make_llama("bbq-w3a4")
    row = next(row for row in layer_codes(model, [ids]) if row.name.endswith("layers.1.mlp.down_proj"))
    assert (row.shape, row.recipe, row.weight_bits, row.activation_bits) == ((64, 128), "bbq-w3a4", 3, 4)
    assert row.bytes == 64 * 128 * 4
    assert row.packed_bytes == 64 * 128 * 3 // 8 + 64 * 4
    assert 2.9 < row.weight_entropy <= 3  # what BBQ is for


def test_weight_only_layers_have_no_activation_codes(make_llama: MakeLlama, ids: Tensor) -> None:
    rows = layer_codes(make_llama("bbq-w2a16"), [ids])
    assert {row.activation_bits for row in rows} == {None}
    assert {row.activation_entropy for row in rows} == {None}


def test_a_full_precision_model_has_no_rows_and_no_mean_entropy(make_llama: MakeLlama, ids: Tensor) -> None:
    assert layer_codes(make_llama(), [ids]) == []
    assert weight_entropies(make_llama()) == {}
    assert mean_entropy({}) is None


def test_the_mean_entropy_is_unweighted() -> None:
    assert mean_entropy({"small": 1.0, "large": 2.0}) == 1.5


def test_gathering_codes_leaves_no_hooks_modes_or_statistics_behind(make_llama: MakeLlama, ids: Tensor) -> None:
    model = make_llama("bbq-w2a2").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer_codes(model, [ids])
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_hooks_go_after_an_error_too(make_llama: MakeLlama) -> None:
    model = make_llama("bbq-w2a2")
    with pytest.raises(IndexError):
        layer_codes(model, [torch.full((1, 3), 300)])
    assert not any(module._forward_pre_hooks for module in model.modules())
