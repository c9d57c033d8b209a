"""QuantConv1D: the linear layer of GPT-2 in `transformers`, whose weight lies the other way round.

Importing this file imports `transformers`; `bitbell.layers` does so only when a model has such a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitbell.layers.linear import TrainedLayer
from bitbell.layers.recipes import Recipe


class QuantConv1D(TrainedLayer, Conv1D):
    """`Conv1D` in codes: `weight` (nx inputs, nf outputs) and `bias`. Raises ValueError where nx cannot be rotated."""

    def __init__(self, nf: int, nx: int, recipe: Recipe | str) -> None:
        super().__init__(nf, nx)
        self.in_features, self.out_features = nx, nf
        self._add_quantizers(recipe)

    @classmethod
    def from_linear(cls, linear: Conv1D, recipe: Recipe | str) -> QuantConv1D:
        """The quantized layer around the very parameters of `linear`."""
        with torch.device("meta"):
            layer = cls(linear.nf, linear.nx, recipe)
        return layer._take_over(linear)

    @property
    def matrix(self) -> Tensor:
        # Copied into rows: sums then run in the same order as for nn.Linear, and faster than over a transposed view.
        return self.weight.T.contiguous()

    def in_rows(self, weight: Tensor) -> Tensor:
        return weight.T

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}, recipe={self.recipe.name}"

    __repr__ = nn.Module.__repr__
