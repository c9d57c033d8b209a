"""A packed layer on a GPU: its codes as planes, its inputs' codes, and one product (`bitbell.kernels.planes`).

    x --quantize--> codes int8, step --planes_linear--> y             a tenth of the bytes, integers on tensor cores
    x --rotate--> floats --planes_linear_floats--> y                  inputs that stay floats: levels are made of codes
    codes --look up--> levels float32 --planes_linear_floats--> y     grids that are not uniform (NormalFloat, FP4)

Planes are made once, at the first call on a GPU, and take as many bytes again as the packed words that stay for saving.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitbell.kernels import native, planes, rotate, triton
from bitbell.layers.product import grid_of, levels_of
from bitbell.quantizers import Quantized, Quantizer

if TYPE_CHECKING:
    from bitbell.packing.layers import PackedLinear

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def suits(layer: PackedLinear, x: Tensor) -> bool:
    """Whether Triton's kernels compute `layer` for `x`: where they are in use, and integers and even levels are exact
    on the way. Where inputs stay floats, these and a table's levels are rounded to the type of x."""
    if not triton.computes(x) or x.dtype not in TYPES or x.device != layer.weight_packed.device:
        return False
    quantizer, bits = layer.activation_quantizer, layer.recipe.weights
    if layer.is_image or layer.in_features >= 1 << 17:
        return False
    if quantizer is None:
        return layer.weight_grid[1] is not None or _exact_levels(bits, layer.weight_zero_point, x.dtype)
    if layer.weight_grid[1] is not None or quantizer.table is not None:
        return layer.weight_offset is None and quantizer.offset is None
    return native.sums_fit(layer.in_features, bits, quantizer.bits)


@lru_cache(maxsize=64)
def _exact_levels(bits: int, zero_point: float, dtype: torch.dtype) -> bool:
    levels = torch.arange(2**bits, device="cpu") - 2 ** (bits - 1) - zero_point
    return bool((levels.to(dtype) == levels).all())


class GpuLayer:
    """The tensors of a packed layer as the kernels read them. What changes in the layer asks for a new one."""

    def __init__(self, layer: PackedLinear) -> None:
        self.bits, self.inputs, self.outputs = layer.recipe.weights, layer.in_features, layer.out_features
        self.planes, self.sums = planes.arrange_planes(layer.weight_packed, self.bits, self.inputs)
        self.zero_point, table = layer.weight_grid
        self.table = None if table is None else torch.tensor(table, dtype=torch.float32, device=self.planes.device)
        self.scale = layer.weight_scale.reshape(-1).float().contiguous()
        self.offset = None if layer.weight_offset is None else layer.weight_offset.reshape(-1).float().contiguous()
        self.bias = None if layer.bias is None else layer.bias.detach().float().contiguous()

    def of_codes(self, a: Quantized, quantizer: Quantizer, dtype: torch.dtype) -> Tensor:
        """(..., outputs) for quantized inputs (..., inputs)."""
        codes = a.codes.reshape(-1, self.inputs)
        step = a.step.float().reshape(-1)
        zero_point, table = grid = grid_of(quantizer)
        if self.table is not None or table is not None:
            levels = levels_of(codes, grid, torch.float32)
            y = self._of_floats(levels, torch.float32, bias=None) * step.reshape(-1, 1)
            y = (y if self.bias is None else y + self.bias).to(dtype)
        else:
            weight = self.planes, self.sums, self.scale, self.bits
            offset = None if a.offset is None else a.offset.float().reshape(-1)
            how = quantizer.bits, zero_point, self.zero_point, dtype, offset, self.offset, self.bias
            y = planes.planes_linear(codes, step, *weight, *how)
        return y.view(*a.codes.shape[:-1], self.outputs)

    def of_floats(self, x: Tensor, rotation: int | None) -> Tensor:
        """(..., outputs) for inputs (..., inputs) that stay floats; rotated in float32, multiplied in their type."""
        h = rotate(x.float(), rotation).to(x.dtype).reshape(-1, self.inputs)
        return self._of_floats(h, x.dtype, self.bias).view(*x.shape[:-1], self.outputs)

    def _of_floats(self, x: Tensor, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
        weight = self.planes, self.scale, self.bits, self.zero_point
        return planes.planes_linear_floats(x, *weight, dtype, self.table, self.offset, bias)
