"""How a quantized model uses its codes: histograms and entropies of weights and activations, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitbell.evaluation.loss import device_of, evaluation_mode, logits_of
from bitbell.kernels import packed_words
from bitbell.layers import QuantizedLayer, quantized_layers
from bitbell.quantizers import code_histogram, entropy_of


@dataclass(frozen=True)
class LayerCodes:
    """Codes of one layer. Histograms count each code 0 .. 2**bits - 1; entropies are in bits; bytes as fp32 and as
    packed."""

    name: str
    shape: tuple[int, int]
    recipe: str
    weight_bits: int
    activation_bits: int | None
    weight_entropy: float
    weight_histogram: list[int]
    activation_entropy: float | None = None
    activation_histogram: list[int] = field(default_factory=list)
    bytes: int = 0
    packed_bytes: int = 0


@torch.no_grad()
def weight_entropies(model: nn.Module) -> dict[str, float]:
    """Entropy, in bits, of each quantized layer's weight codes."""
    return {
        name: entropy_of(code_histogram(layer.weight_codes(), layer.recipe.weights))
        for name, layer in quantized_layers(model)
    }


def mean_entropy(entropies: Mapping[str, float]) -> float | None:
    """The unweighted mean over layers, as the BBQ paper reports it; None without layers."""
    return sum(entropies.values()) / len(entropies) if entropies else None


@torch.no_grad()
def layer_codes(model: nn.Module, batches: Sequence[Tensor] = ()) -> list[LayerCodes]:
    """Codes of every quantized layer; those of activations are gathered from forward passes over `batches` (B, T) of
    ids."""
    inputs = _activation_histograms(model, batches) if batches else {}
    rows = []
    for name, layer in quantized_layers(model):
        weights = code_histogram(layer.weight_codes(), layer.recipe.weights)
        activations = inputs.get(name)
        out_features, in_features = layer.out_features, layer.in_features
        rows.append(
            LayerCodes(
                name=name,
                shape=(out_features, in_features),
                recipe=layer.recipe.name,
                weight_bits=layer.recipe.weights,
                activation_bits=layer.recipe.activations,
                weight_entropy=entropy_of(weights),
                weight_histogram=weights.tolist(),
                activation_entropy=None if activations is None else entropy_of(activations),
                activation_histogram=[] if activations is None else activations.tolist(),
                bytes=out_features * in_features * 4,
                packed_bytes=out_features * (packed_words(in_features, layer.recipe.weights) + 1) * 4,
            )
        )
    return rows


def _activation_histograms(model: nn.Module, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    counts: dict[str, Tensor] = {}

    def before(name: str, layer: QuantizedLayer, args: tuple[Any, ...]) -> None:
        quantizer = layer.activation_quantizer
        if quantizer is not None:
            histogram = code_histogram(quantizer.encode(layer.quantizer_input(args[0])), quantizer.bits)
            counts[name] = counts[name] + histogram if name in counts else histogram

    hooks = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: before(name, layer, args))
        for name, layer in quantized_layers(model)
    ]
    try:
        with evaluation_mode(model):
            for batch in batches:
                logits_of(model, batch.to(device_of(model)))
    finally:
        for hook in hooks:
            hook.remove()
    return counts
