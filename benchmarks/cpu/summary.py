"""What `layers.py --json` wrote, in small: time of every peer over that of the packed layer which is its match.

    python benchmarks/cpu/summary.py layers.json

Decode and prefill, each regime, a column a shape: medians of the times, divided. Above 1 bitbell is faster.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

# Peer -> bits of ours that it is set against; the others against all.
MATCHES = {"Q4_0": [4], "Q2_K": [2], "TQ2_0": [2], "TQ1_0": [2], "Q1_0": [1], "4-bit": [4], "2-bit": [2], "int4": [4]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--ours", default="C++ call", help='"C++ call", or "layer" for the module\'s')
    args = parser.parse_args()
    records = [record for file in args.files for record in json.loads(file.read_text())["layers"]]
    for rows, regime in dict.fromkeys((r["rows"], r["regime"]) for r in records):
        chosen = [r for r in records if (r["rows"], r["regime"]) == (rows, regime)]
        print(f"\n{rows} row{'s' * (rows > 1)}, {regime}\n")
        print_table(chosen, args.ours)


def print_table(records: list[dict[str, Any]], ours: str) -> None:
    """A row for each pair of a peer and ours, then the share of the stream rate that ours reaches."""
    shapes = list(dict.fromkeys(tuple(r["shape"]) for r in records))
    print(f"| peer | ours | {' | '.join(f'{n}x{k}' for n, k in shapes)} |")
    print("|---|---|" + "---|" * len(shapes))
    names = sorted({r["candidate"] for r in records if r["candidate"].startswith("bitbell")})
    mine = [name for name in names if name.endswith("C++ call") == (ours == "C++ call")]
    peers = sorted({r["candidate"] for r in records if not r["candidate"].startswith("bitbell")})
    for peer in peers:
        bits = next((b for word, b in MATCHES.items() if word in peer), [1, 2, 3, 4])
        for name in mine:
            if any(f"w{b}a" in name for b in bits):
                cells = [ratio(records, shape, peer, name) for shape in shapes]
                print(f"| {peer} | {short(name)} | {' | '.join(cells)} |")
    for name in mine:
        cells = [
            cell(records, shape, name, lambda r: f"{r['of_stream']:.2f}" if r["of_stream"] else "-") for shape in shapes
        ]
        print(f"| *share of the stream rate* | {short(name)} | {' | '.join(cells)} |")


def cell(records: list[dict[str, Any]], shape: tuple[int, int], candidate: str, show: Any) -> str:
    found = [r for r in records if tuple(r["shape"]) == shape and r["candidate"] == candidate]
    return show(found[0]) if found else "-"


def ratio(records: list[dict[str, Any]], shape: tuple[int, int], peer: str, ours: str) -> str:
    times = [cell(records, shape, name, lambda r: str(r["us"]["median"])) for name in (peer, ours)]
    return "-" if "-" in times else f"{float(times[0]) / float(times[1]):.2f}"


def short(name: str) -> str:
    return name.removeprefix("bitbell ").removesuffix(", C++ call").split("-")[-1].upper()


if __name__ == "__main__":
    main()
