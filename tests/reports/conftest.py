"""Synthetic run folders, shaped like the real ones: falling loss, rising entropy, histograms, samples."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

KINDS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
QUALITY = {"bbq": 3.47, "quest": 3.55, "lsq": 3.71, None: 3.3}

MakeRun = Callable[..., Path]


def layer_names(depth: int) -> list[str]:
    return [f"model.layers.{i}.{kind}" for i in range(depth) for kind in KINDS]


def histogram(random: np.random.Generator, method: str | None, bits: int, size: int) -> list[int]:
    """BBQ: nearly even; others: a bell over the codes."""
    middle = np.linspace(-1, 1, 2**bits) if bits > 1 else np.array([-1.0, 1.0])
    width = {"bbq": 9.0, "quest": 0.9, "lsq": 0.6}[method or "bbq"]
    shares = np.exp(-0.5 * (middle / width) ** 2) * random.uniform(0.95, 1.05, 2**bits)
    return [int(x) for x in np.round(size * shares / shares.sum())]


def entropy(counts: list[int]) -> float:
    shares = [count / sum(counts) for count in counts if count]
    return -sum(share * math.log2(share) for share in shares)


def metrics(
    random: np.random.Generator, method: str | None, bits: int, steps: int, depth: int, every: int
) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    end = QUALITY[method] + {1: 0.3, 2: 0.0, 3: -0.06, 4: -0.1}[bits] * (method is not None)
    for step in range(every, steps + 1, every):
        loss = end + 5.5 * math.exp(-8 * step / steps) + 0.4 * (1 - step / steps)
        noisy = loss + float(random.normal(0, 0.05))
        events.append(
            {"event": "train", "step": step, "loss": noisy, "learning_rate": 1e-3, "gradient_norm": 0.9}
            | {"tokens_per_second": 4100.0, "seconds": 0.6 * step}
        )
        if method and step % (5 * every) == 0:
            events.append({"event": "quantizers", "step": step, "layers": layer_states(random, method, bits, depth)})
        if step % (10 * every) == 0:
            events.append(
                {"event": "valid", "step": step, "loss": loss, "perplexity": math.exp(loss)}
                | {"bits_per_byte": loss * 0.47}
            )
    return events


def layer_states(random: np.random.Generator, method: str, bits: int, depth: int) -> dict[str, Any]:
    share = {"bbq": 0.995, "quest": 0.95, "lsq": 0.88}[method]
    base = {"bbq": 0.05, "quest": 0.06, "lsq": 0.02}[method]
    return {
        name: {
            "weight_entropy": bits * share * float(random.uniform(0.985, 1.0)),
            "weight_scale": base * float(random.uniform(0.8, 1.3)),
            "activation_scale": 30 * base * float(random.uniform(0.8, 1.3)),
        }
        for name in layer_names(depth)
    }


def summary_of(
    random: np.random.Generator, name: str, method: str | None, bits: int, steps: int, depth: int, loss: float
) -> dict[str, Any]:
    layers = []
    for layer in layer_names(depth) if method else []:
        weights, activations = (histogram(random, method, bits, size) for size in (65536, 100_000))
        layers.append(
            {"name": layer, "shape": [256, 256], "weight_bits": bits, "activation_bits": bits}
            | {"weight_entropy": entropy(weights), "activation_entropy": entropy(activations)}
            | {"weight_histogram": weights, "activation_histogram": activations}
            | {"bytes": 262144, "packed_bytes": 65536 * bits // 8 + 1024}
        )
    means = {
        key: float(np.mean([layer[key] for layer in layers])) if layers else None
        for key in ("weight_entropy", "activation_entropy")
    }
    return {
        "name": name,
        "method": method,
        "weight_bits": bits if method else None,
        "activation_bits": bits if method else None,
        "steps": steps,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss * 0.47,
        **means,
        "parameters": 3_900_000,
        "quantized_parameters": 3_300_000 if method else 0,
        "bytes": 15_600_000,
        "packed_bytes": 2_400_000 + 412_500 * bits if method else None,
        "seconds_per_step": {"bbq": 0.61, "quest": 0.63, "lsq": 0.58, None: 0.41}[method],
        "layers": layers,
        "samples": [{"prompt": "In the", "text": "In the beginning of the night the king did say\nunto his men."}],
    }


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Write a run folder and return it: make_run("a", method="bbq", bits=2, seed=0, finished=True, ...)."""
    return lambda *args, **settings: write_run(tmp_path, *args, **settings)


def write_run(
    parent: Path,
    folder: str,
    *,
    name: str | None = None,
    method: str | None = "bbq",
    bits: int = 2,
    seed: int = 0,
    steps: int = 300,
    depth: int = 4,
    every: int = 5,
    finished: bool = True,
    config: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
) -> Path:
    random = np.random.default_rng([seed, bits, *(method or "").encode()])
    path = parent / folder
    path.mkdir(parents=True)
    settings = {
        "preset": "tiny",
        "recipe": f"{method}-w{bits}a{bits}" if method else None,
        "steps": steps,
        "batch_size": 16,
        "sequence_length": 256,
        "learning_rate": 0.001,
        "seed": seed,
        "precision": "fp32",
        "device": "cpu",
        "data": "data/book",
        "versions": {"torch": "2.13.0", "bitbell": "0.1.0"},
    }
    (path / "config.json").write_text(json.dumps(settings | (config or {})))
    events = metrics(random, method, bits, steps if finished else steps * 3 // 5, depth, every)
    (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if finished:
        losses = [event["loss"] for event in events if event["event"] == "valid"]
        loss = (losses or [QUALITY[method]])[-1] + float(random.normal(0, 0.01))
        done = summary_of(random, name or folder, method, bits, steps, depth, loss)
        (path / "summary.json").write_text(json.dumps(done | (summary or {})))
    return path
