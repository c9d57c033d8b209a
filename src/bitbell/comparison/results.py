"""What a sweep leaves beside its runs: results.jsonl, table.md and index.html."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from typing import Any

from bitbell.comparison.columns import LOSS, cells, columns_of, gap_lines, text
from bitbell.comparison.folder import SweepFolder
from bitbell.comparison.kinds import kind_of
from bitbell.comparison.plan import Look, choose, chosen_trials, known_trials, tune_loss
from bitbell.comparison.rows import Row, best_rows, finite, legend, make_rows, problems
from bitbell.comparison.sweep import Sweep
from bitbell.training.run import write_at_once

PAGE_EVERY = 300.0  # seconds between two drawings of the page while the sweep runs


def write_results(folder: SweepFolder, sweep: Sweep, at_end: bool = False) -> None:
    """Write results.jsonl and table.md, and index.html unless it is younger than five minutes; each file at once."""
    lines = [json.dumps(record, allow_nan=False) + "\n" for record in records(sweep, folder.look)]
    write_at_once(folder.path / "results.jsonl", "".join(lines))
    write_at_once(folder.path / "table.md", markdown(sweep, folder.look) + "\n")
    page = folder.path / "index.html"
    if at_end or not page.exists() or time.time() - page.stat().st_mtime > PAGE_EVERY:
        from bitbell.comparison.page import make_page

        write_at_once(page, make_page(folder, sweep))


def records(sweep: Sweep, look: Look) -> list[dict[str, Any]]:
    """A flat object for each run that is decided on."""
    choices = [(setting, choose(sweep, setting, look)) for setting in sweep.settings]
    chosen = {trial for setting, choice in choices if choice for trial in chosen_trials(sweep, setting, choice)}
    numbers = kind_of(sweep).numbers
    found = []
    for trial in known_trials(sweep, look):
        outcome = look(trial)
        found.append(
            {
                "run": trial.name,
                "label": trial.setting.label,
                "recipe": trial.setting.recipe,
                "bits": trial.setting.bits,
                "seed": trial.seed,
                "learning_rate": trial.learning_rate,
                "is_tune": trial.seed in sweep.seeds[: sweep.tune_seeds],
                "is_chosen": trial in chosen,
                "status": outcome.status,
                "message": outcome.message,
                **{key: finite(outcome.summary.get(key)) for key in numbers},
                "seconds": outcome.seconds,
            }
        )
    return found


def markdown(sweep: Sweep, look: Look) -> str:
    """The table as Markdown, then the losses behind the choice of each rate, then what went wrong."""
    rows = make_rows(sweep, look)
    best = best_rows(rows)
    columns = columns_of(sweep, rows)
    lines = [_bold(cells(row, columns), LOSS) if row in best else cells(row, columns) for row in rows]
    titles = [f"{c.title.lower()} ({c.unit})" if c.unit else c.title.lower() for c in columns]
    parts = [_table(titles, lines + gap_lines(sweep, columns)), legend(rows)]
    if len(sweep.learning_rates) > 1:
        parts.append("Mean loss over the tune seeds at each learning rate; the best one is bold:")
        parts.append(_table(*rates_table(sweep, rows, look)))
    parts.append("\n".join(f"- {line}" for line in problems(sweep, look, known_trials(sweep, look))))
    return "\n\n".join(part for part in parts if part)


def rates_table(sweep: Sweep, rows: Sequence[Row], look: Look) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table of learning rates; best ones between asterisks."""
    lines = []
    for row in rows:
        losses = [tune_loss(sweep, row.setting, rate, look) for rate in sweep.learning_rates]
        line = ["diverged" if loss is not None and math.isinf(loss) else text(loss, ".4f") for loss in losses]
        if row.choice:
            line = _bold(line, sweep.learning_rates.index(row.choice.learning_rate))
        lines.append([row.label, row.bits, *line])
    return ["method", "bits", *(f"{rate:g}" for rate in sweep.learning_rates)], lines


def _bold(line: Sequence[str], place: int) -> list[str]:
    return [f"**{cell}**" if i == place else cell for i, cell in enumerate(line)]


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
