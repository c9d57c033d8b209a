"""How fast onnxruntime runs exported models, beside bitbell's own C++ kernels, in one run.

    python benchmarks/onnx_speed.py --preset 50m --vocabulary 8192 --recipes none bbq-w2a2 bbq-w4a4 bbq-w4a16
    python benchmarks/onnx_speed.py --preset resnet18 --recipes none bbq-vision-w2a2 bbq-w4a4 bbq-w4a16

Weights are random (speed does not depend on them). A round times every model once, in turn; medians of the rounds are
shown; with one thread by its CPU time, so that neighbours do not count. Of language models prefill: all logits of a
prompt; and decode: one token after it, with the keys and values given and taken back. Of image classifiers one image.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

import bitbell
from bitbell.export import onnx
from bitbell.kernels import native
from bitbell.models import IMAGE_PRESETS, build_model
from bitbell.serving.native_llama import NativeLlama

Steps = dict[str, tuple[Callable[[], object], int]]  # what is timed -> how, and how many tokens or images it makes


def build(preset: str, recipe: str, example: torch.Tensor, **sizes: Any) -> Any:
    model = build_model(preset, **sizes)
    if recipe == "none":
        return model.eval()
    bitbell.calibrate(bitbell.quantize(model, recipe), example)
    return bitbell.pack(model.eval())


def session_of(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def text_in_onnxruntime(path: Path, tokens: torch.Tensor, threads: int) -> Steps:
    session = session_of(path, threads)
    shapes = {i.name: (1, i.shape[1], 0, i.shape[3]) for i in session.get_inputs()[1:]}
    empty = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
    prompt = {"input_ids": tokens.numpy()} | empty
    _, *kept = session.run(None, prompt)
    after = {"input_ids": tokens[:, :1].numpy()} | dict(zip(empty, kept, strict=True))
    count = tokens.numel()
    return {"prefill": (lambda: session.run(None, prompt), count), "decode": (lambda: session.run(None, after), 1)}


def text_in_bitbell(model: Any, tokens: torch.Tensor, threads: int) -> Steps:
    llama, ids = NativeLlama(model, threads=threads), tokens[0].tolist()
    where = [0] * len(ids), list(range(len(ids))), [True] * len(ids)
    decode = lambda: llama.forward(ids[:1], [0], [len(ids)])  # noqa: E731
    return {"prefill": (lambda: llama.forward(ids, *where), len(ids)), "decode": (decode, 1)}


def images_in_onnxruntime(path: Path, images: torch.Tensor, threads: int) -> Steps:
    session, feeds = session_of(path, threads), {"pixel_values": images.numpy()}
    return {"images": (lambda: session.run(None, feeds), len(images))}


def images_in_bitbell(model: Any, images: torch.Tensor, threads: int) -> Steps:
    return {"images": (torch.inference_mode()(lambda: model(images)), len(images))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="50m")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--recipes", nargs="+", default=["none", "bbq-w2a2", "bbq-w4a4", "bbq-w4a16"])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    seeded = torch.Generator().manual_seed(0)
    if preset := IMAGE_PRESETS.get(asked.preset):
        inputs = torch.randn(1, 3, preset.image_size, preset.image_size, generator=seeded)
        sizes, what, own = {"labels": 10}, images_in_onnxruntime, images_in_bitbell
    else:
        inputs = torch.randint(0, asked.vocabulary, (1, asked.prompt), generator=seeded)
        sizes, what, own = {"vocab_size": asked.vocabulary}, text_in_onnxruntime, text_in_bitbell
    steps: dict[tuple[str, str], Steps] = {}
    megabytes: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for recipe in asked.recipes:
            model, path = build(asked.preset, recipe, inputs, **sizes), Path(folder) / f"{recipe}.onnx"
            megabytes[recipe] = onnx(model, path, cache=preset is None, check=False).size / 1e6
            steps[recipe, "onnxruntime"] = what(path, inputs, asked.threads)
            if native.available():
                steps[recipe, "bitbell"] = own(model, inputs, asked.threads)
        times = measure(steps, asked.rounds, asked.threads)
    versions = f"onnxruntime {onnxruntime.__version__}, bitbell's level {native.level()}"
    shape = f"images of {inputs.shape[-1]}" if preset else f"vocabulary {asked.vocabulary}, prompt {asked.prompt}"
    print(f"{asked.preset}, {shape}, threads {asked.threads}; {versions}")
    show(steps, times, megabytes)


def measure(steps: dict[tuple[str, str], Steps], rounds: int, threads: int) -> dict[Any, float]:
    """Seconds: medians."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    times: dict[Any, list[float]] = {(key, kind): [] for key, kinds in steps.items() for kind in kinds}
    for _ in range(rounds):
        for key, kind in times:
            start = clock()
            steps[key][kind][0]()
            times[key, kind].append(clock() - start)
    return {key: statistics.median(seen) for key, seen in times.items()}


def show(steps: dict[tuple[str, str], Steps], times: dict[Any, float], megabytes: dict[str, float]) -> None:
    base, kinds = next(iter(steps)), list(next(iter(steps.values())))
    unit = {"prefill": "prefill, tokens/s", "decode": "decode, tokens/s", "images": "images/s"}
    print(f"| recipe | runs in | file, MB | {' | '.join(f'{unit[kind]} | ratio' for kind in kinds)} |")
    print("|---" * (3 + 2 * len(kinds)) + "|")
    for key, found in steps.items():
        cells = []
        for kind in kinds:
            rate = found[kind][1] / times[key, kind]
            cells += [f"{rate:.{0 if rate > 20 else 1}f}", f"{times[base, kind] / times[key, kind]:.2f}"]
        size = f"{megabytes[key[0]]:.1f}" if key[1] == "onnxruntime" else ""
        print(f"| {' | '.join([*key, size, *cells])} |")


if __name__ == "__main__":
    main()
