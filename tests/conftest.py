"""What every test shares: one thread (small tensors are slower on two), no network, a small data set."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # also of the processes that tests start
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TEXT = (
    "In the beginning God created the heaven and the earth.\n" * 40
    + "And the evening and the morning were the day.\n" * 40
)


@pytest.fixture
def reference_kernels() -> Iterator[None]:
    """Compute by the definitions, for tests that compare bits; the C++ kernels have tests of their own."""
    from bitbell.kernels import native

    with native.using(native.REFERENCE):
        yield


@pytest.fixture
def pass_interpreted() -> Callable[[Path, int], None]:
    """Run a module of tests in a process whose Triton kernels are interpreted; more than `at_least` of them pass, and
    none is skipped."""

    def run(module: Path, at_least: int) -> None:
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(module)]
        environment = os.environ | {"BITBELL_TRITON": "interpret"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        passed = re.search(r"(\d+) passed", done.stdout)
        assert passed is not None
        assert int(passed[1]) > at_least
        assert "skipped" not in done.stdout

    return run


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of a few kilobytes with some variety."""
    path = tmp_path_factory.mktemp("text") / "small.txt"
    lines = [f"{n} sheep and {n * n % 97} goats went up the hill in the year {n * 7 % 1000}.\n" for n in range(600)]
    path.write_text(TEXT + "".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_data(small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level token data set of that text."""
    from bitbell.data import tokenize

    out = tmp_path_factory.mktemp("data") / "bytes"
    tokenize([str(small_text)], out, tokenizer="bytes", valid_fraction=0.2)
    return out
