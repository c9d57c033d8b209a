"""A tensor -> codes, levels, gradients. `base` is the contract; then one file a method.

>>> from bitbell.quantizers import make_quantizer
>>> make_quantizer("bbq", bits=2, rows=640).levels.tolist()
[-1.5, -0.5, 0.5, 1.5]
"""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from bitbell.quantizers.absmax import AbsMax
from bitbell.quantizers.base import Quantized, Quantizer, code_histogram, entropy_of
from bitbell.quantizers.bbq import BBQ
from bitbell.quantizers.lsq import LSQ
from bitbell.quantizers.lsq_plus import LSQPlus
from bitbell.quantizers.n2uq import N2UQ, N2UQActivations
from bitbell.quantizers.narrow import Narrow
from bitbell.quantizers.normal_float import NormalFloat
from bitbell.quantizers.pact import PACT
from bitbell.quantizers.quest import QuEST
from bitbell.quantizers.quest_fp4 import QuESTFP4
from bitbell.quantizers.seq import SEQ
from bitbell.quantizers.ternary import Ternary

METHODS: dict[str, type[Quantizer]] = {
    kind.method: kind
    for kind in (
        BBQ,
        QuEST,
        QuESTFP4,
        LSQ,
        LSQPlus,
        PACT,
        SEQ,
        N2UQ,
        N2UQActivations,
        NormalFloat,
        AbsMax,
        Narrow,
        Ternary,
    )
}


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
    known = known_options(kind)
    wrong = [name for name in options if name not in known]
    if wrong:
        raise ValueError(f"{method} has no option {wrong[0]!r}; it has {', '.join(known)}")
    return kind(**options)


def known_options(kind: type[Quantizer]) -> list[str]:
    """Names of the arguments that a method's quantizer is made from."""
    return list(inspect.signature(kind.__init__).parameters)[1:]


__all__ = [
    "BBQ",
    "LSQ",
    "METHODS",
    "N2UQ",
    "PACT",
    "SEQ",
    "AbsMax",
    "LSQPlus",
    "N2UQActivations",
    "Narrow",
    "NormalFloat",
    "QuEST",
    "QuESTFP4",
    "Quantized",
    "Quantizer",
    "Ternary",
    "code_histogram",
    "entropy_of",
    "find_method",
    "known_options",
    "make_quantizer",
]
