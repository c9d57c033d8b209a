"""The quantizers in Triton: one read of x, and one write of codes.

    measure_kernel     partial sums of a statistic over all of x
    quantize_kernel    rotate, measure each row (or take the size as given), codes, steps, values or packed words

Bytes of an element, for bfloat16 x: quantize reads 2 (each row twice, the second time from the cache) and writes 1
(codes) or bits/8 (packed); a statistic of the whole tensor reads 2 more. Steps and partial sums are a percent.

Operations: the rotation multiplies by a matrix of +-1, exact in bfloat16, 256 operations an element on tensor cores,
which add in float32; 1/sqrt(block) comes after. A float32 x is the exact sum of three bfloat16 numbers, and costs three
such products. Up to 4 bits, thresholds are compared with as a tree: 4 comparisons for 15 thresholds.

A program has ROWS rows and a range of columns, in tiles of 128: rotation blocks are powers of two up to 128, so that
one block-diagonal matrix serves them all. Where a row is measured, its program has all its columns.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from bitbell.kernels.triton.tiles import (
    codes_of,
    load_by_row,
    load_matrix,
    load_thresholds,
    pack_tile,
    pack_word,
    rotate_tile,
)


@triton.jit
def measure_kernel(
    x_ptr,
    matrix_ptr,
    partials_ptr,
    count,
    STATISTIC: tl.constexpr,
    ROTATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial sums (or maxima) over x, which is seen as rows of 128; one a program."""
    NORM: tl.constexpr = ROTATION**-0.5
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    place = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if (ROTATION > 1) & (STATISTIC != "rms"):
        matrix = load_matrix(matrix_ptr, BLOCK)
    step = tl.num_programs(0).to(tl.int64) * (ROWS * BLOCK)
    for start in range(tl.program_id(0).to(tl.int64) * (ROWS * BLOCK), count, step):
        x = tl.load(x_ptr + start + place, mask=start + place < count, other=0.0)
        if STATISTIC == "rms":  # a rotation changes no sum of squares
            h = x.to(tl.float32)
            total += h * h
        else:
            if ROTATION > 1:
                h = tl.abs(rotate_tile(x, matrix, NORM))
            else:
                h = tl.abs(x.to(tl.float32))
            if STATISTIC == "absmax":
                total = tl.maximum(total, h, propagate_nan=tl.PropagateNan.ALL)
            else:
                total += h
    if STATISTIC == "absmax":
        partial = tl.max(tl.max(total, axis=1), axis=0) + tl.sum(tl.sum(total * 0.0, axis=1), axis=0)
    else:
        partial = tl.sum(tl.sum(total, axis=1), axis=0)
    tl.store(partials_ptr + tl.program_id(0), partial)


