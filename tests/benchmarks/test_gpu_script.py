"""benchmarks/gpu/run.py on the CPU, in tiny sizes: that it runs, checks what it times, and survives what fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu" / "run.py"


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import measure

    return measure


def script(out: Path, *arguments: str) -> tuple[int, dict]:
    """Exit status and results. As on a machine where bitbell is not installed, nor tyro."""
    blocked = out.parent / "blocked"
    blocked.mkdir()
    (blocked / "tyro.py").write_text("raise ImportError('not here')\n")
    path = os.pathsep.join([str(blocked), str(ROOT / "src")])
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--quick", "--out", str(out), *arguments]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, cwd=out.parent
    )
    assert (out / "results.json").exists(), done.stderr[-2000:]
    return done.returncode, json.loads((out / "results.json").read_text())


def test_parts_run_without_tyro(tmp_path: Path) -> None:
    status, results = script(tmp_path / "out", "--only", "kernels", "products")
    assert status == 0
    parts = results["parts"]
    assert [parts[name]["status"] for name in ("kernels", "products")] == ["finished"] * 2
    rows = {row["case"].split(",")[0]: row for row in parts["products"]["rows"]}
    assert rows["integer_product"]["check"] == "sums exact"
    assert parts["kernels"]["rows"][0]["check"] == "interpreted on the CPU"
    assert rows["planes_product"]["milliseconds"] > 5  # the interpreter at work: the definition takes 0.05
    assert all(row["milliseconds"] > 0 for row in rows.values())
    table = (tmp_path / "out" / "results.md").read_text()
    assert "| case | ms | rate |" in table
    assert "planes_product, 2 bits, 33 x 96 -> 48" in table


@pytest.mark.slow
def test_the_whole_script_runs(tmp_path: Path) -> None:
    status, results = script(tmp_path / "out", "--curves", "0.05")
    failed = [row for part in results["parts"].values() for row in part["rows"] if "FAILED" in row["check"]]
    assert (status, failed) == (0, [])
    assert list(results["parts"]) == ["kernels", "quantize", "products", "layers", "steps", "curves"]
    assert all(part["rows"] for part in results["parts"].values())
    assert (tmp_path / "out" / "curves.png").stat().st_size > 1000


def test_a_part_that_dies_is_reported_and_the_rest_goes_on(tmp_path: Path, measure: ModuleType) -> None:
    import run

    monkey = tmp_path / "out"
    monkey.mkdir()
    args = run.arguments().parse_args(["--device", "no-such-device", "--quick", "--out", str(monkey)])
    part = run.run_part("kernels", args)
    assert part["status"].startswith("stopped with exit status")
    assert part["rows"] == []
    assert "no-such-device" in part["log"]


def test_an_error_becomes_a_row(measure: ModuleType, tmp_path: Path) -> None:
    report = measure.Report(tmp_path / "part.json")
    with report.guarded("a case"):
        raise RuntimeError("too | wide\nand more")
    report.add(measure.Row("another", 1.5, ratio=2.0, floor=1.4, aim=1.8, check="fine"))
    rows = json.loads((tmp_path / "part.json").read_text())
    assert [row["check"] for row in rows] == ["FAILED: RuntimeError: too / wide", "fine"]
    assert measure.Row(**rows[1]).cells()[1:] == ["1.5", "-", "-", "2.00", "1.4 / 1.8", "fine"]


def test_candidates_take_turns_and_ratios_are_within_rounds(measure: ModuleType) -> None:
    import torch

    calls: list[str] = []
    machine = measure.Machine(torch.device("cpu"), quick=True)
    seconds = measure.compare({name: [lambda name=name: calls.append(name)] * 2 for name in ("a", "b")}, machine)
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 2, "b": 2}
    assert "".join(calls[-8:]) == "aabbaabb"
    assert measure.ratio([2.0, 6.0, 4.0], [1.0, 2.0, 4.0]) == 2.0


def test_wrong_sums_are_not_passed(measure: ModuleType) -> None:
    import products
    import torch

    a, b = torch.ones(3, 8, dtype=torch.int8), torch.ones(2, 8, dtype=torch.int8)
    assert products.equal_sums(torch.full((3, 2), 8, dtype=torch.int32), a, b) == "sums exact"
    with pytest.raises(AssertionError, match="6 sums differ"):
        products.equal_sums(torch.full((3, 2), 9, dtype=torch.int32), a, b)
