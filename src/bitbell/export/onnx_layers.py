"""A packed layer as ONNX operators: its input's codes times its weight's levels, and scales.

    codes uint8 --copies of windows, for a convolution--> MatMulInteger --> int32 --scales--> y

Weights lie in the file as codes of 2, 4 or 8 bits and are looked up as int8 levels, (code - zero point) or twice that
where the zero point is a half, so that no sum has to be taken while the model runs. Whoever runs the graph does that
lookup once, when it opens the file, if it folds constants (onnxruntime does). Linear layers whose inputs are floats
become MatMulNBits (com.microsoft) of 4 bits, or a float MatMul where their levels are no even grid or have more bits;
convolutions of floats a float Conv.
"""

from __future__ import annotations

import numpy as np
import torch

from bitbell.export.onnx_graph import Array, Graph, Watched
from bitbell.export.onnx_inputs import Input, quantized, rotated
from bitbell.export.onnx_windows import Rows, Windows
from bitbell.export.refusals import Refused
from bitbell.layers.product import levels_of
from bitbell.packing import PackedLinear
from bitbell.packing.conv2d import PackedConv2d
from bitbell.packing.layers import EXACT_IN_FLOAT32

SATURATION = 2**15  # kernels without VNNI sum two products of uint8 and int8 in 16 bits, which must not overflow
BLOCK_SIZES = (128, 64, 32, 16)  # of MatMulNBits
Int8Levels = tuple[Array, int, float]


def packed_layer(graph: Graph, name: str, layer: PackedLinear, x: str) -> str:
    """Add a packed layer called `name` for the input `x`: (batch, sequence, I), or (batch, height, width, I) of a
    convolution. Raises Refused."""
    rows = Windows(name, layer.geometry) if isinstance(layer, PackedConv2d) else Rows()
    if layer.activation_quantizer is None:
        y = _of_floats(graph, layer, rotated(graph, x, layer.rotation, rows), rows)
        if layer.bias is not None:
            y = str(graph.add("Add", y, graph.constant(layer.bias)))
        graph.watched[name] = Watched(x, None, y)
        return y
    if layer.weight_grid[1] is not None:
        why = f"the levels of {layer.recipe.name} are no even grid, so there are no integers to multiply"
        raise Refused(f"{name}: {why}; run it with bitbell.load, or train weights only (a16)")
    made = quantized(graph, name, layer.activation_quantizer, x, rows)
    y = _of_codes(graph, layer, made, rows)
    graph.watched[name] = Watched(x, made.codes, y)
    return y


def _int8_levels(layer: PackedLinear) -> Int8Levels:
    """Code -> int8 of `factor` times its level; the factor; what is left of the zero point."""
    bits, zero = layer.recipe.weights, layer.weight_zero_point
    centred = np.arange(2**bits) - 2 ** (bits - 1)
    for factor in (1, 2, 4):
        levels = factor * (centred - zero)
        if float(factor * zero).is_integer() and levels.min() >= -128 and levels.max() <= 127:
            return levels.astype(np.int8), factor, 0.0
    return centred.astype(np.int8), 1, zero


def _of_codes(graph: Graph, layer: PackedLinear, x: Input, rows: Rows) -> str:
    """y = levels_x . levels_w^T * steps + offsets + bias."""
    plan, columns = x.plan, layer.in_features
    table, factor, left = _int8_levels(layer)
    levels = table[layer.weight_codes().numpy()].astype(np.float64) - left  # (O, I), times factor
    largest = 4 * factor * columns * 2 ** (plan.bits + layer.recipe.weights - 2)
    kind, dtype = ("float", np.float32) if largest < EXACT_IN_FLOAT32 else ("double", np.float64)
    y = graph.cast(_integers(graph, layer, x, table, rows), kind)
    if left:  # z_w sum(codes_x), which a doubled level spares
        sums = graph.add("Mul", _code_sums(graph, x, columns, kind, rows), graph.constant(np.array(left, dtype=dtype)))
        y = graph.add("Sub", y, sums)
    if plan.zero_point:
        y = graph.add("Sub", y, rows.sums_inside(graph, x.codes, plan.zero_point * levels, dtype))
    y = y if kind == "float" else graph.cast(y, "float")
    scale = layer.weight_scale.reshape(-1).numpy() / np.float32(factor)
    if isinstance(x.step, float):
        y = graph.add("Mul", y, graph.constant((scale * np.float32(x.step)).astype(np.float32)))
    else:
        y = graph.add("Mul", graph.add("Mul", y, graph.constant(scale)), x.step)
    return _with_offsets(graph, layer, x, y, levels / factor, rows)


def _integers(graph: Graph, layer: PackedLinear, x: Input, table: Array, rows: Rows) -> str:
    """Centred codes of x times int8 levels, int32."""
    zeros = [graph.constant(_zero(x))]
    if 2 * (2**x.plan.bits - 1) * int(np.abs(table.astype(int)).max()) >= SATURATION:
        table = (table.astype(int) + 128).astype(np.uint8)  # two unsigned bytes are multiplied exactly everywhere
        zeros.append(graph.constant(np.array(128, dtype=np.uint8)))
    copied = rows.copied(graph, x.codes, _zero(x))
    return str(graph.add("MatMulInteger", copied, _looked_up(graph, layer, table), *zeros))


