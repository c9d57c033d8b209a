"""A packed linear layer as ONNX operators.

    x --MatMul with the Hadamard block--> h --thresholds--> codes uint8 --MatMulInteger--> int32 --scales--> y

Weights lie in the file as codes of 2, 4 or 8 bits and are looked up as int8 levels, (code - zero point) or twice that
where the zero point is a half, so that no sum has to be taken while the model runs. Whoever runs the graph does that
lookup once, when it opens the file, if it folds constants (onnxruntime does). Layers whose inputs are floats become
MatMulNBits (com.microsoft) of 4 bits, or a float MatMul where their levels are no even grid or have more bits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from bitbell.export.onnx_graph import Array, Graph, Watched
from bitbell.export.refusals import Refused
from bitbell.kernels import hadamard
from bitbell.kernels.native import InputPlan
from bitbell.kernels.thresholds import bell_thresholds, find_thresholds, float32
from bitbell.layers.product import levels_of
from bitbell.packing import PackedLinear
from bitbell.packing.layers import EXACT_IN_FLOAT32
from bitbell.packing.plans import input_plan
from bitbell.quantizers import BBQ, Quantizer

FEW_THRESHOLDS = 3  # up to which comparing with each is fast enough
SATURATION = 2**15  # kernels without VNNI sum two products of uint8 and int8 in 16 bits, which must not overflow
BLOCK_SIZES = (128, 64, 32, 16)  # of MatMulNBits
Int8Levels = tuple[Array, int, float]


class Input(NamedTuple):
    """A quantized input in the graph: codes (uint8, unsigned), and the step as a tensor's name or as a number."""

    codes: str
    step: str | float
    plan: InputPlan


def packed_linear(graph: Graph, name: str, layer: PackedLinear, x: str) -> str:
    """Add a packed layer called `name` for the input `x` (batch, sequence, in_features); raises Refused."""
    if layer.activation_quantizer is None:
        y = _of_floats(graph, layer, _rotated(graph, x, layer.rotation))
        y = y if layer.bias is None else str(graph.add("Add", y, graph.constant(layer.bias)))
        graph.watched[name] = Watched(x, None, y)
        return y
    if layer.weight_grid[1] is not None:
        why = f"the levels of {layer.recipe.name} are no even grid, so there are no integers to multiply"
        raise Refused(f"{name}: {why}; run it with bitbell.load, or train weights only (a16)")
    made = _quantized(graph, name, layer.activation_quantizer, x)
    y = _of_codes(graph, layer, made)
    graph.watched[name] = Watched(x, made.codes, y)
    return y


# Inputs --------------------------------------------------------------------------------------------------------------


def _rotated(graph: Graph, x: str, block: int | None) -> str:
    if block is None or block == 1:
        return x
    key = "rotated", x, block
    if key not in graph.made:
        parts = graph.reshape(x, (0, 0, -1, block))
        rotated = graph.add("MatMul", parts, graph.constant(hadamard(block)))
        graph.made[key] = graph.add("Reshape", rotated, graph.add("Shape", x))
    return str(graph.made[key])


def _quantized(graph: Graph, name: str, quantizer: Quantizer, x: str) -> Input:
    """The codes of `x`, once for all layers that share the quantizer."""
    key = "quantized", x, id(quantizer)
    if key not in graph.made:
        plan = input_plan(quantizer)
        if plan is None:
            table, why = quantizer.table is not None, "its inputs' statistic is one of a whole batch"
            why = "the levels of its inputs are no even grid" if table else why
            raise Refused(f"{name}: {why} ({quantizer.method}); run it with bitbell.load")
        h = _rotated(graph, x, plan.rotation)
        size = _size(graph, h, plan)
        graph.made[key] = Input(_codes(graph, h, size, plan, quantizer), _step(graph, size, plan), plan)
    made: Input = graph.made[key]
    return made


def _size(graph: Graph, h: str, plan: InputPlan) -> str | None:
    """What each token measures, (batch, sequence, 1); None where nothing is measured."""
    if plan.statistic == "none":
        return None
    last = graph.integers(-1)
    if plan.statistic == "rms":
        size = graph.add("Sqrt", graph.add("ReduceMean", graph.add("Mul", h, h), last))
    else:
        size = graph.add("ReduceMax" if plan.statistic == "absmax" else "ReduceMean", graph.add("Abs", h), last)
    return str(graph.add("Max", size, graph.number(plan.smallest)))


def _scaled(graph: Graph, size: str, factor: float, plus: float) -> str:
    size = size if factor == 1.0 else graph.add("Mul", size, graph.number(factor))
    return size if plus == 0.0 else str(graph.add("Add", size, graph.number(plus)))


def _step(graph: Graph, size: str | None, plan: InputPlan) -> str | float:
    if size is None or plan.step_factor == 0.0:
        return plan.step_plus
    return _scaled(graph, size, plan.step_factor, plan.step_plus)


