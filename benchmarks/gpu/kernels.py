"""What is here: which kernels run on this machine, and why the others do not."""

from __future__ import annotations

import argparse

from measure import Machine, Report, Row

from bitbell.kernels import native, triton


def run(machine: Machine, report: Report, args: argparse.Namespace) -> None:
    """One row for Triton's kernels, one for the C++."""
    state = triton.why_not() or ("interpreted on the CPU" if triton.interpreted() else "on the GPU")
    report.add(Row("Triton", check=state))
    report.add(Row("C++", check=native.reason() if not native.available() else f"{native.level()}"))
