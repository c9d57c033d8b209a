"""Products of packed weights in Triton; `product.py` launches them.

    few_kernel     up to 4 rows of int8 inputs: a program multiplies a few outputs' rows of planes, in registers
    many_kernel    tiles on tensor cores: int8 with int32 sums, or floats with float32 sums; K may be split
    finish_kernel  adds the parts of a split K, then the same epilogue
    sums_kernel    sums of the rows of int8 inputs, which fold the weight's zero point

Decoding a row moves bytes: N K bits / 8 of weights, and little else. 4096 outputs of 11008 inputs at 2 bits are
11.3 MB: 2.6 us at the 4.3 TB/s that an H200 copies with, against 21 us for bfloat16. Arithmetic must not be slower than
that. A shift, a mask and a dp4a for 4 codes are 34 million operations of a lane, 2.3 us of the chip's integer lanes; so
fields within half a byte are masked only, and their sums, 2**bits apart, are shifted once at the end: 2.25 operations
for 4 codes of 2 bits, 1.7 us.

Prefill is arithmetic: 4096 rows through a 4096-wide layer are 137 billion operations, 69 us at the 1979 TOP/s of int8
tensor cores (bfloat16 has half of that). What else it costs, for a tile of 128 rows by 256 outputs:
- Bytes. From the L2 cache come 128 + 256 bits / 8 bytes for 32768 products: 0.5 GB in all at 4 bits (int8 weights:
  0.8), 80 us at some 6 to 7 TB/s, behind the arithmetic. This is what packed weights save here.
- Unpacking, in registers: weights are the product's left operand, since that one may come from registers. A shift and
  a mask for 4 codes are 16 thousand operations of a lane for 128 columns, 256 clocks where the product takes 1024.
- Waiting. Triton waits for every integer product before it goes on (only float32 sums may stay in flight). Two groups
  of four warps take turns on the tensor cores, and 128 columns a product make the waits few.
Compiled and looked at, but never run on a GPU: docs/gpu.md has what the compiler made of it.
"""

# Triton's language has no (*tuple, item), and its functions take tensors and constants alike.
# ruff: noqa: RUF005
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

# Pieces ---------------------------------------------------------------------------------------------------------------


@triton.constexpr_function
def _field_assembly(shift, mask):
    """Four bytes at a time: shift right (left, if negative), mask."""
    how = f"shr.u32 t, $1, {shift}" if shift >= 0 else f"shl.b32 t, $1, {-shift}"
    return f"{{ .reg .b32 t; {how}; and.b32 $0, t, {mask * 0x01010101}; }}"