def _codes(graph: Graph, h: str, size: str | None, plan: InputPlan, quantizer: Quantizer) -> str:
    """Unsigned codes: by comparisons where there are few thresholds, else by the formula that they come from."""
    v, half = h, 2 ** (plan.bits - 1)
    if size is not None:
        v = graph.add("Div", h, _scaled(graph, size, plan.divisor, plan.divisor_plus))
    elif plan.divisor_plus != 1.0:
        v = graph.add("Div", h, graph.number(plan.divisor_plus))
    t = plan.thresholds
    if t is None:
        return _rounded(graph, v, half)
    if len(t) > FEW_THRESHOLDS:
        inverse = _inverse_rms(quantizer)
        if inverse is not None and torch.equal(t, bell_thresholds(plan.bits, inverse)):
            factor = graph.number(float(float32(inverse) * math.sqrt(0.5)))
            phi = graph.add("Erf", graph.add("Mul", v, factor))
            return _rounded(graph, graph.add("Mul", phi, graph.number(half)), half)
        if step := _even_step(plan):
            return _rounded(graph, v if step == 1.0 else graph.add("Div", v, graph.number(step)), half)
    counted = [graph.cast(graph.add("GreaterOrEqual", v, graph.number(float(at))), "float") for at in t]
    total = counted[0] if len(counted) == 1 else graph.add("Sum", *counted)
    return graph.cast(total, "uint8")


def _rounded(graph: Graph, v: str, half: int) -> str:
    """round(v - 1/2), clipped, plus half: ties to even, as PyTorch has it."""
    low, high = graph.number(-half), graph.number(half - 1)
    nearest = graph.add("Clip", graph.add("Sub", v, graph.number(0.5)), low, high)
    return str(graph.add("QuantizeLinear", nearest, graph.number(1.0), graph.constant(np.array(half, dtype=np.uint8))))


def _inverse_rms(quantizer: Quantizer) -> float | None:
    """What a bell box multiplies its (divided) input with; None for other methods."""
    if not isinstance(quantizer, BBQ):
        return None
    return float(quantizer.running_inverse_rms) if quantizer.rms == "running" and quantizer.normalise else 1.0


def _even_step(plan: InputPlan) -> float | None:
    """The step of thresholds that are those of rounding, to the last bit; None for others."""
    half, t = 2 ** (plan.bits - 1), plan.thresholds

    def agrees(step: float) -> bool:
        found = find_thresholds(lambda v: (v / float32(step) - 0.5).round().clamp(-half, half - 1), plan.bits)
        return t is not None and torch.equal(t, found)

    return next((step for step in (1.0, plan.step_plus) if step > 0 and agrees(step)), None)


# Products ------------------------------------------------------------------------------------------------------------


def _int8_levels(layer: PackedLinear) -> Int8Levels:
    """Code -> int8 of `factor` times its level; the factor; what is left of the zero point."""
    bits, zero = layer.recipe.weights, layer.weight_zero_point
    centred = np.arange(2**bits) - 2 ** (bits - 1)
    for factor in (1, 2, 4):
        levels = factor * (centred - zero)
        if float(factor * zero).is_integer() and levels.min() >= -128 and levels.max() <= 127:
            return levels.astype(np.int8), factor, 0.0
    return centred.astype(np.int8), 1, zero


def _of_codes(graph: Graph, layer: PackedLinear, x: Input) -> str:
    """y = levels_x . levels_w^T * steps + offsets + bias."""
    plan, columns = x.plan, layer.in_features
    table, factor, left = _int8_levels(layer)
    levels = table[layer.weight_codes().cpu().numpy()].astype(np.float64)  # (O, I), times factor
    y = _integers(graph, layer, x, table)
    largest = 4 * factor * columns * 2 ** (plan.bits + layer.recipe.weights - 2)
    kind = "float" if largest < EXACT_IN_FLOAT32 else "double"
    dtype = np.dtype(np.float32 if kind == "float" else np.float64)
    y, sums = graph.cast(y, kind), levels.sum(1)
    if left:  # z_w sum(codes_x), which a doubled level spares
        y = graph.add(
            "Sub", y, graph.add("Mul", _code_sums(graph, x, columns, kind), graph.constant(np.array(left, dtype=dtype)))
        )
    if plan.zero_point:
        y = graph.add("Sub", y, graph.constant((plan.zero_point * (sums - columns * left)).astype(dtype)))
    y = y if kind == "float" else graph.cast(y, "float")
    scale = layer.weight_scale.reshape(-1).cpu().numpy() / np.float32(factor)
    if isinstance(x.step, float):
        y = graph.add("Mul", y, graph.constant((scale * np.float32(x.step)).astype(np.float32)))
    else:
        y = graph.add("Mul", graph.add("Mul", y, graph.constant(scale)), x.step)
    return _with_offsets(graph, layer, x, y, sums / factor - columns * left)