def _zero(x: Input) -> Array:
    """The code () that is 0 when it is centred."""
    return np.array(2 ** (x.plan.bits - 1), dtype=np.uint8)


def _looked_up(graph: Graph, layer: PackedLinear, table: Array) -> str:
    """The transposed weight (I, O) with the table's entries in place of codes."""
    codes = graph.stored(layer.weight_codes().numpy(), layer.recipe.weights)
    looked_up = graph.add("Gather", graph.constant(table), graph.cast(codes, "int32"), axis=0)
    return str(graph.add("Transpose", looked_up, perm=[1, 0]))


def _code_sums(graph: Graph, x: Input, columns: int, kind: str, rows: Rows) -> str:
    """Sums of the centred codes that make one output, (..., 1)."""
    copied = rows.copied(graph, x.codes, _zero(x))
    if ("sums", copied, kind) not in graph.made:
        total = graph.add("ReduceSum", graph.cast(copied, "int32"), graph.integers(-1))
        zeros = graph.constant(columns * _zero(x).astype(np.int32))
        graph.made["sums", copied, kind] = graph.cast(graph.add("Sub", total, zeros), kind)
    return str(graph.made["sums", copied, kind])


def _with_offsets(graph: Graph, layer: PackedLinear, x: Input, y: str, levels: Array, rows: Rows) -> str:
    """`y` plus what offsets contribute, and the bias; levels: of the weight (O, I)."""
    scale, offset = layer.weight_scale.numpy(), layer.weight_offset
    if x.plan.offset:
        values = levels * scale if offset is None else levels * scale + offset.numpy()
        y = graph.add("Add", y, rows.sums_inside(graph, x.codes, x.plan.offset * values, np.float32))
    if offset is not None:
        y = graph.add("Add", y, _weight_offsets(graph, layer, x, offset.reshape(-1).numpy(), rows))
    return y if layer.bias is None else str(graph.add("Add", y, graph.constant(layer.bias)))


def _weight_offsets(graph: Graph, layer: PackedLinear, x: Input, offset: Array, rows: Rows) -> str:
    """Sums of the input's levels times its step times the weight's offset."""
    sums = _code_sums(graph, x, layer.in_features, "float", rows)
    zeros = x.plan.zero_point * np.ones((1, layer.in_features))
    levels = graph.add("Sub", sums, rows.sums_inside(graph, x.codes, zeros, np.float32))
    step = x.step if isinstance(x.step, str) else graph.number(x.step)
    return str(graph.add("Mul", graph.add("Mul", levels, step), graph.constant(offset)))


def _of_floats(graph: Graph, layer: PackedLinear, h: str, rows: Rows) -> str:
    """A product of floats with quantized weights, without the bias."""
    if layer.weight_grid[1] is not None or layer.recipe.weights > 4 or layer.is_image:
        return _expanded(graph, layer, h, rows)
    bits, zero = layer.recipe.weights, layer.weight_zero_point
    doubled = 2 * zero == -1 and bits <= 3  # odd integers, which 4 bits hold
    factor, left = (2, 0.0) if doubled else (1, zero)
    centred = np.arange(2**bits) - 2 ** (bits - 1)
    nibbles = (8 + (2 * centred + 1 if doubled else centred)).astype(np.uint8)[layer.weight_codes().numpy()]
    block = next((size for size in BLOCK_SIZES if layer.in_features % size == 0), BLOCK_SIZES[-1])
    nibbles = np.pad(nibbles, ((0, 0), (0, -layer.in_features % block)), constant_values=8)
    blocks = nibbles.shape[1] // block
    octets = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    scale = layer.weight_scale.numpy()
    sides = graph.constant(octets.reshape(-1, blocks, block // 2)), graph.constant(np.repeat(scale / factor, blocks, 1))
    size = {"K": layer.in_features, "N": layer.out_features, "bits": 4, "block_size": block}
    y = graph.add("MatMulNBits", h, *sides, domain="com.microsoft", accuracy_level=1, **size)
    row = -left * scale + (0 if layer.weight_offset is None else layer.weight_offset.numpy())
    if not row.any():
        return str(y)
    sums = graph.add("ReduceSum", h, graph.integers(-1))
    return str(graph.add("Add", y, graph.add("Mul", sums, graph.constant(row.reshape(-1).astype(np.float32)))))


def _expanded(graph: Graph, layer: PackedLinear, h: str, rows: Rows) -> str:
    """Levels looked up as floats when the file is opened, multiplied as floats."""
    bits = layer.recipe.weights
    codes = torch.arange(2**bits).sub(2 ** (bits - 1)).to(torch.int8)
    table = levels_of(codes, layer.weight_grid, torch.float32).numpy()
    weight = graph.add("Mul", _looked_up(graph, layer, table), graph.constant(layer.weight_scale.reshape(-1)))
    if layer.weight_offset is not None:
        weight = graph.add("Add", weight, graph.constant(layer.weight_offset.reshape(-1)))
    return rows.product_of_floats(graph, h, weight)
