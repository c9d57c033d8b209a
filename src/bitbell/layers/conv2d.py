"""QuantConv2d: `nn.Conv2d` with a weight quantizer and an activation quantizer, and nothing else new.

Both quantizers work on the last dimension, so images are handed to them channels last, a sample a row: (N, H * W * I).
Rotation blocks divide the channels of a group and so lie within a pixel, and within a tap of the kernel. What a
linear layer shares by token, a convolution shares by sample: the pixels of a window must have one step, or their
codes could not be summed as integers. A filter is a row of the weight, with one statistic and one scale.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bitbell.kernels import product_dtype, rotate
from bitbell.layers.convolution import Geometry, as_images, channels_last, convolve, integer_convolution
from bitbell.layers.linear import TrainedLayer
from bitbell.layers.product import grid_of
from bitbell.layers.recipes import Recipe
from bitbell.quantizers import Quantized


class QuantConv2d(TrainedLayer, nn.Conv2d):
    """`nn.Conv2d` in codes: `weight` (O, I / groups, kernel height, kernel width) and `bias`; input (N, I, H, W).

    Padding with zeros is of real zeros, which no code stands for; other padding modes are put around the input before
    it is quantized. Raises ValueError where the channels of a group cannot be rotated.

    >>> layer = QuantConv2d(32, 8, 3, recipe="bbq-w2a2", padding=1)
    >>> x = torch.randn(2, 32, 5, 5)
    >>> layer.weight_quantizer.calibrate(layer.matrix)
    >>> layer.activation_quantizer.calibrate(layer.quantizer_input(x))
    >>> tuple(layer(x).shape)
    (2, 8, 5, 5)
    """

    is_image = True

    def __init__(self, *args: Any, recipe: Recipe | str, **options: Any) -> None:
        super().__init__(*args, **options)
        self._add_quantizers(recipe)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, recipe: Recipe | str) -> QuantConv2d:
        """The quantized layer around the very parameters of `conv`."""
        found: Any = conv
        shape = conv.in_channels, conv.out_channels, found.kernel_size, found.stride, found.padding, found.dilation
        rest = {"groups": conv.groups, "bias": conv.bias is not None, "padding_mode": conv.padding_mode}
        return cls(*shape, **rest, recipe=recipe, device="meta", dtype=conv.weight.dtype)._take_over(conv)

    def _add_quantizers(self, recipe: Recipe | str) -> None:
        self.geometry = Geometry.of(self)
        self.in_features, self.out_features = self.geometry.columns, self.out_channels
        try:
            super()._add_quantizers(recipe)
        except ValueError as error:
            of = f"the channels of each of its {self.groups} groups" if self.groups > 1 else "its input channels"
            raise ValueError(f"{error}. A convolution rotates {of}, {self.rotated_width}") from None

    @property
    def rotated_width(self) -> int:
        return self.geometry.group_channels

    @property
    def matrix(self) -> Tensor:
        """The weight as (O, columns): the taps of a filter one after the other, channels last."""
        return self.in_rows(self.weight).reshape(-1, self.in_features)

    def in_rows(self, weight: Tensor) -> Tensor:
        return weight.permute(0, 2, 3, 1)

    def quantizer_input(self, x: Tensor) -> Tensor:
        return channels_last(x, self.geometry).flatten(1)

    def multiply(self, x: Tensor, w: Quantized) -> Tensor:
        """The layer's output for images `x` (N, I, H, W), or one of them, and its quantized weight `w`."""
        image = channels_last(x, self.geometry)
        if self.activation_quantizer is None:
            y = convolve(rotate(image, self.weight_quantizer.rotation), w.values.to(x.dtype), self.geometry)
        else:
            a = self.quantize_input(image.flatten(1))
            grids = grid_of(self.activation_quantizer), grid_of(self.weight_quantizer)
            size = int(image.shape[1]), int(image.shape[2])
            y = integer_convolution(a, w, *grids, size, self.geometry, product_dtype(x))
        return as_images(y if self.bias is None else y + self.bias.to(y.dtype), x)
