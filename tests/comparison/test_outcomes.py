"""How a run stands, from whatever a crash has left in its folder."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bitbell.comparison.outcomes import drop_checkpoints, forget_failure, read_outcome, write_outcome


def test_an_empty_or_missing_folder_waits(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        outcome = read_outcome(folder)
        assert (outcome.status, outcome.is_done, outcome.seconds) == ("waiting", False, None)


@pytest.mark.parametrize(("status", "is_done"), [("diverged", True), ("failed", True), ("stopped", False)])
def test_a_note_says_how_a_run_ended(tmp_path: Path, status: str, is_done: bool) -> None:
    write_outcome(tmp_path / "run", status, 12.5, "at step 7", traceback="...")
    outcome = read_outcome(tmp_path / "run")
    assert (outcome.status, outcome.message, outcome.seconds) == (status, "at step 7", 12.5)
    assert outcome.is_done is is_done
    assert math.isinf(outcome.loss)


def test_the_summary_is_what_makes_a_run_finished(tmp_path: Path) -> None:
    write_outcome(tmp_path, "stopped", 3.0)
    (tmp_path / "summary.json").write_text('{"loss": 2.5}')  # killed before it could note its end
    outcome = read_outcome(tmp_path)
    assert (outcome.status, outcome.loss, outcome.seconds) == ("finished", 2.5, 3.0)


@pytest.mark.parametrize("loss", ["NaN", "Infinity"])
def test_a_finished_run_without_a_finite_loss_has_diverged(tmp_path: Path, loss: str) -> None:
    (tmp_path / "summary.json").write_text(f'{{"loss": {loss}}}')
    outcome = read_outcome(tmp_path)
    assert outcome.status == "diverged"
    assert f"the last validation loss is {float(loss)}" in outcome.message
    assert math.isinf(outcome.loss)


def test_torn_notes_are_no_notes(tmp_path: Path) -> None:
    (tmp_path / "outcome.json").write_text('{"status": "fai')
    assert read_outcome(tmp_path).status == "waiting"


def test_only_failures_are_forgotten(tmp_path: Path) -> None:
    for status in ("failed", "diverged"):
        write_outcome(tmp_path / status, status, 1.0)
        forget_failure(tmp_path / status)
    assert read_outcome(tmp_path / "failed").status == "waiting"
    assert read_outcome(tmp_path / "diverged").status == "diverged"


def test_dropping_checkpoints_keeps_the_numbers(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "summary.json").write_text(json.dumps({"loss": 1.0}))
    drop_checkpoints(tmp_path)
    drop_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
