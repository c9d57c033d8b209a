"""What a quantized model is made of, layer by layer: codes, scales, dead rows, what rotation did to the weights.

model --inspect_model--> layers --compare_layers, with another model's--> differences --inspect_page--> one page
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitbell.kernels import rotate
from bitbell.layers import TrainedLayer, quantized_layers
from bitbell.packing.layers import values_of, weight_step
from bitbell.quantizers import code_histogram, entropy_of

BINS = 41  # of a histogram of weights, from -REACH to REACH standard deviations
REACH = 5.0
SCALE_BINS = 24
MOST_LISTED = 50  # dead rows named


@dataclass(frozen=True)
class Spread:
    """How numbers lie. counts: of equal bins from low to high; kurtosis: excess (a Gaussian: 0), None of constants."""

    low: float
    median: float
    high: float
    counts: list[int]
    kurtosis: float | None = None


@dataclass(frozen=True)
class LayerView:
    """One layer. histogram: of codes 0 .. 2**bits - 1. scales: of the value of one level of each row, which a
    method may learn to be negative. dead_rows: all of whose codes are one; the first of them are listed. before, after:
    weights in units of their standard deviation, without and with the rotation; after is None where nothing is rotated.
    trained: they are the weights of training; if not, the values that the codes stand for."""

    name: str
    recipe: str
    rows: int
    columns: int
    bits: int
    rotation: int | None
    histogram: list[int]
    entropy: float
    scales: Spread
    negative_scales: int
    dead_rows: int
    dead_listed: list[int]
    before: Spread
    after: Spread | None
    trained: bool


@dataclass(frozen=True)
class Difference:
    """A layer of two models. changed: share of the codes that differ; ratios: of the scales, other to this, row by row;
    None where why_not says why they cannot be compared."""

    name: str
    changed: float | None
    ratios: Spread | None
    histogram: list[int] | None
    why_not: str | None = None


@torch.no_grad()
def inspect_model(model: nn.Module) -> list[LayerView]:
    """Every quantized layer of a model, trained or packed. Raises ValueError where there is none."""
    views = [_view(name, layer) for name, layer in quantized_layers(model)]
    if not views:
        raise ValueError("the model has no quantized layers, so there are no codes to look at")
    return views


@torch.no_grad()
def compare_layers(model: nn.Module, other: nn.Module) -> list[Difference]:
    """Each layer of `model` with that of the same name in `other`; those that only `other` has come last."""
    ours, theirs = dict(quantized_layers(model)), dict(quantized_layers(other))
    here = [_difference(name, layer, theirs.get(name)) for name, layer in ours.items()]
    there = [Difference(name, None, None, None, "only in the other model") for name in theirs if name not in ours]
    return here + there


def as_data(views: list[LayerView], differences: list[Difference]) -> dict[str, Any]:
    """Everything that the page shows, for JSON."""
    return {
        "reach": REACH,
        "layers": [asdict(view) for view in views],
        "differences": {difference.name: asdict(difference) for difference in differences},
    }


def _view(name: str, layer: Any) -> LayerView:
    codes, scales = layer.weight_codes(), _scales(layer)
    histogram = code_histogram(codes, layer.recipe.weights)
    dead = (codes.amin(1) == codes.amax(1)).nonzero().flatten().tolist()
    before, after, rotation = _weights(layer)
    return LayerView(
        name=name,
        recipe=layer.recipe.name,
        rows=codes.shape[0],
        columns=codes.shape[1],
        bits=layer.recipe.weights,
        rotation=rotation,
        histogram=histogram.tolist(),
        entropy=entropy_of(histogram),
        scales=spread_of(scales),
        negative_scales=int((scales < 0).sum()),
        dead_rows=len(dead),
        dead_listed=dead[:MOST_LISTED],
        before=_standard_spread(before),
        after=None if after is None else _standard_spread(after),
        trained=isinstance(layer, TrainedLayer),
    )


def _difference(name: str, layer: Any, other: Any) -> Difference:
    if other is None:
        return Difference(name, None, None, None, "not in the other model")
    codes, theirs, bits = layer.weight_codes(), other.weight_codes(), other.recipe.weights
    histogram = code_histogram(theirs, bits).tolist()
    ratios = spread_of(_scales(other) / _scales(layer)) if len(codes) == len(theirs) else None
    if codes.shape != theirs.shape or layer.recipe.weights != bits:
        shapes = [
            f"{c.shape[0]} x {c.shape[1]} in {b} bits" for c, b in ((codes, layer.recipe.weights), (theirs, bits))
        ]
        return Difference(name, None, ratios, histogram, f"{shapes[0]} here, {shapes[1]} there")
    return Difference(name, float((codes != theirs).float().mean()), ratios, histogram)


def _scales(layer: Any) -> Tensor:
    """The value of one level of each row, (O,) float32."""
    scales = weight_step(layer) if isinstance(layer, TrainedLayer) else layer.weight_scale
    return scales.reshape(-1).float()


def _weights(layer: Any) -> tuple[Tensor, Tensor | None, int | None]:
    """Weights without and with the rotation, and its block: those of training, or the values that codes stand for."""
    if isinstance(layer, TrainedLayer):
        plain, block = layer.matrix.float(), layer.weight_quantizer.rotation
        return plain, rotate(plain, block) if block else None, block
    centred = (layer.weight_codes().to(torch.int16) - 2 ** (layer.recipe.weights - 1)).to(torch.int8)
    values = values_of(centred, layer.weight_scale, layer.weight_offset, layer.weight_grid)
    block = layer.rotation
    return (rotate(values, block), values, block) if block else (values, None, None)  # rotating twice undoes it


def spread_of(values: Tensor, bins: int = SCALE_BINS) -> Spread:
    """Counts between the smallest and the largest of `values` (N,); NaN and infinity are left out."""
    values = values[values.isfinite()].double()
    if not len(values):
        return Spread(float("nan"), float("nan"), float("nan"), [])
    low, high = float(values.min()), float(values.max())
    counts = torch.histc(values, bins, low, high) if high > low else torch.tensor([len(values)])
    return Spread(low, float(values.median()), high, counts.int().tolist())


def _standard_spread(weights: Tensor) -> Spread:
    """In units of the standard deviation; what lies beyond REACH counts at the ends."""
    values = weights.flatten().double()
    deviation = values.std(correction=0)
    if not deviation > 0:
        return Spread(float("nan"), float("nan"), float("nan"), [])
    z = (values - values.mean()) / deviation
    counts = torch.histc(z.clamp(-REACH, REACH), BINS, -REACH, REACH).int().tolist()
    return Spread(float(z.min()), float(z.median()), float(z.max()), counts, float(z.pow(4).mean() - 3))
