"""The proof that packing changed nothing: codes equal, layer outputs and logits equal up to the last rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitbell.evaluation import logits_of
from bitbell.evaluation.loss import device_of, evaluation_mode
from bitbell.kernels import native, triton
from bitbell.layers import QuantConv2d, QuantizedLayer, TrainedLayer, quantized_layers
from bitbell.packing.layers import PackedLinear, weight_step
from bitbell.packing.model import PackedModel

LAYER_TOLERANCE = 1e-6  # of a layer's largest output; float32 rounding of the two steps is half of 1.2e-7
LOGIT_TOLERANCE = 1e-4  # of the largest logit


class VerificationError(AssertionError):
    """A trained model and its packed twin differ; the message names the layer and the difference."""


@dataclass(frozen=True)
class Verification:
    """What was compared, and the largest differences, relative to the largest output."""

    layers: int
    codes: int
    worst_layer: str
    layer_difference: float
    logit_difference: float | None

    def __str__(self) -> str:
        logits = "not compared" if self.logit_difference is None else f"{self.logit_difference:.1e} of the largest"
        return (
            f"verified {self.layers} layers: {self.codes:,} weight codes equal, input codes equal, outputs within "
            f"{self.layer_difference:.1e} of the largest ({self.worst_layer}), logits {logits}"
        )


@torch.no_grad()
def verify(model: nn.Module, packed: nn.Module, batch: Any = None) -> Verification:
    """Compare a trained model with its packed twin; raise VerificationError, naming the layer, where they differ.

    batch: token ids (B, T), or whatever the model takes as its one argument; by default random ids, or images, for a
    Hugging Face model, and random layer inputs for others. Weight codes, steps and input codes must be equal; outputs
    may differ by 1e-6 of the largest, logits by 1e-4. Computed by the reference kernels: the fast ones sum a rotation
    in another order, so that an input within float rounding of a threshold may get the next code there.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    twin = packed.model if isinstance(packed, PackedModel) else packed
    trained, others = dict(quantized_layers(model)), dict(quantized_layers(twin))
    if not trained or trained.keys() != others.keys():
        missing = sorted(trained.keys() ^ others.keys())[:3]
        raise VerificationError(
            f"the two models have different quantized layers: {', '.join(missing) or 'none at all'}"
        )
    codes = sum(_compare_weights(name, trained[name], others[name]) for name in trained)
    if batch is None and hasattr(model, "config"):
        batch = _random_batch(model.config)
    with evaluation_mode(model), evaluation_mode(twin), native.using(native.REFERENCE), triton.using("off"):
        inputs = _record_inputs(model, batch) if batch is not None else _random_inputs(trained)
        if missed := sorted(trained.keys() - inputs.keys()):
            raise VerificationError(f"the batch does not reach {missed[0]}, so its outputs cannot be compared")
        differences = {name: _compare_outputs(name, trained[name], others[name], x) for name, x in inputs.items()}
        logits = None if batch is None else _compare_logits(model, twin, batch)
    worst = max(differences, key=lambda name: differences[name])
    return Verification(len(trained), codes, worst, differences[worst], logits)


def _compare_weights(name: str, layer: TrainedLayer, packed: PackedLinear) -> int:
    ours, theirs = layer.weight_codes(), packed.weight_codes()
    if ours.shape != theirs.shape:
        raise VerificationError(f"{name}: the weight is {tuple(ours.shape)}, packed {tuple(theirs.shape)}")
    if different := int((ours != theirs).sum()):
        raise VerificationError(f"{name}: {different} of {ours.numel()} weight codes differ")
    if not torch.equal(weight_step(layer), packed.weight_scale):
        raise VerificationError(f"{name}: the weight scales differ")
    offset, packed_offset = layer.weight_offset, packed.weight_offset
    if (offset is None) != (packed_offset is None):
        raise VerificationError(f"{name}: only one of the two has a weight offset")
    if offset is not None and packed_offset is not None and not bool(torch.eq(offset, packed_offset).all()):
        raise VerificationError(f"{name}: the weight offsets differ")
    return ours.numel()


def _record_inputs(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    inputs: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: inputs.__setitem__(name, args[0]))
        for name, layer in quantized_layers(model)
    ]
    try:
        logits_of(model, batch.to(device_of(model)) if isinstance(batch, Tensor) else batch)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


def _random_batch(config: Any) -> Tensor:
    """Images for a configuration with channels and no vocabulary, else token ids."""
    if not hasattr(config, "vocab_size") and hasattr(config, "num_channels"):
        size = getattr(config, "image_size", 64)
        shape = (size, size) if isinstance(size, int) else tuple(size)
        return torch.randn(2, config.num_channels, *shape, generator=torch.Generator().manual_seed(0))
    length = min(64, getattr(config, "max_position_embeddings", None) or 64)
    return torch.randint(0, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))


def _random_inputs(layers: dict[str, TrainedLayer]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(16, *_input_shape(layer), generator=generator).to(layer.weight.device)
        for name, layer in layers.items()
    }


def _input_shape(layer: TrainedLayer) -> tuple[int, ...]:
    if not isinstance(layer, QuantConv2d):
        return (layer.in_features,)
    geometry = layer.geometry
    (left, right, top, bottom), spans = geometry.zeros, geometry.spans
    height, width = max(spans[0] - top - bottom, 1) + 4, max(spans[1] - left - right, 1) + 5
    return geometry.in_channels, height, width


def _compare_outputs(name: str, layer: TrainedLayer, packed: PackedLinear, x: Tensor) -> float:
    if layer.activation_quantizer is not None:
        ours, theirs = _encode(layer, x), _encode(packed, x)
        if different := int((ours != theirs).sum()):
            raise VerificationError(f"{name}: {different} of {ours.numel()} input codes differ")
    expected, got = layer(x), packed(x)
    allowed = max(LAYER_TOLERANCE, 4 * torch.finfo(expected.dtype).eps)  # a model in bfloat16 rounds that much sooner
    difference = _difference(expected, got)
    if not difference <= allowed:
        raise VerificationError(f"{name}: outputs differ by {difference:.2e} of the largest, allowed are {allowed}")
    return difference


def _difference(expected: Tensor, got: Tensor) -> float:
    expected, got = expected.float(), got.float()
    return float((expected - got).abs().max() / expected.abs().max().clamp_min(1e-30))


def _encode(layer: QuantizedLayer, x: Tensor) -> Tensor:
    assert layer.activation_quantizer is not None
    return layer.activation_quantizer.encode(layer.quantizer_input(x))


def _compare_logits(model: nn.Module, twin: nn.Module, batch: Any) -> float | None:
    """The largest difference of logits; None for models narrower than float32, where one rounding may flip a code."""
    batch = batch.to(device_of(model)) if isinstance(batch, Tensor) else batch
    expected = logits_of(model, batch)
    if torch.finfo(expected.dtype).bits < 32:
        return None
    difference = _difference(expected, logits_of(twin, batch))
    if not difference <= LOGIT_TOLERANCE:
        raise VerificationError(f"logits differ by {difference:.2e} of the largest, allowed are {LOGIT_TOLERANCE}")
    return difference
