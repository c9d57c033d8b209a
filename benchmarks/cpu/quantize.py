"""Rotating and quantizing inputs in one pass, against PyTorch: blocks of 128 times the Hadamard matrix, then round.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/cpu/quantize.py --json quantize.json

float32 (rows, K) -> int8 codes and a step a row. token: the step of a row is its own largest magnitude over that of the
outermost level; running: the step is known beforehand. PyTorch gets the same formula in as few operations as it has,
in float32, and all of it in bfloat16, which is faster and rounds some values near a threshold the other way.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from measure import Spread, clock_for, describe, machine, native_kernels, ratios, use_threads
from torch import Tensor

from bitbell.kernels import hadamard

BLOCK = 128
KNOWN_STEP = 0.9  # of inputs of standard deviation 1
AGREE = {"bitbell": 0.999, "torch float32": 1.0, "torch bfloat16": 0.95}  # share of equal codes; others are neighbours

Quantize = Callable[[Tensor], Tensor]


@dataclass
class Candidate:
    """name, function from (rows, K) to int8 codes, its input, and the seconds of a call in each round."""

    name: str
    run: Quantize
    x: Tensor
    seconds: list[float] = field(default_factory=list)


def in_torch(bits: int, per_token: bool, dtype: torch.dtype) -> Quantize:
    """x of `dtype` -> int8 codes, all arithmetic in that type."""
    matrix = hadamard(BLOCK, dtype=dtype)
    largest, half = (2**bits - 1) / 2, 1 << (bits - 1)

    def run(x: Tensor) -> Tensor:
        h = (x.view(-1, BLOCK) @ matrix).view_as(x)
        if per_token:
            h = h * (largest / h.abs().amax(-1, keepdim=True).clamp_min_(1e-8))
        else:
            h = h * (1 / KNOWN_STEP)
        return h.floor_().clamp_(-half, half - 1).to(torch.int8)

    return run


def in_one_pass(bits: int, per_token: bool, rows: int, width: int, threads: int) -> Quantize:
    """Our kernel. Called below `native.quantize`, since a layer keeps its memory from call to call as this does."""
    from bitbell.kernels import native

    if per_token:
        share = 2 / (2**bits - 1)  # the step of a row over its largest magnitude
        plan = native.InputPlan(
            bits, BLOCK, "absmax", smallest=1e-8, divisor=share, divisor_plus=0.0, step_factor=share, zero_point=-0.5
        )
    else:
        half = 1 << (bits - 1)
        thresholds = torch.arange(1 - half, half) * KNOWN_STEP
        plan = native.InputPlan(bits, BLOCK, thresholds=thresholds, step_plus=KNOWN_STEP, zero_point=-0.5)
    stride, level = native.extension.padded_k(width) + 64, native.level()
    described = plan.fields(), plan  # the fields hold addresses of the plan's memory
    codes, steps = torch.zeros(rows, stride, dtype=torch.int8), torch.zeros(rows)
    sums = torch.zeros(rows, dtype=torch.int32)

    def run(x: Tensor) -> Tensor:
        places = codes.data_ptr(), stride, steps.data_ptr(), sums.data_ptr()
        native.extension.quantize(level, described[0], x.data_ptr(), rows, width, *places, threads)
        return codes[:, :width]

    return run


def candidates_for(rows: int, width: int, bits: int, per_token: bool, threads: int) -> list[Candidate]:
    """All candidates whose codes are right. Raises RuntimeError, naming it, for one whose are not."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    made = [
        Candidate("torch float32", in_torch(bits, per_token, torch.float32), x),
        Candidate("torch bfloat16", in_torch(bits, per_token, torch.bfloat16), x.bfloat16()),
    ]
    if native_kernels() is not None:
        made.insert(0, Candidate("bitbell", in_one_pass(bits, per_token, rows, width, threads), x))
    expected = in_torch(bits, per_token, torch.float64)(x.double())
    for candidate in made:
        codes = candidate.run(candidate.x)
        equal = float((codes == expected).double().mean())
        furthest = int((codes.int() - expected.int()).abs().max())
        # Each bit beyond 4 doubles how many values lie within rounding of a threshold.
        needed = 1 - max(1 - AGREE[candidate.name], 0.0001) * 2 ** max(0, bits - 4)
        allowed = 2 if bits > 6 and "bfloat16" in candidate.name else 1  # 8 significant bits, rounded twice
        if equal < needed or furthest > allowed:
            raise RuntimeError(
                f"{candidate.name} is wrong: {equal:.4f} of the codes are equal (at least {needed:.4f}), "
                f"the furthest is off by {furthest} (at most {allowed})"
            )
    return made


@torch.no_grad()
def measure(candidates: Sequence[Candidate], threads: int, rounds: int) -> None:
    """Fill in the seconds: in each round, each candidate's median of several calls in a row."""
    clock = clock_for(threads)
    for _, candidate in itertools.product(range(rounds), candidates):
        seconds: list[float] = []
        candidate.run(candidate.x)
        while len(seconds) < 5 or (sum(seconds) < 0.01 and len(seconds) < 200):
            begun = clock()
            candidate.run(candidate.x)
            seconds.append(clock() - begun)
        candidate.seconds.append(statistics.median(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 128, 512])
    parser.add_argument("--widths", nargs="+", type=int, default=[1024, 4096], help="multiples of 128")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--steps", nargs="+", default=["running", "token"], choices=["running", "token"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    if any(width % BLOCK for width in args.widths):
        parser.error(f"--widths must be multiples of {BLOCK}, got {args.widths}")
    use_threads(args.threads)
    about = machine(args.threads)
    print(describe(about))
    print("\n| rows x width | step | candidate | us | time / bitbell |\n|---|---|---|---|---|")
    records = []
    for rows, width, step in itertools.product(args.rows, args.widths, args.steps):
        candidates = candidates_for(rows, width, args.bits, step == "token", args.threads)
        measure(candidates, args.threads, args.rounds)
        for c in candidates:
            ours = candidates[0] if candidates[0].name == "bitbell" else None
            ratio = ratios(c.seconds, ours.seconds) if ours else None
            us = Spread.of([1e6 * s for s in c.seconds])
            print(f"| {rows} x {width} | {step} | {c.name} | {us.median:.1f} | {ratio or '-'} |", flush=True)
            records.append(
                {
                    "rows": rows,
                    "width": width,
                    "bits": args.bits,
                    "step": step,
                    "threads": args.threads,
                    "candidate": c.name,
                    "us": us.json(),
                    "ratio_to_bitbell": ratio.json() if ratio else None,
                }
            )
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "quantize": records}, indent=1))


if __name__ == "__main__":
    main()
