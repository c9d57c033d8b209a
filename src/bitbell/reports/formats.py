"""Numbers as text, the same way everywhere: a dash for what is not known, thin spaces between thousands."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

DASH = "\N{EN DASH}"
THIN = "\N{NARROW NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"
INFINITY = "\N{INFINITY}"


def decimals(places: int) -> Callable[[float | None], str]:
    """A writer with a fixed number of decimals; from 10 000 on the decimals say nothing and fall away."""
    return lambda value: _write(value, lambda x: _grouped(x, 0 if abs(x) >= 10_000 else places))


def significant(digits: int) -> Callable[[float | None], str]:
    """A writer with at least `digits` significant digits, in scientific notation only below 0.001."""

    def write(x: float) -> str:
        if x == 0:
            return "0"
        if abs(x) < 1e-3:
            return f"{x:.{digits - 1}e}".replace("-", MINUS)
        return _grouped(x, max(0, digits - 1 - math.floor(math.log10(abs(x)))))

    return lambda value: _write(value, write)


def percent(value: float | None) -> str:
    """A share in per cent, without the sign."""
    return decimals(2)(None if value is None else 100 * value)


def count(value: float | None) -> str:
    """An integer."""
    return _write(value, lambda x: _grouped(x, 0))


def millions(value: float | None) -> str:
    return significant(3)(None if value is None else value / 1e6)


def megabytes(value: float | None) -> str:
    """Bytes as MB (10**6 bytes)."""
    return millions(value)


_METHODS = {None: "full precision", "bbq": "BBQ", "bbq-vision": "BBQ-Vision", "quest": "QuEST", "lsq": "LSQ"}
_METHODS |= {"quest-fp4": "QuEST-FP4", "lsq-plus": "LSQ+", "pact": "PACT", "seq": "SEQ", "n2uq": "N2UQ", "nf": "NF"}


def method(name: str | None) -> str:
    """A quantization method as its authors write it."""
    return _METHODS.get(name, str(name))


def plain(value: Any) -> str:
    """Any JSON value, strings without quotes; a dash for None."""
    if value is None:
        return DASH
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def shorten(text: str, length: int) -> str:
    """At most `length` characters: the middle gives way, since names differ at their ends."""
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return text[: length - 1 - tail] + "\N{HORIZONTAL ELLIPSIS}" + text[len(text) - tail :]


def _grouped(value: float, places: int) -> str:
    text = f"{value:,.{places}f}"
    # Four digits read well without a gap; five do not.
    text = text.replace(",", THIN if abs(value) >= 10_000 else "")
    return text.replace("-", MINUS)


def _write(value: float | None, how: Callable[[float], str]) -> str:
    if value is None:
        return DASH
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return INFINITY if value > 0 else MINUS + INFINITY
    return how(value)
