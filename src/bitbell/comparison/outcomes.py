"""How a run of the sweep stands, as its folder tells it.

RUN/summary.json     training writes it last: the run is finished
RUN/outcome.json     the sweep's own note: {"status", "message", "seconds", ...}
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitbell.training.run import write_json

DONE = ("finished", "diverged", "failed")


@dataclass(frozen=True)
class Outcome:
    """A run's status (finished, diverged, failed, stopped, or waiting), its final numbers, and its time so far."""

    status: str = "waiting"
    message: str = ""
    seconds: float | None = None
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return self.status in DONE

    @property
    def loss(self) -> float:
        """Final validation loss; infinite for a run that diverged."""
        return float(self.summary["loss"]) if self.status == "finished" else math.inf


def read_outcome(run: Path) -> Outcome:
    """How the run in a folder stands. A finished run with a loss that is not finite has diverged."""
    note = read_note(run / "outcome.json")
    summary = read_note(run / "summary.json")
    seconds = note.get("seconds")
    if not summary:
        return Outcome(note.get("status", "waiting"), note.get("message", ""), seconds)
    if not math.isfinite(summary.get("loss", math.nan)):
        return Outcome("diverged", f"the last validation loss is {summary.get('loss')}", seconds, summary)
    return Outcome("finished", "", seconds, summary)


def write_outcome(run: Path, status: str, seconds: float, message: str = "", **details: Any) -> None:
    """Note in the run's folder how it ended."""
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "outcome.json", {"status": status, "message": message, "seconds": seconds, **details})


def forget_failure(run: Path) -> None:
    """Make a failed run one that waits again."""
    if read_outcome(run).status == "failed":
        (run / "outcome.json").unlink(missing_ok=True)


def drop_checkpoints(run: Path) -> None:
    """Delete a run's checkpoints; its numbers stay."""
    shutil.rmtree(run / "checkpoints", ignore_errors=True)


def read_note(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where the file is missing or torn."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
