"""QuantLinear: `nn.Linear` with a weight quantizer and an activation quantizer, and nothing else new.

What a layer of another kind (QuantConv1D) shares with it is TrainedLayer.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitbell.kernels import product_dtype, rotate, triton
from bitbell.layers.product import grid_of, integer_linear
from bitbell.layers.recipes import Recipe
from bitbell.quantizers import Quantized, Quantizer


class SharedInput:
    """Quantizes once what several layers are fed: q, k and v, or gate and up, share one activation quantizer.

    The result is kept from the first layer's call until the last one's, and is used only for the very same tensor,
    unchanged, under the same modes and parameters, and once a layer; anything else is quantized anew.
    """

    def __init__(self, quantizer: Quantizer, num_layers: int) -> None:
        self.quantizer, self.num_layers = quantizer, num_layers
        self._kept: tuple[Tensor, tuple[object, ...], Quantized, tuple[int, ...]] | None = None

    def quantize(self, x: Tensor, layer: int, codes_only: bool = False) -> Quantized:
        """Quantize `x` for the layer with index `layer`. codes_only: by `Quantizer.quantize_codes`."""
        kept, state = self._kept, (codes_only, *self._state(x))
        if kept is not None and kept[0] is x and kept[1] == state and layer not in kept[3]:
            quantized, served = kept[2], (*kept[3], layer)
        else:
            quantized, served = _quantize(self.quantizer, x, codes_only), (layer,)
        self._kept = None if len(served) == self.num_layers else (x, state, quantized, served)
        return quantized

    def _state(self, x: Tensor) -> tuple[object, ...]:
        """What else the result depends on: modes, and the counts of in-place changes of the input and parameters."""
        modes = torch.is_grad_enabled(), self.quantizer.training
        if torch.compiler.is_compiling():  # one graph holds all layers of a group, and nothing changes between them
            return modes
        tensors = (x, self.quantizer.scale, *self.quantizer.parameters())
        return *modes, *(0 if tensor.is_inference() else tensor._version for tensor in tensors)

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedInput:
        import copy

        return SharedInput(copy.deepcopy(self.quantizer, memo), self.num_layers)


def _quantize(quantizer: Quantizer, x: Tensor, codes_only: bool) -> Quantized:
    return quantizer.quantize_codes(x) if codes_only else quantizer.quantize(x)


class QuantizedLayer:
    """What every layer with a quantized input has in common, trained or packed."""

    recipe: Recipe
    activation_quantizer: Quantizer | None
    shared_input: SharedInput | None = None
    place_in_shared_input: int = 0
    integer_forward: bool = False  # whether training multiplies codes as integers, not levels as floats

    def share_input(self, shared: SharedInput, place: int) -> None:
        """Use a shared activation quantizer. The layer in place 0 owns it; only there is it part of the state."""
        self.shared_input, self.place_in_shared_input = shared, place
        if place > 0:
            modules: dict[str, Any] = self._modules  # type: ignore[attr-defined]
            modules.pop("activation_quantizer", None)
            self.__dict__["activation_quantizer"] = shared.quantizer

    def quantize_input(self, x: Tensor) -> Quantized:
        """Codes and step of the layer's input."""
        if self.shared_input is not None:
            return self.shared_input.quantize(x, self.place_in_shared_input, self._needs_only_codes(x))
        assert self.activation_quantizer is not None
        return _quantize(self.activation_quantizer, x, self._needs_only_codes(x))

    def _needs_only_codes(self, x: Tensor) -> bool:
        """Whether to quantize without values but for their gradient."""
        return self.integer_forward

    def quantizer_input(self, x: Tensor) -> Tensor:
        """What the activation quantizer sees of the layer's input `x`: groups that share a statistic last."""
        return x

    def weight_codes(self) -> Tensor:
        """Codes of the weight, uint8 of shape (out_features, in_features)."""
        raise TypeError(f"{type(self).__name__} has no weight codes")


class RowGather(Protocol):
    """Where a layer's quantized weight comes from when every process holds some of its rows."""

    def forward(self, layer: TrainedLayer, x: Tensor) -> Tensor:
        """`layer.multiply(x, w)` with the whole quantized weight."""


