"""Everything on one GPU in a few minutes: checked, timed, and written down as a Markdown table and JSON.

    PYTHONPATH=src python benchmarks/gpu/run.py --out results                # all but the training curves
    PYTHONPATH=src python benchmarks/gpu/run.py --only layers products       # some parts
    PYTHONPATH=src python benchmarks/gpu/run.py --curves 1.5                 # and curves, 1.5 minutes a run
    PYTHONPATH=src python benchmarks/gpu/run.py --device cpu --quick         # does the script itself work? tiny sizes

Every part is a process of its own: one that fails, hangs or loses the GPU is reported, and the others go on. Results
are written after each part. bitbell need not be installed, and needs no compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from measure import HEADER, Machine, Report, Row

# Name -> title, and the seconds after which a part is stopped.
PARTS = {
    "kernels": ("Which kernels are here", 60),
    "quantize": ("Quantizers: share of the copy bandwidth", 150),
    "products": ("Matrix products: against torch in bfloat16", 150),
    "layers": ("Packed layers: decode and prefill, against torch in bfloat16", 180),
    "steps": ("Training steps: against torch in bfloat16, compiled", 420),
    "curves": ("The 30m preset, trained for the same time", 3600),
}


def main() -> int:
    args = arguments().parse_args()
    machine = Machine(torch.device(args.device), args.quick)
    if args.part:
        import_module(args.part).run(machine, Report(args.out / f"{args.part}.json"), args)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part does not outlive a script that is stopped
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = args.only or [name for name in PARTS if name != "curves" or args.curves]
    results: dict[str, Any] = {"machine": machine.describe(), "command": sys.argv[1:], "parts": {}}
    for name in wanted:
        results["parts"][name] = run_part(name, args)
        write(results, args.out)
    print(f"\n{args.out / 'results.md'} and {args.out / 'results.json'} have it all")
    failed = [row for part in results["parts"].values() for row in part["rows"] if row["check"].startswith("FAILED")]
    broken = [name for name, part in results["parts"].items() if part["status"] != "finished"]
    print(f"{len(failed)} rows failed; parts that did not finish: {', '.join(broken) or 'none'}")
    return 1 if failed or broken else 0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and two rounds: shows that it works, no more")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="parts to run; default: all but curves")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="directory for results")
    parser.add_argument("--curves", type=float, default=0.0, metavar="MINUTES", help="also train, so long a run")
    parser.add_argument("--curve-recipes", nargs="+", default=None, help="instead of bfloat16, BBQ and QuEST, 4, 2, 1")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    return parser


def run_part(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run a part in a process of its own; its rows, how it ended, and the end of what it said if badly."""
    title, limit = PARTS[name]
    limit *= 1 if args.device.startswith("cuda") else 4  # the interpreter and a compiler on a busy CPU
    print(f"\n## {title}\n\n| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}", flush=True)
    rows, log = args.out / f"{name}.json", args.out / f"{name}.log"
    rows.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--part", name, "--out", str(args.out), "--device", args.device]
    command += ["--quick"] * args.quick + ["--curves", str(args.curves)]
    command += ["--curve-recipes", *args.curve_recipes] if args.curve_recipes else []
    environment = dict(os.environ)
    if args.device == "cpu" and name not in ("steps", "curves"):  # Triton's interpreter is too slow for models
        environment.setdefault("BITBELL_TRITON", "interpret")
    if args.quick:  # so small that threads only wait for each other
        environment.setdefault("OMP_NUM_THREADS", "1")
    begun = time.monotonic()
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        try:
            said, _ = process.communicate(timeout=limit + 60 * args.curves * (name == "curves") * 10)
            status = "finished" if process.returncode == 0 else f"stopped with exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
            status = f"stopped after {limit} s"
        finally:
            process.kill()
    print(said, end="", flush=True)
    found = json.loads(rows.read_text()) if rows.exists() else []
    part = {"title": title, "status": status, "seconds": time.monotonic() - begun, "rows": found}
    if status != "finished":
        part["log"] = log.read_text()[-2000:]
        print(f"{name}: {status}\n{part['log']}", flush=True)
    return part


def write(results: dict[str, Any], out: Path) -> None:
    """results.json and results.md, as far as they have come."""
    (out / "results.json").write_text(json.dumps(results, indent=1))
    lines = ["# GPU results", "", ", ".join(f"{key} {value}" for key, value in results["machine"].items())]
    lines += ["", f"`python benchmarks/gpu/run.py {' '.join(results['command'])}`"]
    for part in results["parts"].values():
        lines += ["", f"## {part['title']}", ""]
        if part["status"] != "finished":
            lines += [f"**{part['status']}**", ""]
        lines += [f"| {' | '.join(HEADER)} |", "|" + "---|" * len(HEADER)]
        lines += ["| " + " | ".join(Row(**row).cells()) + " |" for row in part["rows"]]
    (out / "results.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
