"""Methods x bits x seeds x learning rates -> one fair table. docs/compare.md has the rules.

sweep file --sweep--> settings --plan--> trials --claims, work--> run folders --table, pictures, page--> results
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitbell.comparison.run import SweepResult, run_sweep
    from bitbell.comparison.sweep import Sweep, read_sweep_file

_HOMES = {"Sweep": "sweep", "SweepResult": "run", "read_sweep_file": "sweep", "run_sweep": "run"}

__all__ = ["Sweep", "SweepResult", "read_sweep_file", "run_sweep"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
