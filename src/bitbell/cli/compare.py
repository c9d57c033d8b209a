"""The verb `compare`: flags over a sweep file over the sweep that a folder holds."""

from __future__ import annotations

import sys
import tomllib
from typing import Annotated, Any

import tyro


def compare(
    sweep: tyro.conf.Positional[str | None] = None,
    /,
    *,
    out: str,
    methods: tuple[str, ...] = (),
    bits: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (),
    learning_rates: tuple[float, ...] = (),
    tune_seeds: int | None = None,
    data: str | None = None,
    preset: str | None = None,
    steps: int | None = None,
    settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set")] = (),
    budget: str | None = None,
    earlier: str | None = None,
    workers: int = 1,
    keep_checkpoints: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> int:
    """Compare methods x bits x seeds x learning rates, each method at its best rate, in one table.

    The same command continues; several processes and machines may work in one folder. docs/compare.md tells all.

    Args:
        sweep: Sweep file (TOML or JSON); flags win over it. Without one, the sweep that --out holds.
        out: Folder of the sweep.
        methods: Recipes without bits, such as bbq, quest, bbq:zero_point=-0.25; none is full precision.
        bits: Widths: 2 means W2A2; also w4a16.
        seeds: Of initial weights and data order.
        learning_rates: The grid that every method is tuned on.
        tune_seeds: The first so many seeds try every learning rate; the others only the chosen one.
        data: Token data set, made by bitbell tokenize, or image set, made by bitbell images.
        preset: Model size.
        steps: Optimizer steps of each run.
        settings: Further options of bitbell train for every run, such as batch_size=16 weight_decay=0.05.
        budget: Start no run that would end after this time: 90 (seconds), 30m, 2h, 1d.
        earlier: Another sweep's folder, or a copy of its sweep.json and results.jsonl: its runs count as done.
        workers: Processes, of one thread each unless --set threads=N.
        keep_checkpoints: Keep the checkpoints of finished runs, which pack and evaluate need.
    """
    from bitbell.comparison import run_sweep

    changes = _given(methods=methods, bits=bits, seeds=seeds, learning_rates=learning_rates, tune_seeds=tune_seeds)
    changes["train"] = _given(data=data, preset=preset, steps=steps) | _read_settings(settings)
    result = run_sweep(
        sweep,
        out,
        budget=budget,
        workers=workers,
        keep_checkpoints=keep_checkpoints,
        changes=changes,
        earlier=earlier,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    print(result.table)
    print(f"\n{_how_it_stands(result.ended, result.done, result.runs)}: {result.out / 'index.html'}")
    if result.failed:
        print(f"bitbell compare: failed: {', '.join(result.failed)}", file=sys.stderr)
    return result.exit_status


def _given(**flags: Any) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value not in ((), None)}


def _how_it_stands(ended: str, done: int, runs: int) -> str:
    why = {"done": "", "budget": ", the budget is spent; the same command continues"}
    return f"{done} of {runs} runs done" + why.get(ended, ", interrupted; the same command continues")


def _read_settings(settings: tuple[str, ...]) -> dict[str, Any]:
    """Values of "name=value" as TOML reads them, else as text. Raises ValueError for what is no pair."""
    found: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise ValueError(f"--set takes name=value, such as batch_size=16, got {setting!r}")
        try:
            found[name.replace("-", "_")] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            found[name.replace("-", "_")] = text
    return found