class TrainedLayer(QuantizedLayer, nn.Module):
    """A linear layer that multiplies codes: y = quantize(x) . quantize(matrix)^T + bias.

    A subclass is also a subclass of the layer that it replaces, whose `weight` and `bias` it keeps, in the unrotated
    domain. Needs `bitbell.calibrate` before its first forward pass.
    """

    in_features: int
    out_features: int
    weight: Tensor
    bias: Any
    weight_quantizer: Quantizer
    is_image: ClassVar[bool] = False  # whether inputs are images, of which windows are multiplied
    row_gather: RowGather | None = None

    @property
    def matrix(self) -> Tensor:
        """The weight as (out_features, in_features), whichever way round the layer stores it."""
        return self.in_rows(self.weight)

    def in_rows(self, weight: Tensor) -> Tensor:
        """A view of the weight, or of its gradient, whose first dimension is the outputs and whose last is rotated."""
        return weight

    @property
    def rotated_width(self) -> int:
        """How many inputs lie side by side, so that rotation blocks must divide it."""
        return self.in_features

    @property
    def weight_offset(self) -> Tensor | None:
        """What the weight quantizer adds to every value, (out_features, 1) or (1,); None for nothing."""
        return self.weight_quantizer.offset

    def _add_quantizers(self, recipe: Recipe | str) -> None:
        self.recipe = Recipe.parse(recipe) if isinstance(recipe, str) else recipe
        rows, width = self.out_features, self.rotated_width
        with torch.device(self.weight.device):
            self.weight_quantizer, self.activation_quantizer = self.recipe.quantizers_for(rows, width, self.is_image)

    def _take_over(self, linear: Any) -> Self:
        """This layer with the very parameters of `linear`, in its mode and on its device."""
        self.weight, self.bias = linear.weight, linear.bias
        self._add_quantizers(self.recipe)
        return self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.row_gather is not None:
            return self.row_gather.forward(self, x)
        return self.multiply(x, self.quantize_weight())

    def quantize_weight(self) -> Quantized:
        """The whole weight, quantized as training multiplies it."""
        matrix = self.matrix
        return _quantize(self.weight_quantizer, matrix, self._needs_only_codes(matrix))

    def _needs_only_codes(self, x: Tensor) -> bool:
        # A product of codes takes only the gradient from values; where the definitions compute, they are there anyway.
        return self.integer_forward or (self.activation_quantizer is not None and triton.computes(x))

    def multiply(self, x: Tensor, w: Quantized) -> Tensor:
        """The layer's output for input `x` (..., in_features) and its quantized weight `w`."""
        dtype = product_dtype(x)
        if self.activation_quantizer is None:
            y = F.linear(rotate(x, self.weight_quantizer.rotation), w.values.to(x.dtype))
        else:
            a = self.quantize_input(x)
            grids = grid_of(self.activation_quantizer), grid_of(self.weight_quantizer)
            bits = (self.activation_quantizer.bits, self.weight_quantizer.bits) if self.integer_forward else None
            y = integer_linear(a, w, *grids, dtype, bits)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def multiply_integers(self, compact: bool = False) -> None:
        """From now on multiply codes as integers in training; compact: and keep one byte an input for the gradient.

        Raises ValueError where there are no integers to multiply, or the method's gradient needs more than a byte.
        """
        if self.activation_quantizer is None:
            raise ValueError("integer_forward needs quantized activations: its inputs stay floats")
        if self.is_image:
            raise ValueError("integer_forward is for linear layers: convolutions multiply levels as floats in training")
        for quantizer in (self.weight_quantizer, self.activation_quantizer):
            if quantizer.table is not None:
                raise ValueError(f"integer_forward needs even levels, and those of {quantizer.method} are a table's")
        if compact:
            self.activation_quantizer.keep_bins()
        self.integer_forward = True

    def weight_codes(self) -> Tensor:
        return self.weight_quantizer.encode(self.matrix)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe.name}"


class QuantLinear(TrainedLayer, nn.Linear):
    """`nn.Linear` in codes: `weight` (out_features, in_features) and `bias`. Raises ValueError where the width cannot
    be rotated."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        recipe: Recipe | str,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._add_quantizers(recipe)

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: Recipe | str) -> QuantLinear:
        """The quantized layer around the very parameters of `linear`."""
        shape, bias = (linear.in_features, linear.out_features), linear.bias is not None
        return cls(*shape, recipe, bias, device="meta", dtype=linear.weight.dtype)._take_over(linear)
