"""What `test_gather.py` runs in every process: `python gather_ranks.py RANK RANKS FOLDER`. Rank 0 writes findings."""

from __future__ import annotations

import copy
import json
import sys
import weakref
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import bitbell
from bitbell.kernels import native
from bitbell.layers import QuantLinear
from bitbell.quantizers import Quantized
from bitbell.training.gather import LowBitGather

RECIPES = (
    "bbq-w1a1", "bbq-w2a2", "bbq-w3a3:learn_offset=true", "bbq-w4a4:estimator=clip", "bbq-w8a8", "quest-w2a2",
    "quest-fp4-w4a4", "nf-w4a4", "absmax-w4a4", "narrow-w2a2", "n2uq-w2a2", "seq-w2a2", "bbq-w2a16",
    "lsq-w2a2:w.granularity=row", "lsq-plus-w3a3:w.granularity=row", "pact-w2a2:w.granularity=row",
)  # fmt: skip


class Block(nn.Module):
    """Two layers, the second with as many rows as no number of processes divides."""

    def __init__(self, width: int, rows: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 48), nn.Linear(48, rows, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def stack(recipe: str, dtype: torch.dtype = torch.float32, integer_forward: bool = False) -> nn.Sequential:
    """Three blocks, calibrated, the same on every rank."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(32, 16), Block(16, 9), nn.Linear(9, 16), Block(16, 32)).to(dtype)
    bitbell.quantize(model, {"2": None, "*": recipe}, integer_forward=integer_forward)
    return bitbell.calibrate(model, torch.randn(6, 32, dtype=dtype))


def whole(t: Any) -> torch.Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


def compare_with_whole(
    mesh: DeviceMesh, recipe: str, dtype: torch.dtype, integers: bool = False, **options: bool
) -> dict[str, Any]:
    """One step of every rank on inputs of its own, against whole layers whose gradients are averaged."""
    model = stack(recipe, dtype, integers)
    plain = copy.deepcopy(model)
    gather = LowBitGather(model, mesh, [model[i] for i in (0, 1, 3)], **options)
    torch.manual_seed(dist.get_rank() + 1)
    x, g = torch.randn(5, 32, dtype=dtype), torch.randn(5, 32, dtype=dtype)
    y, expected = model(x), plain(x)
    torch.autograd.backward([y], [g])
    torch.autograd.backward([expected], [g])
    errors = {}
    for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if q.requires_grad:
            mean = q.grad.clone()
            if p in gather.parameters:
                dist.all_reduce(mean)
                mean /= mesh.size()
            errors[name] = worst(whole(p.grad), mean)
    return {"equal": bool(torch.equal(y, expected)), "error": max(errors.values()), "gathered": len(gather.parameters)}


def small_llama(recipe: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = bitbell.quantize(LlamaForCausalLM(config), recipe)
    return bitbell.calibrate(model, torch.randint(0, 96, (4, 16)))


@contextmanager
def counted(moved: Counter[str]) -> Any:
    """Bytes that every collective's input holds."""
    before = {name: getattr(dist, name) for name in ("all_gather_single", "reduce_scatter_single")}

    def counting(name: str) -> Any:
        def call(output: Any = None, input: Any = None, *args: Any, **kwargs: Any) -> Any:
            sent = input if input is not None else kwargs["input_tensor"]
            moved[name] += sent.numel() * sent.element_size()
            moved[f"{name} calls"] += 1
            if input is not None:
                return before[name](output, input, *args, **kwargs)
            return before[name](*args, **kwargs)

        return call

    for name in before:
        setattr(dist, name, counting(name))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def count_codes(mesh: DeviceMesh, regather: bool) -> Counter[str]:
    """Bytes and messages of two micro-batches, without FSDP."""
    model = small_llama("quest-w2a2")
    LowBitGather(model, mesh, list(model.model.layers), regather=regather)
    moved: Counter[str] = Counter()
    with counted(moved):
        for _ in range(2):
            tokens = torch.randint(0, 96, (2, 16))
            model(tokens, labels=tokens).loss.backward()
    return moved


def train_llama(mesh: DeviceMesh, low_bit: bool, recipe: str = "quest-w2a2", **options: bool) -> dict[str, Any]:
    """Four steps under FSDP2, with or without the gather: losses, norms, bytes moved, and the state."""
    model = small_llama(recipe)
    blocks = list(model.model.layers)
    gather = LowBitGather(model, mesh, blocks, **options) if low_bit else None
    ignored = gather.parameters if gather else set()
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(dist.get_rank() + 1)
    losses, norms, moved = [], [], Counter()
    for step in range(4):
        moved.clear()
        with counted(moved):
            for _ in range(1 + step % 2):  # every other step accumulates
                tokens = torch.randint(0, 96, (2, 16))
                loss = model(tokens, labels=tokens).loss
                loss.backward()
        norms.append(float(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        losses.append(float(model.eval()(tokens, labels=tokens).loss))
    state = {name: [list(t.shape), round(float(whole(t).double().sum()), 4)] for name, t in model.state_dict().items()}
    return {"losses": losses, "norms": norms, "moved": dict(moved), "state": state}


def codes_kept(mesh: DeviceMesh, regather: bool) -> int:
    """How many of the six layers' codes autograd holds between forward and backward pass."""
    model = stack("bbq-w2a2")
    LowBitGather(model, mesh, [model[i] for i in (0, 1, 3)], regather=regather)
    codes: list[weakref.ref[torch.Tensor]] = []
    multiply = QuantLinear.multiply

    def noting(layer: QuantLinear, x: torch.Tensor, w: Quantized) -> torch.Tensor:
        codes.append(weakref.ref(w.codes))
        return multiply(layer, x, w)

    QuantLinear.multiply = noting
    try:
        y = model(torch.randn(2, 32))
    finally:
        QuantLinear.multiply = multiply
    alive = sum(ref() is not None for ref in codes)
    y.sum().backward()
    return alive


def order_of_messages(mesh: DeviceMesh) -> list[str]:
    """Which block's codes are sent and read, and which block's gradients are sent and awaited, one after the other."""
    from bitbell.training import gather as module

    model = stack("bbq-w2a2")
    gather = LowBitGather(model, mesh, [model[i] for i in (0, 1, 3)])
    number = {id(rows): i for i, group in enumerate(gather.groups) for rows in group.members}
    seen: list[str] = []

    def noted(owner: Any, name: str, word: str, rows_of: Any) -> None:
        method = getattr(owner, name)

        def call(self: Any, *args: Any) -> Any:
            seen.append(f"{word} {number[id(rows_of(self, *args))]}")
            return method(self, *args)

        restore.append((owner, name, method))
        setattr(owner, name, call)

    restore: list[tuple[Any, str, Any]] = []
    noted(module._Gathered, "send", "send", lambda self: self.members[0])
    noted(module._Gathered, "read", "read", lambda self, rows: rows)
    noted(module._Reduction, "start", "reduce", lambda self, g: self.rows)
    noted(module._Reduction, "finish", "await", lambda self: self.rows)
    try:
        y = model(torch.randn(2, 32))
        seen.append("backward")
        y.sum().backward()
    finally:
        for owner, name, method in restore:
            setattr(owner, name, method)
    return [word for i, word in enumerate(seen) if i == 0 or word != seen[i - 1]]


def refusals(mesh: DeviceMesh) -> dict[str, Any]:
    mixed = bitbell.quantize(nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))), {"0": "lsq-w2a2", "1": "bbq-w2a2"})
    gather = LowBitGather(bitbell.calibrate(mixed, torch.randn(4, 16)), mesh)
    found: dict[str, Any] = {"kept": gather.kept}
    for what, recipe, calibrated in (("nothing", "lsq-w2a2", True), ("uncalibrated", "bbq-w2a2", False)):
        model = bitbell.quantize(nn.Sequential(nn.Linear(16, 16)), recipe)
        try:
            LowBitGather(bitbell.calibrate(model, torch.randn(4, 16)) if calibrated else model, mesh)
            model(torch.randn(4, 16))
        except (ValueError, RuntimeError) as error:
            found[what] = str(error)
    return found


