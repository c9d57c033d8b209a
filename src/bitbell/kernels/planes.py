"""The operators of packed layers on GPUs, each with its plain-PyTorch definition; there Triton kernels compute them.

    arrange_planes          words (N, W) int32         -> planes (N, bytes) uint8, sums of centred codes (N,) int32
    planes_product          codes (M, K) int8, planes  -> codes times centred weight codes (M, N) int32, exact
    planes_linear           codes, steps, planes, ...  -> a layer's output (M, N)
    planes_linear_floats    x (M, K) float, planes ... -> the output of a layer whose inputs stay floats (M, N)
    scaled_integer_product  a (M, K), b (N, K) int8    -> (M, N) float, exact but for the steps
    integer_product         of operators.py, on GPUs

Registered under `bitbell::`. Planes are what GPUs read: each row by itself, and a byte holds the codes of 8 / bits
columns that lie `plane_width` apart, lowest bits first. Then a tile of bytes, shifted and masked, is a tile of the
codes of consecutive columns: it needs no shuffling before it meets the same columns of the input. 3 bits are two bytes
that hold 2 bits of 4 columns each, and one that holds the third bit of the same 8; 5 to 8 bits take a byte, centred.
Bytes of a weight: bits / 8 (1 above 4 bits), up to padding of each plane of a row to 16 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from bitbell.kernels import triton
from bitbell.kernels.operators import _check_operands, integer_product, no_autocast, unpack_codes

ALIGNMENT = 16  # bytes: the widest load of a thread
EXACT_IN_FLOAT32 = 2**24


def fields_of(bits: int) -> int:
    """How many columns share a byte (3 bits: share three bytes)."""
    return {1: 8, 2: 4, 3: 8, 4: 2}.get(bits, 1)


def planes_of(bits: int) -> int:
    """How many planes of bytes a row has."""
    return 3 if bits == 3 else 1


def plane_width(columns: int, bits: int) -> int:
    """Bytes of a plane of a row, and how far apart the columns of a byte are."""
    return -(-columns // (fields_of(bits) * ALIGNMENT)) * ALIGNMENT


@torch.library.custom_op("bitbell::arrange_planes", mutates_args=())
def arrange_planes(words: Tensor, bits: int, columns: int) -> tuple[Tensor, Tensor]:
    """Packed codes (N, packed_words(columns, bits)) int32 -> planes (N, planes_of * plane_width) uint8, and each row's
    sum of centred codes."""
    codes = unpack_codes(words, bits, columns)
    sums = codes.sum(1, dtype=torch.int32) - columns * 2 ** (bits - 1)
    fields, width = fields_of(bits), plane_width(columns, bits)
    if fields == 1:
        centred = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
        return pad(centred, (0, width - columns)).view(torch.uint8), sums
    split = pad(codes, (0, fields * width - columns)).view(-1, fields, width)
    if bits == 3:
        parts = [_merge(split[:, half::2] & 3, 2) for half in (0, 1)] + [_merge(split >> 2, 1)]
        return torch.cat(parts, dim=1), sums
    return _merge(split, bits), sums


@arrange_planes.register_fake
def _(words: Tensor, bits: int, columns: int) -> tuple[Tensor, Tensor]:
    rows = words.shape[0]
    width = planes_of(bits) * plane_width(columns, bits)
    return words.new_empty(rows, width, dtype=torch.uint8), words.new_empty(rows, dtype=torch.int32)


def restore_planes(planes: Tensor, bits: int, columns: int) -> Tensor:
    """Centred codes (N, columns) int8 of planes."""
    rows, width = planes.shape[0], plane_width(columns, bits)
    if fields_of(bits) == 1:
        return planes[:, :columns].contiguous().view(torch.int8)
    if bits == 3:
        low = torch.stack([_split(planes[:, half * width : (half + 1) * width], 2) for half in (0, 1)], dim=2)
        codes = low.view(rows, 8, width) | (_split(planes[:, 2 * width :], 1) << 2)
    else:
        codes = _split(planes, bits)
    return (codes.reshape(rows, -1)[:, :columns].to(torch.int8) - 2 ** (bits - 1)).contiguous()


@torch.library.custom_op("bitbell::planes_product", mutates_args=())
def planes_product(codes: Tensor, planes: Tensor, bits: int) -> Tensor:
    """Exact int32 (M, N): centred codes (M, K) int8 times the centred codes of planes of an (N, K) matrix."""
    _check_planes(codes, planes, bits)
    return integer_product._init_fn(codes, restore_planes(planes, bits, codes.shape[1]))


@planes_product.register_fake
def _(codes: Tensor, planes: Tensor, bits: int) -> Tensor:
    return codes.new_empty(codes.shape[0], planes.shape[0], dtype=torch.int32)


@torch.library.custom_op("bitbell::planes_linear", mutates_args=())
def planes_linear(
    codes: Tensor,
    step: Tensor,
    planes: Tensor,
    sums: Tensor,
    scale: Tensor,
    bits: int,
    x_bits: int,
    x_zero_point: float,
    zero_point: float,
    dtype: torch.dtype,
    x_offset: Tensor | None = None,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """(M, N) `dtype`: a layer of packed weights for quantized inputs.

    codes: centred (M, K) int8 of x_bits. step: float32, M numbers or one. planes, sums: of `arrange_planes`. scale,
    offset, bias: float32 (N,). x_offset: float32, one number. Values are (code - zero point) * step + offset on both
    sides. Sums are exact in int32; zero points are folded out by sums of codes; then come the weight's scale, the
    step, offsets and bias, in float32.
    """
    x_sums = codes.sum(-1, keepdim=True, dtype=torch.int32)
    columns = codes.shape[1]
    wide = is_wide(columns, bits, x_bits)
    y = planes_product._init_fn(codes, planes, bits).to(torch.float64 if wide else torch.float32)
    y = y - zero_point * x_sums if zero_point else y
    y = y - x_zero_point * sums if x_zero_point else y
    y = (y + columns * x_zero_point * zero_point).float() * scale * step.reshape(-1, 1)
    if x_offset is not None:
        y = y + x_offset * ((sums - columns * zero_point) * scale)
    if offset is not None:
        y = y + (x_sums - columns * x_zero_point) * step.reshape(-1, 1) * offset
    if x_offset is not None and offset is not None:
        y = y + columns * x_offset * offset
    return (y if bias is None else y + bias).to(dtype)


@planes_linear.register_fake
def _(
    codes: Tensor,
    step: Tensor,
    planes: Tensor,
    sums: Tensor,
    scale: Tensor,
    bits: int,
    x_bits: int,
    x_zero_point: float,
    zero_point: float,
    dtype: torch.dtype,
    x_offset: Tensor | None = None,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    return codes.new_empty(codes.shape[0], planes.shape[0], dtype=dtype)


@torch.library.custom_op("bitbell::planes_linear_floats", mutates_args=())
def planes_linear_floats(
    x: Tensor,
    planes: Tensor,
    scale: Tensor,
    bits: int,
    zero_point: float,
    dtype: torch.dtype,
    table: Tensor | None = None,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """(M, N) `dtype`: a layer of packed weights whose inputs stay floats; x (M, K) float32, bfloat16 or float16.

    Levels are code - zero point, or those of `table` float32 (2**bits,), rounded to the type of x; sums are float32,
    then come scale, offset and bias, float32 (N,).
    """
    codes = restore_planes(planes, bits, x.shape[1])
    levels = codes.float() - zero_point if table is None else table[codes.int() + 2 ** (bits - 1)]
    with no_autocast(x.device):
        y = linear(x.float(), levels.to(x.dtype).float()) * scale
    y = y if offset is None else y + x.sum(-1, keepdim=True, dtype=torch.float32) * offset
    return (y if bias is None else y + bias).to(dtype)


@planes_linear_floats.register_fake
def _(
    x: Tensor,
    planes: Tensor,
    scale: Tensor,
    bits: int,
    zero_point: float,
    dtype: torch.dtype,
    table: Tensor | None = None,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    return x.new_empty(x.shape[0], planes.shape[0], dtype=dtype)


@torch.library.custom_op("bitbell::scaled_integer_product", mutates_args=())
def scaled_integer_product(
    a: Tensor,
    b: Tensor,
    step_a: Tensor,
    step_b: Tensor,
    zero_a: float,
    zero_b: float,
    dtype: torch.dtype,
    bits_a: int = 8,
    bits_b: int = 8,
) -> Tensor:
    """(M, N) `dtype`: centred codes a (M, K) times b (N, K), both int8, as levels (code - zero point) times steps.

    step_a: float32, M numbers or one; step_b: N numbers or one. bits_a, bits_b: of the codes. The sum of products is
    exact in int32; zero points are folded out in float32 (float64 where sums of levels may pass 2**24), then come
    step_b and step_a.
    """
    _check_operands(a, b)
    y = integer_product._init_fn(a, b).to(torch.float64 if is_wide(a.shape[1], bits_a, bits_b) else torch.float32)
    y = y - zero_b * a.sum(1, keepdim=True, dtype=torch.int32) if zero_b else y
    y = y - zero_a * b.sum(1, dtype=torch.int32) if zero_a else y
    y = (y + a.shape[1] * zero_a * zero_b).float()
    return (y * _of_outputs(step_b, b.shape[0]) * step_a.float().reshape(-1, 1)).to(dtype)


@scaled_integer_product.register_fake
def _(
    a: Tensor,
    b: Tensor,
    step_a: Tensor,
    step_b: Tensor,
    zero_a: float,
    zero_b: float,
    dtype: torch.dtype,
    bits_a: int = 8,
    bits_b: int = 8,
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


def is_wide(columns: int, bits: int, x_bits: int) -> bool:
    """Whether sums of levels may need more than float32's 24 bits (levels come in quarters at the finest)."""
    return 4 * columns * 2 ** (bits + x_bits - 2) >= EXACT_IN_FLOAT32


