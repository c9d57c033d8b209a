"""One process of several: trains the runs of a list together with the others, and writes down what happened.

python distributed_ranks.py RANK SIZE FOLDER, with FOLDER/jobs-SIZE.json: [{"name": ..., "config": ..., "stop_at": ...}]
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bitbell.kernels import native
from bitbell.models.presets import PRESETS, Preset
from bitbell.quantizers import make_quantizer
from bitbell.quantizers.ranks import Ranks
from bitbell.training import TrainConfig, checkpoint, loop, train
from bitbell.training.distributed import average_running_statistics, local_part

MICRO = Preset(layers=2, width=64, heads=2, feed_forward=128, learning_rate=4e-3, tokens=1e4, vocabulary=300)


class Watch:
    """Looks into the run that `train` makes: what the last step sent, and how far the processes' state is apart."""

    def __init__(self, rank: int) -> None:
        self.rank, self.seen = rank, {}  # type: ignore[var-annotated]
        self.stop_at: int | None = None
        self.own_disk = False
        take_step, save = loop._Run._take_step, loop.save_checkpoint
        write_shards = checkpoint._write_shards

        def watched_step(run: Any) -> None:
            if run.step == self.stop_at and rank == 1:
                run.stop_requested = True  # as a signal to this process alone would do
            if run.step != 1:
                return take_step(run)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                take_step(run)
            self.seen["messages"] = {e.key: e.count for e in profile.key_averages() if "c10d" in e.key}
            return None

        def watched_save(run: Path, step: int, model: nn.Module, *rest: Any) -> Any:
            self.seen["apart"] = max(map(apart, [*model.buffers(), *model.parameters()]))
            self.seen["largest part"] = max(local_part(p).numel() / p.numel() for p in model.parameters())
            return save(run, step, model, *rest)

        def watched_write(state: dict[str, Tensor], folder: Path) -> None:
            write_shards(state, folder.with_name(f"seen by {rank} alone") if self.own_disk and rank > 0 else folder)

        checkpoint._write_shards = watched_write
        loop._Run._take_step, loop.save_checkpoint = watched_step, watched_save  # type: ignore[method-assign]


def apart(tensor: Tensor) -> float:
    """The largest difference between what any two processes have of a tensor that all hold whole."""
    if local_part(tensor) is not tensor:
        return 0.0
    values = tensor.detach().double()
    both = torch.stack([values, -values])
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return float((both[0] + both[1]).max())


# Quantizers of activations whose start, forward pass or gradient depends on the whole batch.
SHARING: list[tuple[str, dict[str, Any]]] = [
    ("bbq", {"rms": "running"}),
    ("bbq", {"rms": "tensor", "learn_offset": True}),
    ("bbq", {"rms": "tensor", "estimator": "identity"}),
    ("quest", {"rms": "tensor"}),
    ("quest", {"rms": "token"}),
    ("lsq", {}),
    ("lsq-plus", {"asymmetric": True}),
    ("pact", {}),
    ("seq", {}),
    ("n2uq-activations", {}),
    ("absmax", {"granularity": "running"}),
    ("ternary", {"granularity": "tensor"}),
    ("narrow", {"granularity": "running"}),
]


def compare_quantizers(rank: int, size: int) -> dict[str, float]:
    """The largest relative difference between a quantizer of shares and one of the whole: values, gradients, state."""
    torch.manual_seed(0)
    x, target = torch.randn(8, 6, 128) * torch.rand(8, 1, 1), torch.randn(8, 6, 128)
    found = {}
    for method, options in SHARING:
        whole, mine = (make_quantizer(method, bits=2, **options) for _ in range(2))
        mine.ranks = Ranks(size, dist.group.WORLD.group_name)
        pairs = []
        for q, some, goal in ((whole, x, target), (mine, x.chunk(size)[rank], target.chunk(size)[rank])):
            some = some.clone().requires_grad_()
            q.calibrate(some.detach())
            y = q(some)
            (y - goal).square().sum().backward()
            pairs.append((y.detach(), some.grad, q))
        (y, gradient, _), (our_y, our_gradient, _) = pairs
        differences = [far(our_y, y.chunk(size)[rank]), far(our_gradient, gradient.chunk(size)[rank])]
        for name, parameter in mine.named_parameters():
            if parameter.requires_grad:
                dist.all_reduce(parameter.grad)
                differences.append(far(parameter.grad, whole.get_parameter(name).grad))
        differences += [far(ours, theirs) for ours, theirs in zip(mine.buffers(), whole.buffers(), strict=True)]
        found[f"{method} {options}"] = max(differences)
    return found


def average_batch_norms(rank: int, size: int) -> list[float]:
    """Running means and variances after each process has seen its own batch, and their averages."""
    norm = nn.BatchNorm1d(1).train()
    norm(torch.tensor([[1.0], [2.0]]) * (rank + 1))
    before = [float(norm.running_mean), float(norm.running_var)]
    average_running_statistics(norm, Ranks(size, dist.group.WORLD.group_name))
    return [*before, float(norm.running_mean), float(norm.running_var)]


def far(ours: Tensor | None, theirs: Tensor | None) -> float:
    assert ours is not None
    assert theirs is not None
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-12))


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    native.set_level(native.REFERENCE)
    PRESETS.update({"micro": MICRO, "micro-gpt": replace(MICRO, architecture="gpt")})
    meeting, patience = f"file://{folder / f'meeting-{size}'}", timedelta(seconds=600)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=patience)
    watch = Watch(rank)
    found: dict[str, Any] = {"quantizers": compare_quantizers(rank, size), "norms": average_batch_norms(rank, size)}
    for job in json.loads((folder / f"jobs-{size}.json").read_text()):
        watch.seen, watch.stop_at, watch.own_disk = {}, job.get("stop_at"), job.get("own_disk", False)
        try:
            result = train(TrainConfig(**job["config"]))
            found[job["name"]] = {"status": result.status, "step": result.step, **watch.seen}
        except Exception as error:
            found[job["name"]] = {"error": f"{type(error).__name__}: {error}"}
    found["groups"] = len(dist.distributed_c10d._world.pg_map)
    (folder / f"found-{size}-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
