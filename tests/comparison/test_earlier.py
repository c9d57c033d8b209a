"""A sweep that builds on another one's sweep.json and results.jsonl."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bitbell.comparison import run_sweep


def test_runs_of_an_earlier_sweep_count_as_done(tmp_path: Path, values: dict[str, Any]) -> None:
    first = run_sweep(values, tmp_path / "first", say=lambda _: None)
    kept = tmp_path / "kept"
    kept.mkdir()
    for name in ("sweep.json", "results.jsonl"):
        shutil.copy(first.out / name, kept / name)
    wider = values | {"methods": ["none", "bbq", "lsq"]}
    said: list[str] = []
    second = run_sweep(wider, tmp_path / "second", earlier=kept, say=said.append)
    assert {path.name.partition("-")[0] for path in (second.out / "runs").glob("[a-z]*")} == {"lsq"}
    assert (first.done, second.done) == (6, 9)
    before, after = (
        {line["run"]: line["loss"] for line in map(json.loads, (out / "results.jsonl").read_text().splitlines())}
        for out in (first.out, second.out)
    )
    assert before.items() < after.items()
    again = run_sweep(None, second.out, say=said.append)  # remembered without being told again
    assert again.done == 9
    assert len(said) == 3


@pytest.mark.parametrize("damage", ["not json\n", '{"run": "x"}\n', "[]\n"])
def test_a_damaged_list_of_runs_is_refused(tmp_path: Path, values: dict[str, Any], damage: str) -> None:
    values |= {"methods": ["none"], "learning_rates": [1e-3], "seeds": [0]}
    first = run_sweep(values, tmp_path / "first", say=lambda _: None)
    (first.out / "results.jsonl").write_text(damage)
    with pytest.raises(ValueError, match=r"not the results\.jsonl of a sweep"):
        run_sweep(values, tmp_path / "second", earlier=first.out)
    assert not (tmp_path / "second").exists()


def test_an_earlier_sweep_of_other_training_is_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    values |= {"methods": ["none"], "learning_rates": [1e-3], "seeds": [0]}
    first = run_sweep(values, tmp_path / "first", say=lambda _: None)
    longer = values | {"train": values["train"] | {"steps": 4}}
    with pytest.raises(ValueError, match="steps was 3, is 4"):
        run_sweep(longer, tmp_path / "second", earlier=first.out)
