"""The whole road in one command: text -> full precision, BBQ, QuEST and LSQ side by side -> packed model -> text ->
report."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitbell.training.config import TrainConfig

PROMPTS = ("In the beginning", "And the LORD said unto", "Blessed are")


@dataclass(frozen=True)
class Contestant:
    """One run of the demo. Learning rates are the ones docs/results/language.md found best for each method."""

    name: str
    recipe: str
    learning_rate: float


CONTESTANTS = (
    Contestant("full-precision", "none", 2e-3),
    Contestant("bbq-w2a2", "bbq-w2a2", 4e-3),
    Contestant("quest-w2a2", "quest-w2a2", 2e-3),
    Contestant("lsq-w2a2", "lsq-w2a2", 2e-3),
)


def demo(out: str = "runs/demo", corpus: str = "kjv", steps: int = 300, seed: int = 0) -> int:
    """Train full precision, BBQ, QuEST and LSQ at 2 bits side by side, pack the BBQ model, generate from it, and
    report.

    Interrupted, the same command continues where it stopped; finished parts are not done again.

    Args:
        out: Directory for everything the demo makes.
        corpus: What to train on: kjv, which ships with bitbell, or a text file or folder of yours (a megabyte or more).
        steps: Optimizer steps of each run.
        seed: Of the weights and of the order of the data.
    """
    from bitbell.data import tokenize

    begun = time.perf_counter()
    folder = Path(out)
    data = folder / "data"
    _announce(f"bitbell tokenize {corpus} --out {data} --tokenizer bpe:1024")
    tokenize([corpus], data, tokenizer="bpe:1024")  # if that is there already, it is opened
    summaries = {}
    for contestant in CONTESTANTS:
        summary = _train(contestant, folder, data, steps, seed)
        if summary is None:
            return 130
        summaries[contestant.name] = summary
    _pack_and_generate(folder)
    page = _report(folder, [folder / contestant.name for contestant in CONTESTANTS])
    print(_table(summaries))
    print(f"\nreport: {page}   ({(time.perf_counter() - begun) / 60:.1f} minutes)")
    return 0


def _announce(command: str) -> None:
    print(f"\n$ {command}", flush=True)


def _train(contestant: Contestant, folder: Path, data: Path, steps: int, seed: int) -> dict[str, Any] | None:
    """Train one contestant unless it is done; None if it was interrupted."""
    from bitbell.training import train

    run = folder / contestant.name
    flags = f"--recipe {contestant.recipe} --learning-rate {contestant.learning_rate:g} --steps {steps} --seed {seed}"
    _announce(f"bitbell train --preset tiny --data {data} --out {run} {flags}")
    config = TrainConfig(
        data=str(data),
        out=str(run),
        recipe=contestant.recipe,
        learning_rate=contestant.learning_rate,
        steps=steps,
        seed=seed,
    )
    result = train(config)
    return result.summary if result.status == "finished" else None


def _pack_and_generate(folder: Path) -> None:
    """Pack the BBQ run, prove it, and let it continue a few prompts; the samples go into the run's summary."""
    from bitbell.cli import commands
    from bitbell.packing import load
    from bitbell.serving import generate, load_tokenizer_of
    from bitbell.training.run import write_json

    run, packed = folder / "bbq-w2a2", folder / "packed-bbq-w2a2"
    _announce(f"bitbell pack {run} {packed} --overwrite")
    commands.pack(str(run), str(packed), overwrite=True)
    _announce(f"bitbell verify {run} {packed}")
    if commands.verify(str(run), str(packed)):
        raise ValueError(f"{packed} does not compute what {run} computes")
    model, tokenizer = load(packed), load_tokenizer_of(packed)
    samples = []
    for prompt in PROMPTS:
        _announce(f'bitbell generate {packed} --prompt "{prompt}"')
        result = generate(model, tokenizer, prompt, max_new_tokens=60)
        print(f"{prompt}{result.text}\n[{result.tokens_per_second:.0f} tokens/s]")
        samples.append({"prompt": prompt, "text": result.text, "tokens_per_second": result.tokens_per_second})
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    size = (packed / "model.safetensors").stat().st_size
    write_json(run / "summary.json", summary | {"samples": samples, "packed_file_bytes": size})


def _report(folder: Path, runs: list[Path]) -> Path:
    from bitbell.reports import write_report

    _announce(f"bitbell report {' '.join(map(str, runs))} --out {folder / 'report'}")
    return write_report(runs, folder / "report")


def _table(summaries: dict[str, dict[str, Any]]) -> str:
    lines = [
        "",
        f"{'run':<16}{'val loss':>10}{'bits/byte':>11}{'entropy W':>11}{'packed MB':>11}{'s/step':>9}",
    ]
    for name, summary in summaries.items():
        entropy = "-" if summary["weight_entropy"] is None else f"{summary['weight_entropy']:.3f}"
        size = (summary["packed_bytes"] or summary["bytes"]) / 1e6
        lines.append(
            f"{name:<16}{summary['loss']:>10.3f}{summary['bits_per_byte']:>11.3f}{entropy:>11}{size:>11.2f}"
            f"{summary['seconds_per_step']:>9.3f}"
        )
    return "\n".join(lines)
