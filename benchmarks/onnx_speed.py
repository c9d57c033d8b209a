"""How fast onnxruntime runs exported models, beside bitbell's own C++ step, in one run.

    python benchmarks/onnx_speed.py --preset 50m --vocabulary 8192 --recipes none bbq-w2a2 bbq-w4a4 bbq-w4a16

Weights are random (speed does not depend on them). A round times every model once, in turn; medians of the rounds are
shown; with one thread by its CPU time, so that neighbours do not count. Prefill: all logits of a prompt; decode: one
token after it, with the keys and values given and taken back.
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
from bitbell.serving.native_llama import NativeLlama

Step = Callable[[], object]


def build(preset: str, vocabulary: int, recipe: str) -> Any:
    model = bitbell.build_model(preset, vocab_size=vocabulary)
    if recipe == "none":
        return model.eval()
    bitbell.calibrate(bitbell.quantize(model, recipe), torch.randint(0, vocabulary, (1, 64)))
    return bitbell.pack(model.eval())


def in_onnxruntime(path: Path, tokens: torch.Tensor, threads: int) -> tuple[Step, Step]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    shapes = {i.name: (1, i.shape[1], 0, i.shape[3]) for i in session.get_inputs()[1:]}
    empty = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
    prompt = {"input_ids": tokens[None].numpy()} | empty
    _, *kept = session.run(None, prompt)
    after = {"input_ids": tokens[None, :1].numpy()} | dict(zip(empty, kept, strict=True))
    return lambda: session.run(None, prompt), lambda: session.run(None, after)


def in_bitbell(model: Any, tokens: torch.Tensor, threads: int) -> tuple[Step, Step]:
    llama, ids, count = NativeLlama(model, threads=threads), tokens.tolist(), len(tokens)
    where = [0] * count, list(range(count)), [True] * count
    return lambda: llama.forward(ids, *where), lambda: llama.forward(ids[:1], [0], [count])


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
    tokens = torch.randint(0, asked.vocabulary, (asked.prompt,), generator=torch.Generator().manual_seed(0))
    steps: dict[tuple[str, str], tuple[Step, Step]] = {}
    sizes: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for recipe in asked.recipes:
            model, path = build(asked.preset, asked.vocabulary, recipe), Path(folder) / f"{recipe}.onnx"
            sizes[recipe] = onnx(model, path, cache=True, check=False).size / 1e6
            steps[recipe, "onnxruntime"] = in_onnxruntime(path, tokens, asked.threads)
            if native.available():
                steps[recipe, "bitbell C++"] = in_bitbell(model, tokens, asked.threads)
        clock = time.thread_time if asked.threads == 1 else time.perf_counter
        times: dict[Any, list[float]] = {(key, what): [] for key in steps for what in (0, 1)}
        for _ in range(asked.rounds):
            for key, pair in steps.items():
                for what, step in enumerate(pair):
                    start = clock()
                    step()
                    times[key, what].append(clock() - start)
    found = {key: statistics.median(seen) for key, seen in times.items()}
    base = next(iter(steps))
    versions = f"onnxruntime {onnxruntime.__version__}, bitbell's level {native.level()}"
    print(f"{asked.preset}, vocabulary {asked.vocabulary}, prompt {asked.prompt}, threads {asked.threads}; {versions}")
    print("| recipe | runs in | file, MB | prefill, tokens/s | ratio | decode, tokens/s | ratio |")
    print("|---|---|---|---|---|---|---|")
    for key in steps:
        cells = []
        for what, count in ((0, asked.prompt), (1, 1)):
            cells += [f"{count / found[key, what]:.0f}", f"{found[base, what] / found[key, what]:.2f}"]
        size = f"{sizes[key[0]]:.1f}" if key[1] == "onnxruntime" else ""
        print(f"| {' | '.join([*key, size, *cells])} |")


if __name__ == "__main__":
    main()
