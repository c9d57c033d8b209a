"""Packed layers on Triton's kernels: through the interpreter here, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bitbell.kernels import triton


@pytest.mark.skipif(not triton._installed, reason="Triton is not installed")
def test_layers_of_every_method_through_the_interpreter() -> None:
    cases = Path(__file__).with_name("interpreted_layers.py")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(cases)]
    environment = os.environ | {"BITBELL_TRITON": "interpret"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 25
    assert "skipped" not in done.stdout
