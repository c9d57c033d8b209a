"""Time and memory of a training step: each method against the same model in the same precision, eager and compiled.

    python benchmarks/train_step.py                     # demo model and a wider one (d = 1024), every method
    python benchmarks/train_step.py --models tiny --recipes none bbq-w2a2 --threads 1
    python benchmarks/train_step.py --models wide --recipes none bbq-w2a2 bbq-w2a2+integers --modes compiled

A recipe's name followed by +integers is trained with `integer_forward`, products of int8 codes instead of floats, and
by +compact with `compact` too.

Candidates take turns, step by step, in one process, so that a noisy neighbour hits all alike; medians and ratios are
reported. "Kept" counts the distinct bytes that autograd holds for the backward pass, parameters not included. "Peak"
is how far the resident memory of a fresh process rises above its model during two eager steps: gradients, AdamW's
state and activations (on a GPU: the allocator's peak).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitbell.evaluation import logits_of
from bitbell.evaluation.loss import autocast
from bitbell.layers import calibrate, quantize
from bitbell.models import build_model
from bitbell.models.presets import PRESETS, Preset
from bitbell.quantizers import METHODS
from bitbell.training.loop import pick_precision

PRESETS["wide"] = Preset(
    layers=2, width=1024, heads=8, feed_forward=2816, learning_rate=6e-4, tokens=1e10, vocabulary=1024
)


# Two bits, or the fewest that the method has.
EVERY_METHOD = [
    f"{method}-w{bits}a{bits}"
    for method, kind in METHODS.items()
    if kind.for_weights
    for bits in [max(2, min(kind.widths))]
]


@dataclass
class Candidate:
    """A model, how to take a step with it, and the seconds its steps took."""

    recipe: str
    mode: str
    step: Callable[[], None]
    kept_bytes: int
    peak_bytes: int
    seconds: list[float]


def make(name: str, recipe: str, compiled: bool, tokens: Tensor, precision: torch.dtype) -> Candidate:
    """Build, calibrate, measure what autograd keeps, and (for `compiled`) compile."""
    model = quantized_model(name, recipe, tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()
    kept = kept_bytes(model, tokens, precision)
    torch._dynamo.config.recompile_limit = (
        64  # the candidates share code objects; behind the limit some would run eager
    )
    forward: nn.Module = torch.compile(model) if compiled else model  # type: ignore[assignment]

    def step() -> None:
        loss_of(forward, model, tokens, precision).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if tokens.is_cuda:
            torch.cuda.synchronize()

    return Candidate(recipe, "compiled" if compiled else "eager", step, kept, 0, [])


def quantized_model(name: str, recipe: str, tokens: Tensor) -> nn.Module:
    return swap(build_model(name, vocab_size=1024).to(tokens.device), recipe, tokens)


def swap(model: nn.Module, recipe: str, tokens: Tensor) -> nn.Module:
    """Quantize `model` by a recipe, "none", or a recipe with +integers or +compact, and calibrate it."""
    if recipe == "none":
        return model
    plain, _, how = recipe.partition("+")
    quantize(model, plain, integer_forward=bool(how), compact=how == "compact")
    return calibrate(model, tokens[:, :-1])


def loss_of(forward: nn.Module, model: nn.Module, tokens: Tensor, precision: torch.dtype) -> Tensor:
    with autocast(model, precision):
        logits = logits_of(forward, tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def kept_bytes(model: nn.Module, tokens: Tensor, precision: torch.dtype) -> int:
    """Bytes of distinct storages that one forward pass saves for the backward pass, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = loss_of(model, model, tokens, precision)
    total = sum(kept.values())
    del loss
    return total


def measure_peak(arguments: list[str], name: str, recipe: str) -> int:
    """Peak memory, in bytes, of two eager steps in a process of its own."""
    command = [sys.executable, __file__, *arguments, "--models", name, "--recipes", recipe, "--print-peak"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_peak(name: str, recipe: str, tokens: Tensor, precision: torch.dtype) -> None:
    """What `measure_peak` runs in the other process."""
    model = build_model(name, vocab_size=1024).to(tokens.device)
    before = peak_resident_bytes()
    swap(model, recipe, tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for _ in range(2):
        loss_of(model, model, tokens, precision).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    print(torch.cuda.max_memory_allocated() if tokens.is_cuda else peak_resident_bytes() - before)


def peak_resident_bytes() -> int:
    """This process's own peak; the one that `resource` tells is inherited from the parent."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "wide"])
    parser.add_argument("--recipes", nargs="+", default=["none", *EVERY_METHOD])
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"])
    parser.add_argument("--batch", type=int, nargs=2, default=[8, 256], help="sequences and tokens in each")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--cpu-time", action="store_true", help="the process's CPU time, on a machine that others use")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", default=None, help="also write the rows to this file")
    parser.add_argument("--print-peak", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    device = torch.device(args.device)
    precision = pick_precision(args.precision, device)
    if args.print_peak:
        tokens = torch.randint(0, 1024, (args.batch[0], args.batch[1] + 1), device=device)
        print_peak(args.models[0], args.recipes[0], tokens, precision)
        return
    passed_on = [
        "--threads",
        str(torch.get_num_threads()),
        "--batch",
        *map(str, args.batch),
        "--precision",
        args.precision,
        "--device",
        args.device,
    ]
    rows = []
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {precision}, batch {args.batch}")
    for name in args.models:
        tokens = torch.randint(0, 1024, (args.batch[0], args.batch[1] + 1), device=device)
        candidates = [
            make(name, recipe, mode == "compiled", tokens, precision) for mode in args.modes for recipe in args.recipes
        ]
        peaks = {recipe: measure_peak(passed_on, name, recipe) for recipe in args.recipes}
        for candidate in candidates:
            candidate.peak_bytes = peaks[candidate.recipe]
        take_turns(candidates, args.rounds, clock)
        rows += summarize(name, candidates)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


def take_turns(candidates: Sequence[Any], rounds: int, clock: Callable[[], float]) -> None:
    """Two unmeasured steps of each candidate, then `rounds` of one measured step each, in seconds of `clock`."""
    for candidate in candidates:
        candidate.step()
        candidate.step()
    for _ in range(rounds):
        for candidate in candidates:
            begun = clock()
            candidate.step()
            candidate.seconds.append(clock() - begun)


def summarize(name: str, candidates: list[Candidate]) -> list[dict]:
    """Print and return medians, and ratios to full precision of the same mode."""
    rows = []
    print(f"\n| {name} | mode | ms/step | x full precision | kept MB | x full precision | peak MB |\n|{'---|' * 7}")
    for candidate in candidates:
        base = next(c for c in candidates if c.mode == candidate.mode and c.recipe == candidates[0].recipe)
        # The median of ratios within a round: both sides of each ratio were measured seconds apart.
        ratio = statistics.median(a / b for a, b in zip(candidate.seconds, base.seconds, strict=True))
        row = {
            "model": name,
            "recipe": candidate.recipe,
            "mode": candidate.mode,
            "ms": 1e3 * statistics.median(candidate.seconds),
            "ratio": ratio,
            "kept_mb": candidate.kept_bytes / 1e6,
            "kept_ratio": candidate.kept_bytes / base.kept_bytes,
            "peak_mb": candidate.peak_bytes / 1e6,
        }
        rows.append(row)
        print(
            f"| {row['recipe']} | {row['mode']} | {row['ms']:.1f} | {ratio:.2f} | {row['kept_mb']:.1f} "
            f"| {row['kept_ratio']:.2f} | {row['peak_mb']:.0f} |",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
