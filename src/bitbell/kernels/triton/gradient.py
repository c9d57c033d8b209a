"""The quantizers' backward pass in Triton, from x again.

    gradient_kernel    rotate x, slope, radial part, rotate back; partial sums for the scale and the offset

Bytes of an element, for bfloat16 x: reads 2 and 4 (the gradient, float32), writes 2. A radial part over the row reads
both twice, the second time from the cache; over the tensor, twice from memory. What `quantize` says of operations
holds here, with two rotations.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from bitbell.kernels.triton.tiles import codes_of, load_by_row, load_matrix, load_thresholds, over_rows, rotate_tile


@triton.jit
def load_pair(
    g_ptr,
    x_ptr,
    matrix,
    row,
    is_row,
    column,
    last,
    columns,
    inverse,
    shift,
    window_low,
    window_high,
    ROTATION: tl.constexpr,
    TILE: tl.constexpr,
):
    """A tile of g and of v = (rotate(x) - shift) * inverse, whether v is inside the window, and where the tile is."""
    is_here = is_row[:, None] & (column < last)
    place = row.to(tl.int64)[:, None] * columns + column
    x = tl.load(x_ptr + place, mask=is_here, other=0.0)
    g = tl.load(g_ptr + place, mask=is_here, other=0.0).to(tl.float32)
    if ROTATION > 1:
        h = rotate_tile(x, matrix, ROTATION, TILE)
    else:
        h = x.to(tl.float32)
    v = (h - shift[:, None]) * inverse[:, None]
    return g, v, (v >= window_low) & (v <= window_high), place, is_here


@triton.jit
def passed_on(g, v, inside, factor, bell_factor, SLOPE: tl.constexpr):
    """u: g times the slope."""
    if SLOPE == "window":
        u = tl.where(inside, g, 0.0)
    elif SLOPE == "bell":
        z = v * bell_factor
        u = g * tl.exp2(z * z * -0.7213475204444817)
    else:
        u = g
    return u * factor[:, None]


@triton.jit
def add_sums(
    to_scale,
    to_offset,
    g,
    v,
    inside,
    t,
    table_ptr,
    zero_point,
    BITS: tl.constexpr,
    CODES: tl.constexpr,
    ADD: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    PLUS: tl.constexpr,
    SCALE_GRADIENT: tl.constexpr,
    OFFSET_GRADIENT: tl.constexpr,
):
    """The sums for the scale and for the offset, (TILE,), with what a tile adds to them."""
    if SCALE_GRADIENT == "sign":
        sign = tl.where(v > 0, 1.0, tl.where(v < 0, -1.0, 0.0))
        to_scale += tl.sum(g * tl.where(inside, 0.0, sign), axis=1)
    elif SCALE_GRADIENT != "none":
        weight = codes_of(v, t, table_ptr, BITS, CODES, ADD, LOW, HIGH, PLUS) - zero_point
        if SCALE_GRADIENT == "error":
            weight -= tl.where(inside, v, 0.0)
        to_scale += tl.sum(g * weight, axis=1)
    if OFFSET_GRADIENT == "all":
        to_offset += tl.sum(g, axis=1)
    elif OFFSET_GRADIENT == "outside":
        to_offset += tl.sum(tl.where(inside, 0.0, g), axis=1)
    return to_scale, to_offset


@triton.jit
def gradient_kernel(
    g_ptr,
    x_ptr,
    scale_ptr,
    size_ptr,
    offset_ptr,
    along_ptr,
    table_ptr,
    matrix_ptr,
    grad_ptr,
    sums_ptr,
    rows,
    columns,
    chunk,
    chunks,
    smallest,
    divisor,
    divisor_plus,
    zero_point,
    window_low,
    window_high,
    bell_factor,
    slope_factor,
    BITS: tl.constexpr,
    ROTATION: tl.constexpr,
    SIZE_ROWS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    CODES: tl.constexpr,
    CENTRED: tl.constexpr,
    ADD: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    PLUS: tl.constexpr,
    SLOPE: tl.constexpr,
    RELATIVE: tl.constexpr,
    RADIAL: tl.constexpr,
    SCALE_GRADIENT: tl.constexpr,
    OFFSET_GRADIENT: tl.constexpr,
    NARROW: tl.constexpr,
    TILE: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dL/dx, and sums over a row's range of columns, (3, rows, chunks * SPAN) float32: for the scale, for the offset,
    and of u v for the radial part.

    RADIAL "none": one pass does both. "row": a first pass over the row sums, a second one writes. "sum": only sums,
    u v among them. "given": only writes, with mean(u v) at along_ptr. Without grad_ptr nothing is written but sums.
    """
    entry = tl.arange(0, TILE)
    row = tl.program_id(0) * (TILE // SPAN) + entry // SPAN
    in_row = entry[:, None] % SPAN * BLOCK + tl.arange(0, BLOCK)[None, :]
    is_row = row < rows
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, columns)
    matrix = 0.0
    if ROTATION > 1:
        matrix = load_matrix(matrix_ptr, BLOCK)
    t = (0.0,)
    if (CODES == "table") and (BITS <= 4):
        t = load_thresholds(table_ptr, BITS)
    base = tl.maximum(load_by_row(size_ptr, row, is_row, SIZE_ROWS), smallest, propagate_nan=tl.PropagateNan.ALL)
    inverse = 1.0 / (base * divisor + divisor_plus)
    factor = slope_factor + tl.zeros((TILE,), tl.float32)
    if RELATIVE != "one":
        factor *= inverse
    if RELATIVE == "scale":
        factor *= load_by_row(scale_ptr, row, is_row, SCALE_ROWS)
    shift = tl.zeros((TILE,), tl.float32)
    if CENTRED:
        shift += load_by_row(offset_ptr, row, is_row, SCALE_ROWS)

    to_scale = tl.zeros((TILE,), tl.float32)
    to_offset = tl.zeros((TILE,), tl.float32)
    radial = tl.zeros((TILE,), tl.float32)
    along = tl.zeros((TILE,), tl.float32)
    if RADIAL == "given":
        along += tl.load(along_ptr)
    if (RADIAL == "row") or (RADIAL == "sum"):
        for start in range(first, last, SPAN * BLOCK):
            g, v, inside, place, is_here = load_pair(
                g_ptr, x_ptr, matrix, row, is_row, start + in_row, last, columns, inverse, shift,
                window_low, window_high, ROTATION, TILE,
            )  # fmt: skip
            radial += tl.sum(passed_on(g, v, inside, factor, bell_factor, SLOPE) * v, axis=1)
            to_scale, to_offset = add_sums(
                to_scale, to_offset, g, v, inside, t, table_ptr, zero_point,
                BITS, CODES, ADD, LOW, HIGH, PLUS, SCALE_GRADIENT, OFFSET_GRADIENT,
            )  # fmt: skip
    if RADIAL == "row":
        along += over_rows(radial, True, TILE, SPAN) / columns
    if RADIAL != "sum":
        for start in range(first, last, SPAN * BLOCK):
            g, v, inside, place, is_here = load_pair(
                g_ptr, x_ptr, matrix, row, is_row, start + in_row, last, columns, inverse, shift,
                window_low, window_high, ROTATION, TILE,
            )  # fmt: skip
            if RADIAL == "none":
                to_scale, to_offset = add_sums(
                    to_scale, to_offset, g, v, inside, t, table_ptr, zero_point,
                    BITS, CODES, ADD, LOW, HIGH, PLUS, SCALE_GRADIENT, OFFSET_GRADIENT,
                )  # fmt: skip
            if grad_ptr is not None:
                u = passed_on(g, v, inside, factor, bell_factor, SLOPE)
                if RADIAL != "none":
                    u -= v * along[:, None]
                if ROTATION > 1:
                    u = rotate_tile(u.to(NARROW), matrix, ROTATION, TILE)
                tl.store(grad_ptr + place, u.to(grad_ptr.dtype.element_ty), mask=is_here)
    if RADIAL != "given":
        here = (row * chunks + tl.program_id(1)) * SPAN + entry % SPAN
        plane = rows * chunks * SPAN
        if SCALE_GRADIENT != "none":
            tl.store(sums_ptr + here, to_scale, mask=is_row)
        if OFFSET_GRADIENT != "none":
            tl.store(sums_ptr + plane + here, to_offset, mask=is_row)
        if RADIAL == "sum":
            tl.store(sums_ptr + 2 * plane + here, radial, mask=is_row)
