"""The 30m preset on the corpus that bitbell ships (the King James Bible), each run for the same time.

Steps are as many as fit the time at the speed of a short run before. The corpus is small: the model sees it many
times over, so curves compare methods, and say nothing about language.
"""

from __future__ import annotations

import argparse
from io import StringIO
from pathlib import Path
from typing import Any

from measure import Machine, Report, Row

from bitbell.data import tokenize
from bitbell.training import TrainConfig, train
from bitbell.training.journal import Progress, read_metrics

RECIPES = ["none"] + [f"{method}-w{bits}a{bits}" for bits in (4, 2, 1) for method in ("bbq", "quest")]
WARM_UP = 30  # steps of the short run; the last 10 are timed


def run(machine: Machine, report: Report, args: argparse.Namespace) -> None:
    folder = args.out / "curves"
    minutes = args.curves or 0.05
    data = folder / "data"
    if not (data / "dataset.json").exists():
        tokenize(["kjv"], data, tokenizer="bytes" if machine.quick else "bpe:4096")
    curves: dict[str, Any] = {}
    for recipe in args.curve_recipes or (RECIPES[:2] if machine.quick else RECIPES):
        with report.guarded(recipe):
            curves[recipe] = one_run(machine, report, folder, data, recipe, minutes)
            draw(curves, args.out / "curves.png")


def one_run(
    machine: Machine, report: Report, folder: Path, data: Path, recipe: str, minutes: float
) -> list[tuple[float, float]]:
    """Train; the row of its final loss, and (tokens seen, validation loss) of its curve."""
    common: dict[str, Any] = {
        "data": str(data), "recipe": recipe, "device": str(machine.device), "tensorboard": False,
        "preset": "tiny" if machine.quick else "30m", "batch_size": 2 if machine.quick else 64,
        "sequence_length": 64 if machine.quick else 512, "compile": machine.is_gpu,
    }  # fmt: skip
    short = folder / f"{recipe}-speed"
    warm_up = 4 if machine.quick else WARM_UP
    probe = TrainConfig(
        **common, out=str(short), steps=100_000, stop_after=warm_up, log_every=max(1, warm_up // 3)
    )  # fmt: skip
    train(probe, Progress(warm_up, StringIO()))
    pace = [event for event in read_metrics(short / "metrics.jsonl") if event["event"] == "train"][-1]["step_seconds"]
    steps = 4 if machine.quick else max(50, round(minutes * 60 / pace))
    config = TrainConfig(
        **common, out=str(folder / recipe), steps=steps, evaluate_every=max(1, steps // 12),
        checkpoint_every=steps, entropy_every=steps, evaluate_windows=8 if machine.quick else 64,
        final_windows=8 if machine.quick else 256,
    )  # fmt: skip
    result = train(config, Progress(steps, StringIO()))
    summary = result.summary
    check = f"loss {summary['loss']:.4f} after {steps} steps, {summary['bits_per_byte']:.3f} bits/byte"
    tokens = config.batch_size * config.sequence_length
    report.add(Row(recipe, 1e3 * pace, f"{tokens / pace:.4g} tokens/s", check=check, details={"loss": summary["loss"]}))
    events = read_metrics(folder / recipe / "metrics.jsonl")
    return [(event["step"] * tokens, event["loss"]) for event in events if event["event"] == "valid"]


def draw(curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Validation loss over tokens, a line a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for recipe, points in curves.items():
        axes.plot([p[0] for p in points], [p[1] for p in points], marker=".", label=recipe)
    axes.set_xlabel("tokens")
    axes.set_ylabel("validation loss")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
