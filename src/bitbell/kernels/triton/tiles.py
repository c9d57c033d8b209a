"""What the Triton kernels of quantizers are made of: functions of a tile (rows, columns) in registers."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rotate_tile(x, matrix, ROTATION: tl.constexpr, TILE: tl.constexpr):
    """A tile (TILE, 128) rotated in blocks of ROTATION; float32.

    16 bits: a product with the matrix of +-1, whose products are exact, added in float32. float32: butterflies, each
    sum rounded once; tensor cores would need three products for its 24 bits.
    """
    if x.dtype == tl.float32:
        h = butterflies(x, ROTATION, TILE)
    elif INTERPRETED:  # it multiplies the bits of bfloat16 as if they were integers
        h = tl.dot(x.to(tl.float32), matrix.to(tl.float32), input_precision="ieee")
    else:
        h = tl.dot(x, matrix.to(x.dtype))
    return h * ROTATION**-0.5


@triton.jit
def butterflies(x, ROTATION: tl.constexpr, TILE: tl.constexpr):
    """Sums and differences of a tile (TILE, 128) at distances 1, 2, .. ROTATION / 2.

    A step takes pairs that lie together and puts sums before differences, which turns the places of a group around by a
    bit; after as many steps as a group has bits, they are back. Groups of 16 first, then, moved together, what lies 16
    apart: so many are in one thread's registers at a time.
    """
    INNER: tl.constexpr = 16 if ROTATION >= 16 else ROTATION
    OUTER: tl.constexpr = ROTATION // INNER
    GROUPS: tl.constexpr = TILE * 128 // ROTATION
    y = tl.reshape(x, (GROUPS, OUTER, INNER))
    for i in tl.static_range(4):
        if 2**i < INNER:
            a, b = tl.split(tl.reshape(y, (GROUPS, OUTER, INNER // 2, 2)))
            y = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (GROUPS, OUTER, INNER))
    if OUTER > 1:
        y = tl.permute(y, (0, 2, 1))
        for i in tl.static_range(3):
            if 2**i < OUTER:
                a, b = tl.split(tl.reshape(y, (GROUPS, INNER, OUTER // 2, 2)))
                y = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (GROUPS, INNER, OUTER))
        y = tl.permute(y, (0, 2, 1))
    return tl.reshape(y, (TILE, 128))


@triton.jit
def load_thresholds(table_ptr, BITS: tl.constexpr):
    """The thresholds of up to 4 bits, in registers."""
    n: tl.constexpr = 2**BITS - 1
    t0 = tl.load(table_ptr)
    t1 = tl.load(table_ptr + min(1, n - 1))
    t2 = tl.load(table_ptr + min(2, n - 1))
    t3 = tl.load(table_ptr + min(3, n - 1))
    t4 = tl.load(table_ptr + min(4, n - 1))
    t5 = tl.load(table_ptr + min(5, n - 1))
    t6 = tl.load(table_ptr + min(6, n - 1))
    t7 = tl.load(table_ptr + min(7, n - 1))
    t8 = tl.load(table_ptr + min(8, n - 1))
    t9 = tl.load(table_ptr + min(9, n - 1))
    t10 = tl.load(table_ptr + min(10, n - 1))
    t11 = tl.load(table_ptr + min(11, n - 1))
    t12 = tl.load(table_ptr + min(12, n - 1))
    t13 = tl.load(table_ptr + min(13, n - 1))
    t14 = tl.load(table_ptr + min(14, n - 1))
    return t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14


@triton.jit
def count_reached(v, t, BITS: tl.constexpr):
    """How many of the 2**BITS - 1 rising thresholds `t` are at most v, up to 4 bits; int32."""
    if BITS == 1:
        return (v >= t[0]).to(tl.int32)
    elif BITS == 2:
        a = v >= t[1]
        b = v >= tl.where(a, t[2], t[0])
        return a.to(tl.int32) * 2 + b.to(tl.int32)
    elif BITS == 3:
        a = v >= t[3]
        b = v >= tl.where(a, t[5], t[1])
        c = v >= tl.where(a, tl.where(b, t[6], t[4]), tl.where(b, t[2], t[0]))
        return a.to(tl.int32) * 4 + b.to(tl.int32) * 2 + c.to(tl.int32)
    else:
        a = v >= t[7]
        b = v >= tl.where(a, t[11], t[3])
        c = v >= tl.where(a, tl.where(b, t[13], t[9]), tl.where(b, t[5], t[1]))
        low = tl.where(b, tl.where(c, t[6], t[4]), tl.where(c, t[2], t[0]))
        high = tl.where(b, tl.where(c, t[14], t[12]), tl.where(c, t[10], t[8]))
        d = v >= tl.where(a, high, low)
        return a.to(tl.int32) * 8 + b.to(tl.int32) * 4 + c.to(tl.int32) * 2 + d.to(tl.int32)


@triton.jit
def codes_of(
    v,
    t,
    table_ptr,
    BITS: tl.constexpr,
    CODES: tl.constexpr,
    ADD: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    PLUS: tl.constexpr,
):
    """Centred codes of v, float32 integers; NaN gets the lowest."""
    half: tl.constexpr = 2 ** (BITS - 1)
    if CODES == "table":
        if BITS <= 4:
            count = count_reached(v, t, BITS)
        else:
            count = tl.zeros(v.shape, tl.int32)
            for i in range(2**BITS - 1):
                count += (v >= tl.load(table_ptr + i)).to(tl.int32)
        return (count - half).to(tl.float32)
    elif CODES == "bell":
        place = tl.erf(v * 0.7071067811865476) * half + (half - 0.5)
        return round_even(tl.minimum(tl.maximum(place, 0.0), 2.0 * half - 1.0)) - half
    else:
        return round_even(tl.minimum(tl.maximum(v + ADD, LOW), HIGH)) + PLUS


@triton.jit
def round_even(x):
    """Half to even, of numbers below 2**22: the sum has no room for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def pack_tile(codes, BITS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Unsigned codes (ROWS, WIDTH) int32 -> words (ROWS, WIDTH * BITS / 32) int32, for widths that divide a word."""
    per_word: tl.constexpr = 32 // BITS
    shift = tl.arange(0, per_word) * BITS
    fields = tl.reshape(codes, (ROWS, WIDTH // per_word, per_word)) << shift[None, None, :]
    return tl.sum(fields, axis=2)


@triton.jit
def pack_word(codes, J: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Word J of the BITS words of every 32 codes, (ROWS, WIDTH / 32) int32: for widths that cross words."""
    shift = tl.arange(0, 32) * BITS - 32 * J
    left = tl.where((shift >= 0) & (shift < 32), shift, 0)
    right = tl.where(shift < 0, -shift, 0)
    groups = tl.reshape(codes, (ROWS, WIDTH // 32, 32))
    reaches = ((shift > -BITS) & (shift < 32))[None, None, :]
    fields = tl.where((shift < 0)[None, None, :], groups >> right[None, None, :], groups << left[None, None, :])
    return tl.sum(tl.where(reaches, fields, 0), axis=2)


@triton.jit
def load_by_row(ptr, row, is_row, BY_ROW: tl.constexpr):
    """A number for each row, or one for all, as (ROWS,) float32."""
    if BY_ROW:
        return tl.load(ptr + row, mask=is_row, other=1.0).to(tl.float32)
    else:
        return tl.load(ptr).to(tl.float32) + tl.zeros(row.shape, tl.float32)


@triton.jit
def over_rows(x, SUM: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr):
    """Reduce (TILE,) over each row's SPAN entries, which lie together, and hand every entry its row's result: the sum,
    or the maximum, with NaN in it where there is one."""
    if SPAN == 1:
        return x
    groups = tl.reshape(x, (TILE // SPAN, SPAN))
    if SUM:
        result = tl.sum(groups, axis=1)
    else:
        result = tl.max(groups, axis=1) + tl.sum(groups * 0.0, axis=1)
    return tl.reshape(tl.broadcast_to(result[:, None], (TILE // SPAN, SPAN)), (TILE,))


@triton.jit
def load_matrix(matrix_ptr, BLOCK: tl.constexpr):
    """The rotation's matrix of +-1, (BLOCK, BLOCK) bfloat16."""
    return tl.load(matrix_ptr + tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :])