def _integers(graph: Graph, layer: PackedLinear, x: Input, table: Array) -> str:
    """MatMulInteger: centred codes of x times int8 levels, int32."""
    zero_x = np.array(2 ** (x.plan.bits - 1), dtype=np.uint8)
    zeros = [graph.constant(zero_x)]
    if 2 * (2**x.plan.bits - 1) * int(np.abs(table.astype(int)).max()) >= SATURATION:
        table = (table.astype(int) + 128).astype(np.uint8)  # two unsigned bytes are multiplied exactly everywhere
        zeros.append(graph.constant(np.array(128, dtype=np.uint8)))
    return str(graph.add("MatMulInteger", x.codes, _looked_up(graph, layer, table), *zeros))


def _looked_up(graph: Graph, layer: PackedLinear, table: Array) -> str:
    """The transposed weight (I, O) with the table's entries in place of codes."""
    codes = graph.stored(layer.weight_codes().cpu().numpy(), layer.recipe.weights)
    looked_up = graph.add("Gather", graph.constant(table), graph.cast(codes, "int32"), axis=0)
    return str(graph.add("Transpose", looked_up, perm=[1, 0]))


def _code_sums(graph: Graph, x: Input, columns: int, kind: str) -> str:
    """Sums of centred codes, (batch, sequence, 1)."""
    key = "sums", x.codes, kind
    if key not in graph.made:
        total = graph.add("ReduceSum", graph.cast(x.codes, "int32"), graph.integers(-1))
        centre = np.array(columns * 2 ** (x.plan.bits - 1), dtype=np.int32)
        graph.made[key] = graph.cast(graph.add("Sub", total, graph.constant(centre)), kind)
    return str(graph.made[key])


def _with_offsets(graph: Graph, layer: PackedLinear, x: Input, y: str, w_sums: Array) -> str:
    """`y` plus what offsets contribute, and the bias; w_sums: of levels (O,)."""
    added = np.zeros(layer.out_features)
    if layer.bias is not None:
        added += layer.bias.cpu().numpy()
    added += x.plan.offset * w_sums * layer.weight_scale.reshape(-1).cpu().numpy()
    if layer.weight_offset is not None:
        offset = layer.weight_offset.reshape(-1).cpu().numpy()
        added += layer.in_features * x.plan.offset * offset
        levels = graph.add(
            "Sub", _code_sums(graph, x, layer.in_features, "float"), graph.number(layer.in_features * x.plan.zero_point)
        )
        step = x.step if isinstance(x.step, str) else graph.number(x.step)
        y = graph.add("Add", y, graph.add("Mul", graph.add("Mul", levels, step), graph.constant(offset)))
    return str(graph.add("Add", y, graph.constant(added.astype(np.float32)))) if added.any() else y


def _of_floats(graph: Graph, layer: PackedLinear, h: str) -> str:
    """A product of floats with quantized weights, without the bias."""
    if layer.weight_grid[1] is not None or layer.recipe.weights > 4:
        return _expanded(graph, layer, h)
    bits, zero = layer.recipe.weights, layer.weight_zero_point
    doubled = 2 * zero == -1 and bits <= 3  # odd integers, which 4 bits hold
    factor, left = (2, 0.0) if doubled else (1, zero)
    centred = np.arange(2**bits) - 2 ** (bits - 1)
    nibbles = (8 + (2 * centred + 1 if doubled else centred)).astype(np.uint8)[layer.weight_codes().cpu().numpy()]
    block = next((size for size in BLOCK_SIZES if layer.in_features % size == 0), BLOCK_SIZES[-1])
    nibbles = np.pad(nibbles, ((0, 0), (0, -layer.in_features % block)), constant_values=8)
    blocks = nibbles.shape[1] // block
    octets = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    scale = layer.weight_scale.cpu().numpy()
    sides = graph.constant(octets.reshape(-1, blocks, block // 2)), graph.constant(np.repeat(scale / factor, blocks, 1))
    size = {"K": layer.in_features, "N": layer.out_features, "bits": 4, "block_size": block}
    y = graph.add("MatMulNBits", h, *sides, domain="com.microsoft", accuracy_level=1, **size)
    row = -left * scale + (0 if layer.weight_offset is None else layer.weight_offset.cpu().numpy())
    if not row.any():
        return str(y)
    sums = graph.add("ReduceSum", h, graph.integers(-1))
    return str(graph.add("Add", y, graph.add("Mul", sums, graph.constant(row.reshape(-1).astype(np.float32)))))


def _expanded(graph: Graph, layer: PackedLinear, h: str) -> str:
    """Levels looked up as floats when the file is opened, multiplied as floats."""
    bits = layer.recipe.weights
    codes = torch.arange(2**bits).sub(2 ** (bits - 1)).to(torch.int8)
    table = levels_of(codes, layer.weight_grid, torch.float32).numpy()
    weight = graph.add("Mul", _looked_up(graph, layer, table), graph.constant(layer.weight_scale.reshape(-1)))
    if layer.weight_offset is not None:
        weight = graph.add("Add", weight, graph.constant(layer.weight_offset.reshape(-1)))
    return str(graph.add("MatMul", h, weight))