def left_over(mesh: DeviceMesh, fused: bool) -> bool:
    """A pass stops after the first block, whose successor's codes were sent already, and a step changes all weights."""
    model, x = stack("bbq-w2a2"), torch.randn(5, 32, generator=torch.Generator().manual_seed(4))
    plain = copy.deepcopy(model)
    gather = LowBitGather(model, mesh, [model[i] for i in (0, 1, 3)])
    model(x).sum().backward()  # gradients for all of them
    model[0](x).sum().backward()
    torch.optim.AdamW(gather.parameters, lr=0.1, fused=fused).step()
    with torch.no_grad():
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            q.copy_(whole(p))
    return bool(torch.equal(model(x), plain(x)))


def recomputed(mesh: DeviceMesh, reentrant: bool) -> float:
    """Activation checkpointing: each block's forward pass once more within the backward pass."""
    from torch.utils.checkpoint import checkpoint

    model = stack("quest-w2a2")
    plain = copy.deepcopy(model)
    LowBitGather(model, mesh, [model[i] for i in (0, 1, 3)])
    torch.manual_seed(3)
    x = torch.randn(5, 32, requires_grad=True)
    for m in (model, plain):
        h = x
        for block in m:
            h = checkpoint(block, h, use_reentrant=reentrant)
        h.square().sum().backward()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    return max(worst(whole(p.grad), q.grad) for p, q in pairs)


