"""Make docs/results/language.md: methods x bits x seeds on the demo model and the shipped corpus.

    python benchmarks/language_results.py --out runs/results            # everything, resumable
    python benchmarks/language_results.py --out runs/results --tune     # only the choice of learning rates

Learning rates are chosen per method, at 2 bits and seed 0, from one grid, by the validation loss; the other bit
widths and seeds use that choice. Finished runs are skipped, interrupted ones continued.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from bitbell.data import tokenize
from bitbell.training import TrainConfig, train

GRID = (2e-3, 4e-3)
METHODS = ("none", "bbq", "quest", "lsq")


def run(out: Path, data: Path, name: str, recipe: str, rate: float, seed: int, args: argparse.Namespace) -> dict:
    """Train one run unless it is finished; return its summary."""
    config = TrainConfig(
        data=str(data),
        out=str(out / name),
        recipe=recipe,
        learning_rate=rate,
        seed=seed,
        steps=args.steps,
        threads=args.threads,
        tensorboard=False,
        evaluate_every=args.steps,
        checkpoint_every=args.steps,
        keep_checkpoints=1,
    )
    result = train(config)
    if result.status != "finished":
        raise SystemExit("interrupted; the same command continues")
    return result.summary


def recipe_of(method: str, bits: int) -> str:
    return "none" if method == "none" else f"{method}-w{bits}a{bits}"


def tuned_rates(out: Path, data: Path, args: argparse.Namespace) -> dict[str, float]:
    """The learning rate of the grid with the lowest validation loss at 2 bits and seed 0, for each method."""
    best = {}
    for method in args.methods:
        recipe = recipe_of(method, 2)
        losses = {
            rate: run(out, data, f"{recipe}-lr{rate:g}-seed0", recipe, rate, 0, args)["loss"] for rate in args.grid
        }
        best[method] = min(losses, key=losses.__getitem__)
        print(method, losses, "->", best[method], flush=True)
    return best


def table(rows: list[tuple[str, int, list[dict]]], rates: dict[str, float]) -> str:
    """Markdown: mean and sample standard deviation over seeds."""
    lines = [
        "| method | bits | learning rate | validation loss | spread | bits/byte | weight entropy | packed MB | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method, bits, summaries in rows:
        losses = [s["loss"] for s in summaries]
        spread = f"{statistics.stdev(losses):.3f}" if len(losses) > 1 else "-"
        quantized = method != "none"
        entropy = f"{statistics.mean(s['weight_entropy'] for s in summaries):.3f}" if quantized else "-"
        size = summaries[0]["packed_bytes"] if quantized else summaries[0]["bytes"]
        cells = [
            method if quantized else "full precision",
            f"W{bits}A{bits}" if quantized else "32",
            f"{rates[method]:g}",
            f"{statistics.mean(losses):.3f}",
            spread,
            f"{statistics.mean(s['bits_per_byte'] for s in summaries):.3f}",
            entropy,
            f"{size / 1e6:.2f}",
            str(len(losses)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4, 1, 3])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--grid", type=float, nargs="+", default=list(GRID))
    parser.add_argument("--tune", action="store_true", help="only choose learning rates")
    args = parser.parse_args()
    data = args.out / "data"
    if not (data / "dataset.json").exists():
        tokenize(["kjv"], data, tokenizer="bpe:1024")
    rates = tuned_rates(args.out, data, args)
    if args.tune:
        return
    rows = []
    for bits in args.bits:
        for method in args.methods:
            if method == "none" and bits != args.bits[0]:
                continue
            recipe, rate = recipe_of(method, bits), rates[method]
            summaries = [
                run(args.out, data, f"{recipe}-lr{rate:g}-seed{seed}", recipe, rate, seed, args) for seed in args.seeds
            ]
            rows.append((method, bits, summaries))
            rows.sort(key=lambda row: (row[0] != "none", -row[1], METHODS.index(row[0])))
            text = table(rows, rates)
            (args.out / "table.md").write_text(text + "\n")
            print(text, flush=True)


if __name__ == "__main__":
    main()
