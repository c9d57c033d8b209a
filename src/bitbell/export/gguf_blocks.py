"""Codes of a weight as the blocks of GGUF's types, bit by bit: levels that a type has are kept exactly.

    type    values of a block        used for (half: levels shifted by a half, such as BBQ's at 1 and 2 bits)
    Q4_0    d (q - 8), 32 values     4 bits; 1 to 3 bits, half or not, where the width suits no other
    Q4_K    d sc q - dmin m, 256     4 bits, half
    Q3_K    d (sc - 32) (q - 4), 256 3 bits
    Q2_K    d sc q - dmin m, 256     2 bits, half or not
    TQ2_0   d (q - 1), 256           ternary
    Q1_0    +d or -d, 128            1 bit, half

Here sc is 1 and d (float16) is the step of the row, or half of it where levels are doubled; an offset of halves is
m dmin with dmin = d / 2, which float16 holds exactly. Source: ggml's block structures, as the package `gguf` reads
them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Blocks(NamedTuple):
    """A type's name, how many values share a block, and: codes (O, I) uint8, step (O, 1) float16 -> bytes (O, n)."""

    type: str
    width: int
    pack: Callable[[Array, Array], Array]


def choose_blocks(bits: int, zero_point: float, ternary: bool, width: int) -> Blocks | None:
    """The smallest type that has the levels code - 2**(bits-1) - zero_point in rows of `width`; None if none has."""
    below = 2 ** (bits - 1) + zero_point  # level 0 lies so far above code 0
    doubled = 2 * below
    if not float(doubled).is_integer() or not 0 <= doubled <= 16:
        return None
    found = [kind for kind in _candidates(bits, int(doubled), ternary) if width % kind.width == 0]
    return found[0] if found else None


def _candidates(bits: int, doubled: int, ternary: bool) -> list[Blocks]:
    """Those that have the levels, the smallest first; doubled: twice the level of code 0, negated."""
    made, half = [], 2**bits
    if bits == 1 and doubled == 1:
        made.append(Blocks("Q1_0", 128, _q1_0))
    if ternary and bits == 2 and doubled == 4:
        made.append(Blocks("TQ2_0", 256, _tq2_0))
    if bits <= 2:
        made.append(Blocks("Q2_K", 256, lambda codes, d: _q2_k(codes, d, doubled)))
    if bits <= 3 and doubled % 2 == 0 and doubled <= 8 and half - doubled // 2 <= 4:
        made.append(Blocks("Q3_K", 256, lambda codes, d: _q3_k(codes + np.uint8(4 - doubled // 2), d)))
    if doubled % 2 == 0 and half - doubled // 2 <= 8:
        made.append(Blocks("Q4_0", 32, lambda codes, d: _q4_0(codes + np.uint8(8 - doubled // 2), d)))
    if bits <= 3 and doubled <= 8 and 2 * (half - 1) - doubled <= 7:
        odd = Blocks("Q4_0", 32, lambda codes, d: _q4_0(2 * codes + np.uint8(8 - doubled), d / np.float16(2)))
        made.append(odd)
    if bits <= 4 and doubled <= 15:
        made.append(Blocks("Q4_K", 256, lambda codes, d: _q4_k(codes, d, doubled)))
    return made


def _scales(d: Array, blocks: int) -> Array:
    """(O, 1) float16 -> its bytes for every block (O, blocks, 2)."""
    return np.repeat(d.astype("<f2").view(np.uint8)[:, None, :], blocks, 1)


def _joined(*parts: Array) -> Array:
    """Parts (O, blocks, n) of the blocks -> rows of bytes (O, all)."""
    return np.concatenate(parts, axis=2).reshape(len(parts[0]), -1)


def _same(value: int, count: int, like: Array) -> Array:
    return np.full((*like.shape[:2], count), value, dtype=np.uint8)


def _fields(values: Array, bits: int) -> Array:
    """Values (O, blocks, chunks, fields, n): field f of a byte holds value n of row f, lowest bits first."""
    shift = (bits * np.arange(values.shape[3], dtype=np.uint8)).reshape(-1, 1)
    packed = np.bitwise_or.reduce(values.astype(np.uint8) << shift, axis=3)
    return packed.reshape(*packed.shape[:2], -1)


def _two_bits(codes: Array) -> Array:
    """Codes below 4 (O, I) -> (O, blocks, 64): two halves of 128, four rows of 32 in the fields of a byte."""
    return _fields(codes.reshape(len(codes), -1, 2, 4, 32), 2)


def _q1_0(codes: Array, d: Array) -> Array:
    bits = np.packbits(codes.reshape(len(codes), -1, 128), axis=2, bitorder="little")
    return _joined(_scales(d / np.float16(2), bits.shape[1]), bits)


def _tq2_0(codes: Array, d: Array) -> Array:
    q = _two_bits(codes - np.uint8(1))  # centred -1, 0, 1 are codes 1, 2, 3
    return _joined(q, _scales(d, q.shape[1]))


def _q2_k(codes: Array, d: Array, minimum: int) -> Array:
    q = _two_bits(codes)
    return _joined(_same(1 | minimum << 4, 16, q), q, _scales(d, q.shape[1]), _scales(d / np.float16(2), q.shape[1]))


def _q3_k(values: Array, d: Array) -> Array:
    low = _two_bits(values & 3)
    high = _fields((values >> 2).reshape(len(values), -1, 1, 8, 32), 1)
    return _joined(high, low, _same(0x11, 8, low), _same(0xAA, 4, low), _scales(d, low.shape[1]))  # sixteen times 33


def _q4_0(values: Array, d: Array) -> Array:
    q = _fields(values.reshape(len(values), -1, 1, 2, 16), 4)
    return _joined(_scales(d, q.shape[1]), q)


def _q4_k(codes: Array, d: Array, minimum: int) -> Array:
    q = _fields(codes.reshape(len(codes), -1, 4, 2, 32), 4)
    scales = _scales(d, q.shape[1]), _scales(d / np.float16(2), q.shape[1])
    return _joined(*scales, _same(1, 4, q), _same(minimum, 4, q), _same(1 | minimum << 4, 4, q), q)
