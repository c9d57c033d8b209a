"""The quantizers in Triton: one read of x, and one write of codes.

    measure_kernel     partial sums of a statistic over all of x
    quantize_kernel    rotate, measure each row (or take the size as given), codes, steps, values or packed words

Bytes of an element, for bfloat16 x: quantize reads 2 (each row twice, the second time from the cache) and writes 1
(codes) or bits/8 (packed); a statistic of the whole tensor reads 2 more. Steps and partial sums are a percent.

Operations: an H200 has 20 a element to spend beside memory. Of 16-bit x, the rotation is a product with a matrix of +-1
on tensor cores, 256 operations an element of theirs, a third of what they do; of float32 x, it is butterflies, 15
instructions an element, of which 7 are sums. Up to 4 bits, thresholds are compared with as a tree: 4 comparisons for 15
thresholds.

Tiles are 64 x 128, which is what Hopper's tensor cores take at once with the matrix in shared memory: 128 columns,
since rotation blocks are powers of two up to 128, so that one block-diagonal matrix serves them all; and 64 entries,
of which SPAN lie side by side in a row. A program has 64 / SPAN rows, and of each a range of columns ("chunk"), or all
columns where rows are measured.
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
    over_rows,
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
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial sums (or maxima) over x, which is seen as rows of 128; one a program."""
    ROTATED: tl.constexpr = (ROTATION > 1) and (STATISTIC != "rms")  # a rotation changes no sum of squares
    total = tl.zeros((TILE, BLOCK), tl.float32)
    place = tl.arange(0, TILE)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if ROTATED:
        matrix = load_matrix(matrix_ptr, BLOCK)
    stride = tl.num_programs(0).to(tl.int64) * (TILE * BLOCK)
    for start in range(tl.program_id(0).to(tl.int64) * (TILE * BLOCK), count, stride):
        x = tl.load(x_ptr + start + place, mask=start + place < count, other=0.0)
        if ROTATED:
            h = rotate_tile(x, matrix, ROTATION, TILE)
        else:
            h = x.to(tl.float32)
        if STATISTIC == "rms":
            total += h * h
        elif STATISTIC == "absmax":
            total = tl.maximum(total, tl.abs(h), propagate_nan=tl.PropagateNan.ALL)
        else:
            total += tl.abs(h)
    if STATISTIC == "absmax":
        partial = tl.max(tl.max(total, axis=1), axis=0) + tl.sum(tl.sum(total * 0.0, axis=1), axis=0)
    else:
        partial = tl.sum(tl.sum(total, axis=1), axis=0)
    tl.store(partials_ptr + tl.program_id(0), partial)