@triton.jit
def quantize_kernel(
    x_ptr,
    scale_ptr,
    size_ptr,
    offset_ptr,
    partials_ptr,
    table_ptr,
    matrix_ptr,
    codes_ptr,
    words_ptr,
    values_ptr,
    step_ptr,
    measured_ptr,
    rows,
    columns,
    chunk,
    words,
    count,
    smallest,
    divisor,
    divisor_plus,
    step_factor,
    step_plus,
    zero_point,
    PARTIALS: tl.constexpr,
    BITS: tl.constexpr,
    ROTATION: tl.constexpr,
    STATISTIC: tl.constexpr,
    BY_ROW: tl.constexpr,
    SIZE_ROWS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    STEP_ROWS: tl.constexpr,
    CODES: tl.constexpr,
    STEP_FROM_SCALE: tl.constexpr,
    CENTRED: tl.constexpr,
    ADD: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    PLUS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    NORM: tl.constexpr = ROTATION**-0.5
    HALF: tl.constexpr = 2 ** (BITS - 1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    row_start = x_ptr + row.to(tl.int64)[:, None] * columns
    column = tl.arange(0, BLOCK)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, columns)
    if ROTATION > 1:
        matrix = load_matrix(matrix_ptr, BLOCK)
    t = (0.0,)
    if (CODES == "table") & (BITS <= 4):
        t = load_thresholds(table_ptr, BITS)

    if STATISTIC == "given":
        base = load_by_row(size_ptr, row, is_row, SIZE_ROWS)
    elif BY_ROW:
        base = measure_rows(x_ptr, row, is_row, columns, matrix_ptr, STATISTIC, ROTATION, ROWS, BLOCK, WIDE)
    else:
        partials = tl.load(partials_ptr + tl.arange(0, PARTIALS))
        if STATISTIC == "absmax":
            base = tl.max(partials, axis=0) + 0.0 * tl.sum(partials, axis=0)
        elif STATISTIC == "rms":
            base = tl.sqrt(tl.sum(partials, axis=0) / count)
        else:
            base = tl.sum(partials, axis=0) / count
        base += tl.zeros((ROWS,), tl.float32)
    base = tl.maximum(base, smallest, propagate_nan=tl.PropagateNan.ALL)
    if STEP_FROM_SCALE:
        step = load_by_row(scale_ptr, row, is_row, SCALE_ROWS) * step_factor + step_plus
    else:
        step = base * step_factor + step_plus
    if STATISTIC != "given":
        step += 0.0 * base
        is_mine = is_row & (row * 0 + tl.program_id(1) == 0)
        if STEP_ROWS:
            tl.store(step_ptr + row, step, mask=is_mine)
        else:
            tl.store(step_ptr + row * 0, step, mask=is_mine & (row == 0))
        if BY_ROW:
            tl.store(measured_ptr + row, base, mask=is_mine)
        else:
            tl.store(measured_ptr + row * 0, base, mask=is_mine & (row == 0))
    inverse = 1.0 / (base * divisor + divisor_plus)
    if offset_ptr is not None:
        offset = load_by_row(offset_ptr, row, is_row, SCALE_ROWS)
    traced = tl.zeros((ROWS, BLOCK), tl.float32)

    for start in range(first, last, BLOCK):
        is_here = is_row[:, None] & (start + column < columns)[None, :]
        x = tl.load(row_start + start + column[None, :], mask=is_here, other=0.0)
        if ROTATION > 1:
            h = rotate_tile(x, matrix, NORM)
        else:
            h = x.to(tl.float32)
        if STATISTIC == "given":
            traced += 0.0 * h
        v = h
        if CENTRED:
            v = h - offset[:, None]
        v = v * inverse[:, None]
        code = codes_of(v, t, table_ptr, BITS, CODES, ADD, LOW, HIGH, PLUS)
        place = row.to(tl.int64)[:, None] * columns + start + column[None, :]
        if codes_ptr is not None:
            tl.store(codes_ptr + place, code.to(tl.int8), mask=is_here)
        if values_ptr is not None:
            value = (code - zero_point) * step[:, None] + 0.0 * h
            if offset_ptr is not None:
                value += offset[:, None]
            tl.store(values_ptr + place, value, mask=is_here)
        if words_ptr is not None:
            unsigned = code.to(tl.int32) + HALF
            word_row = words_ptr + row.to(tl.int64)[:, None] * words
            if 32 % BITS == 0:
                packed = pack_tile(unsigned, columns - start, BITS, ROWS, BLOCK)
                word = start * BITS // 32 + tl.arange(0, BLOCK * BITS // 32)
                tl.store(word_row + word[None, :], packed, mask=is_row[:, None] & (word < words)[None, :])
            else:
                group = start // 32 + tl.arange(0, BLOCK // 32)
                for j in tl.static_range(BITS):
                    packed = pack_word(unsigned, columns - start, j, BITS, ROWS, BLOCK)
                    word = group * BITS + j
                    tl.store(word_row + word[None, :], packed, mask=is_row[:, None] & (word < words)[None, :])
    if STATISTIC == "given":
        # The step has been filled in before. Whoever sees NaN writes NaN, so that no order matters.
        bad = tl.sum(traced, axis=1)
        bad_here = (bad != bad) & is_row
        if STEP_ROWS:
            tl.store(step_ptr + row, bad, mask=bad_here)
        else:
            tl.store(step_ptr + row * 0, bad, mask=bad_here)


@triton.jit
def measure_rows(
    x_ptr,
    row,
    is_row,
    columns,
    matrix_ptr,
    STATISTIC: tl.constexpr,
    ROTATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The statistic of each row, (ROWS,) float32, with NaN and infinity in it."""
    NORM: tl.constexpr = ROTATION**-0.5
    ROTATED: tl.constexpr = (ROTATION > 1) & (STATISTIC != "rms")  # a rotation changes no sum of squares
    WIDTH: tl.constexpr = BLOCK if ROTATED else BLOCK * WIDE
    column = tl.arange(0, WIDTH)
    row_start = x_ptr + row.to(tl.int64)[:, None] * columns
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    if ROTATED:
        matrix = load_matrix(matrix_ptr, BLOCK)
    for start in range(0, columns, WIDTH):
        is_here = is_row[:, None] & (start + column < columns)[None, :]
        x = tl.load(row_start + start + column[None, :], mask=is_here, other=0.0)
        if ROTATED:
            h = rotate_tile(x, matrix, NORM)
        else:
            h = x.to(tl.float32)
        if STATISTIC == "rms":
            total += h * h
        elif STATISTIC == "absmax":
            total = tl.maximum(total, tl.abs(h), propagate_nan=tl.PropagateNan.ALL)
        else:
            total += tl.abs(h)
    if STATISTIC == "absmax":
        return tl.max(total, axis=1) + tl.sum(total * 0.0, axis=1)
    elif STATISTIC == "rms":
        return tl.sqrt(tl.sum(total, axis=1) / columns)
    else:
        return tl.sum(total, axis=1) / columns
