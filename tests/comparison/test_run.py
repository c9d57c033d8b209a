"""Real sweeps of a model of a few thousand weights: done once, continued, shared, and honest about what goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bitbell.training
from bitbell.comparison import run_sweep
from bitbell.comparison.claims import take
from bitbell.comparison.folder import open_folder
from bitbell.comparison.outcomes import read_outcome
from bitbell.comparison.plan import known_trials
from bitbell.comparison.run import parse_budget, wait_for
from bitbell.comparison.signals import StopSignals
from bitbell.comparison.sweep import Sweep
from bitbell.comparison.work import Budget, ClaimLost, QuietProgress, expected_seconds
from bitbell.training import TrainConfig, train
from bitbell.training.journal import read_metrics

Values = dict[str, Any]


def quiet(text: str) -> None:
    """Say nothing."""


def results(out: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return {line["run"]: line for line in lines}


@pytest.fixture(autouse=True)
def blank_page(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than these runs; one test draws them."""
    if "real_page" not in request.fixturenames:
        monkeypatch.setattr("bitbell.comparison.page.make_page", lambda folder, sweep: "")


@pytest.fixture
def real_page() -> None:
    """Ask for the page as it is."""


@pytest.fixture
def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that are trained from now on, in order."""
    done: list[str] = []

    def counted(config: TrainConfig, *rest: Any) -> Any:
        done.append(Path(config.out).name)
        return train(config, *rest)

    monkeypatch.setattr(bitbell.training, "train", counted)
    return done


def test_a_sweep_runs_everything_once_and_leaves_its_results(
    values: Values, tmp_path: Path, count_runs: list[str], real_page: None
) -> None:
    lines: list[str] = []
    result = run_sweep(values, tmp_path / "out", say=lines.append)
    assert (result.ended, result.done, result.runs, result.failed, result.exit_status) == ("done", 6, 6, (), 0)
    assert len(set(count_runs)) == len(count_runs) == 6
    assert count_runs[:2] == ["none-lr0.004-seed0", "bbq-w2a2-lr0.004-seed0"]
    assert [line.split()[0] for line in lines] == [f"[{n}/6]" for n in range(1, 7)]
    found = results(tmp_path / "out")
    assert all(line["status"] == "finished" and line["seconds"] > 0 for line in found.values())
    assert 0 < found["bbq-w2a2-lr0.004-seed0"]["weight_entropy"] <= 2
    assert sum(line["is_chosen"] for line in found.values()) == 4
    assert result.table == (tmp_path / "out" / "table.md").read_text().rstrip("\n")
    assert "6 of 6 runs are done" in (tmp_path / "out" / "index.html").read_text()
    run = tmp_path / "out" / "runs" / "bbq-w2a2-lr0.004-seed0"
    assert not (run / "checkpoints").exists()
    again = run_sweep(values, tmp_path / "out", say=lines.append)
    assert (again.table, len(count_runs), len(lines)) == (result.table, 6, 6)


def test_a_run_of_a_sweep_is_the_run_that_train_makes(values: Values, tmp_path: Path) -> None:
    values |= {"seeds": [0], "learning_rates": [4e-3]}
    run_sweep(values, tmp_path / "out", keep_checkpoints=True, say=quiet)
    run = tmp_path / "out" / "runs" / "bbq-w2a2-lr0.004-seed0"
    assert (run / "checkpoints" / "step-00000003").is_dir()
    alone = TrainConfig(**values["train"], recipe="bbq-w2a2", learning_rate=4e-3, out=str(tmp_path / "alone"))
    assert train(alone).summary["loss"] == results(tmp_path / "out")[run.name]["loss"]


def test_more_methods_seeds_and_rates_continue(values: Values, tmp_path: Path, count_runs: list[str]) -> None:
    run_sweep(values | {"methods": ["none"], "seeds": [0], "learning_rates": [1e-3]}, tmp_path / "out", say=quiet)
    result = run_sweep(values, tmp_path / "out", say=quiet)
    assert (result.done, result.runs) == (6, 6)
    assert len(count_runs) == len(set(count_runs)) == 6
    fewer = run_sweep(values | {"methods": ["bbq"]}, tmp_path / "out", say=quiet)
    assert fewer.runs == 3
    assert len(count_runs) == 6


def test_a_folder_continues_without_its_file(values: Values, tmp_path: Path) -> None:
    run_sweep(values, tmp_path / "out", budget=1e-9, say=quiet)
    assert run_sweep(None, tmp_path / "out", say=quiet).done == 6
    with pytest.raises(ValueError, match=r"nowhere holds no sweep \(no sweep.json in it\). Give a sweep file"):
        run_sweep(None, tmp_path / "nowhere", say=quiet)


def test_divergence_is_recorded_and_not_repeated(values: Values, tmp_path: Path, count_runs: list[str]) -> None:
    values |= {"methods": ["none"], "learning_rates": [1e-3, 1e30]}
    result = run_sweep(values, tmp_path / "out", say=quiet)
    assert (result.ended, result.exit_status, result.done) == ("done", 0, 3)
    line = results(tmp_path / "out")["none-lr1e+30-seed0"]
    assert (line["status"], line["loss"]) == ("diverged", None)
    assert "first in" in line["message"]
    assert "| 0.001v |" in result.table
    assert "none-lr1e+30-seed0 diverged: " in result.table
    run_sweep(values, tmp_path / "out", say=quiet)
    assert len(count_runs) == 3


def test_a_failure_is_recorded_the_sweep_goes_on_and_a_repetition_tries_again(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: TrainConfig, *rest: Any) -> Any:
        if "bbq" in config.recipe:
            raise RuntimeError("the disk is full")
        return train(config, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(bitbell.training, "train", fail)
        result = run_sweep(values, tmp_path / "out", say=quiet)
    assert (result.ended, result.exit_status) == ("done", 1)
    assert sorted(result.failed) == ["bbq-w2a2-lr0.001-seed0", "bbq-w2a2-lr0.004-seed0"]
    assert "bbq-w2a2-lr0.004-seed0 failed: RuntimeError: the disk is full" in result.table
    note = json.loads((tmp_path / "out" / "runs" / "bbq-w2a2-lr0.004-seed0" / "outcome.json").read_text())
    assert "Traceback" in note["traceback"]
    assert sum(line["status"] == "finished" for line in results(tmp_path / "out").values()) == 3
    again = run_sweep(values, tmp_path / "out", say=quiet)
    assert (again.done, again.failed, again.exit_status) == (6, (), 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_continues_to_the_same_numbers(
    values: Values, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(progress: QuietProgress, step: int, *rest: float) -> None:
        if step == 2:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(QuietProgress, "show", interrupt)
        result = run_sweep(values | {"methods": ["bbq"]}, tmp_path / "out", say=quiet)
    assert (result.ended, result.exit_status, result.done) == ("interrupted", 130, 0)
    run = tmp_path / "out" / "runs" / "bbq-w2a2-lr0.004-seed0"
    assert read_outcome(run).status == results(tmp_path / "out")[run.name]["status"] == "stopped"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    before = read_outcome(run).seconds
    assert run_sweep(None, tmp_path / "out", say=quiet).done == 3
    assert read_outcome(run).seconds > before  # type: ignore[operator]
    assert [e["step"] for e in read_metrics(run / "metrics.jsonl") if e["event"] == "train"] == [1, 2, 3]
    alone = TrainConfig(**values["train"], recipe="bbq-w2a2", learning_rate=4e-3, out=str(tmp_path / "alone"))
    assert train(alone).summary["loss"] == results(tmp_path / "out")[run.name]["loss"]


def test_a_signal_is_passed_on_to_the_workers_once() -> None:
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(130));"
    code += "print('up', flush=True); time.sleep(60)"
    workers = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    with StopSignals() as signals:
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == b"up\n"
            worker.stdout.close()
        os.kill(os.getpid(), signal.SIGINT)
        assert wait_for(workers, signals) == [130, 130]


def test_workers_share_the_folder_and_do_each_run_once(values: Values, tmp_path: Path) -> None:
    values |= {"bits": [2, 1], "learning_rates": [1e-3]}
    values["train"] |= {"preset": "tiny", "sequence_length": 8}  # the processes know no preset of these tests
    result = run_sweep(values, tmp_path / "out", workers=2, say=quiet)
    assert (result.ended, result.done, result.failed) == ("done", 6, ())
    owners = set()
    for name in results(tmp_path / "out"):
        run = tmp_path / "out" / "runs" / name
        # Had it been trained twice, it would have steps twice, or two claims.
        assert [e["step"] for e in read_metrics(run / "metrics.jsonl") if e["event"] == "train"] == [1, 2, 3]
        assert json.loads((run / "config.json").read_text())["threads"] == 1
        claims = [json.loads(path.read_text()) for path in (tmp_path / "out" / "claims").glob(f"{name}.*")]
        assert all(claim["released"] for claim in claims)
        owners |= {claim["pid"] for claim in claims}
    assert os.getpid() not in owners
    assert "threads" not in json.loads((tmp_path / "out" / "sweep.json").read_text())["train"]


def test_the_budget_starts_no_run_that_would_end_after_it(
    values: Values, tmp_path: Path, finish: Callable[..., None], count_runs: list[str]
) -> None:
    folder, sweep = open_folder(tmp_path / "out", values)
    finish(folder, sweep, known_trials(sweep, folder.look)[0])  # it took 10 seconds
    assert expected_seconds(sweep, folder) == 10.0
    lines: list[str] = []
    result = run_sweep(values, tmp_path / "out", budget="9s", say=lines.append)
    assert (result.ended, result.done, result.exit_status, count_runs) == ("budget", 1, 0, [])
    result = run_sweep(values, tmp_path / "out", budget="5m", say=lines.append)
    assert (result.ended, result.done) == ("done", 6)


def test_a_budget_counts_from_its_start() -> None:
    assert Budget(None).allows(1e9)
    assert Budget(5.0).allows(4.0)
    assert not Budget(5.0).allows(6.0)
    spent = Budget(5.0, started=time.monotonic() - 6)
    assert spent.left() == 0.0
    assert not spent.allows(0.0)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), (90, 90), ("45s", 45), ("30m", 1800), ("1.5h", 5400), (".5d", 43200), (None, None)],
)
def test_a_budget_is_a_time(text: Any, seconds: float | None) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "3 weeks", "-5", "0", "0m", True, 0, -1.0, "1e3"])
def test_what_is_no_time_is_no_budget(text: Any) -> None:
    with pytest.raises(ValueError, match="budget must be a positive time"):
        parse_budget(text)


@pytest.mark.parametrize("workers", [0, -1, 1.5, True])
def test_workers_are_counted(values: Values, tmp_path: Path, workers: Any) -> None:
    with pytest.raises(ValueError, match="workers must be at least 1"):
        run_sweep(values, tmp_path / "out", workers=workers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"steps": 4}}, r"\(steps was 3, is 4\)"),
        ({"train": {"batch_size": 4, "clip": 2.0}}, r"\(batch_size was 2, is 4; clip was 1.0, is 2.0\)"),
        ({"train": {"final_windows": 8}}, r"final_windows was 4, is 8"),
        ({"train": {"precision": "float32"}}, r"precision was '\w+', is 'float32'"),
        ({"methods": {"none": "none", "bbq": "quest"}}, r"methods.bbq was 'bbq', is 'quest'"),
        ({"overrides": {"bbq": {"clip": 2.0}}}, r"overrides.bbq was None, is {'clip': 2.0}"),
    ],
)
def test_runs_that_are_not_comparable_do_not_share_a_folder(
    values: Values, tmp_path: Path, change: Values, message: str
) -> None:
    open_folder(tmp_path / "out", values)
    changed = values | change | {"train": values["train"] | change.get("train", {})}
    with pytest.raises(ValueError, match=message) as caught:
        open_folder(tmp_path / "out", changed)
    assert "would not be comparable" in str(caught.value)


def test_other_data_and_other_arithmetic_are_noticed(
    values: Values, tmp_path: Path, small_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitbell.data import tokenize

    tokenize([str(small_text)], tmp_path / "other", tokenizer="bytes", valid_fraction=0.3)
    open_folder(tmp_path / "out", values)
    with pytest.raises(ValueError, match="data was "):
        open_folder(tmp_path / "out", values | {"train": values["train"] | {"data": str(tmp_path / "other")}})
    facts = json.loads((tmp_path / "out" / "sweep.json").read_text())
    facts["computed_in"] = "float16"
    (tmp_path / "out" / "sweep.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="precision was 'float16', is "):
        open_folder(tmp_path / "out", values)


def test_where_the_data_lies_and_how_it_is_run_is_free(values: Values, tmp_path: Path) -> None:
    open_folder(tmp_path / "out", values)
    (tmp_path / "moved").symlink_to(values["train"]["data"])
    free = {"data": str(tmp_path / "moved"), "threads": 1, "evaluate_every": 2}
    _, sweep = open_folder(tmp_path / "out", values | {"train": values["train"] | free})
    assert sweep.train["threads"] == 1
    stored = json.loads((tmp_path / "out" / "sweep.json").read_text())["train"]
    assert "threads" not in stored
    assert stored["data"] == values["train"]["data"]


@pytest.mark.parametrize(
    ("train_part", "message"),
    [({"data": "nowhere"}, "nowhere is no data set"), ({"preset": "micra"}, "preset .*'micra'")],
)
def test_missing_data_and_unknown_presets_are_named_before_any_work(
    values: Values, tmp_path: Path, train_part: Values, message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_sweep(values | {"train": values["train"] | train_part}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(values: Values, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"exists and is not a sweep's folder \(no sweep.json in it\)"):
        run_sweep(values, tmp_path)
    with pytest.raises(ValueError, match="exists and is not a sweep's folder"):
        run_sweep(values, tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("text", ["{", "[]", '{"format_version": 99}'])
def test_a_damaged_sweep_file_is_named(values: Values, tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ValueError, match=r"sweep.json (cannot be read|is not a sweep that this bitbell reads)"):
        run_sweep(values, tmp_path)


def test_a_running_process_takes_up_what_another_has_added(values: Values, tmp_path: Path) -> None:
    first = values | {"methods": ["none"], "seeds": [0], "learning_rates": [1e-3]}

    def extend(line: str) -> None:
        if line.startswith("[1/"):
            open_folder(tmp_path / "out", values)

    assert run_sweep(first, tmp_path / "out", say=extend).done == 6


def test_a_run_that_was_taken_over_is_dropped_and_the_sweep_waits_for_it(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitbell.comparison.work.POLL", 0.01)
    monkeypatch.setattr("bitbell.comparison.work.LOOK_AGAIN", 0.01)
    lost: list[str] = []

    def lose_once(config: TrainConfig, progress: QuietProgress) -> Any:
        if not lost:
            lost.append(config.out)
            progress.claim.is_lost = True
        return train(config, progress)

    monkeypatch.setattr(bitbell.training, "train", lose_once)
    lines: list[str] = []
    result = run_sweep(values | {"methods": ["none"], "seeds": [0]}, tmp_path / "out", say=lines.append)
    assert (result.done, result.failed) == (2, ())
    assert lines[0] == "none-lr0.004-seed0: another process is training it"


def test_the_quiet_progress_stops_a_run_whose_claim_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with take(tmp_path, "run") as claim:  # type: ignore[union-attr]
        progress = QuietProgress(10, "run", claim)
        progress.say("loud")
        progress.show(1, 3.0, 1e-3, 100.0, 5.0)
        assert capsys.readouterr().err == ""
        claim.is_lost = True
        with pytest.raises(ClaimLost, match="another process has taken over run"):
            progress.show(2, 3.0, 1e-3, 100.0, 5.0)


def test_claimed_runs_are_left_to_their_owner(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finish: Callable[..., None]
) -> None:
    monkeypatch.setattr("bitbell.comparison.work.POLL", 0.01)
    values |= {"methods": ["none"], "seeds": [0]}
    folder, sweep = open_folder(tmp_path / "out", values)
    other = take(folder.claims, "none-lr0.004-seed0")
    assert other is not None
    lines: list[str] = []

    def hear(line: str) -> None:
        lines.append(line)
        if line.startswith("waiting for 1 run of other processes"):
            finish(folder, sweep, known_trials(sweep, folder.look)[0], 2.0)
            other.release()

    result = run_sweep(values, tmp_path / "out", say=hear)
    assert [line.split()[0] for line in lines] == ["[1/2]", "waiting"]
    assert result.done == 2


def test_tables_that_cannot_be_written_do_not_end_the_sweep(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def break_first(folder: Any, sweep: Sweep, at_end: bool = False) -> None:
        calls.append(at_end)
        if not at_end:
            raise OSError("no space")

    monkeypatch.setattr("bitbell.comparison.run.write_results", break_first)
    lines: list[str] = []
    result = run_sweep(values | {"methods": ["none"], "seeds": [0]}, tmp_path / "out", say=lines.append)
    assert result.done == 2
    assert calls == [False, False, True]
    assert "the tables could not be written, the sweep goes on: OSError: no space" in lines
