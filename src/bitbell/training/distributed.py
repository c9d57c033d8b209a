"""One run on several processes: who takes part, what they agree on, and how the model is spread over them.

    torchrun --nproc-per-node 4 -m bitbell train ... --distributed ddp | fsdp

ddp:  every process holds the whole model; gradients are averaged while the backward pass runs
fsdp: every process holds rows of every parameter, gradient and moment (FSDP2, a block at a time); weights are gathered
      where they are used, gradients reduced to the rows that a process holds

The global batch of a step is cut into equal shares, one a process, so that 1, 2 and 4 processes take the same steps up
to the order of sums. Statistics that a quantizer takes over a whole batch are reduced over the processes (`Ranks`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bitbell.data import Batches, TokenDataset
from bitbell.evaluation import LanguageModelLoss, measure_loss
from bitbell.layers import quantized_layers
from bitbell.quantizers.ranks import ALONE, Ranks, mean_over
from bitbell.training.config import TrainConfig

T = TypeVar("T")


class RankFailed(RuntimeError):
    """The first process could not go on, and says why itself; the others stop with it."""


@dataclass(frozen=True)
class World:
    """The processes of a run, and this one's place among them. statistics: the group that quantizers reduce over."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    statistics: Ranks = ALONE

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sums over the processes; the same on each of them to the last bit."""
        return self._reduce(values, "SUM")

    def smallest(self, value: int) -> int:
        """The smallest `value` of any process."""
        return int(self._reduce([float(value)], "MIN")[0])

    def _reduce(self, values: list[float], operation: str) -> list[float]:
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
        return tensor.tolist()

    def first(self, action: Callable[[], T]) -> T:
        """Let the first process do `action`; every process returns what it returned. Raises RankFailed on the others,
        and the error itself there, if it failed."""
        if self.size == 1:
            return action()
        outcome: list[Any] = [None, None]
        try:
            if self.is_first:
                outcome = [action(), None]
        except BaseException as error:
            outcome = [None, f"{type(error).__name__}: {error}"]
            raise
        finally:
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise RankFailed(f"the first of {self.size} processes stopped: {outcome[1]}")
        return outcome[0]

    @contextmanager
    def held_by_first(self, resource: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        """Let the first process hold a resource inside a `with`; all fail if it cannot be had."""
        with ExitStack() as stack:
            self.first(lambda: stack.enter_context(resource()))
            yield


ONE_PROCESS = World()


@contextmanager
def join(device: str) -> Iterator[World]:
    """The processes that torchrun started this one with, or this one alone.

    Joins a process group unless the program has done so; leaves it afterwards. Raises ValueError for a device that
    several processes cannot share, and where it is not said which GPU is this one's.
    """
    joined_before = dist.is_available() and dist.is_initialized()
    if (dist.get_world_size() if joined_before else int(os.environ.get("WORLD_SIZE", 1))) == 1:
        yield ONE_PROCESS
        return
    if joined_before and "cpu:" not in dist.get_backend_config():
        raise ValueError(
            f"the process group was made with {dist.get_backend_config()!r}, but the processes also agree on numbers "
            'on the CPU: make it with "cpu:gloo,cuda:nccl"'
        )
    if device.startswith("cuda:"):
        raise ValueError(f"device={device} is one GPU; with several processes each takes its own with device=cuda")
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu and "LOCAL_RANK" not in os.environ:
        raise ValueError("LOCAL_RANK must say which of this machine's GPUs is this process's (torchrun sets it)")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"process {local_rank} of this machine finds {torch.cuda.device_count()} GPUs; start one process a GPU "
            "(--nproc-per-node), or use --device cpu"
        )
    if on_gpu:
        torch.cuda.set_device(local_rank)
    if not joined_before:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    group: Any = None
    try:
        # A group of its own: its messages then need no order among those of gradients.
        group = dist.new_group()
        yield World(dist.get_rank(), dist.get_world_size(), local_rank, Ranks(dist.get_world_size(), group.group_name))
    finally:
        if not joined_before:
            dist.destroy_process_group()
        elif group is not None:
            dist.destroy_process_group(group)


def check_shares(config: TrainConfig, world: World) -> None:
    """Raise ValueError unless every process gets an equal share of a batch."""
    if config.batch_size % world.size:
        raise ValueError(
            f"batch_size is that of all processes together and must be a multiple of their number, {world.size}; "
            f"got batch_size={config.batch_size}"
        )


def share_of_batches(dataset: TokenDataset, config: TrainConfig, world: World) -> Batches:
    """This process's share of every micro-batch. Raises ValueError if the shares would not be equal."""
    check_shares(config, world)
    return Batches(
        dataset,
        "train",
        batch_size=config.batch_size // world.size,
        sequence_length=config.sequence_length,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
    )


def share_statistics(model: nn.Module, ranks: Ranks) -> None:
    """Tell the quantizers of activations that `ranks` share every batch. Weights are the same on each."""
    for _, layer in quantized_layers(model):
        if layer.activation_quantizer is not None:
            layer.activation_quantizer.ranks = ranks


