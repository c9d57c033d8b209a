"""A tensor -> codes, levels, gradients. `base` is the contract; then one file a method.

>>> from bitbell.quantizers import make_quantizer
>>> make_quantizer("bbq", bits=2, rows=640).levels.tolist()
[-1.5, -0.5, 0.5, 1.5]
"""

from __future__ import annotations

import difflib
from typing import Any

from bitbell.quantizers.base import Quantized, Quantizer, code_histogram, entropy_of
from bitbell.quantizers.bbq import BBQ
from bitbell.quantizers.lsq import LSQ
from bitbell.quantizers.quest import QuEST

METHODS: dict[str, type[Quantizer]] = {"bbq": BBQ, "quest": QuEST, "lsq": LSQ}


def find_method(name: str) -> type[Quantizer]:
    """The quantizer class of a method's name. Raises ValueError with a suggestion for an unknown one."""
    if name in METHODS:
        return METHODS[name]
    close = difflib.get_close_matches(name.lower(), METHODS, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown method {name!r}; there are {', '.join(sorted(METHODS))}.{hint}")


def make_quantizer(method: str, **options: Any) -> Quantizer:
    """Build a quantizer from its method's name and options. Raises ValueError, naming what there is, for a wrong
    option."""
    kind = find_method(method)
    import inspect

    known = list(inspect.signature(kind.__init__).parameters)[1:]
    wrong = [name for name in options if name not in known]
    if wrong:
        raise ValueError(f"{method} has no option {wrong[0]!r}; it has {', '.join(known)}")
    return kind(**options)


__all__ = [
    "BBQ",
    "LSQ",
    "METHODS",
    "QuEST",
    "Quantized",
    "Quantizer",
    "code_histogram",
    "entropy_of",
    "find_method",
    "make_quantizer",
]