# Which implementation -------------------------------------------------------------------------------------------------


def _on(*devices: str, operator: object, function: str) -> None:
    """Let that function of `bitbell.kernels.triton.product` compute where Triton computes, else the definition."""
    definition = operator._init_fn  # type: ignore[attr-defined]

    def run(*args: object, **kwargs: object) -> Tensor:
        first = args[0]
        assert isinstance(first, Tensor)
        if not triton.computes(first):
            return definition(*args, **kwargs)
        from bitbell.kernels.triton import product

        return getattr(product, function)(*args, **kwargs)

    for device in devices:
        operator.register_kernel(device)(run)  # type: ignore[attr-defined]


_on("cpu", "cuda", operator=planes_product, function="planes_product")
_on("cpu", "cuda", operator=planes_linear, function="planes_linear")
_on("cpu", "cuda", operator=planes_linear_floats, function="planes_linear_floats")
_on("cpu", "cuda", operator=scaled_integer_product, function="scaled_integer_product")


@integer_product.register_kernel("cuda")
def _(a: Tensor, b: Tensor) -> Tensor:
    """cuBLAS where its int8 product takes the shapes, else Triton, else the definition."""
    _check_operands(a, b)
    if a.shape[0] > 16 and b.shape[0] % 8 == 0 and a.shape[1] % 8 == 0 and b.numel():
        return torch._int_mm(a.contiguous(), b.contiguous().T)
    if triton.computes(a):
        from bitbell.kernels.triton import product

        return product.integer_product(a, b)
    return integer_product._init_fn(a, b)


