"""A quantizer of activations -> the few numbers by which a kernel chooses the same codes (`InputPlan`).

Whatever a method's formula is, its codes rise with the value, so that they are known by where they change. Those
thresholds are found on the formula itself, float by float: a kernel that compares with them gives the very codes of the
formula, not those of a second derivation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch

from bitbell.kernels.native import InputPlan
from bitbell.kernels.thresholds import Codes, bell_thresholds, find_thresholds, float32
from bitbell.quantizers import BBQ, LSQ, AbsMax, Quantizer, QuEST
from bitbell.quantizers.formula import FormulaQuantizer
from bitbell.quantizers.n2uq import N2UQActivations
from bitbell.quantizers.steps import OPTIMAL_CLIP, SMALLEST_SIZE


@torch.no_grad()
def input_plan(quantizer: Quantizer) -> InputPlan | None:
    """The plan of an activation quantizer in evaluation mode, from its state as it is now.

    None where there is none: levels that are no uniform grid, a statistic over the whole tensor, or codes that fall.
    """
    if quantizer.table is not None:
        return None
    if isinstance(quantizer, N2UQActivations) and float(quantizer.input_scale) < 0:
        return None
    group = getattr(quantizer, "rms", getattr(quantizer, "granularity", None))
    computes = isinstance(quantizer, (BBQ, QuEST)) or getattr(quantizer, "statistic", None) is not None
    if isinstance(quantizer, BBQ) and not quantizer.normalise:
        computes = False
    if not computes or group == "running":
        return _static_plan(quantizer)
    return None if group == "tensor" else _token_plan(quantizer)


def _static_plan(quantizer: Quantizer) -> InputPlan:
    """Nothing is measured: thresholds are values of the rotated input."""
    bare = copy.copy(quantizer).eval()
    bare.rotation = None
    known = bare.quantize(float32(0.0))
    step = float(known.step)
    offset = 0.0 if known.offset is None else float(known.offset)
    plan = partial(InputPlan, quantizer.bits, quantizer.rotation, step_plus=step, zero_point=quantizer.zero_point)
    if isinstance(quantizer, LSQ) and quantizer.bits > 4:
        return plan(divisor_plus=step)
    thresholds = find_thresholds(lambda v: bare.quantize(v).codes, quantizer.bits)
    return plan(thresholds=thresholds, offset=offset)


def _token_plan(quantizer: Quantizer) -> InputPlan | None:
    """A statistic of each row; thresholds in units of it."""
    bits, steps = quantizer.bits, 2**quantizer.bits - 1
    plan = partial(InputPlan, bits, quantizer.rotation, zero_point=quantizer.zero_point)
    if isinstance(quantizer, BBQ):
        offset = 0.0 if quantizer.offset is None else float(quantizer.offset)
        table, step = bell_thresholds(bits), float(quantizer.scale / 2 ** (bits - 1))
        plan = partial(plan, statistic="rms", smallest=SMALLEST_SIZE, divisor=1.0, divisor_plus=0.0)
        return plan(thresholds=table, offset=offset, **{"step_factor" if quantizer.restore_rms else "step_plus": step})
    if isinstance(quantizer, QuEST):
        step, plus = 2 * OPTIMAL_CLIP[bits] / steps, 2e-8 / steps
        return _uniform_plan(plan, "rms", bits, step, plus)
    assert isinstance(quantizer, FormulaQuantizer)
    assert quantizer.statistic is not None
    of_one, of_two = (quantizer.formula(float32(0.0), float32(size)) for size in (1.0, 2.0))
    step = float(of_one.step)
    if of_one.offset is not None or float(of_two.step) != 2 * step:
        return None  # no step in proportion to the size
    plan = partial(plan, smallest=SMALLEST_SIZE)
    if isinstance(quantizer, AbsMax):
        return _uniform_plan(plan, "absmax", bits, step, 0.0)
    table = find_thresholds(lambda v: quantizer.formula(v, float32(1.0)).codes, bits)
    return plan(statistic=quantizer.statistic, divisor=1.0, divisor_plus=0.0, step_factor=step, thresholds=table)


def _uniform_plan(plan: Callable[..., InputPlan], statistic: str, bits: int, step: float, plus: float) -> InputPlan:
    """Codes clip(round(h / step - 1/2)), step = size * step + plus. Up to 4 bits comparing is faster than dividing."""
    table = find_thresholds(_uniform_codes(bits), bits) if bits <= 4 else None
    sizes = {"divisor": step, "divisor_plus": plus, "step_factor": step, "step_plus": plus}
    return plan(statistic=statistic, thresholds=table, **sizes)


def _uniform_codes(bits: int) -> Codes:
    half = 2 ** (bits - 1)
    return lambda v: (v - 0.5).round().clamp(-half, half - 1)
