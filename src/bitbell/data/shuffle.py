"""Pseudo-random numbers that depend on their arguments only, so that any of them can be computed at any time.

`draw` hashes a few integers to 64 bits. `Permutation` shuffles 0 .. size - 1 without storing the order: a
balanced Feistel network is a bijection of the numbers of 2h bits whatever its round function is, and cycle
walking (apply it again until the result is below `size`) restricts that bijection to the range that is
wanted. With 2h chosen as small as possible the network's domain is at most four times the range, so a few
walks are enough on average.
"""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

_ROUNDS = 8  # four already give a pseudo-random permutation; small domains mix slowly, so twice that


def draw(*numbers: int) -> int:
    """Hash integers to one integer in 0 .. 2**64 - 1, the same on every machine and in every version."""
    text = ",".join(str(int(number)) for number in numbers)
    return int.from_bytes(blake2b(text.encode("ascii"), digest_size=8).digest(), "little")


class Permutation:
    """A shuffled order of 0 .. size - 1 in constant memory; `numbers` (a seed, an epoch) choose which."""

    def __init__(self, size: int, *numbers: int) -> None:
        if size < 1:
            raise ValueError(f"a permutation needs a size of at least 1, got {size}.")
        self.size = size
        half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half = np.uint64(half)
        self._mask = np.uint64((1 << half) - 1)
        self._keys = [np.uint64(draw(*numbers, turn)) for turn in range(_ROUNDS)]

    def __call__(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return what stands at these positions (integers in 0 .. size - 1), as int64 of the same length."""
        places = np.asarray(positions, dtype=np.int64)
        if places.size and not (places.min() >= 0 and places.max() < self.size):
            raise ValueError(f"positions must lie in 0 .. {self.size - 1}, got {places.min()} .. {places.max()}.")
        values = self._feistel(places.astype(np.uint64))
        while (outside := values >= self.size).any():
            values[outside] = self._feistel(values[outside])
        return values.astype(np.int64)

    def _feistel(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """Scatter 64 bits over 64 bits (multiplications by odd constants and shifts, wrapping around)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
