"""Speed of one packed layer against every other way to multiply by a weight matrix (`peers.py`), in one run.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/cpu/layers.py --json layers.json --plot layers.png
    python benchmarks/cpu/layers.py --quick
    python benchmarks/cpu/layers.py --peers torch llama.cpp --shapes 4096x4096 --rows 1 --bits 2

warm: each candidate alone: a few passes that are not timed, then timed ones, each over copies of the layer that no L2
holds together. cold: all candidates in turn, one pass each, with at least 1 GB read until a candidate's turn comes
again. Every peer's output is checked first; one that is wrong is named and not timed. Ratios are taken within a round,
where both sides were measured a moment apart; the table has their median and range over rounds.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure import Spread, clock_for, describe, machine, native_kernels, ratios, stream_rates, use_threads
from peers import (
    DEFAULT_GROUPS,
    Peer,
    Run,
    parse_shape,
    problem_in_other_process,
    random_layer,
    relative_error,
    selected_peers,
)
from torch import Tensor, nn

import bitbell

SHAPES = ["1024x1024", "2048x2048", "4096x4096", "11008x4096"]
RESIDENT = 1 << 30  # bytes that a cold round reads at least
MOST_COPIES = 64
FEW_ROWS = 16  # up to here the weights' bytes set the pace, and copies and warm caches matter


class Bitbell(Peer):
    """Our packed layer, called as any module. Its outputs have to be those of the trained layer.

    Equal but for the odd input within float rounding of a threshold, of which there is one in a million or so; one more
    step in one of 2048 inputs moves a row's outputs by a few per mille.
    """

    group = "bitbell"
    tolerance = 2e-3

    def __init__(self, bits: int, recipe: str) -> None:
        self.recipe = recipe.format(bits=bits)
        self.name = f"bitbell {self.recipe}"
        self.bytes_per_weight = bits / 8
        self.made: tuple[Tensor, nn.Module, nn.Module] | None = None

    def layers(self, weight: Tensor) -> tuple[nn.Module, nn.Module]:
        """The trained layer of a weight and its packed twin, which is never called itself."""
        if self.made is None or self.made[0] is not weight:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight = nn.Parameter(weight.clone())
            trained = bitbell.quantize(nn.Sequential(layer), self.recipe)
            bitbell.calibrate(trained, random_layer((1, weight.shape[1]), 64, seed=1)[1])
            packed: Any = bitbell.pack(trained.eval()).model
            self.made = weight, trained, packed[0]
        return self.made[1:]

    def copies_of(self, weight: Tensor, copies: int) -> list[Any]:
        packed = [copy.deepcopy(self.layers(weight)[1]) for _ in range(copies)]
        for i, layer in enumerate(packed):
            for buffer in (layer.weight_packed, layer.weight_scale, layer.weight_offset):
                if buffer is not None:
                    buffer.copy_(buffer.roll(i, 0))
        return packed

    def prepare(self, weight: Tensor, copies: int, rows: int, threads: int) -> Run:
        packed = self.copies_of(weight, copies)
        return lambda x: [layer(x) for layer in packed]

    @torch.no_grad()
    def expected(self, weight: Tensor, x: Tensor) -> Tensor:
        return self.layers(weight)[0](x)


class BitbellKernels(Bitbell):
    """The C++ call under the layer, into memory that is there: what a layer costs inside the native step of a model,
    and what to compare with libraries that get all copies in one graph."""

    def __init__(self, bits: int, recipe: str) -> None:
        super().__init__(bits, recipe)
        self.name += ", C++ call"

    def available(self) -> str | None:
        return None if native_kernels() is not None else "bitbell's native kernels are not in use"

    def prepare(self, weight: Tensor, copies: int, rows: int, threads: int) -> Run:
        native: Any = native_kernels()
        layers = [layer.native_layer() for layer in self.copies_of(weight, copies)]
        if layers[0] is None or layers[0].plan is None:
            raise ValueError(f"the native kernels have no integer product for {self.recipe}")
        outputs = [torch.empty(rows, len(weight)) for _ in layers]
        level = native.level()

        def run(x: Tensor) -> list[Tensor]:
            for layer, y in zip(layers, outputs, strict=True):
                layer.layer.forward(level, x.data_ptr(), rows, y.data_ptr(), threads)
            return outputs

        return run


@dataclass
class Candidate:
    """A peer with its layers in memory. seconds: regime -> seconds a layer, one of each round."""

    peer: Peer
    run: Run
    x: Any
    copies: int
    error: float
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"warm": [], "cold": []})


@dataclass(frozen=True)
class Case:
    """What is measured: shape (outputs, inputs), rows of input, threads."""

    shape: tuple[int, int]
    rows: int
    threads: int

    @property
    def name(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]}, {self.rows} row{'s' * (self.rows > 1)}"


def make_candidate(peer: Peer, case: Case, weight: Tensor, x: Tensor, working_set: float) -> Candidate | str:
    """Prepare and check; or say why it is not timed."""
    reason = peer.available()
    if reason is None and peer.may_crash:
        reason = problem_in_other_process(peer, case.shape, case.rows, case.threads)
    if reason:
        return reason
    copies = 1
    if case.rows < FEW_ROWS:
        copies = min(MOST_COPIES, math.ceil(working_set / (weight.numel() * peer.bytes_per_weight)))
    try:
        run = peer.prepare(weight, copies, case.rows, case.threads)
        error = relative_error(peer, run, weight, x)
    except Exception as problem:  # whatever a library objects to, the others shall be timed
        return f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
    if not error <= peer.tolerance:  # NaN is wrong too
        return f"WRONG: relative error {error:.1e}, at most {peer.tolerance:g}"
    candidate = Candidate(peer, run, peer.give(x), copies, error)
    if case.threads == 1 and peer.on_its_thread(works_elsewhere, candidate):
        return "works in threads that the clock does not see"
    return candidate


def works_elsewhere(candidate: Candidate) -> bool:
    """Does a pass take the process far more CPU time than the thread that asks for it?"""
    candidate.run(candidate.x)
    thread, process = time.thread_time(), time.process_time()
    candidate.run(candidate.x)
    thread, process = time.thread_time() - thread, time.process_time() - process
    return process > 1.5 * thread + 1e-3


def warm_pass(candidate: Candidate, clock: Callable[[], float], case: Case) -> float:
    """Seconds a layer: the median of timed passes after some that are not timed."""
    # A shared cache may take memory in from the second pass on only, so one pass is not enough.
    for _ in range(3 if case.rows < FEW_ROWS else 1):
        candidate.run(candidate.x)
    seconds: list[float] = []
    while len(seconds) < 3 or (sum(seconds) < 0.02 and len(seconds) < 15):
        seconds.append(one_pass(candidate, clock))
        if seconds[-1] > 0.2:
            break
    return statistics.median(seconds) / candidate.copies


def one_pass(candidate: Candidate, clock: Callable[[], float]) -> float:
    begun = clock()
    candidate.run(candidate.x)
    return clock() - begun


def resident_bytes(candidates: Sequence[Candidate], case: Case) -> int:
    weights = case.shape[0] * case.shape[1]
    return int(sum(c.copies * c.peer.bytes_per_weight * weights for c in candidates))


@torch.no_grad()
def measure(candidates: Sequence[Candidate], case: Case, regimes: Sequence[str], rounds: int) -> None:
    """Fill in the candidates' seconds."""
    clock = clock_for(case.threads)
    missing = max(0, RESIDENT - resident_bytes(candidates, case))
    other_memory = torch.ones(missing // 4 + 1 if "cold" in regimes else 1)
    for number in range(rounds):
        # A new order each round: who comes first pays for waking things up that all use.
        order = random.Random(number).sample(candidates, len(candidates))
        if "warm" in regimes:
            for c in order:
                c.seconds["warm"].append(c.peer.on_its_thread(warm_pass, c, clock, case))
        if "cold" in regimes:
            if len(candidates[0].seconds["cold"]) == 0:  # evicts what the warm passes left
                torch.ones(RESIDENT // 4).sum()
            for c in order:
                c.seconds["cold"].append(c.peer.on_its_thread(one_pass, c, clock) / c.copies)
            other_memory.sum()


def rows_of(
    candidates: Sequence[Candidate], case: Case, regime: str, stream: dict[str, float], base: type[Peer]
) -> list[dict[str, Any]]:
    """One record a candidate, in the order of their times; ratios are to the candidates of class `base`."""
    ours = [c for c in candidates if type(c.peer) is base]
    weights = case.shape[0] * case.shape[1]
    records = []
    for c in sorted(candidates, key=lambda c: statistics.median(c.seconds[regime])):
        seconds = Spread.of(c.seconds[regime])
        rate = weights * c.peer.bytes_per_weight / seconds.median
        records.append(
            {
                "shape": case.shape,
                "rows": case.rows,
                "regime": regime,
                "threads": case.threads,
                "candidate": c.peer.name,
                "group": c.peer.group,
                "bytes_per_weight": c.peer.bytes_per_weight,
                "copies": c.copies,
                "error": c.error,
                "us": Spread.of([1e6 * s for s in c.seconds[regime]]).json(),
                "gb_per_second": rate / 1e9,
                "of_stream": rate / stream[regime] if regime in stream else None,
                "gop_per_second": 2e-9 * weights * case.rows / seconds.median,
                "ratio_to": {o.peer.name: ratios(c.seconds[regime], o.seconds[regime]).json() for o in ours},
            }
        )
    return records


def table(records: Sequence[dict[str, Any]], title: str) -> str:
    """Markdown."""
    ours = list(records[0]["ratio_to"])
    header = ["candidate", "bits a weight", "us", "GB/s", "of stream", "Gop/s", *(f"time / {name}" for name in ours)]
    lines = [f"\n### {title}\n", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for r in records:
        share = "-" if r["of_stream"] is None else f"{r['of_stream']:.2f}"
        cells = [
            r["candidate"],
            f"{8 * r['bytes_per_weight']:.2f}",
            f"{r['us']['median']:.1f}",
            f"{r['gb_per_second']:.1f}",
            share,
            f"{r['gop_per_second']:.0f}",
            *(str(Spread(**r["ratio_to"][name])) for name in ours),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run_case(case: Case, peers: Sequence[Peer], args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Prepare, check, measure, print, and add to the result."""
    weight, x = random_layer(case.shape, case.rows)
    candidates = []
    for peer in peers:
        made = make_candidate(peer, case, weight, x, args.working_set * 1e6)
        if isinstance(made, Candidate):
            candidates.append(made)
        else:
            print(f"{case.name}: {peer.name}: not timed: {made}", flush=True)
            result["not_timed"].append({"shape": case.shape, "rows": case.rows, "candidate": peer.name, "reason": made})
    if candidates:
        measure(candidates, case, args.regimes, args.rounds)
        for regime in args.regimes:
            base = BitbellKernels if args.ratio_to == "kernels" else Bitbell
            records = rows_of(candidates, case, regime, result["machine"]["stream"], base)
            result["layers"] += records
            print(table(records, f"{case.name}, {regime}"), flush=True)
    for peer in peers:
        peer.release()


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars: each peer's time over ours, by shape; a picture for each number of rows and regime. Ours: the most like 2
    bits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ours = sorted(records[0]["ratio_to"], key=lambda name: "w2" not in name)[0]
    if not ours.endswith("C++ call"):  # too many bars to tell apart otherwise
        records = [r for r in records if not r["candidate"].endswith("C++ call")]
    panels = list(dict.fromkeys((r["rows"], r["regime"]) for r in records))
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(11, 3.6 * len(panels)), squeeze=False)
    for axis, (rows, regime) in zip(axes[:, 0], panels, strict=True):
        chosen = [r for r in records if (r["rows"], r["regime"]) == (rows, regime) and r["candidate"] != ours]
        shapes = list(dict.fromkeys(tuple(r["shape"]) for r in chosen))
        names = sorted(dict.fromkeys(r["candidate"] for r in chosen))
        width = 0.85 / max(1, len(names))
        for i, name in enumerate(names):
            bars = {tuple(r["shape"]): r["ratio_to"][ours]["median"] for r in chosen if r["candidate"] == name}
            places = [shapes.index(shape) + i * width for shape in bars]
            axis.bar(places, list(bars.values()), width, label=name, color=pyplot.colormaps["tab20"](i % 20))
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_yscale("log")
        axis.set_xticks([j + 0.42 for j in range(len(shapes))], [f"{n}x{k}" for n, k in shapes])
        axis.set_ylabel(f"time / {ours}")
        axis.set_title(f"{rows} row{'s' * (rows > 1)}, {regime}: above 1, {ours} is faster", fontsize=10)
    axes[0, 0].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=130, bbox_inches="tight")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=None, help=f"outputs x inputs; {' '.join(SHAPES)}")
    parser.add_argument("--rows", nargs="+", type=int, default=None, help="of input: 1 is decode; 1 128 512")
    parser.add_argument("--bits", nargs="+", type=int, default=None, help="of our layers; 1 2 3 4")
    parser.add_argument("--recipe", default="bbq-w{bits}a{bits}", help="of our layers")
    parser.add_argument("--peers", nargs="+", default=list(DEFAULT_GROUPS), help="groups or names; also: llama.cpp")
    parser.add_argument("--regimes", nargs="+", default=["warm", "cold"], choices=["warm", "cold"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=None, help="7")
    parser.add_argument("--working-set", type=float, default=24, help="megabytes of copies that a candidate walks over")
    parser.add_argument(
        "--ratio-to",
        default="layers",
        choices=["layers", "kernels"],
        help="ours as called from Python, or the C++ call alone",
    )
    parser.add_argument("--quick", action="store_true", help="one small shape, 1 and 128 rows, 2 bits, 3 rounds")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None, help="a PNG file")
    args = parser.parse_args()
    args.shapes = [parse_shape(word) for word in args.shapes or (["1024x1024"] if args.quick else SHAPES)]
    args.rows = args.rows or ([1, 128] if args.quick else [1, 128, 512])
    args.bits = args.bits or ([2] if args.quick else [1, 2, 3, 4])
    args.rounds = args.rounds if args.rounds is not None else 3 if args.quick else 7
    try:
        args.peers = selected_peers(args.peers)
    except ValueError as error:
        parser.error(str(error))
    for name in ("rounds", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


def main() -> None:
    args = parse_arguments()
    use_threads(args.threads)
    ours = [kind(bits, args.recipe) for kind in (Bitbell, BitbellKernels) for bits in args.bits]
    peers = [*ours, *args.peers]
    about = machine(args.threads)
    about["stream"] = stream_rates(args.threads)
    print(describe(about), flush=True)
    result: dict[str, Any] = {"machine": about, "layers": [], "not_timed": []}
    for shape, rows in itertools.product(args.shapes, args.rows):
        run_case(Case(shape, rows, args.threads), peers, args, result)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1))
    if args.plot and result["layers"] and result["layers"][0]["ratio_to"]:
        plot(result["layers"], args.plot)


if __name__ == "__main__":
    main()
