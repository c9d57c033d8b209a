"""PackedLinear: what a trained layer becomes. It stores codes at their true width and multiplies integers.

    levels_x . levels_w^T = codes_x . codes_w^T - z_w sum(codes_x) - z_x sum(codes_w) + K z_x z_w

The product of codes is int8 times int8 with an int32 sum, whatever the zero points (half-integers too): they are
folded out by the sums of codes. Then come the same two steps, in the same order, as in training. Where a method's grid
is not uniform (NormalFloat), levels are looked up and multiplied in float32: small, but not fast.

On CPUs the C++ kernels do all of this in one call (`bitbell.kernels.native`); what they have no way for, and everything
under `BITBELL_KERNELS=reference`, is computed by the plain PyTorch here. On GPUs it is Triton's kernels (`gpu.py`).
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from bitbell.kernels import integer_product, native, no_autocast, pack_codes, packed_words, rotate, triton, unpack_codes
from bitbell.layers import QuantizedLayer, Recipe, TrainedLayer, shape_of
from bitbell.layers.product import Grid, add_offsets, grid_of, levels_of
from bitbell.packing import gpu
from bitbell.packing.plans import input_plan
from bitbell.quantizers import Quantized, Quantizer

EXACT_IN_FLOAT32 = 2**24
FEW_ROWS = 16  # up to which the portable level multiplies float inputs faster than PyTorch; the others always do


class PackedLinear(nn.Module, QuantizedLayer):
    """A linear layer of packed codes, which stay as they are; gradients pass through it to what is before it.

    weight_packed: int32 (O, packed_words(I, bits)), see `bitbell.kernels.pack_codes`. weight_scale: float32 (O, 1),
    the value of one level. weight_offset: float32 (O, 1), added to every value, or None. weight_shape: int64 (O, I).
    bias: float32 (O,) or None. activation_quantizer: None leaves inputs alone. weight: always empty; a reader that
    knows nothing of packing finds it of the wrong shape and stops, where it would start from random weights otherwise.
    """

    weight: Tensor
    weight_packed: Tensor
    weight_scale: Tensor
    weight_offset: Tensor | None
    weight_shape: Tensor
    bias: Tensor | None
    rotated_width: int | None = None  # how many inputs lie side by side, where those are not all
    is_image = False

    def __init__(self, in_features: int, out_features: int, recipe: Recipe, bias: bool, device: Any = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.recipe = in_features, out_features, recipe
        with torch.device(device or torch.get_default_device()):
            width = self.rotated_width or in_features
            weight_quantizer, self.activation_quantizer = recipe.quantizers_for(out_features, width, self.is_image)
            words = packed_words(in_features, recipe.weights)
            self.register_buffer("weight", torch.empty(0))
            self.register_buffer("weight_packed", torch.zeros(out_features, words, dtype=torch.int32))
            self.register_buffer("weight_scale", torch.zeros(out_features, 1))
            has_offset = weight_quantizer.offset is not None
            self.register_buffer("weight_offset", torch.zeros(out_features, 1) if has_offset else None)
            self.register_buffer("weight_shape", torch.tensor([out_features, in_features]))
            self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self.rotation, self.weight_zero_point = weight_quantizer.rotation, weight_quantizer.zero_point
        self.weight_grid = grid_of(weight_quantizer)
        self._unpacked: tuple[Tensor, Tensor] | None = None
        self._native: tuple[_Snapshot, native.NativeLayer | None] | None = None
        self._gpu: tuple[_Snapshot, gpu.GpuLayer] | None = None
        self.requires_grad_(False)

    @classmethod
    def outline(cls, module: nn.Module, recipe: Recipe, bias: bool) -> PackedLinear:
        """A layer that waits for its tensors, in the place of `module`, trained or in full precision."""
        linear: Any = module
        outputs, inputs = shape_of(linear)
        return cls(inputs, outputs, recipe, bias, linear.weight.device)

    @classmethod
    @torch.no_grad()
    def from_trained(cls, layer: TrainedLayer, activation_quantizer: Quantizer | None) -> PackedLinear:
        """Pack a trained layer; `activation_quantizer` is its (possibly shared) quantizer's copy."""
        bits = layer.recipe.weights
        packed = cls.outline(layer, layer.recipe, layer.bias is not None)
        codes, step = layer.weight_codes(), weight_step(layer)
        packed.weight_packed.copy_(pack_codes(codes, bits))
        packed.weight_scale.copy_(step)
        if packed.bias is not None:
            packed.bias.copy_(layer.bias)
        packed.activation_quantizer = activation_quantizer
        if packed.weight_offset is not None and layer.weight_offset is not None:
            packed.weight_offset.copy_(layer.weight_offset)
        packed.rotation, packed.weight_zero_point = layer.weight_quantizer.rotation, layer.weight_quantizer.zero_point
        return packed.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_image and x.shape[-1:] != (self.in_features,):
            this = f"{type(self).__name__}({self.extra_repr()})"
            raise ValueError(f"{this} takes inputs of shape (..., {self.in_features}), got {tuple(x.shape)}")
        if not is_plain(x):
            return self._reference(x)
        if gpu.suits(self, x):
            return self._by_gpu(x)
        layer = self.native_layer() if self._suits_native(x) else None
        return self._reference(x) if layer is None else layer(x)

    def _needs_only_codes(self, x: Tensor) -> bool:
        return triton.computes(x)

    @torch.no_grad()
    def _by_gpu(self, x: Tensor) -> Tensor:
        kept = self._gpu
        if kept is None or not kept[0].still_holds():
            kept = self._gpu = _Snapshot(self), gpu.GpuLayer(self)
        if self.activation_quantizer is None:
            return kept[1].of_floats(x, self.rotation)
        return kept[1].of_codes(self.quantize_input(x), self.activation_quantizer, x.dtype)

    def _suits_native(self, x: Tensor) -> bool:
        if not native.available() or x.device.type != "cpu":
            return False
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return False
        quantizer = self.activation_quantizer
        if quantizer is not None:
            return not quantizer.training
        return native.level() != "portable" or x.numel() <= FEW_ROWS * self.in_features

    def native_layer(self) -> native.NativeLayer | None:
        """This layer for the C++ kernels, arranged at the first use; None if they have no way to compute it."""
        kept = self._native
        if kept is None or not kept[0].still_holds():
            kept = self._native = _Snapshot(self), self._make_native_layer()
        return kept[1]

    @torch.no_grad()
    def _make_native_layer(self) -> native.NativeLayer | None:
        plan = None if self.activation_quantizer is None else input_plan(self.activation_quantizer)
        table = self.weight_grid[1]
        if self.activation_quantizer is not None:
            if plan is None or table is not None:
                return None
            if not native.sums_fit(self.in_features, self.recipe.weights, plan.bits):
                return None
        shape = self.weight_packed, self.recipe.weights, self.in_features, self.weight_scale, self.weight_zero_point
        options: dict[str, Any] = {"offset": self.weight_offset, "bias": self.bias, "table": table}
        return native.NativeLayer(*shape, plan=plan, rotation=self.rotation, **options)

    def _reference(self, x: Tensor) -> Tensor:
        codes, _ = self._weights()
        weight = codes, self.weight_scale, self.weight_offset, self.weight_grid
        if self.activation_quantizer is None:
            with no_autocast(x.device):
                y = F.linear(rotate(x.float(), self.rotation), values_of(*weight))
        else:
            a = self.quantize_input(x)
            with torch.no_grad(), no_autocast(x.device):
                y = self._multiply(a, codes)
            if a.values.requires_grad:
                y = _WithGradient.apply(a.values, y, *weight)
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype)

    def _multiply(self, a: Quantized, codes: Tensor) -> Tensor:
        assert self.activation_quantizer is not None
        x_grid = grid_of(self.activation_quantizer)
        if x_grid[1] is None and self.weight_grid[1] is None:
            total = integer_product(a.codes.reshape(-1, self.in_features), codes)
            y = self._fold_zero_points(total, a.codes).view(*a.codes.shape[:-1], self.out_features)
        else:
            y = levels_of(a.codes, x_grid, torch.float32) @ levels_of(codes, self.weight_grid, torch.float32).T
        y = y * self.weight_scale.reshape(-1) * a.step.float()
        if a.offset is None and self.weight_offset is None:
            return y
        x_sums = levels_of(a.codes, x_grid, torch.float32).sum(-1, keepdim=True)
        w_sums = levels_of(codes, self.weight_grid, torch.float32).sum(-1)
        x_side, w_side = (a.step.float(), a.offset), (self.weight_scale, self.weight_offset)
        return add_offsets(y, x_sums, w_sums, x_side, w_side, self.in_features)

    def _fold_zero_points(self, total: Tensor, x_codes: Tensor) -> Tensor:
        """Product of codes (M, O) int32 -> product of levels, float32; exact, but for the last rounding of wide
        sums."""
        assert self.activation_quantizer is not None
        z_x, z_w = self.activation_quantizer.zero_point, self.weight_zero_point
        # Levels come in quarters at the finest (half-integer zero points), hence the 4.
        largest = 4 * self.in_features * 2 ** (self.activation_quantizer.bits + self.recipe.weights - 2)
        result = total.to(torch.float32 if largest < EXACT_IN_FLOAT32 else torch.float64)
        if z_w:
            result = result - z_w * x_codes.reshape(-1, self.in_features).sum(-1, keepdim=True, dtype=torch.int32)
        if z_x:
            result = result - z_x * self._weights()[1]
        return (result + self.in_features * z_x * z_w).float()

    def _weights(self) -> tuple[Tensor, Tensor]:
        """Centred codes (O, I) int8 and their row sums (O,) int32, unpacked at the first use."""
        kept = self._unpacked
        if kept is None or kept[0].device != self.weight_packed.device:
            bits = self.recipe.weights
            codes = unpack_codes(self.weight_packed, bits, self.in_features).to(torch.int16) - 2 ** (bits - 1)
            kept = codes.to(torch.int8), codes.sum(-1, dtype=torch.int32)
            self._unpacked = kept
        return kept

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode: running statistics must not move while adapters around the layer are trained."""
        return super().train(False)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._unpacked = self._native = self._gpu = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles arrange and unpack for themselves."""
        return self.__dict__ | {"_unpacked": None, "_native": None, "_gpu": None}

    def weight_codes(self) -> Tensor:
        return unpack_codes(self.weight_packed, self.recipe.weights, self.in_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, recipe={self.recipe.name}"


def values_of(codes: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid) -> Tensor:
    """Float32 values (O, I) of a rotated weight."""
    values = levels_of(codes, grid, torch.float32) * scale
    return values if offset is None else values + offset


class _WithGradient(torch.autograd.Function):
    """A packed product, made of integers, with the gradient that the trained layer gives to its input's values."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, codes: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid
    ) -> Tensor:
        ctx.save_for_backward(codes, scale, offset)
        ctx.grid, ctx.dtype = grid, x.dtype
        return y.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale, offset = ctx.saved_tensors
        return (g.float() @ values_of(codes, scale, offset, ctx.grid)).to(ctx.dtype), *[None] * 5


def is_plain(x: Tensor) -> bool:
    """Whether kernels that PyTorch cannot look into may compute for `x`: nobody compiles, traces or differentiates."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _is_transformed() or type(x) is not Tensor:
        return False
    return not (x.requires_grad and torch.is_grad_enabled())


def _is_transformed() -> bool:
    """Whether torch.func (vmap, jvp, grad) or forward-mode differentiation is at work, which sees no C++ call."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


class _Snapshot:
    """Tells, in a few microseconds, whether a tensor of a layer or its quantizer was replaced or changed in place."""

    def __init__(self, layer: PackedLinear) -> None:
        modules = [m for m in (layer, layer.activation_quantizer) if m is not None]
        self._stores: list[dict[str, Any]] = [store for m in modules for store in (m._parameters, m._buffers)]
        self._sizes = [*map(len, self._stores)]  # a bias that comes later may come as a parameter
        self._places = [(store, name, held) for store in self._stores for name, held in store.items()]
        for store in (layer.__dict__, layer._modules):  # a shared quantizer is in the first
            self._places.append((store, "activation_quantizer", store.get("activation_quantizer")))
        self._counted = [t for _, _, t in self._places if isinstance(t, Tensor) and not t.is_inference()]
        self._versions = [t._version for t in self._counted]

    def still_holds(self) -> bool:
        if self._versions != [t._version for t in self._counted] or self._sizes != [*map(len, self._stores)]:
            return False
        return all(store.get(name) is held for store, name, held in self._places)


@torch.no_grad()
def weight_step(layer: TrainedLayer) -> Tensor:
    """The value of one level of each row of a trained layer's weight, (O, 1) float32."""
    step = layer.weight_quantizer.quantize(layer.matrix).step
    return step.float().expand(layer.out_features, 1)
