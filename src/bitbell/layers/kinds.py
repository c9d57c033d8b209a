"""The kinds of layers that can be quantized, linear maps all of them, and what each becomes."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from bitbell.layers.conv2d import QuantConv2d
from bitbell.layers.convolution import Geometry
from bitbell.layers.linear import QuantLinear, TrainedLayer
from bitbell.layers.recipes import Recipe

# Linear maps too, for which there is no quantized layer.
NOT_QUANTIZED = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Bilinear)


def linear_kind(module: nn.Module) -> type[nn.Module] | None:
    """`nn.Linear`, `nn.Conv2d`, or `Conv1D` of `transformers` (GPT-2), if `module` is one or a subclass of one; else
    None."""
    # Whoever made a Conv1D has loaded its file; importing it here would let everyone wait for transformers.
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return next(
        (kind for kind in (nn.Linear, nn.Conv2d, conv1d) if kind is not None and isinstance(module, kind)), None
    )


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer, or a convolution, of a kind that can be quantized."""
    return linear_kind(module) is not None


def shape_of(linear: Any) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer; of a convolution, filters and weights of a filter."""
    if isinstance(linear, nn.Conv2d):
        return linear.out_channels, Geometry.of(linear).columns
    if isinstance(linear, nn.Linear):
        return linear.out_features, linear.in_features
    return linear.nf, linear.nx


def quantized_twin(linear: Any, recipe: Recipe) -> TrainedLayer:
    """The quantized layer around the very parameters of `linear`. Raises ValueError where it cannot be rotated."""
    if isinstance(linear, nn.Linear):
        return QuantLinear.from_linear(linear, recipe)
    if isinstance(linear, nn.Conv2d):
        return QuantConv2d.from_conv(linear, recipe)
    from bitbell.layers.conv1d import QuantConv1D

    return QuantConv1D.from_linear(linear, recipe)
