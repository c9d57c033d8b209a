"""What a layer multiplies its weight with: the input itself, or the windows of an image copied side by side.

Images lie channels last, so that a window is a row in the order of a filter's weights, and a convolution is a linear
layer from there on. (ConvInteger computes the same sums; it takes two to three times as long in onnxruntime.) Padding
holds no code: the level outside an image is zero, which half-integer levels have none of. So what is constant for a
linear layer, such as sums of a weight's levels, depends for a convolution on how much of a window lies inside.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bitbell.export.onnx_graph import Array, Graph
from bitbell.export.refusals import Refused
from bitbell.layers import Geometry

LAST = 2**31 - 1


class Rows:
    """Inputs (batch, sequence, I) of a linear layer. axes: those that share a statistic."""

    rank = 3
    axes: tuple[int, ...] = (-1,)

    def copied(self, graph: Graph, x: str, outside: Array) -> str:
        """`x` as rows of what makes one output, (..., columns); outside: a number () to pad with."""
        return x

    def sums_inside(self, graph: Graph, x: str, values: Array, dtype: Any) -> str:
        """Sums of the rows of `values` (O, columns) over what is no padding of `x`: to be broadcast to (..., O)."""
        return graph.constant(values.sum(1).astype(dtype))

    def product_of_floats(self, graph: Graph, x: str, weight: str) -> str:
        """`x` times a weight (columns, O)."""
        return str(graph.add("MatMul", x, weight))


class Windows(Rows):
    """Images (batch, height, width, I) of a convolution; raises Refused, with `name`, for groups and for padding that
    does not hold zeros."""

    rank = 4
    axes = (1, 2, 3)

    def __init__(self, name: str, geometry: Geometry) -> None:
        if geometry.groups != 1 or geometry.mode != "zeros":
            what = f"{geometry.groups} groups" if geometry.groups != 1 else f"padding of mode {geometry.mode!r}"
            raise Refused(f"{name}: a convolution with {what} has no ONNX export; bitbell.load runs it")
        self.geometry = geometry

    def copied(self, graph: Graph, x: str, outside: Array) -> str:
        key = "windows", x, self.geometry._replace(out_channels=0)
        if key not in graph.made:
            graph.made[key] = self._copied(graph, x, outside)
        return str(graph.made[key])

    def _copied(self, graph: Graph, x: str, outside: Array) -> str:
        left, right, top, bottom = self.geometry.zeros
        if any(self.geometry.zeros):
            around = graph.integers(0, top, left, 0, 0, bottom, right, 0)
            x = graph.add("Pad", x, around, graph.constant(outside))
        taps = [(row, column) for row in range(self.geometry.kernel[0]) for column in range(self.geometry.kernel[1])]
        parts = [self._seen_by(graph, x, tap) for tap in taps]
        return parts[0] if len(parts) == 1 else str(graph.add("Concat", *parts, axis=3))

    def _seen_by(self, graph: Graph, x: str, tap: tuple[int, int]) -> str:
        """The pixel that each window has at one place, (batch, rows, columns, I)."""
        geometry = self.geometry
        first = [place * dilation for place, dilation in zip(tap, geometry.dilation, strict=True)]
        left_out = [start - span + 1 for start, span in zip(first, geometry.spans, strict=True)]  # at the end
        if first == [0, 0] and left_out == [0, 0] and geometry.stride == (1, 1):
            return x
        ends = graph.integers(*(end or LAST for end in left_out))
        axes, steps = graph.integers(1, 2), graph.integers(*geometry.stride)
        return str(graph.add("Slice", x, graph.integers(*first), ends, axes, steps))

    def sums_inside(self, graph: Graph, x: str, values: Array, dtype: Any) -> str:
        if not any(self.geometry.zeros):
            return super().sums_inside(graph, x, values, dtype)
        if ("ones", x) not in graph.made:
            one = graph.integers(1)
            shape = graph.add("Concat", one, graph.add("Shape", x, start=1, end=3), one, axis=0)
            graph.made["ones", x] = graph.add("Expand", graph.number(1.0), shape)
        inside = self.copied(graph, str(graph.made["ones", x]), np.array(0.0, dtype=np.float32))
        taps = values.reshape(len(values), -1, self.geometry.in_channels).sum(-1).T.astype(np.float32)
        sums = graph.add("MatMul", inside, graph.constant(taps))
        return sums if dtype == np.float32 else graph.cast(sums, "double")

    def product_of_floats(self, graph: Graph, x: str, weight: str) -> str:
        geometry = self.geometry
        left, right, top, bottom = geometry.zeros
        filters = graph.reshape(weight, (*geometry.kernel, geometry.in_channels, -1))
        filters = graph.add("Transpose", filters, perm=[3, 2, 0, 1])
        sizes: dict[str, Any] = {"strides": list(geometry.stride), "dilations": list(geometry.dilation)}
        x = graph.add("Transpose", x, perm=[0, 3, 1, 2])
        y = graph.add("Conv", x, filters, pads=[top, left, bottom, right], **sizes)
        return str(graph.add("Transpose", y, perm=[0, 2, 3, 1]))
