"""What image models have in full precision, in C++: convolutions of few channels with their ReLU and pooling, pooling
alone, means of all pixels, and linear layers of few rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitbell.kernels import native

Pair = tuple[int, int]


@dataclass(frozen=True)
class Pooling:
    """Largest numbers of windows. kernel, stride and padding are (height, width); padding holds -infinity.

    Raises ValueError for padding wider than half a window, as PyTorch does.
    """

    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)

    def __post_init__(self) -> None:
        if min(*self.kernel, *self.stride) < 1:
            raise ValueError(f"kernel and stride must be 1 or more, got {self.kernel} and {self.stride}")
        if any(not 0 <= 2 * p <= k for p, k in zip(self.padding, self.kernel, strict=True)):
            raise ValueError(f"padding must be 0 to half of the kernel {self.kernel}, got {self.padding}")

    def output_size(self, height: int, width: int) -> Pair:
        """Rows and columns of windows; 0 or less where not one fits."""
        sizes = zip((height, width), self.kernel, self.stride, self.padding, strict=True)
        rows, columns = ((size + 2 * p - k) // s + 1 for size, k, s, p in sizes)
        return rows, columns

    def numbers(self) -> tuple[int, ...]:
        """As the extension takes them."""
        return *self.kernel, *self.stride, *self.padding


class NativeFloatConvolution:
    """A convolution in float32, and what follows it, in C++. Filters are copied and arranged once.

    weight: float32 (O, I, height, width); bias: (O,) or None; padding: zeros left, right, above and below.
    Where 3 or 4 taps along a row fall on a phase of the stride (as of a 7 x 7 kernel with stride 2), rows are convolved
    by Winograd's algorithm, F(5, 4): differences to the exact sums are about three times those of sums taken in order,
    where pixels are of one size. Images with NaN or numbers above 256, whose rounding would spread over a tile, are
    convolved directly. Raises ValueError where parts do not fit.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: Pair = (1, 1),
        padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    ) -> None:
        weight = native._on_cpu("weight", weight.detach(), torch.float32)
        if weight.dim() != 4 or not weight.numel():
            raise ValueError(f"weight must be (outputs, channels, height, width), got {tuple(weight.shape)}")
        self.outputs, self.channels, *kernel = weight.shape
        self.kernel, self.stride, self.padding = kernel, stride, padding
        held = None if bias is None else native.of_outputs("bias", bias.detach(), self.outputs)
        window = {"channels": self.channels, "outputs": self.outputs, "groups": 1, "kernel": kernel}
        window |= {"stride": list(stride), "dilation": [1, 1], "padding": list(padding)}
        self._layer = native._loaded().FloatConvolution(
            window, weight.data_ptr(), 0 if held is None else held.data_ptr()
        )

    def output_size(self, height: int, width: int, pooling: Pooling | None = None) -> Pair:
        """Rows and columns of the outputs; 0 or less where not one window fits."""
        left, right, top, bottom = self.padding
        rows = (height + top + bottom - self.kernel[0]) // self.stride[0] + 1
        columns = (width + left + right - self.kernel[1]) // self.stride[1] + 1
        if pooling is None or min(rows, columns) < 1:
            return rows, columns
        return pooling.output_size(rows, columns)

    def __call__(self, x: Tensor, pooling: Pooling | None = None, clip: bool = False) -> Tensor:
        """x (N, channels, H, W) float32, channels last or not -> (N, outputs, rows, columns), channels last.

        clip: negative numbers become 0, as by a ReLU, before the pooling or after it. Raises ValueError for images that
        no window fits.
        """
        x = x if x.is_contiguous(memory_format=torch.channels_last) else native._on_cpu("x", x, torch.float32)
        if x.dim() != 4 or x.shape[1] != self.channels or x.dtype != torch.float32 or not x.is_cpu:
            raise ValueError(f"x must be float32 (N, {self.channels}, H, W) on the CPU, got {x.dtype} {tuple(x.shape)}")
        images, _, height, width = x.shape
        rows, columns = self.output_size(height, width, pooling)
        if not height * width or min(rows, columns) < 1:
            raise ValueError(f"an image of {height} x {width} is too small for the kernel of {tuple(self.kernel)}")
        y = torch.empty((images, rows, columns, self.outputs), **native.FLOATS)
        if images:
            place = x.data_ptr(), not x.is_contiguous(), images, height, width
            how = (pooling or Pooling()).numbers(), clip, y.data_ptr()
            self._layer.forward(native.level(), *place, *how, native.threads())
        return y.permute(0, 3, 1, 2)


def max_pool(x: Tensor, pooling: Pooling) -> Tensor:
    """x (N, C, H, W) float32, channels last -> (N, C, rows, columns), channels last; NaN is larger than numbers.

    Raises ValueError for images that no window fits.
    """
    if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"x must be (N, C, H, W), channels last, got {tuple(x.shape)} with strides {x.stride()}")
    if x.dtype != torch.float32 or not x.is_cpu:
        raise ValueError(f"x must be float32 on the CPU, got {x.dtype} on {x.device}")
    images, channels, height, width = x.shape
    rows, columns = pooling.output_size(height, width)
    if not height * width or min(rows, columns) < 1:
        raise ValueError(f"an image of {height} x {width} is too small for windows of {pooling.kernel}")
    y = torch.empty((images, rows, columns, channels), **native.FLOATS)
    if y.numel():
        shape = images, height, width, channels
        place = pooling.numbers(), y.data_ptr()
        native._loaded().max_pool(native.level(), x.data_ptr(), *shape, *place, native.threads())
    return y.permute(0, 3, 1, 2)


def pixel_means(x: Tensor) -> Tensor:
    """x (N, C, H, W) float32, channels last -> (N, C, 1, 1), the mean of all pixels of a channel.

    Raises ValueError for other layouts and types, and for images without pixels.
    """
    if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"x must be (N, C, H, W), channels last, got {tuple(x.shape)} with strides {x.stride()}")
    if x.dtype != torch.float32 or not x.is_cpu or not x.shape[2] * x.shape[3]:
        raise ValueError(f"x must have float32 pixels on the CPU, got {x.dtype} {tuple(x.shape)} on {x.device}")
    images, channels, height, width = x.shape
    y = torch.empty((images, channels, 1, 1), **native.FLOATS)
    native._loaded().pixel_means(native.level(), x.data_ptr(), images, height * width, channels, y.data_ptr())
    return y


def float_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., I) times weight (O, I), plus bias (O,): (..., O), all float32. As fast as memory gives for a few rows.

    Raises ValueError for shapes that do not fit each other, and for what is not float32 on the CPU.
    """
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"x must be (..., {weight.shape[-1]}), got {tuple(x.shape)}")
    x, weight = native._on_cpu("x", x, torch.float32), native._on_cpu("weight", weight.detach(), torch.float32)
    held = None if bias is None else native._on_cpu("bias", bias.detach(), torch.float32)
    if held is not None and held.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},), got {tuple(held.shape)}")
    rows, k = weight.shape
    y = torch.empty((*x.shape[:-1], rows), **native.FLOATS)
    if y.numel():
        numbers = weight.data_ptr(), 0 if held is None else held.data_ptr(), rows, k, x.data_ptr(), y.numel() // rows
        native._loaded().float_linear(native.level(), *numbers, y.data_ptr(), native.threads())
    return y
