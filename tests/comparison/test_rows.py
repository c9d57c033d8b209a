"""The table's numbers, marks and ranks, from made-up runs."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitbell.comparison.columns import cells, columns_of, gap_lines
from bitbell.comparison.folder import SweepFolder
from bitbell.comparison.results import markdown, records, write_results
from bitbell.comparison.rows import best_rows, legend, make_row, make_rows, problems
from bitbell.comparison.sweep import Sweep, Trial

Finish = Callable[..., None]


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    return SweepFolder(tmp_path)


def finish_all(
    folder: SweepFolder, sweep: Sweep, finish: Finish, losses: dict[str, float], rates: dict[float, float] | None = None
) -> None:
    """Every run of every setting: its loss, a bit more for each seed and rate."""
    extra = rates or {}
    for setting in sweep.settings:
        for seed in sweep.seeds:
            for rate in sweep.learning_rates:
                loss = losses[setting.label] + 0.01 * seed + extra.get(rate, 0.0)
                finish(folder, sweep, Trial(setting, seed, rate), loss)


def test_a_row_is_the_mean_over_all_seeds_at_the_chosen_rate(
    folder: SweepFolder, values: dict[str, Any], finish: Finish
) -> None:
    sweep = Sweep.from_dict(values)
    finish_all(folder, sweep, finish, {"none": 3.0, "bbq": 3.1}, {1e-3: 0.5})
    row = make_row(sweep, sweep.settings[1], folder.look)
    assert row.choice is not None
    assert row.choice.learning_rate == 4e-3
    assert row.losses == pytest.approx([3.1, 3.11])
    assert row.deviation == pytest.approx(statistics.stdev([3.1, 3.11]))
    columns = columns_of(sweep, [row])
    line = cells(row, columns)
    assert line[:6] == ["bbq", "W2A2", "0.004^", "3.1050", "0.0071", "2"]
    assert line[6] == f"{math.exp(3.105):.2f}"
    assert line[8:] == ["1.800", "1.600", "0.50", "0.25"]
    assert cells(make_row(sweep, sweep.settings[0], folder.look), columns)[10] == "4.00"


def test_full_precision_leads_then_widths_fall_and_the_best_comes_first(
    folder: SweepFolder, values: dict[str, Any], finish: Finish
) -> None:
    sweep = Sweep.from_dict(values | {"methods": ["bbq", "quest", "none", "nf"], "bits": [1, 4], "seeds": [0]})
    finish_all(folder, sweep, finish, {"none": 3.0, "bbq": 3.2, "quest": 3.1, "nf": 3.3})
    rows = make_rows(sweep, folder.look)
    assert [row.name for row in rows] == [
        *("full precision", "quest W4A4", "bbq W4A4", "nf W4A4", "quest W1A1", "bbq W1A1"),
    ]
    assert [row.name for row in best_rows(rows)] == ["quest W4A4", "quest W1A1"]
    assert [line[:3] for line in gap_lines(sweep, columns_of(sweep, rows))] == [["nf", "W1A1", "-"]]
    text = markdown(sweep, folder.look)
    assert text.count("**3.1000**") == 2 + 2  # best of two widths, and best rate of each
    assert "- nf has no W1A1: " in text
    assert "v the best rate is the lowest" in text


def test_nothing_is_best_while_a_rival_has_rates_to_try(
    folder: SweepFolder, values: dict[str, Any], finish: Finish
) -> None:
    sweep = Sweep.from_dict(values | {"methods": ["bbq", "quest"], "seeds": [0]})
    bbq, quest = sweep.settings
    for rate in sweep.learning_rates:
        finish(folder, sweep, Trial(bbq, 0, rate), 3.0)
    finish(folder, sweep, Trial(quest, 0, 4e-3), 2.0)
    rows = make_rows(sweep, folder.look)
    assert [(row.label, row.marks) for row in rows] == [("quest", "?"), ("bbq", "v")]
    assert best_rows(rows) == []
    assert "? not all rates of the grid have been tried yet." in legend(rows)
    finish(folder, sweep, Trial(quest, 0, 1e-3), 2.5)
    assert [row.label for row in best_rows(make_rows(sweep, folder.look))] == ["quest"]


def test_divergence_is_counted_marked_and_never_best(
    folder: SweepFolder, values: dict[str, Any], finish: Finish
) -> None:
    sweep = Sweep.from_dict(values | {"methods": ["bbq", "quest", "lsq"], "learning_rates": [1e-3]})
    bbq, quest, lsq = sweep.settings
    finish(folder, sweep, Trial(bbq, 0, 1e-3), 2.0)
    finish(folder, sweep, Trial(bbq, 1, 1e-3), status="diverged")
    for seed in (0, 1):
        finish(folder, sweep, Trial(quest, seed, 1e-3), 3.0)
    finish(folder, sweep, Trial(lsq, 0, 1e-3), status="diverged")
    rows = {row.label: row for row in make_rows(sweep, folder.look)}
    columns = columns_of(sweep, list(rows.values()))
    assert cells(rows["bbq"], columns)[3:6] == ["2.0000!", "-", "1 of 2, 1 diverged"]
    assert cells(rows["lsq"], columns)[2:6] == ["-", "-", "-", "1 diverged"]
    assert best_rows(list(rows.values())) == []
    trials = [Trial(bbq, 1, 1e-3)]
    assert problems(sweep, folder.look, trials) == ["bbq-w2a2-lr0.001-seed1 diverged: at step 7"]
    for seed in (0, 1):
        finish(folder, sweep, Trial(lsq, seed, 1e-3), 3.5)
    folder.known.clear()
    assert [row.label for row in best_rows(make_rows(sweep, folder.look))] == ["quest"]


def test_every_run_has_a_line_of_strict_json(folder: SweepFolder, values: dict[str, Any], finish: Finish) -> None:
    sweep = Sweep.from_dict(values)
    none, bbq = sweep.settings
    finish(folder, sweep, Trial(none, 0, 4e-3), 3.0)
    finish(folder, sweep, Trial(none, 0, 1e-3), status="diverged")
    finish(folder, sweep, Trial(bbq, 0, 4e-3), status="failed")
    folder.path.mkdir(exist_ok=True)
    write_results(folder, sweep)
    lines = [json.loads(line) for line in (folder.path / "results.jsonl").read_text().splitlines()]
    assert lines == records(sweep, folder.look)
    by_run = {line["run"]: line for line in lines}
    assert len(by_run) == len(lines) == 5  # the second seed of full precision is decided on, that of BBQ is not
    best = by_run["none-lr0.004-seed0"]
    assert (best["status"], best["loss"], best["is_tune"], best["is_chosen"]) == ("finished", 3.0, True, True)
    assert (best["label"], best["recipe"], best["bits"], best["seed"]) == ("none", "none", None, 0)
    assert by_run["none-lr0.001-seed0"]["status"] == "diverged"
    assert by_run["none-lr0.001-seed0"]["loss"] is None
    assert by_run["bbq-w2a2-lr0.004-seed0"]["message"] == "at step 7"
    assert by_run["none-lr0.004-seed1"]["status"] == "waiting"
    assert (folder.path / "table.md").read_text() == markdown(sweep, folder.look) + "\n"