def compiled(mesh: DeviceMesh) -> bool:
    model = stack("quest-w2a2")
    plain = copy.deepcopy(model)
    LowBitGather(model, mesh, [model[i] for i in (0, 1, 3)])
    x = torch.randn(5, 32)
    return bool(torch.allclose(torch.compile(model, backend="aot_eager")(x), plain(x), rtol=1e-5, atol=1e-6))


def conv1d(mesh: DeviceMesh) -> dict[str, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=16)
    model = bitbell.quantize(GPT2LMHeadModel(config).eval(), "bbq-w2a2")
    tokens = torch.randint(0, 64, (2, 8))
    plain = copy.deepcopy(bitbell.calibrate(model, tokens))
    gather = LowBitGather(model, mesh, list(model.transformer.h))
    loss, expected = model(tokens, labels=tokens).loss, plain(tokens, labels=tokens).loss
    loss.backward()
    expected.backward()
    named = dict(plain.named_parameters())
    errors = [worst(whole(p.grad), named[n].grad) for n, p in model.named_parameters() if p in gather.parameters]
    return {"equal": bool(torch.equal(loss, expected)), "error": max(errors), "gathered": len(errors)}


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    native.set_level(native.REFERENCE)
    dist.init_process_group("gloo", init_method=f"file://{folder / f'meeting-{ranks}'}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    found: dict[str, Any] = {"whole": {}}
    recipes = RECIPES if ranks == 2 else RECIPES[1:3]
    for recipe in recipes:
        found["whole"][recipe] = compare_with_whole(mesh, recipe, torch.float64)
    for regather in (False, True):
        for prefetch in (False, True):
            options = {"regather": regather, "prefetch": prefetch}
            found["whole"][f"float32 {options}"] = compare_with_whole(mesh, "bbq-w2a2", torch.float32, **options)
    with native.using("auto"):
        for recipe in ("bbq-w2a2", "quest-w4a4"):
            found["whole"][f"integers {recipe}"] = compare_with_whole(mesh, recipe, torch.float32, integers=True)
    found["fsdp"] = train_llama(mesh, low_bit=False)
    found["gather"] = train_llama(mesh, low_bit=True)
    if ranks == 2:
        found["gather once"] = train_llama(mesh, low_bit=True, regather=False, prefetch=False)
        once, again = (count_codes(mesh, regather) for regather in (False, True))
        found["codes moved"], found["codes moved regathering"] = once["all_gather_single"], again["all_gather_single"]
        found["messages"] = once["all_gather_single calls"]
        found["order"] = order_of_messages(mesh)
        found["kept"] = [codes_kept(mesh, regather) for regather in (False, True)]
        found["refusals"] = refusals(mesh)
        found["left over"] = [left_over(mesh, fused) for fused in (False, True)]
        found["recomputed"] = [recomputed(mesh, reentrant) for reentrant in (False, True)]
        found["compiled"] = compiled(mesh)
        found["conv1d"] = conv1d(mesh)
    dist.barrier()
    if rank == 0:
        (folder / f"found-{ranks}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
