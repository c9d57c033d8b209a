"""A model -> the same model with quantized layers: rules, QuantLinear, QuantConv2d, quantize, calibrate, report."""

from typing import Any

from bitbell.layers.conv2d import QuantConv2d
from bitbell.layers.convolution import Geometry
from bitbell.layers.kinds import is_linear, shape_of
from bitbell.layers.linear import QuantizedLayer, QuantLinear, SharedInput, TrainedLayer
from bitbell.layers.recipes import Recipe, as_recipe
from bitbell.layers.report import QuantizationReport, report
from bitbell.layers.swap import calibrate, quantize, quantized_layers, quantizers, replace_module

__all__ = [
    "Geometry",
    "QuantConv1D",
    "QuantConv2d",
    "QuantLinear",
    "QuantizationReport",
    "QuantizedLayer",
    "Recipe",
    "SharedInput",
    "TrainedLayer",
    "as_recipe",
    "calibrate",
    "is_linear",
    "quantize",
    "quantized_layers",
    "quantizers",
    "replace_module",
    "report",
    "shape_of",
]


def __getattr__(name: str) -> Any:
    if name == "QuantConv1D":  # its file imports transformers
        from bitbell.layers.conv1d import QuantConv1D

        return QuantConv1D
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
