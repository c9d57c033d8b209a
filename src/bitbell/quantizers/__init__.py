"""A tensor -> codes, levels, gradients. `base` is the contract; then one file a method.

>>> from bitbell.quantizers import make_quantizer
>>> make_quantizer("bbq", bits=2, rows=640).levels.tolist()
[-1.5, -0.5, 0.5, 1.5]
"""

from __future__ import annotations

import difflib
import inspect
from functools import lru_cache
from types import NoneType
from typing import Any, get_args, get_type_hints

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
    if isinstance(name, str) and name in METHODS:
        return METHODS[name]
    close = difflib.get_close_matches(str(name).lower(), METHODS, n=1)
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
    for name, value in options.items():
        if name != "bits":  # has an error of its own
            _check_type(method, name, value, _types_of_options(method)[name])
    return kind(**options)


def known_options(kind: type[Quantizer]) -> list[str]:
    """Names of the arguments that a method's quantizer is made from."""
    return list(inspect.signature(kind.__init__).parameters)[1:]


@lru_cache
def _types_of_options(method: str) -> dict[str, tuple[type, ...]]:
    """Name -> types that the argument may have, from its annotation."""
    return {name: get_args(hint) or (hint,) for name, hint in get_type_hints(METHODS[method].__init__).items()}


def _check_type(method: str, name: str, value: object, allowed: tuple[type, ...]) -> None:
    """Raise ValueError unless `value` has one of the types: options also come from names of recipes and from files."""
    # A bool is an int to Python. The bound keeps out NaN, infinity, and integers that no float can hold.
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and -1e9 < value < 1e9
    fits = {
        bool: isinstance(value, bool),
        int: is_number and isinstance(value, int),
        float: is_number,
        str: isinstance(value, str),
        NoneType: value is None,
    }
    if not any(fits[kind] for kind in allowed):
        words = {bool: "true or false", int: "an integer", float: "a number", str: "a name", NoneType: "none"}
        wanted = " or ".join(words[kind] for kind in allowed)
        raise ValueError(f"{name} of {method} must be {wanted}, got {name}={value!r}")


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