@triton.jit
def measure_rows(
    x_ptr,
    row,
    offset,
    is_row,
    columns,
    matrix_ptr,
    STATISTIC: tl.constexpr,
    ROTATION: tl.constexpr,
    TILE: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The statistic of each entry's row, (TILE,) float32, with NaN and infinity in it."""
    ROTATED: tl.constexpr = (ROTATION > 1) and (STATISTIC != "rms")
    total = tl.zeros((TILE, BLOCK), tl.float32)
    if ROTATED:
        matrix = load_matrix(matrix_ptr, BLOCK)
    for start in range(0, columns, SPAN * BLOCK):
        column = start + offset[:, None] + tl.arange(0, BLOCK)[None, :]
        is_here = is_row[:, None] & (column < columns)
        x = tl.load(x_ptr + row.to(tl.int64)[:, None] * columns + column, mask=is_here, other=0.0)
        if ROTATED:
            h = rotate_tile(x, matrix, ROTATION, TILE)
        else:
            h = x.to(tl.float32)
        if STATISTIC == "rms":
            total += h * h
        elif STATISTIC == "absmax":
            total = tl.maximum(total, tl.abs(h), propagate_nan=tl.PropagateNan.ALL)
        else:
            total += tl.abs(h)
    if STATISTIC == "absmax":
        return over_rows(tl.max(total, axis=1) + tl.sum(total * 0.0, axis=1), False, TILE, SPAN)
    mean = over_rows(tl.sum(total, axis=1), True, TILE, SPAN) / columns
    if STATISTIC == "rms":
        mean = tl.sqrt(mean)
    return mean


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
    TILE: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Codes int8, values float32, packed words: those that have a pointer; and step and size where they are measured.

    Where the size is given, so is the step, and only NaN is written over it. *_ROWS: whether there is one a row.
    """
    entry = tl.arange(0, TILE)
    row = tl.program_id(0) * (TILE // SPAN) + entry // SPAN
    offset_in_row = entry % SPAN * BLOCK
    is_row = row < rows
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, columns)
    if ROTATION > 1:
        matrix = load_matrix(matrix_ptr, BLOCK)
    t = (0.0,)
    if (CODES == "table") and (BITS <= 4):
        t = load_thresholds(table_ptr, BITS)

    if STATISTIC == "given":
        base = load_by_row(size_ptr, row, is_row, SIZE_ROWS)
    elif BY_ROW:
        base = measure_rows(
            x_ptr, row, offset_in_row, is_row, columns, matrix_ptr, STATISTIC, ROTATION, TILE, SPAN, BLOCK
        )
    else:
        partials = tl.load(partials_ptr + tl.arange(0, PARTIALS))
        if STATISTIC == "absmax":
            of_all = tl.max(partials, axis=0) + 0.0 * tl.sum(partials, axis=0)
        else:
            of_all = tl.sum(partials, axis=0) / count
        base = tl.zeros((TILE,), tl.float32) + of_all
        if STATISTIC == "rms":
            base = tl.sqrt(base)
    base = tl.maximum(base, smallest, propagate_nan=tl.PropagateNan.ALL)
    if STEP_FROM_SCALE:
        step = load_by_row(scale_ptr, row, is_row, SCALE_ROWS) * step_factor + step_plus
    else:
        step = base * step_factor + step_plus
    if STATISTIC != "given":
        step += 0.0 * base
        is_mine = is_row & (entry % SPAN + tl.program_id(1) == 0)
        tl.store(step_ptr + row * STEP_ROWS, step, mask=is_mine & (STEP_ROWS | (row == 0)))
        tl.store(measured_ptr + row * BY_ROW, base, mask=is_mine & (BY_ROW | (row == 0)))
    inverse = 1.0 / (base * divisor + divisor_plus)
    if offset_ptr is not None:
        offset = load_by_row(offset_ptr, row, is_row, SCALE_ROWS)
    trace = tl.zeros((TILE,), tl.float32)

    for start in range(first, last, SPAN * BLOCK):
        column = start + offset_in_row[:, None] + tl.arange(0, BLOCK)[None, :]
        is_here = is_row[:, None] & (column < last)
        place = row.to(tl.int64)[:, None] * columns + column
        x = tl.load(x_ptr + place, mask=is_here, other=0.0)
        if ROTATION > 1:
            h = rotate_tile(x, matrix, ROTATION, TILE)
        else:
            h = x.to(tl.float32)
        if STATISTIC == "given":
            trace += tl.sum(0.0 * h, axis=1)
        if CENTRED:
            v = (h - offset[:, None]) * inverse[:, None]
        else:
            v = h * inverse[:, None]
        code = codes_of(v, t, table_ptr, BITS, CODES, ADD, LOW, HIGH, PLUS)
        if codes_ptr is not None:
            tl.store(codes_ptr + place, code.to(tl.int8), mask=is_here)
        if values_ptr is not None:
            value = (code - zero_point) * step[:, None] + 0.0 * h
            if offset_ptr is not None:
                value += offset[:, None]
            tl.store(values_ptr + place, value, mask=is_here)
        if words_ptr is not None:
            unsigned = tl.where(is_here, code.to(tl.int32) + 2 ** (BITS - 1), 0)
            in_row = row.to(tl.int64)[:, None] * words
            has_words = is_row[:, None] & (start + offset_in_row < last)[:, None]
            if 32 % BITS == 0:
                word = (start + offset_in_row)[:, None] * BITS // 32 + tl.arange(0, BLOCK * BITS // 32)[None, :]
                packed = pack_tile(unsigned, BITS, TILE, BLOCK)
                tl.store(words_ptr + in_row + word, packed, mask=has_words & (word < words))
            else:
                group = (start + offset_in_row)[:, None] // 32 + tl.arange(0, BLOCK // 32)[None, :]
                for j in tl.static_range(BITS):
                    word = group * BITS + j
                    packed = pack_word(unsigned, j, BITS, TILE, BLOCK)
                    tl.store(words_ptr + in_row + word, packed, mask=has_words & (word < words))
    if STATISTIC == "given":
        # Whoever sees NaN writes NaN, so that no order matters.
        tl.store(step_ptr + row * STEP_ROWS, trace, mask=(trace != trace) & is_row)