def _check_planes(x: Tensor, planes: Tensor, bits: int) -> None:
    """Raise ValueError unless `planes` are those of a matrix with the columns of `x`."""
    if x.dim() != 2 or planes.dim() != 2 or planes.dtype != torch.uint8 or not 1 <= bits <= 8:
        raise ValueError(
            f"planes take (M, K) inputs, (N, bytes) uint8 and 1 to 8 bits, got {tuple(x.shape)}, {planes.dtype} "
            f"{tuple(planes.shape)} and {bits}"
        )
    wanted = planes_of(bits) * plane_width(x.shape[1], bits)
    if planes.shape[1] != wanted or x.shape[1] >= 1 << 17:
        raise ValueError(
            f"planes of {bits} bits for {x.shape[1]} columns (at most {(1 << 17) - 1}) have {wanted} bytes a row, got "
            f"{planes.shape[1]}"
        )


def _of_outputs(x: Tensor, outputs: int) -> Tensor:
    """A number for each output, float32 (outputs,); one for all is repeated."""
    return x.reshape(-1).float().expand(outputs).contiguous()


def _merge(split: Tensor, bits: int) -> Tensor:
    """Codes (N, fields, width) uint8 -> bytes (N, width)."""
    shift = bits * torch.arange(split.shape[1], device=split.device).view(-1, 1)
    return (split.to(torch.int32) << shift).sum(1).to(torch.uint8)


def _split(merged: Tensor, bits: int) -> Tensor:
    """Undo `_merge`."""
    shift = bits * torch.arange(8 // bits, device=merged.device, dtype=torch.uint8).view(-1, 1)
    return (merged.unsqueeze(1) >> shift) & (2**bits - 1)
