"""A layer's input as ONNX operators: rotated, measured where the method measures, and compared with thresholds.

x --Hadamard blocks--> h --thresholds--> codes uint8
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from bitbell.export.onnx_graph import Graph
from bitbell.export.onnx_windows import Rows
from bitbell.export.refusals import Refused
from bitbell.kernels import hadamard
from bitbell.kernels.native import InputPlan
from bitbell.kernels.thresholds import bell_thresholds, find_thresholds, float32
from bitbell.packing.plans import input_plan
from bitbell.quantizers import BBQ, Quantizer

FEW_THRESHOLDS = 3  # up to which comparing with each is fast enough


class Input(NamedTuple):
    """A quantized input in the graph: codes (uint8, unsigned), and the step as a tensor's name or as a number."""

    codes: str
    step: str | float
    plan: InputPlan


def rotated(graph: Graph, x: str, block: int | None, rows: Rows) -> str:
    """`x` rotated by blocks of its channels, once for all layers that need it."""
    if block is None or block == 1:
        return x
    key = "rotated", x, block
    if key not in graph.made:
        parts = graph.reshape(x, (*[0] * (rows.rank - 1), -1, block))
        turned = graph.add("MatMul", parts, graph.constant(hadamard(block)))
        graph.made[key] = graph.add("Reshape", turned, graph.add("Shape", x))
    return str(graph.made[key])


def quantized(graph: Graph, name: str, quantizer: Quantizer, x: str, rows: Rows) -> Input:
    """The codes of `x`, once for all layers that share the quantizer. Raises Refused, with the layer's `name`."""
    key = "quantized", x, id(quantizer)
    if key not in graph.made:
        plan = input_plan(quantizer)
        if plan is None:
            table, why = quantizer.table is not None, "its inputs' statistic is one of a whole batch"
            why = "the levels of its inputs are no even grid" if table else why
            raise Refused(f"{name}: {why} ({quantizer.method}); run it with bitbell.load")
        h = rotated(graph, x, plan.rotation, rows)
        size = _size(graph, h, plan, rows)
        graph.made[key] = Input(_codes(graph, h, size, plan, quantizer), _step(graph, size, plan), plan)
    made: Input = graph.made[key]
    return made


def _size(graph: Graph, h: str, plan: InputPlan, rows: Rows) -> str | None:
    """What each token or image measures, one number each; None where nothing is measured."""
    if plan.statistic == "none":
        return None
    axes = graph.integers(*rows.axes)
    if plan.statistic == "rms":
        size = graph.add("Sqrt", graph.add("ReduceMean", graph.add("Mul", h, h), axes))
    else:
        size = graph.add("ReduceMax" if plan.statistic == "absmax" else "ReduceMean", graph.add("Abs", h), axes)
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
