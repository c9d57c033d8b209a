"""Where codes change: a rising formula as the float32 numbers at which it reaches each code.

A kernel that compares with them gives the very codes of the formula, whatever that is made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

Codes = Callable[[Tensor], Tensor]
LARGEST = 1e30  # that is looked for; sums of such numbers are still finite


def find_thresholds(codes: Codes, bits: int) -> Tensor:
    """The smallest float32 at which `codes` (elementwise, rising, centred) reaches each code but the lowest.

    (2**bits - 1,) float32; -inf for a code that everything reaches, inf for one that nothing does.
    """
    wanted = torch.arange(1, 2**bits, device="cpu") - 2 ** (bits - 1)
    low = torch.full_like(wanted, -_place(LARGEST))
    high = torch.full_like(wanted, _place(LARGEST))
    always, never = codes(_float_at(low)) >= wanted, codes(_float_at(high)) < wanted
    for _ in range(33):  # halves 2**32 places down to one
        middle = (low + high).div(2, rounding_mode="floor")
        reached = codes(_float_at(middle)) >= wanted
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    found = _float_at(high)
    return found.masked_fill(always, -torch.inf).masked_fill(never, torch.inf)


def bell_codes(h: Tensor, inverse_rms: Tensor | float, bits: int) -> Tensor:
    """Centred codes (float) of equally likely bins: clip(round(n Phi(h * inverse_rms) - 1/2)) - n / 2, n = 2**bits."""
    half = 2 ** (bits - 1)
    return (h * (inverse_rms * math.sqrt(0.5))).erf().mul(half).add(half - 0.5).round().clamp(0, 2 * half - 1) - half


@lru_cache(maxsize=1024)
@torch.no_grad()
def bell_thresholds(bits: int, inverse_rms: float = 1.0) -> Tensor:
    """Where `bell_codes` change, (2**bits - 1,) float32 on the CPU."""
    with torch.inference_mode(False):
        return find_thresholds(lambda h: bell_codes(h, float32(inverse_rms), bits), bits)


@lru_cache(maxsize=1024)
@torch.no_grad()
def bin_thresholds(bits: int, inverse_rms: float = 1.0) -> Tensor:
    """Those of 256 equally likely bins, (255,) float32, with those of `bits` among them to the last bit."""
    with torch.inference_mode(False):
        found, every = bell_thresholds(8, inverse_rms).clone(), 2 ** (8 - bits)
        found[every - 1 :: every] = bell_thresholds(bits, inverse_rms)
        return found


@lru_cache(maxsize=64)
@torch.no_grad()
def bin_means(bits: int, zero_point: float) -> Tensor:
    """Of each of 256 equally likely bins of a Gaussian v: the means of v and of exp(-v**2 / 2), and the level of the
    code of `bits` that it belongs to; (3, 256) float32 on the CPU."""
    with torch.inference_mode(False):
        edges = torch.linspace(-1, 1, 257, dtype=torch.float64, device="cpu").erfinv() * math.sqrt(2)
        density = torch.exp(-0.5 * edges**2) / math.sqrt(2 * math.pi)
        # exp(-v**2 / 2) phi(v) is 1 / sqrt(2) times the density of a Gaussian of variance 1/2.
        place = 256 * (density[:-1] - density[1:])
        slope = 256 / math.sqrt(2) * 0.5 * edges.erf().diff()
        level = torch.arange(-128, 128, device="cpu").div(2 ** (8 - bits), rounding_mode="floor") - zero_point
        return torch.stack([place, slope, level.double()]).float()


def float32(x: float) -> Tensor:
    """(1,), whatever torch's default type and device are."""
    return torch.tensor([x], dtype=torch.float32, device="cpu")


def _place(x: float) -> int:
    """Where a positive float32 stands among the floats in rising order; 0.0 has place 0."""
    return int(float32(x).view(torch.int32))


def _float_at(place: Tensor) -> Tensor:
    return torch.where(place < 0, float32(-1.0), float32(1.0)) * place.abs().to(torch.int32).view(torch.float32)
