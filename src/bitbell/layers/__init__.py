"""A model -> the same model with quantized layers: rules, QuantLinear, quantize, calibrate, report."""

from bitbell.layers.linear import QuantizedLayer, QuantLinear, SharedInput
from bitbell.layers.recipes import Recipe, as_recipe
from bitbell.layers.report import QuantizationReport, report
from bitbell.layers.swap import calibrate, quantize, quantized_layers, quantizers, replace_module

__all__ = [
    "QuantLinear",
    "QuantizationReport",
    "QuantizedLayer",
    "Recipe",
    "SharedInput",
    "as_recipe",
    "calibrate",
    "quantize",
    "quantized_layers",
    "quantizers",
    "replace_module",
    "report",
]