@triton.jit
def _field(w, SHIFT: tl.constexpr, MASK: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Bits of the bytes of a tile: uint8 -> int8."""
    if ASSEMBLY:
        TEXT: tl.constexpr = _field_assembly(SHIFT, MASK)
        return tl.inline_asm_elementwise(TEXT, "=r,r", [w], dtype=tl.int8, is_pure=True, pack=4)
    else:
        if SHIFT >= 0:
            return ((w >> SHIFT) & MASK).to(tl.int8)
        else:
            return ((w << -SHIFT) & MASK).to(tl.int8)


@triton.jit
def _tile_codes(low, high, F: tl.constexpr, BITS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Codes of field F of a tile of bytes, int8. 3 bits: `low` is the plane that holds its two low bits."""
    if BITS == 8:
        return low
    elif BITS == 3:
        return _field(low, F // 2 * 2, 3, ASSEMBLY) | _field(high, F - 2, 4, ASSEMBLY)
    else:
        return _field(low, F * BITS, 2**BITS - 1, ASSEMBLY)


@triton.jit
def _word_codes(low, high, F: tl.constexpr, BITS: tl.constexpr, SPREAD: tl.constexpr):
    """Codes of field F of words of four bytes, int32; with SPREAD > 1, times 2**(BITS * (F % SPREAD))."""
    if BITS == 8:
        return low
    elif BITS == 3:
        two = (low >> (F // 2 * 2)) & 0x03030303
        if F < 2:
            return two | ((high << (2 - F)) & 0x04040404)
        else:
            return two | ((high >> (F - 2)) & 0x04040404)
    else:
        MASK: tl.constexpr = (2**BITS - 1) * 0x01010101
        return (low >> (F // SPREAD * SPREAD * BITS)) & (MASK << (F % SPREAD * BITS))


@triton.jit
def _dp4a(x, w, total, ASSEMBLY: tl.constexpr):
    """total plus the products of the four signed bytes of x and w."""
    if ASSEMBLY:
        TEXT: tl.constexpr = "dp4a.s32.s32 $0, $1, $2, $3;"
        return tl.inline_asm_elementwise(TEXT, "=r,r,r,r", [x, w, total], dtype=tl.int32, is_pure=True, pack=1)
    else:
        for i in tl.static_range(4):
            total += ((x << (24 - 8 * i)) >> 24) * ((w << (24 - 8 * i)) >> 24)
        return total


@triton.jit
def _output(
    total,
    x_sum,
    w_sum,
    w_scale,
    x_step,
    x_zero,
    w_zero,
    columns,
    constant,
    x_offset_ptr,
    w_offset,
    bias,
    BASE: tl.constexpr,
    WIDE: tl.constexpr,
    X_OFFSET: tl.constexpr,
    W_OFFSET: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Sums of products with unsigned codes (BASE above centred ones) -> outputs float32, in the reference's order."""
    total -= BASE * x_sum
    if WIDE:
        y = total.to(tl.float64) - w_zero * x_sum.to(tl.float64) - x_zero * w_sum.to(tl.float64) + constant
        y = y.to(tl.float32)
    else:
        y = total.to(tl.float32) - w_zero * x_sum.to(tl.float32) - x_zero * w_sum.to(tl.float32) + constant
    y = y * w_scale * x_step
    if X_OFFSET:
        x_offset = tl.load(x_offset_ptr)
        y = y + x_offset * ((w_sum.to(tl.float32) - columns * w_zero) * w_scale)
    if W_OFFSET:
        y = y + (x_sum.to(tl.float32) - columns * x_zero) * x_step * w_offset
    if X_OFFSET and W_OFFSET:
        y = y + columns * x_offset * w_offset
    if BIAS:
        y = y + bias
    return y


# Kernels --------------------------------------------------------------------------------------------------------------


@triton.jit
def few_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    sums_ptr,
    scale_ptr,
    step_ptr,
    x_offset_ptr,
    offset_ptr,
    bias_ptr,
    x_zero,
    w_zero,
    columns,
    constant,
    N,
    X_WORDS,
    WORDS,
    step_stride,
    M: tl.constexpr,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    SPREAD: tl.constexpr,
    BASE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    EPILOGUE: tl.constexpr,
    WIDE: tl.constexpr,
    X_OFFSET: tl.constexpr,
    W_OFFSET: tl.constexpr,
    BIAS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """M rows of int8 inputs as words of four, times OUTPUTS rows of planes as words; all in vectors of BLOCK words."""
    first = tl.program_id(0) * OUTPUTS
    PLANES: tl.constexpr = 3 if BITS == 3 else 1
    sums = ()
    for _ in tl.static_range(OUTPUTS * M * SPREAD):
        sums = sums + (tl.zeros((BLOCK,), tl.int32),)
    x_sums = ()
    for _ in tl.static_range(M):
        x_sums = x_sums + (tl.zeros((BLOCK,), tl.int32),)
    # What comes after the sums is asked for before them: a program waits for memory once.
    scales = ()
    w_sums = ()
    if EPILOGUE:
        for r in tl.static_range(OUTPUTS):
            scales = scales + (tl.load(scale_ptr + first + r, mask=first + r < N, other=0.0),)
            w_sums = w_sums + (tl.load(sums_ptr + first + r, mask=first + r < N, other=0),)
    for start in range(0, WORDS, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = j < WORDS
        xs = ()
        for i in tl.static_range(M * FIELDS):
            k = (i % FIELDS) * WORDS + j
            xs = xs + (tl.load(x_ptr + (i // FIELDS) * X_WORDS + k, mask=inside & (k < X_WORDS), other=0),)
        added = ()
        for m in tl.static_range(M):
            total = x_sums[m]
            for f in tl.static_range(FIELDS):
                total = _dp4a(xs[m * FIELDS + f], tl.full((BLOCK,), 0x01010101, tl.int32), total, ASSEMBLY)
            added = added + (total,)
        x_sums = added
        added = ()
        for r in tl.static_range(OUTPUTS):
            row = w_ptr + (first + r).to(tl.int64) * (PLANES * WORDS) + j
            mask = j < tl.where(first + r < N, WORDS, 0)
            low = tl.load(row, mask=mask, other=0, eviction_policy="evict_first")
            odd = low
            high = low
            if BITS == 3:
                odd = tl.load(row + WORDS, mask=mask, other=0, eviction_policy="evict_first")
                high = tl.load(row + 2 * WORDS, mask=mask, other=0, eviction_policy="evict_first")
            for m in tl.static_range(M):
                for p in tl.static_range(SPREAD):
                    total = sums[(r * M + m) * SPREAD + p]
                    for h in tl.static_range(FIELDS // SPREAD):
                        if BITS == 3 and (h * SPREAD + p) % 2:
                            codes = _word_codes(odd, high, h * SPREAD + p, BITS, SPREAD)
                        else:
                            codes = _word_codes(low, high, h * SPREAD + p, BITS, SPREAD)
                        total = _dp4a(xs[m * FIELDS + h * SPREAD + p], codes, total, ASSEMBLY)
                    added = added + (total,)
        sums = added
    for r in tl.static_range(OUTPUTS):
        n = first + r
        mask = n < N
        for m in tl.static_range(M):
            total = sums[(r * M + m) * SPREAD]
            for p in tl.static_range(1, SPREAD):
                total += sums[(r * M + m) * SPREAD + p] >> (p * BITS)
            total = tl.sum(total)
            x_sum = tl.sum(x_sums[m])
            if EPILOGUE:
                w_scale = scales[r]
                w_offset = w_scale
                bias = w_scale
                if W_OFFSET:
                    w_offset = tl.load(offset_ptr + n, mask=mask, other=0.0)
                if BIAS:
                    bias = tl.load(bias_ptr + n, mask=mask, other=0.0)
                y = _output(
                    total,
                    x_sum,
                    w_sums[r],
                    w_scale,
                    tl.load(step_ptr + m * step_stride),
                    x_zero,
                    w_zero,
                    columns,
                    constant,
                    x_offset_ptr,
                    w_offset,
                    bias,
                    BASE,
                    WIDE,
                    X_OFFSET,
                    W_OFFSET,
                    BIAS,
                )
                tl.store(out_ptr + m * N + n, y.to(out_ptr.dtype.element_ty), mask=mask)
            else:
                tl.store(out_ptr + m * N + n, total - BASE * x_sum, mask=mask)


@triton.jit
def _finished(
    total,
    m,
    n,
    x_sums_ptr,
    sums_ptr,
    scale_ptr,
    step_ptr,
    x_offset_ptr,
    offset_ptr,
    bias_ptr,
    x_zero,
    w_zero,
    columns,
    constant,
    M,
    N,
    step_stride,
    BASE: tl.constexpr,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    X_OFFSET: tl.constexpr,
    W_OFFSET: tl.constexpr,
    BIAS: tl.constexpr,
):
    """The epilogue of a tile (outputs, rows). KIND: "sums" (int32 products of centred codes), "codes" or "floats"."""
    in_m, in_n = m < M, n < N
    if KIND == "sums":
        return total - BASE * tl.load(x_sums_ptr + m, mask=in_m, other=0)[None, :]
    scale = tl.load(scale_ptr + n, mask=in_n, other=0.0)[:, None]
    w_offset = scale
    bias = scale
    if W_OFFSET:
        w_offset = tl.load(offset_ptr + n, mask=in_n, other=0.0)[:, None]
    if BIAS:
        bias = tl.load(bias_ptr + n, mask=in_n, other=0.0)[:, None]
    if KIND == "floats":
        y = total * scale
        if W_OFFSET:
            y = y + tl.load(x_sums_ptr + m, mask=in_m, other=0.0)[None, :] * w_offset
        if BIAS:
            y = y + bias
        return y
    x_sum = tl.load(x_sums_ptr + m, mask=in_m, other=0)[None, :]
    w_sum = tl.load(sums_ptr + n, mask=in_n, other=0)[:, None]
    step = tl.load(step_ptr + m * step_stride, mask=in_m, other=0.0)[None, :]
    return _output(
        total,
        x_sum,
        w_sum,
        scale,
        step,
        x_zero,
        w_zero,
        columns,
        constant,
        x_offset_ptr,
        w_offset,
        bias,
        BASE,
        WIDE,
        X_OFFSET,
        W_OFFSET,
        BIAS,
    )


@triton.jit
def many_kernel(
    x_ptr,
    w_ptr,
    table_ptr,
    out_ptr,
    x_sums_ptr,
    sums_ptr,
    scale_ptr,
    step_ptr,
    x_offset_ptr,
    offset_ptr,
    bias_ptr,
    x_zero,
    w_zero,
    columns,
    constant,
    M,
    N,
    K,
    WIDTH,
    step_stride,
    BITS: tl.constexpr,
    HALF: tl.constexpr,
    FIELDS: tl.constexpr,
    BASE: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BYTES: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    TABLE: tl.constexpr,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    X_OFFSET: tl.constexpr,
    W_OFFSET: tl.constexpr,
    BIAS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """A tile of OUTPUTS x ROWS: planes (OUTPUTS, BYTES), unpacked field by field, times inputs (BYTES, ROWS).

    Tiles go in groups of GROUP along the rows, whose inputs and weights stay in the L2 cache. With PARTS > 1, program
    (., p) takes every PARTS-th step along K and stores its sums as they are: (PARTS, M, N).
    """
    PLANES: tl.constexpr = 3 if BITS == 3 else 1
    tiles_m, tiles_n = tl.cdiv(M, ROWS), tl.cdiv(N, OUTPUTS)
    program = tl.program_id(0)
    group = program // (GROUP * tiles_n) * GROUP
    in_group = tl.minimum(tiles_m - group, GROUP)
    m = (group + program % (GROUP * tiles_n) % in_group) * ROWS + tl.arange(0, ROWS)
    n = program % (GROUP * tiles_n) // in_group * OUTPUTS + tl.arange(0, OUTPUTS)
    # Rows past the end are others once more; their outputs are not stored.
    x_rows = x_ptr + (m % M).to(tl.int64)[None, :] * K
    w_rows = w_ptr + (n % N).to(tl.int64)[:, None] * (PLANES * WIDTH)
    j = tl.arange(0, BYTES)
    if KIND == "floats":
        acc = tl.zeros((OUTPUTS, ROWS), tl.float32)
    else:
        acc = tl.zeros((OUTPUTS, ROWS), tl.int32)
    for start in range(tl.program_id(1) * BYTES, WIDTH, PARTS * BYTES):
        at = start + j
        w = w_rows + at[None, :]
        # A byte past a plane is a byte of the next one: masked to code 0, and its inputs to 0.
        if EVEN:
            low = tl.load(w)
        else:
            low = tl.load(w, mask=(at < WIDTH)[None, :], other=0)
        odd = low
        high = low
        if BITS == 3:
            if EVEN:
                odd = tl.load(w + WIDTH)
                high = tl.load(w + 2 * WIDTH)
            else:
                odd = tl.load(w + WIDTH, mask=(at < WIDTH)[None, :], other=0)
                high = tl.load(w + 2 * WIDTH, mask=(at < WIDTH)[None, :], other=0)
        for f in tl.static_range(FIELDS):
            k = f * WIDTH + at
            if EVEN:
                x = tl.load(x_rows + k[:, None])
            else:
                x = tl.load(x_rows + k[:, None], mask=((at < WIDTH) & (k < K))[:, None], other=0)
            if BITS == 3 and f % 2:
                codes = _tile_codes(odd, high, f, BITS, ASSEMBLY)
            else:
                codes = _tile_codes(low, high, f, BITS, ASSEMBLY)
            if KIND == "floats":
                if TABLE:
                    levels = tl.load(table_ptr + (codes.to(tl.int32) + HALF - BASE))
                else:
                    levels = codes.to(tl.float32) - (w_zero + BASE)
                if not ASSEMBLY:  # the interpreter has no bfloat16 products
                    acc = tl.dot(levels.to(x.dtype).to(tl.float32), x.to(tl.float32), acc)
                elif x.dtype == tl.float32:
                    acc = tl.dot(levels, x, acc, input_precision="tf32x3")
                else:
                    acc = tl.dot(levels.to(x.dtype), x, acc)
            else:
                acc = tl.dot(codes, x, acc, out_dtype=tl.int32)
    mask = (m < M)[:, None] & (n < N)[None, :]
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    if PARTS > 1:
        out = out_ptr + tl.program_id(1).to(tl.int64) * M * N
        tl.store(out + place, tl.trans(acc), mask=mask)
    else:
        y = _finished(
            acc,
            m,
            n,
            x_sums_ptr,
            sums_ptr,
            scale_ptr,
            step_ptr,
            x_offset_ptr,
            offset_ptr,
            bias_ptr,
            x_zero,
            w_zero,
            columns,
            constant,
            M,
            N,
            step_stride,
            BASE,
            KIND,
            WIDE,
            X_OFFSET,
            W_OFFSET,
            BIAS,
        )
        tl.store(out_ptr + place, tl.trans(y.to(out_ptr.dtype.element_ty)), mask=mask)


@triton.jit
def finish_kernel(
    parts_ptr,
    out_ptr,
    x_sums_ptr,
    sums_ptr,
    scale_ptr,
    step_ptr,
    x_offset_ptr,
    offset_ptr,
    bias_ptr,
    x_zero,
    w_zero,
    columns,
    constant,
    M,
    N,
    step_stride,
    BASE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    X_OFFSET: tl.constexpr,
    W_OFFSET: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Adds (PARTS, M, N) sums, always in the same order, and finishes BLOCK outputs of one row."""
    m = tl.program_id(1) + tl.arange(0, 1)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = n[:, None] + m[None, :] * N
    mask = (n < N)[:, None]
    total = tl.load(parts_ptr + place, mask=mask, other=0)
    for _ in range(1, PARTS):
        parts_ptr += M * N
        total += tl.load(parts_ptr + place, mask=mask, other=0)
    y = _finished(
        total,
        m,
        n,
        x_sums_ptr,
        sums_ptr,
        scale_ptr,
        step_ptr,
        x_offset_ptr,
        offset_ptr,
        bias_ptr,
        x_zero,
        w_zero,
        columns,
        constant,
        M,
        N,
        step_stride,
        BASE,
        KIND,
        WIDE,
        X_OFFSET,
        W_OFFSET,
        BIAS,
    )
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sums_kernel(x_ptr, out_ptr, K, BLOCK: tl.constexpr):
    """The sum of a row of int8, int32."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + row * K + k, mask=k < K, other=0).to(tl.int32)
    tl.store(out_ptr + row, tl.sum(total))
