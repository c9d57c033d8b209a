"""Every level that this machine runs, on one layer: microseconds of a row and of 128 rows, side by side in each round.

OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/cpu/levels.py
"""

from __future__ import annotations

import argparse
import time

import torch
from measure import Spread, describe, machine, ratios, use_threads
from torch import nn

import bitbell
from bitbell.kernels import native

WORKING_SET = 24e6  # bytes of copies that a pass walks over


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="outputs and inputs")
    parser.add_argument("--bits", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    use_threads(1)
    levels = [name for name, missing in native.level_names().items() if not missing and name != "amx-emulated"][::-1]
    print(describe(machine(1)), "\n")
    print("| rows | bits |" + "".join(f" {name} us | time / {levels[0]} |" for name in levels))
    print("|---|---|" + "---|---|" * len(levels))
    for rows in (1, 128):
        for bits in args.bits:
            times = measure(args.size, bits, rows, levels, args.rounds)
            cells = [
                f" {1e6 * Spread.of(times[n]).median:.0f} | {ratios(times[n], times[levels[0]])} |" for n in levels
            ]
            print(f"| {rows} | {bits} |" + "".join(cells), flush=True)


def measure(size: int, bits: int, rows: int, levels: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds a layer and round of each level."""
    model = bitbell.quantize(nn.Sequential(nn.Linear(size, size, bias=False)), f"bbq-w{bits}a{bits}")
    bitbell.calibrate(model, torch.randn(16, size))
    packed = bitbell.pack(model.eval()).model[0]
    count = 1 if rows > 1 else max(1, int(WORKING_SET * 8 / bits / size**2))
    layers = [packed._make_native_layer() for _ in range(count)]
    x, times = torch.randn(rows, size), {name: [] for name in levels}
    for number in range(rounds + 1):
        for name in levels:
            with native.using(name):
                begun = time.thread_time()
                for layer in layers:
                    layer(x)
                if number:
                    times[name].append((time.thread_time() - begun) / count)
    return times


if __name__ == "__main__":
    main()
