"""PackedConv2d: what a trained convolution becomes, in integers as a linear layer.

    levels_x * levels_w = codes_x * codes_w - z_w sum(codes_x) - z_x sum(codes_w) + count z_x z_w

over the part of a window that lies inside the image: outside it the code is 0, which adds nothing to the first two
sums, and the last two are taken over the inside alone, so they differ from place to place near the border. The C++
kernels do all of it in one call, where the method has a plan for them; the definition here copies windows of codes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitbell.kernels import integer_product, native, no_autocast, rotate
from bitbell.kernels.native_convolution import NativeConvolution
from bitbell.layers import Geometry, Recipe
from bitbell.layers.convolution import as_images, channels_last, convolve, with_offsets
from bitbell.layers.product import grid_of, levels_of
from bitbell.packing.layers import EXACT_IN_FLOAT32, PackedLinear, is_plain, values_of
from bitbell.packing.plans import input_plan

COPIED_BYTES = 2**24  # of windows at a time, but for a single image's


class PackedConv2d(PackedLinear):
    """A convolution of packed codes: a PackedLinear whose rows are filters, kernel height x kernel width x channels."""

    clip = False  # whether negative outputs become 0: a ReLU that was folded in

    def __init__(self, geometry: Geometry, recipe: Recipe, bias: bool, device: Any = None) -> None:
        self.rotated_width, self.is_image = geometry.group_channels, True
        super().__init__(geometry.columns, geometry.out_channels, recipe, bias, device)
        self.geometry = geometry

    @classmethod
    def outline(cls, module: nn.Module, recipe: Recipe, bias: bool) -> PackedConv2d:
        """A layer that waits for its tensors, in the place of `module`, an nn.Conv2d."""
        conv: Any = module
        return cls(Geometry.of(conv), recipe, bias, conv.weight.device)

    def quantizer_input(self, x: Tensor) -> Tensor:
        return channels_last(x, self.geometry).flatten(1)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """residual: added to the outputs, which `clip` follows; see `bitbell.packing.fold`."""
        if residual is None and not self.clip:
            return super().forward(x)
        layer: Any = self.native_layer() if is_plain(x) and self._suits_native(x) else None
        if layer is not None and (residual is None or self._suits_residual(residual, x)):
            return layer(x, residual, self.clip)
        y = super().forward(x)
        y = y if residual is None else y + residual
        return y.relu() if self.clip else y

    def _suits_native(self, x: Tensor) -> bool:
        return x.numel() > 0 and super()._suits_native(x)  # images of padding alone have no pixels to quantize

    def _suits_residual(self, residual: Tensor, x: Tensor) -> bool:
        """Whether the C++ kernels can add it: float32 as `x` is, and of the output's shape; nothing to broadcast."""
        if not is_plain(residual) or not residual.dtype == x.dtype == torch.float32:
            return False
        padded = self.geometry._replace(mode="zeros")  # whatever the padding holds
        size = padded.output_size(x.shape[-2], x.shape[-1])
        return residual.shape == (*x.shape[:-3], self.out_features, *size)

    def _reference(self, x: Tensor) -> Tensor:
        image, (codes, _) = channels_last(x, self.geometry), self._weights()
        weight = codes, self.weight_scale, self.weight_offset, self.weight_grid
        if self.activation_quantizer is None:
            with no_autocast(x.device):
                y = convolve(rotate(image.float(), self.rotation), values_of(*weight), self.geometry)
        else:
            a = self.quantize_input(image.flatten(1))
            with torch.no_grad(), no_autocast(x.device):
                y = self._multiply_images(a.codes.view(image.shape), a.step, a.offset)
            if a.values.requires_grad:
                z = convolve(a.values.float().view(image.shape), values_of(*weight), self.geometry)
                y = y + (z - z.detach())  # the integers' value, the gradient of floats
        return self.finish(y, x)

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        """`y` (N, rows, columns, O) as the output for the layer's input `x`."""
        return as_images(y if self.bias is None else y + self.bias, x).to(x.dtype)

    def _multiply_images(self, x_codes: Tensor, x_step: Tensor, x_offset: Tensor | None) -> Tensor:
        """Codes (N, H, W, I) int8 times the weight's: (N, rows, columns, O) float32."""
        assert self.activation_quantizer is not None
        if self.activation_quantizer.table is None and self.weight_grid[1] is None:
            y = self._level_sums(x_codes)
        else:
            y = convolve(*self._levels(x_codes), self.geometry)
        y = y * self.weight_scale.reshape(-1) * x_step.float().view(-1, 1, 1, 1)
        if x_offset is None and self.weight_offset is None:
            return y
        sides = (x_step.float(), x_offset), (self.weight_scale, self.weight_offset)
        return with_offsets(y, *self._levels(x_codes), *sides, self.geometry)

    def _levels(self, x_codes: Tensor) -> tuple[Tensor, Tensor]:
        assert self.activation_quantizer is not None
        w_levels = levels_of(self._weights()[0], self.weight_grid, torch.float32)
        return levels_of(x_codes, grid_of(self.activation_quantizer), torch.float32), w_levels

    def _level_sums(self, x_codes: Tensor) -> Tensor:
        """Sums of products of levels, float32; exact, but for the last rounding of wide sums."""
        assert self.activation_quantizer is not None
        z_x, z_w = self.activation_quantizer.zero_point, self.weight_zero_point
        # Levels come in quarters at the finest (half-integer zero points), hence the 4.
        largest = 4 * self.in_features * 2 ** (self.activation_quantizer.bits + self.recipe.weights - 2)
        dtype = torch.float32 if largest < EXACT_IN_FLOAT32 else torch.float64
        rows, columns = self.geometry.output_size(*x_codes.shape[1:3])
        at_once = max(COPIED_BYTES // (rows * columns * self.in_features), 1)
        parts = []
        for images in x_codes.split(at_once) if len(x_codes) else [x_codes]:
            groups = range(self.geometry.groups)
            parts.append(torch.cat([self._sums_of_group(images, group, z_w, dtype) for group in groups], -1))
        sums = torch.cat(parts)
        if z_x:
            w_sums, count = self._sums_inside(x_codes)
            sums = sums - z_x * w_sums.to(dtype) + z_x * z_w * count.to(dtype)
        return sums.float()

    def _sums_of_group(self, images: Tensor, group: int, z_w: float, dtype: torch.dtype) -> Tensor:
        """Products of codes less z_w times the sums of the input's: (N, rows, columns, O / groups)."""
        patches = self.geometry.patches(images, group)
        total = integer_product(patches.flatten(0, 2), self._weights()[0].chunk(self.geometry.groups)[group])
        total = total.view(*patches.shape[:3], self.out_features // self.geometry.groups).to(dtype)
        return total - z_w * patches.sum(-1, keepdim=True, dtype=torch.int32) if z_w else total

    def _sums_inside(self, x_codes: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of weight codes inside the image (1, rows, columns, O), and how many (1, rows, columns, 1); float64."""
        geometry = self.geometry
        inside = geometry.patches(x_codes.new_ones(1, *x_codes.shape[1:3], 1).double())
        taps = self._weights()[0].view(self.out_features, -1, geometry.group_channels).sum(-1).double()
        return inside @ taps.T, inside.sum(-1, keepdim=True) * geometry.group_channels

    def _make_native_layer(self) -> Any:
        plan = None if self.activation_quantizer is None else input_plan(self.activation_quantizer)
        if plan is None or self.weight_grid[1] is not None:
            return None
        if not native.sums_fit(self.in_features, self.recipe.weights, plan.bits):
            return None
        return _NativeConvolution(self, plan)

    def extra_repr(self) -> str:
        shape = {name: value for name, value in self.geometry._asdict().items() if name != "mode" or value != "zeros"}
        return ", ".join(f"{name}={value}" for name, value in shape.items()) + f", recipe={self.recipe.name}"


class _NativeConvolution:
    """The layer in C++, for images as the layer is given them."""

    def __init__(self, layer: PackedConv2d, plan: native.InputPlan) -> None:
        geometry = layer.geometry
        window: dict[str, Any] = {
            "channels": geometry.in_channels,
            "outputs": geometry.out_channels,
            "groups": geometry.groups,
        }
        window |= {"kernel": geometry.kernel, "stride": geometry.stride, "dilation": geometry.dilation}
        codes = layer.weight_packed, layer.recipe.weights, window | {"padding": geometry.zeros}, layer.weight_scale
        options: dict[str, Any] = {"plan": plan, "offset": layer.weight_offset, "bias": layer.bias}
        self.geometry, self.convolution = geometry, NativeConvolution(*codes, layer.weight_zero_point, **options)

    def __call__(self, x: Tensor, residual: Tensor | None = None, clip: bool = False) -> Tensor:
        image = channels_last(x.detach().float(), self.geometry)
        if residual is not None:
            residual = (residual if residual.dim() == 4 else residual.unsqueeze(0)).permute(0, 2, 3, 1)
        return as_images(self.convolution(image, residual, clip), x).to(x.dtype)


def packed_kind(module: nn.Module) -> type[PackedLinear]:
    """The packed layer that takes the place of `module`, trained or in full precision."""
    return PackedConv2d if isinstance(module, nn.Conv2d) else PackedLinear
