"""Training steps of LLaMA shapes: tokens a second, and what a forward pass keeps for the backward pass.

Each candidate is a whole step: forward, backward, clipping and AdamW, under bfloat16 autocast. Kept bytes are those
that autograd holds after the forward pass, parameters not included.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from measure import Machine, Report, Row, median, ratio
from torch import Tensor, nn

import bitbell
from bitbell.models import build_model
from bitbell.models.presets import PRESETS, Preset

PRESETS["1b-wide"] = Preset(
    layers=4, width=2048, heads=16, feed_forward=5632, learning_rate=3e-4, tokens=1e9, vocabulary=32_000
)
MODELS = {"200m": (16, 512), "1b-wide": (8, 1024), "30m": (32, 512)}  # sequences, tokens in each


@dataclass(frozen=True)
class Candidate:
    """A way to train: recipe ("none": full precision), products of integers in the forward pass, torch.compile."""

    name: str
    recipe: str
    integers: bool = False
    compiled: bool = False


BASE = Candidate("bfloat16, compiled", "none", compiled=True)
CANDIDATES = [
    BASE,
    Candidate("bfloat16, eager", "none"),
    Candidate("BBQ W4A4, fake-quantized, eager", "bbq-w4a4"),
    Candidate("BBQ W4A4, fake-quantized, compiled", "bbq-w4a4", compiled=True),
    Candidate("BBQ W4A4, integer forward, eager", "bbq-w4a4", integers=True),
    Candidate("BBQ W4A4, integer forward, compiled", "bbq-w4a4", integers=True, compiled=True),
    Candidate("QuEST W4A4, fake-quantized, compiled", "quest-w4a4", compiled=True),
]
TARGETS = {("200m", "BBQ W4A4, integer forward, compiled"): ((0.9, 1.15), (1.0, 0.6))}  # speed; memory, less is better


def run(machine: Machine, report: Report, args: argparse.Namespace) -> None:
    models = {"tiny": (2, 64)} if machine.quick else MODELS
    candidates = CANDIDATES[:5:2] if machine.quick else CANDIDATES
    for name, shape in models.items():
        with report.guarded(name):
            one_model(machine, report, name, shape, candidates)
        if machine.is_gpu:
            torch.cuda.empty_cache()


def one_model(machine: Machine, report: Report, name: str, shape: tuple[int, int], candidates: list[Candidate]) -> None:
    vocabulary = 300 if machine.quick else PRESETS[name].vocabulary
    tokens = torch.randint(0, vocabulary, (shape[0], shape[1] + 1)).to(machine.device)
    steps: dict[Candidate, Callable[[], float]] = {}
    kept: dict[Candidate, int] = {}
    for candidate in candidates:
        with report.guarded(f"{name}: {candidate.name}"):
            steps[candidate], kept[candidate] = prepare(candidate, name, vocabulary, tokens, machine)
    seconds: dict[Candidate, list[float]] = {candidate: [] for candidate in steps}
    for _ in range(2 if machine.quick else 10):
        for candidate, step in steps.items():
            begun = time.perf_counter()
            step()
            seconds[candidate].append(time.perf_counter() - begun)
    base = BASE if BASE in steps else next(iter(steps))
    for candidate, taken in seconds.items():
        speed, memory = TARGETS.get((name, candidate.name), ((None, None), (None, None)))
        case, rate = f"{name}: {candidate.name}", f"{shape[0] * shape[1] / median(taken):.4g} tokens/s"
        against = None if candidate == base else ratio(seconds[base], taken)
        of = "" if against is None else base.name
        report.add(Row(case, 1e3 * median(taken), rate, of, against, *speed, check="loss and gradients finite"))
        share = None if candidate == base else kept[candidate] / kept[base]
        report.add(
            Row(f"{case}: kept bytes (less is better)", None, f"{kept[candidate] / 1e6:.4g} MB", of, share, *memory)
        )


def prepare(
    candidate: Candidate, name: str, vocabulary: int, tokens: Tensor, machine: Machine
) -> tuple[Callable[[], float], int]:
    """A function that takes a step, after some that warm up, and the bytes that a forward pass keeps.

    Raises FloatingPointError if the loss or a gradient is not finite.
    """
    model = build_model(name, vocab_size=vocabulary, sequence_length=tokens.shape[1]).to(machine.device)
    if candidate.recipe != "none":
        bitbell.quantize(model, candidate.recipe, integer_forward=candidate.integers)
        bitbell.calibrate(model, tokens[:, :-1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward: nn.Module = torch.compile(model) if candidate.compiled else model  # type: ignore[assignment]

    def loss() -> Tensor:
        with torch.autocast(machine.device.type, torch.bfloat16):
            logits = forward(input_ids=tokens[:, :-1], use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    def step() -> float:
        loss().backward()
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        machine.wait()
        return norm

    for _ in range(2 if machine.quick else 4):
        if not math.isfinite(norm := step()):
            raise FloatingPointError(f"the gradient norm is {norm}")
    return step, kept_bytes(model, loss, machine)


def kept_bytes(model: nn.Module, loss: Callable[[], Tensor], machine: Machine) -> int:
    """Bytes that one forward pass leaves allocated; on a CPU those of the storages that autograd saves."""
    if machine.is_gpu:
        machine.wait()
        before = torch.cuda.memory_allocated()
        value = loss()
        machine.wait()
        kept = torch.cuda.memory_allocated() - before
        del value
        return kept
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = loss()
    del value
    return sum(storages.values())
