"""The demo from end to end, with few steps: a part of the shipped corpus, four runs, a packed model, a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitbell.cli.main import main
from bitbell.data import open_corpus


def test_the_demo_makes_everything_it_promises_and_repeats_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, corpus = tmp_path / "demo", tmp_path / "excerpt.txt"
    with open_corpus() as text:
        corpus.write_text(text.read(200_000))
    arguments = ["demo", "--out", str(out), "--corpus", str(corpus)]
    assert main([*arguments, "--steps", "3"]) == 0
    shown = capsys.readouterr().out
    names = ["full-precision", "bbq-w2a2", "quest-w2a2", "lsq-w2a2"]
    for name in names:
        summary = json.loads((out / name / "summary.json").read_text())
        assert 5 < summary["loss"] < 7.5
        assert f"{summary['loss']:.3f}" in shown
    assert "weight codes equal" in shown
    assert len(json.loads((out / "bbq-w2a2" / "summary.json").read_text())["samples"]) == 3
    page = (out / "report" / "report.html").read_text()
    assert all(name in page for name in names)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("metrics.jsonl")}
    assert main([*arguments, "--steps", "3"]) == 0
    assert capsys.readouterr().err.count("is finished already") == 4
    assert {p: p.stat().st_mtime_ns for p in out.rglob("metrics.jsonl")} == before
    assert main([*arguments, "--steps", "4"]) == 1
    assert "steps was 3, is 4" in capsys.readouterr().err
