"""Runs -> pictures: `write_report` makes one HTML page out of run folders, `read_run` reads one of them.

run folders --runs--> `Run` --results--> rows, groups, words --curves, codes--> pictures --page--> report.html
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitbell.reports.page import write_report
    from bitbell.reports.runs import Run, read_run

__all__ = ["Run", "read_run", "write_report"]


def __getattr__(name: str) -> Any:
    if name == "write_report":
        from bitbell.reports.page import write_report

        return write_report
    if name in ("Run", "read_run"):
        from bitbell.reports import runs

        return getattr(runs, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}. It offers {', '.join(__all__)}.")
