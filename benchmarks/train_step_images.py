"""Time of a training step of an image classifier: recipes against the same model in full precision, compiled or eager.

    python benchmarks/train_step_images.py --threads 1 --cpu-time
    python benchmarks/train_step_images.py --preset one-block --threads 1 --cpu-time
    python benchmarks/train_step_images.py --preset resnet18 --size 224 --batch 4 --recipes none bbq-vision-w2a2

Candidates take turns, step by step, in one process; medians and the median of ratios within a round are reported.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from train_step import take_turns

from bitbell.evaluation import logits_of
from bitbell.evaluation.loss import autocast
from bitbell.layers import calibrate, quantize
from bitbell.models import IMAGE_PRESETS, ImagePreset, build_model
from bitbell.training.loop import pick_precision

# A stem, one residual block and a head, where compiling a ResNet takes too long.
IMAGE_PRESETS["one-block"] = ImagePreset("resnet", (128,), (1,), learning_rate=1e-3)


@dataclass
class Candidate:
    """A recipe in a mode, how to take a step with it, and the seconds its steps took."""

    recipe: str
    mode: str
    step: Callable[[], None]
    seconds: list[float] = field(default_factory=list)


def make(preset: str, recipe: str, mode: str, images: Tensor, labels: Tensor, precision: torch.dtype) -> Candidate:
    """Build and calibrate a classifier, channels last as its images, and (for "compiled") compile it."""
    model = build_model(preset, labels=10, image_size=images.shape[-1]).to(memory_format=torch.channels_last)
    if recipe != "none":
        calibrate(quantize(model, recipe), images)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()
    forward: nn.Module = torch.compile(model) if mode == "compiled" else model  # type: ignore[assignment]

    def step() -> None:
        with autocast(model, precision):
            logits = logits_of(forward, images)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Candidate(recipe, mode, step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="resnet18")
    parser.add_argument("--recipes", nargs="+", default=["none", "bbq-vision-w2a2"])
    parser.add_argument("--modes", nargs="+", default=["compiled"], choices=["compiled", "eager"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=112, help="pixels of an image's side")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--cpu-time", action="store_true", help="the process's CPU time, on a machine that others use")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    precision = pick_precision(args.precision, torch.device("cpu"))
    images = torch.randn(args.batch, 3, args.size, args.size).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (args.batch,))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {precision}, {args.preset}, {images.shape}")
    print(f"\n| recipe | mode | ms/step | x full precision |\n|{'---|' * 4}")
    for mode in args.modes:
        candidates = [make(args.preset, recipe, mode, images, labels, precision) for recipe in args.recipes]
        take_turns(candidates, args.rounds, clock)
        for candidate in candidates:
            pairs = zip(candidate.seconds, candidates[0].seconds, strict=True)
            ratio, median = statistics.median(a / b for a, b in pairs), statistics.median(candidate.seconds)
            print(f"| {candidate.recipe} | {mode} | {1e3 * median:.1f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