@torch.no_grad()
def average_running_statistics(model: nn.Module, ranks: Ranks) -> None:
    """Let every process have the mean of all processes' running statistics, in one message: of batch norms, and of
    quantizers that go by their own share of a batch. No message if the model has neither.

    They are linear in what each batch measured, so this is the running average of the processes' mean.
    """
    quantizers = [layer.activation_quantizer for _, layer in quantized_layers(model)]
    owners: list[nn.Module] = [q for q in quantizers if q is not None and q.ranks.group is None]
    owners += [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    found = {id(b): b for owner in owners for b in owner.buffers() if b.is_floating_point()}
    if found:
        means = mean_over(torch.cat([b.flatten() for b in found.values()]), ranks)
        for buffer, mean in zip(found.values(), means.split([b.numel() for b in found.values()]), strict=True):
            buffer.copy_(mean.view_as(buffer))


def distribute(
    model: nn.Module, config: TrainConfig, world: World, say: Callable[[str], object] = lambda text: None
) -> nn.Module:
    """Spread a calibrated `model`, equal on all processes, over them; return what training calls in its place, and
    `say` what was not done as asked.

    Under fsdp the model itself is changed: its parameters are DTensors from then on, so make the optimizer afterwards.
    """
    compiled: Any = torch.compile
    if world.size == 1:
        return compiled(model) if config.compile else model
    if config.distributed == "ddp":
        spread = _replicate(model)
        return compiled(spread) if config.compile else spread
    return _shard(model, config, say)


def _replicate(model: nn.Module) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    device = next(model.parameters()).device
    # Buffers need no broadcast: statistics are reduced, and everything else in them is constant.
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
    )


def _shard(model: nn.Module, config: TrainConfig, say: Callable[[str], object]) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    ignored = _gather_low_bits(model, mesh, say) if config.low_bit_gather else set()
    for block in blocks_of(model):
        if config.compile:
            block.compile()
        fully_shard(block, mesh=mesh, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    return model


def _gather_low_bits(model: nn.Module, mesh: Any, say: Callable[[str], object]) -> set[nn.Parameter]:
    """Let layers gather their weights as codes; the parameters that FSDP has to leave alone for that."""
    from bitbell.training.gather import LowBitGather

    gather = LowBitGather(model, mesh, blocks_of(model))
    for reason, names in gather.kept_by_reason().items():
        say(f"FSDP gathers the weights of {len(names)} quantized layers ({names[0]} ...) in full: {reason}")
    return gather.parameters


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of `model`: the members of its outermost module lists, in order."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            found += list(module)
            inside |= set(module.modules())
    return found


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold parts of the parameters of `model`."""
    return any(local_part(p) is not p for p in model.parameters())


def local_part(tensor: Any) -> Tensor:
    """What this process holds of a tensor: all of it, unless it is a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@contextmanager
def gradients_synchronised(forward: Any, now: bool) -> Iterator[None]:
    """Inside, a backward pass of `forward` sums gradients over the processes, or (now=False) only here."""
    if hasattr(forward, "set_requires_gradient_sync"):
        forward.set_requires_gradient_sync(now)
        yield
    elif not now and hasattr(forward, "no_sync"):
        with forward.no_sync():
            yield
    else:
        yield


@torch.no_grad()
def clip_gradients(model: nn.Module, largest: float, world: World) -> float:
    """Scale all gradients so that their norm, over all processes, is at most `largest`; return what it was."""
    if not is_sharded(model):
        return float(nn.utils.clip_grad_norm_(model.parameters(), largest))
    gradients = [local_part(p.grad) for p in model.parameters() if p.grad is not None]
    norm = world.sum([float(nn.utils.get_total_norm(gradients)) ** 2])[0] ** 0.5
    torch._foreach_mul_(gradients, min(1.0, largest / (norm + 1e-6)))
    return norm


@contextmanager
def whole(*modules: nn.Module) -> Iterator[None]:
    """Inside, the parameters of `modules` are there in full, on every process; all processes must come here."""
    owners = {m: dict(m._parameters) for module in modules for m in module.modules()}
    try:
        for owner, parameters in owners.items():
            for name, parameter in parameters.items():
                if parameter is not None and local_part(parameter) is not parameter:
                    full: Any = parameter.detach()
                    owner._parameters[name] = nn.Parameter(full.full_tensor(), requires_grad=False)
        yield
    finally:
        for owner, parameters in owners.items():
            owner._parameters.update(parameters)


def measure_together(
    model: nn.Module, windows: Tensor, world: World, *, batch_size: int, precision: torch.dtype, bytes_per_token: float
) -> LanguageModelLoss:
    """`measure_loss` with every batch of `batch_size` windows cut into the processes' shares."""
    if world.size == 1:
        return measure_loss(model, windows, bytes_per_token=bytes_per_token, batch_size=batch_size, precision=precision)

    def loss_of(part: Tensor) -> float:
        share = batch_size // world.size
        measured = measure_loss(model, part, bytes_per_token=1.0, batch_size=share, precision=precision)
        return measured.loss * measured.tokens

    even = len(windows) - len(windows) % world.size
    mine = [batch.chunk(world.size)[world.rank] for batch in windows[:even].split(batch_size) if len(batch)]
    total = world.sum([loss_of(torch.cat(mine)) if mine else 0.0])[0]
    if even < len(windows):  # too few for all: every process measures all of them
        total += loss_of(windows[even:])
    reshard: Any = getattr(model, "reshard", None)
    if reshard is not None:  # FSDP keeps the outermost parameters together after a forward pass
        reshard()
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    return LanguageModelLoss(total / tokens, tokens, bytes_per_token)
