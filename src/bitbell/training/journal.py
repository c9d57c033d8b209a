"""What a run tells: metrics as JSON lines and TensorBoard events, and one live line on the screen."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, TextIO


class Journal:
    """Appends events to RUN/metrics.jsonl, flushed line by line, and to RUN/tensorboard.

    Opened for a run that continues after `first_step` steps, it drops what an interrupted process wrote beyond them.
    """

    def __init__(self, run: Path, first_step: int, tensorboard: bool) -> None:
        self.path = run / "metrics.jsonl"
        self.seconds_before = _drop_after(self.path, first_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(run / "tensorboard", purge_step=first_step + 1)

    def write(self, event: str, step: int, **values: Any) -> None:
        """Record one event after `step` steps; numbers, and one level of {layer: {name: number}}."""
        self._file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        self._file.flush()
        if self._writer is None:
            return
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(f"{event}/{name}", value, step)
        for layer, numbers in values.get("layers", {}).items():
            for name, value in numbers.items():
                self._writer.add_scalar(f"{name}/{layer}", value, step)

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The events of a metrics.jsonl, but for a last line torn by a crash."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    events = []
    for number, line in enumerate(lines, 1):
        try:
            events.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is no JSON: {line[:60]!r}") from None
    return events


def _drop_after(path: Path, step: int) -> float:
    """Cut the journal back to the events up to `step`; return how many seconds of the run they had seen."""
    kept = [event for event in read_metrics(path) if event["step"] <= step]
    text = "".join(json.dumps(event) + "\n" for event in kept)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        partial = path.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    return max((event.get("seconds", 0.0) for event in kept), default=0.0)


class Progress:
    """One live line on a terminal; elsewhere a plain line now and then (every `every` seconds, and at the end)."""

    def __init__(self, steps: int, out: TextIO | None = None, every: float = 15.0) -> None:
        self.steps, self.out, self.every = steps, sys.stderr if out is None else out, every
        self.live = self.out.isatty()
        self.unit = "tokens"  # of what the model is trained on
        self._last = -every

    def show(self, step: int, loss: float, learning_rate: float, tokens_per_second: float, seconds_left: float) -> None:
        """Say where the run is: step, loss (nats), learning rate, tokens (or images) a second, the time left."""
        text = (
            f"step {step}/{self.steps}  loss {loss:.4f}  lr {learning_rate:.2e}  "
            f"{tokens_per_second:,.0f} {self.unit}/s  {_clock(seconds_left)} left"
        )
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            self.out.write("\r" + text[:width].ljust(width))
            self.out.flush()
        elif step == self.steps or time.monotonic() - self._last >= self.every:
            self._last = time.monotonic()
            self.say(text)

    def say(self, text: str) -> None:
        """Print a line of its own."""
        self.out.write(("\r" + text.ljust(shutil.get_terminal_size().columns - 1) if self.live else text) + "\n")
        self.out.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
