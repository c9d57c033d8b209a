"""The operators of a training step that multiplies integers, each with its plain-PyTorch definition.

    integer_linear    codes x (M, K), w (N, K) int8 -> the layer's outputs (M, N): exact int32 sums, zero points, steps
    bell_quantize     x (..., C) float -> BBQ's codes int8, 1 / RMS, and the rotated x as the gradient wants it
    bell_gradient     BBQ's gradient: from dL/dy, codes, and what was kept

Registered under `bitbell::`; opaque to the compiler, which keeps them as calls. On CPUs the C++ kernels compute them
(`csrc/training.hpp`), where a row is read once, and everything between is done in the first-level cache.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bitbell.kernels import native
from bitbell.kernels.operators import integer_product, rotate
from bitbell.kernels.planes import scaled_integer_product
from bitbell.kernels.thresholds import bell_codes, bell_thresholds, bin_means, bin_thresholds

ROW_BLOCK = 256  # rows whose sums stay in a cache until they are outputs
TYPES = {torch.float32: 0, torch.bfloat16: 1}  # of tensors that the C++ kernels take
KEPT = TYPES | {torch.int8: 2}  # and of what they keep for the gradient


def computes(*tensors: Tensor) -> bool:
    """Whether the C++ kernels compute for these tensors."""
    return _has_kernels() and all(t.is_cpu and t.dtype in TYPES for t in tensors)


@torch.compiler.assume_constant_result
def _has_kernels() -> bool:
    return native.available()


# Products -------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("bitbell::integer_linear", mutates_args=())
def integer_linear(
    x: Tensor,
    w: Tensor,
    x_step: Tensor,
    w_step: Tensor,
    x_zero: float,
    w_zero: float,
    dtype: torch.dtype,
    x_bits: int = 8,
    w_bits: int = 8,
) -> Tensor:
    """(codes_x - z_x) . (codes_w - z_w)^T * step_w * step_x, (..., N) in `dtype`, for codes int8 (..., K), (N, K).

    Codes are centred, of x_bits and w_bits. The sum over K is exact in int32, and so is what zero points add to it;
    only the two steps and `dtype` round. x_step: (..., 1) or (1,); w_step: (N, 1) or (1,). K must be below 2**17.
    """
    columns = x.shape[-1]
    codes = x.reshape(-1, columns)
    total = fold_zero_points(integer_product(codes, w), codes, w, x_zero, w_zero)
    levels = total.to(torch.promote_types(x_step.dtype, torch.float32)).view(*x.shape[:-1], w.shape[0])
    return (levels * w_step.reshape(-1) * x_step).to(dtype)


@integer_linear.register_fake
def _(
    x: Tensor,
    w: Tensor,
    x_step: Tensor,
    w_step: Tensor,
    x_zero: float,
    w_zero: float,
    dtype: torch.dtype,
    x_bits: int = 8,
    w_bits: int = 8,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]), dtype=dtype)


@integer_linear.register_kernel("cuda")
def _(
    x: Tensor,
    w: Tensor,
    x_step: Tensor,
    w_step: Tensor,
    x_zero: float,
    w_zero: float,
    dtype: torch.dtype,
    x_bits: int = 8,
    w_bits: int = 8,
) -> Tensor:
    if x_step.dtype == torch.float64:
        return integer_linear._init_fn(x, w, x_step, w_step, x_zero, w_zero, dtype)
    codes, how = x.reshape(-1, x.shape[-1]), (x_zero, w_zero, dtype, x_bits, w_bits)
    return scaled_integer_product(codes, w, x_step, w_step, *how).view(*x.shape[:-1], w.shape[0])


@integer_linear.register_kernel("cpu")
def _(
    x: Tensor,
    w: Tensor,
    x_step: Tensor,
    w_step: Tensor,
    x_zero: float,
    w_zero: float,
    dtype: torch.dtype,
    x_bits: int = 8,
    w_bits: int = 8,
) -> Tensor:
    if not computes(x_step, w_step) or dtype not in TYPES or not x.numel() or not w.numel():
        return integer_linear._init_fn(x, w, x_step, w_step, x_zero, w_zero, dtype)
    x, w = x.contiguous(), w.contiguous()
    columns, outputs = x.shape[-1], w.shape[0]
    codes, steps = x.view(-1, columns), x_step.reshape(-1).float().contiguous()
    of_outputs = w_step.reshape(-1).float().expand(outputs).contiguous()
    w_sums = torch.empty(outputs, dtype=torch.int32, device="cpu")
    how = native.level(), native.threads()
    native.extension.training_sums(how[0], w.data_ptr(), outputs, columns, w_sums.data_ptr(), how[1])
    y = torch.empty((*x.shape[:-1], outputs), dtype=dtype, device="cpu")
    fields = {
        "outputs": outputs,
        "k": columns,
        "x_zero": x_zero,
        "w_zero": w_zero,
        "fits_quarters": fits_quarters(x_zero, w_zero, columns),
        "w_sums": w_sums.data_ptr(),
        "w_step": of_outputs.data_ptr(),
        "type": TYPES[dtype],
    }
    of_rows = y.view(-1, outputs)
    for start in range(0, len(codes), ROW_BLOCK):
        part = slice(start, start + ROW_BLOCK)
        total = integer_product(codes[part], w)
        step = steps[part] if len(steps) > 1 else steps
        places = total.data_ptr(), codes[part].data_ptr(), len(total), step.data_ptr(), len(steps) > 1
        native.extension.training_outputs(how[0], fields, *places, of_rows[part].data_ptr(), how[1])
    return y


def fold_zero_points(total: Tensor, x: Tensor, w: Tensor, x_zero: float, w_zero: float) -> Tensor:
    """Product of codes (M, N) int32 -> product of levels, float64; exact."""
    result = total.double()
    if w_zero:
        result = result - w_zero * x.sum(-1, keepdim=True, dtype=torch.int32)
    if x_zero:
        result = result - x_zero * w.sum(-1, dtype=torch.int32)
    return result + x.shape[-1] * x_zero * w_zero


def fits_quarters(x_zero: float, w_zero: float, columns: int) -> bool:
    """Whether four times every sum on the way is an integer that int32 holds, whatever the codes are."""
    halves = float(2 * x_zero).is_integer() and float(2 * w_zero).is_integer()
    return halves and 4 * columns * (128 + abs(x_zero)) * (128 + abs(w_zero)) < 2**31


# Quantizing -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("bitbell::bell_quantize", mutates_args=())
def bell_quantize(
    x: Tensor, bits: int, rotation: int, group: str, frozen: Tensor | None, smallest: float, keep: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """BBQ's centred codes int8 of `x` (..., C), the 1 / RMS that they go by, and the rotated x in the type `keep`.

    group: one RMS for each "row" (..., 1), or for the whole "tensor" (1,), never below `smallest`; frozen: 1 / RMS (1,)
    to take instead. What comes back as 1 / RMS, float32, is not finite where its part of x holds NaN or infinity.
    keep: None for nothing; the third tensor is then empty. int8: instead of the rotated x its code in 256 bins, of
    which the code proper is the upper bits.
    """
    h = rotate(x.float(), rotation)
    trace = (0 * h).sum(-1, keepdim=True) if group == "row" else (0 * h).sum().reshape(1)
    if frozen is None:
        square = h.square().mean(-1, keepdim=True) if group == "row" else h.square().mean().reshape(1)
        inverse_rms = square.sqrt().clamp_min(smallest).reciprocal()
    else:
        inverse_rms = frozen.float()
    codes = bell_codes(h, inverse_rms, bits).nan_to_num(-(2 ** (bits - 1))).to(torch.int8)
    kept = x.new_empty(0) if keep is None else _bins(h, inverse_rms, codes, bits) if keep == torch.int8 else h.to(keep)
    return codes, inverse_rms + trace, kept


def _bins(h: Tensor, inverse_rms: Tensor, codes: Tensor, bits: int) -> Tensor:
    """Codes of 8 bits within those of `bits`: where the two round apart, the coarse one decides."""
    width = 2 ** (8 - bits)
    low = codes.float() * width
    return bell_codes(h, inverse_rms, 8).nan_to_num(-128).clamp(low, low + width - 1).to(torch.int8)


@bell_quantize.register_fake
def _(
    x: Tensor, bits: int, rotation: int, group: str, frozen: Tensor | None, smallest: float, keep: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*x.shape[:-1], 1) if group == "row" else (1,)
    kept = x.new_empty(x.shape, dtype=keep) if keep is not None else x.new_empty(0)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(shape, dtype=torch.float32), kept


@bell_quantize.register_kernel("cpu")
def _(
    x: Tensor, bits: int, rotation: int, group: str, frozen: Tensor | None, smallest: float, keep: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    if not computes(x) or not x.numel() or (keep is not None and keep not in KEPT):
        return bell_quantize._init_fn(x, bits, rotation, group, frozen, smallest, keep)
    x, columns = x.contiguous(), x.shape[-1]
    rows, by_row = x.numel() // columns, group == "row" and frozen is None
    # Under a frozen RMS thresholds are those of the input itself, found on the very formula.
    inverse = 1.0 if frozen is None else float(frozen)
    thresholds = bin_thresholds(bits, inverse) if keep == torch.int8 else bell_thresholds(bits, inverse)
    plan = native.InputPlan(8 if keep == torch.int8 else bits, rotation, smallest=smallest, thresholds=thresholds)
    codes = torch.empty(x.shape, dtype=torch.int8, device="cpu")
    rms = torch.ones((*x.shape[:-1], 1) if by_row else (1,), dtype=torch.float32, device="cpu")
    kept = torch.empty(x.shape if keep is not None else 0, dtype=x.dtype if keep is None else keep, device="cpu")
    native.extension.training_quantize(
        *(native.level(), plan.fields(), x.data_ptr(), TYPES[x.dtype], rows, columns),
        *(by_row, frozen is not None, rms.data_ptr(), codes.data_ptr(), bits),
        *(kept.data_ptr() if keep is not None else 0, KEPT[kept.dtype], native.threads()),
    )
    return codes, 1 / rms if frozen is None else frozen.float() + 0 * rms, kept


# The gradient ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("bitbell::bell_gradient", mutates_args=())
def bell_gradient(
    g: Tensor,
    kept: Tensor,
    is_rotated: bool,
    codes: Tensor,
    inverse_rms: Tensor,
    factor: Tensor,
    bits: int,
    zero_point: float,
    rotation: int,
    radial: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """dL/dx in `dtype`, and of every row the sum of levels times g (..., 1) float32. See `bitbell.quantizers.bbq`.

    u = exp(-v**2 / 2) g with v = h / RMS; dL/dx = rotate(factor (u - v mean(u v))), the mean over each "row", over the
    "tensor", or "none". kept: x, or the rotated x. inverse_rms, factor: (..., 1) or (1,), float32. Where kept is int8,
    it holds x's code in 256 bins, v and the slope are a Gaussian's means in that bin, and codes may be the same tensor.
    """
    g = g.float()
    if kept.dtype == torch.int8:
        v, slope, level = bin_means(bits, zero_point).to(g.device)[:, kept.long() + 128]
    else:
        v = (kept.float() if is_rotated else rotate(kept.float(), rotation)) * inverse_rms
        slope, level = v.square().mul_(-0.5).exp_(), codes.float() - zero_point
    u, sums = slope * g, (g * level).sum(-1, keepdim=True)
    if radial == "row":
        u = u - v * (u * v).mean(-1, keepdim=True)
    elif radial == "tensor":
        u = u - v * (u * v).mean()
    return rotate(u * factor, rotation).to(dtype), sums


@bell_gradient.register_fake
def _(
    g: Tensor,
    kept: Tensor,
    is_rotated: bool,
    codes: Tensor,
    inverse_rms: Tensor,
    factor: Tensor,
    bits: int,
    zero_point: float,
    rotation: int,
    radial: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    sums = g.new_empty((*g.shape[:-1], 1), dtype=torch.float32)
    return torch.empty_like(g, dtype=dtype, memory_format=torch.contiguous_format), sums


@bell_gradient.register_kernel("cpu")
def _(
    g: Tensor,
    kept: Tensor,
    is_rotated: bool,
    codes: Tensor,
    inverse_rms: Tensor,
    factor: Tensor,
    bits: int,
    zero_point: float,
    rotation: int,
    radial: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    if not computes(g, inverse_rms, factor) or kept.dtype not in KEPT or dtype not in TYPES or not g.numel():
        how = bits, zero_point, rotation, radial, dtype
        return bell_gradient._init_fn(g, kept, is_rotated, codes, inverse_rms, factor, *how)
    g, kept = g.contiguous(), kept.contiguous()
    codes = kept if kept.dtype == torch.int8 else codes.contiguous()
    inverse_rms, factor = inverse_rms.float().contiguous(), factor.float().contiguous()
    rows, columns = g.numel() // g.shape[-1], g.shape[-1]
    out = torch.empty(g.shape, dtype=dtype, device="cpu")
    sums = torch.empty((*g.shape[:-1], 1), dtype=torch.float32, device="cpu")
    fields: dict[str, Any] = {
        "g": g.data_ptr(),
        "g_type": TYPES[g.dtype],
        "h": kept.data_ptr(),
        "h_type": KEPT[kept.dtype],
        "bins": bin_means(bits, zero_point).data_ptr() if kept.dtype == torch.int8 else 0,
        "h_rotation": 1 if is_rotated else rotation,
        "rotation": rotation,
        "codes": codes.data_ptr(),
        "inverse_size": inverse_rms.data_ptr(),
        "factor": factor.data_ptr(),
        "size_by_row": inverse_rms.numel() > 1,
        "factor_by_row": factor.numel() > 1,
        "radial": radial != "none",
        "by_row": radial == "row",
        "zero_point": zero_point,
        "out": out.data_ptr(),
        "out_type": TYPES[dtype],
        "levels": sums.data_ptr(),
    }
    native.extension.training_gradient(native.level(), fields, rows, columns, native.threads())
    return out, sums


BELL_SLOPE = math.sqrt(2 / math.pi)  # 2 phi(0): the slope of scale * (2 Phi(v) - 1) at 0, in units of the scale

__all__ = ["BELL_SLOPE", "bell_gradient", "bell_quantize", "computes", "integer_linear"]
