"""The operators of packed layers, each with its plain-PyTorch definition; on CPUs the C++ kernels compute them.

    arrange_codes     words (N, W) int32           -> the order that products read (uint8), and sums of codes (N,) int32
    quantize_rows     x (M, K) float32             -> centred codes (M, K) int8 and steps (M, 1) float32
    packed_product    codes (M, K) int8, arranged  -> codes times unsigned weight codes (M, N) int32, exact

Registered under `bitbell::`. An arranged matrix is cut into panels of 64 rows and into vectors of 64 bytes: 16 rows x 4
consecutive k, each byte holding the codes of 8 / bits consecutive groups of 4 k, lowest bits first; the four vectors of
a panel's 64 rows follow each other, then come the next k. 3 bits are 2 bits and 1 bit apart, every 32 k; 5 to 8 bits
take a byte. Rows and columns are padded to multiples of 64 with code 0. No instruction set is presumed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitbell.kernels import native, triton
from bitbell.kernels.native import STATISTICS, InputPlan
from bitbell.kernels.operators import integer_product, packed_words, rotate, unpack_codes
from bitbell.kernels.quantize import LARGEST_ROTATION

PANEL, STEP = 64, 64  # rows, columns that a matrix is padded to multiples of
NUMBERS = ("smallest", "divisor", "divisor_plus", "step_factor", "step_plus")  # of an InputPlan
CHUNK = 32  # columns in which 3 bits are interleaved


def arranged_bytes(rows: int, columns: int, bits: int) -> int:
    """How many bytes `arrange_codes` gives."""
    return -(-rows // PANEL) * PANEL * (-(-columns // STEP) * STEP) * _kernel_bits(bits) // 8


@torch.library.custom_op("bitbell::arrange_codes", mutates_args=())
def arrange_codes(words: Tensor, bits: int, columns: int) -> tuple[Tensor, Tensor]:
    """Packed codes (N, packed_words(columns, bits)) int32 -> (arranged_bytes,) uint8, and each row's sum of codes."""
    codes = unpack_codes(words, bits, columns)
    rows = codes.shape[0]
    padded = pad(codes, (0, -columns % STEP, 0, -rows % PANEL))
    # panel, 16 rows' vector, row, group of 4 k, k
    groups = padded.view(-1, 4, 16, padded.shape[1] // 4, 4)
    if bits == 3:
        parts = [_merge(part, width) for part, width in ((groups & 3, 2), (groups >> 2, 1))]
        chunks = [part.reshape(part.shape[0], padded.shape[1] // CHUNK, -1) for part in parts]
        arranged = torch.cat(chunks, dim=2)
    else:
        arranged = _merge(groups, _kernel_bits(bits))
    return arranged.reshape(-1).clone(), codes.sum(1, dtype=torch.int32)


@arrange_codes.register_fake
def _(words: Tensor, bits: int, columns: int) -> tuple[Tensor, Tensor]:
    size = arranged_bytes(words.shape[0], columns, bits)
    return words.new_empty(size, dtype=torch.uint8), words.new_empty(words.shape[0], dtype=torch.int32)


@arrange_codes.register_kernel("cpu")
def _(words: Tensor, bits: int, columns: int) -> tuple[Tensor, Tensor]:
    return native.arrange(words, bits, columns) if native.available() else arrange_codes._init_fn(words, bits, columns)


@torch.library.custom_op("bitbell::quantize_rows", mutates_args=())
def quantize_rows(
    x: Tensor, thresholds: Tensor | None, bits: int, rotation: int, statistic: str, numbers: list[float]
) -> tuple[Tensor, Tensor]:
    """Codes and steps of the rows of `x`, as `InputPlan` says; numbers: those of NUMBERS.

    A step is NaN where its row holds NaN or infinity; without a statistic, every step is.
    """
    smallest, divisor, divisor_plus, step_factor, step_plus = numbers
    h = rotate(x, rotation)
    size = _measure(h, statistic).clamp_min(smallest)
    v = h / (size * divisor + divisor_plus)
    half = 2 ** (bits - 1)
    if thresholds is None:
        codes = (v - 0.5).round().clamp(-half, half - 1)
    else:
        codes = torch.searchsorted(thresholds.to(v.device), v.contiguous(), right=True) - half
    trace = (0 * h).sum(-1, keepdim=True) if statistic != "none" else (0 * h).sum().expand(len(h), 1)
    codes = torch.where(v.isnan(), -half, codes).clamp(-half, half - 1)
    return codes.to(torch.int8), size * step_factor + step_plus + trace


@quantize_rows.register_fake
def _(
    x: Tensor, thresholds: Tensor | None, bits: int, rotation: int, statistic: str, numbers: list[float]
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.int8), x.new_empty(x.shape[0], 1)


@quantize_rows.register_kernel("cuda")
@quantize_rows.register_kernel("cpu")
def _(
    x: Tensor, thresholds: Tensor | None, bits: int, rotation: int, statistic: str, numbers: list[float]
) -> tuple[Tensor, Tensor]:
    if triton.computes(x) and x.numel() and rotation <= LARGEST_ROTATION and x.shape[1] % rotation == 0:
        from bitbell.kernels.triton.launch import quantize_rows as on_triton

        return on_triton(x, thresholds, bits, rotation, statistic, dict(zip(NUMBERS, numbers, strict=True)))
    if not x.is_cpu or not native.available():
        return quantize_rows._init_fn(x, thresholds, bits, rotation, statistic, numbers)
    sizes: dict[str, Any] = dict(zip(NUMBERS, numbers, strict=True))
    codes, step = native.quantize(InputPlan(bits, rotation, statistic, thresholds=thresholds, **sizes), x)
    return codes.contiguous(), step


@torch.library.custom_op("bitbell::packed_product", mutates_args=())
def packed_product(codes: Tensor, arranged: Tensor, bits: int, outputs: int, x_bits: int) -> Tensor:
    """Exact int32 (M, outputs): centred codes (M, K) int8 times unsigned codes of an arranged (outputs, K) matrix.

    x_bits: how many bits `codes` need (8 if unknown); fewer allow faster kernels.
    """
    weights = _restore(arranged, bits, outputs, codes.shape[1])
    # Halves, so that unsigned codes fit the signed bytes of integer_product.
    low, high = (weights & 15).to(torch.int8), (weights >> 4).to(torch.int8)
    return integer_product(codes, low) + 16 * integer_product(codes, high)


@packed_product.register_fake
def _(codes: Tensor, arranged: Tensor, bits: int, outputs: int, x_bits: int) -> Tensor:
    return codes.new_empty(codes.shape[0], outputs, dtype=torch.int32)


@packed_product.register_kernel("cpu")
def _(codes: Tensor, arranged: Tensor, bits: int, outputs: int, x_bits: int) -> Tensor:
    if not native.available():
        return packed_product._init_fn(codes, arranged, bits, outputs, x_bits)
    return native.product(codes, arranged, bits, outputs, x_bits)


def _kernel_bits(bits: int) -> int:
    return bits if bits <= 4 else 8


def _merge(groups: Tensor, bits: int) -> Tensor:
    """(panel, vector, row, group, k) of codes below 2**bits -> bytes (panel, byte's groups, vector, row, k)."""
    per_byte = 8 // bits
    fields = groups.unflatten(3, (-1, per_byte)).to(torch.int32)
    shift = (bits * torch.arange(per_byte, device=groups.device)).view(-1, 1)
    return (fields << shift).sum(4).to(torch.uint8).permute(0, 3, 1, 2, 4)


def _split(merged: Tensor, bits: int) -> Tensor:
    """Undo `_merge`."""
    shift = bits * torch.arange(8 // bits, device=merged.device)
    fields = (merged.permute(0, 2, 3, 1, 4).unsqueeze(4) >> shift.view(-1, 1)) & (2**bits - 1)
    return fields.flatten(3, 4)


def _restore(arranged: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    """Codes (rows, columns) uint8 of an arranged matrix."""
    panels, width = -(-rows // PANEL), -(-columns // STEP) * STEP
    if bits == 3:
        chunks = arranged.view(panels, width // CHUNK, 3, 4, 16, 4)
        low = _split(chunks[:, :, :2].flatten(1, 2), 2)
        groups = low | (_split(chunks[:, :, 2], 1) << 2)
    else:
        kept = _kernel_bits(bits)
        groups = _split(arranged.view(panels, width // 4 * kept // 8, 4, 16, 4), kept)
    return groups.reshape(panels * PANEL, width)[:rows, :columns].to(torch.uint8)


def _measure(h: Tensor, statistic: str) -> Tensor:
    if statistic not in STATISTICS:
        raise ValueError(f"statistic must be one of {', '.join(STATISTICS)}, got {statistic!r}")
    if statistic == "rms":
        return h.square().mean(-1, keepdim=True).sqrt()
    if statistic == "absmax":
        return h.abs().amax(-1, keepdim=True)
    return h.abs().mean(-1, keepdim=True) if statistic == "absmean" else h.new_zeros(h.shape[0], 1)


__all__ = ["arrange_codes", "arranged_bytes", "packed_product", "packed_words", "quantize_rows"]
