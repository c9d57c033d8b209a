"""What `fold` puts in the place of layers in full precision: the same numbers but for rounding, in C++ where it can.

Under autograd, compilation or another type than float32, and where the C++ kernels are not in use, they are PyTorch's.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitbell.kernels import native
from bitbell.kernels.native_images import NativeFloatConvolution, Pooling, float_linear, max_pool, pixel_means
from bitbell.packing.layers import is_plain

FEW_ROWS = 4  # of a linear layer, whose time is that of reading its weight
MOST_ROWS = 64  # of a window that the C++ kernels take
FEW_CHANNELS = 4  # of which oneDNN's convolutions fill their vectors badly
Pair = tuple[int, int]


class StandIn(nn.Module):
    """A module in the place of another, of which it has the public attributes too: models read each other's."""

    stands_for: ClassVar[str]  # its name here

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == self.stands_for:
                raise
            return getattr(super().__getattr__(self.stands_for), name)


class FloatConv2d(StandIn):
    """A convolution in full precision, `clip`ped by a ReLU and pooled by `pool`, in one call."""

    stands_for = "conv"

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.clip, self.pool = conv, False, None
        self._made: tuple[list[Any], NativeFloatConvolution] | None = None

    conv: nn.Conv2d
    clip: bool
    pool: MaxPool2d | None

    @staticmethod
    def takes(conv: nn.Module | None) -> bool:
        """Whether the C++ kernels have a way that is faster than PyTorch's, and nobody looks on."""
        if type(conv) is not nn.Conv2d or not isinstance(conv.padding, tuple) or has_hooks(conv):
            return False
        plain = conv.padding_mode == "zeros" and conv.groups == 1 and conv.dilation == (1, 1)
        fits = conv.in_channels <= FEW_CHANNELS and conv.kernel_size[0] <= MOST_ROWS
        return plain and fits and conv.weight.dtype == torch.float32

    def forward(self, x: Tensor) -> Tensor:
        pooling = None if self.pool is None else self.pool.pooling
        if self._suits_native(x):
            layer = self._layer()
            if min(layer.output_size(x.shape[2], x.shape[3], pooling)) > 0:
                return layer(x, pooling, self.clip)
        y = self.conv(x)
        y = F.relu_(y) if self.clip else y
        return y if self.pool is None else self.pool(y)

    def _suits_native(self, x: Tensor) -> bool:
        fits = x.dim() == 4 and x.shape[1] == self.conv.in_channels
        return fits and _are_plain(self.conv.weight, self.conv.bias) and _is_fast() and _is_native(x)

    def _layer(self) -> NativeFloatConvolution:
        """Arranged at the first use, and again where the filters were replaced or changed."""
        conv: Any = self.conv
        held = [_state_of(t) for t in (conv.weight, conv.bias)]
        made = self._made
        if made is None or any(a[0] is not b[0] or a[1:] != b[1:] for a, b in zip(made[0], held, strict=True)):
            padding = conv.padding[1], conv.padding[1], conv.padding[0], conv.padding[0]
            made = self._made = held, NativeFloatConvolution(conv.weight, conv.bias, conv.stride, padding)
        return made[1]

    def __getstate__(self) -> dict[str, Any]:
        """Copies arrange for themselves."""
        return self.__dict__ | {"_made": None}


class MaxPool2d(nn.MaxPool2d):
    """Of images that lie channels last in C++, of others in PyTorch."""

    @cached_property
    def pooling(self) -> Pooling:
        return Pooling(_pair(self.kernel_size), _pair(self.stride), _pair(self.padding))

    @staticmethod
    def takes(pool: nn.Module | None) -> bool:
        """Whether the C++ kernels have a way for this pooling, and nobody looks on."""
        if type(pool) is not nn.MaxPool2d or has_hooks(pool):
            return False
        halves = all(2 * p <= k for p, k in zip(_pair(pool.padding), _pair(pool.kernel_size), strict=True))
        fits = halves and max(_pair(pool.kernel_size)) <= MOST_ROWS
        return fits and _pair(pool.dilation) == (1, 1) and not pool.ceil_mode and not pool.return_indices

    def forward(self, x: Tensor) -> Tensor:
        suits = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and _is_native(x)
        if suits and min(self.pooling.output_size(x.shape[2], x.shape[3])) > 0:
            return max_pool(x, self.pooling)
        return super().forward(x)


class GlobalAvgPool2d(nn.AdaptiveAvgPool2d):
    """Means of all pixels; of images that lie channels last in C++, of others in PyTorch."""

    @staticmethod
    def takes(pool: nn.Module | None) -> bool:
        """Whether it gives one number a channel, and nobody looks on."""
        return type(pool) is nn.AdaptiveAvgPool2d and _pair(pool.output_size) == (1, 1) and not has_hooks(pool)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and _is_native(x):
            return pixel_means(x)
        return super().forward(x)


class FloatLinear(nn.Linear):
    """In C++ for a few rows, whose time is that of reading the weight, in PyTorch for many."""

    @staticmethod
    def takes(linear: nn.Module | None) -> bool:
        """Whether the C++ kernels have a way for this layer, and nobody looks on."""
        return type(linear) is nn.Linear and not has_hooks(linear)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        fits = x.shape[-1:] == w.shape[1:] and x.numel() <= FEW_ROWS * self.in_features
        if fits and _are_plain(w, self.bias) and _is_fast() and _is_native(x):
            return float_linear(x, w, self.bias)
        return super().forward(x)


KINDS: tuple[Any, ...] = MaxPool2d, GlobalAvgPool2d, FloatLinear  # of the classes that they take, with another forward


def in_place_of(module: nn.Module) -> Any:
    """What computes the same as `module` alone, faster, with all that it has; itself where there is nothing."""
    for kind in KINDS:
        if kind.takes(module):
            module = copy.copy(module)
            module.__class__ = kind
            return module
    return module


def _is_fast() -> bool:
    """Whether products are; the portable level takes twice as long as PyTorch on a machine that has more."""
    return native.level() != "portable"


def _is_native(x: Tensor) -> bool:
    usable = x.is_cpu and x.dtype == torch.float32 and x.numel() > 0 and is_plain(x)
    return usable and native.available() and not torch.is_autocast_enabled("cpu")


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks on, or has given this very module another `forward`."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or "forward" in module.__dict__


def _state_of(parameter: Tensor | None) -> tuple[Any, ...]:
    """What tells whether it was replaced or changed in place (through `.data`: replaced alone)."""
    if parameter is None:
        return (None,)
    return parameter, parameter.data_ptr(), None if parameter.is_inference() else parameter._version


def _are_plain(*parameters: Tensor | None) -> bool:
    """Whether the C++ kernels can read them, and autograd need not know."""
    there = [p for p in parameters if p is not None]
    learns = torch.is_grad_enabled() and any(p.requires_grad for p in there)
    return not learns and all(
        type(p) in (Tensor, nn.Parameter) and p.is_cpu and p.dtype == torch.float32 and p.layout is torch.strided
        for p in there
    )


def _pair(of: Any) -> Pair:
    both = tuple(of) if isinstance(of, tuple | list) else (of,)
    return (both[0], both[-1])
