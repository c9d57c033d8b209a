"""Checkpoints without pickle, whole or absent.

    RUN/checkpoints/step-00000100/
        model.safetensors        parameters and buffers
        optimizer.safetensors    AdamW's moments, by parameter name
        state.json               format version, step, random state

Of a run whose processes hold parts of the parameters (FSDP), each writes its own part, and nothing is gathered:

        shard-00002-....safetensors    rows of process 2: parameters, buffers, and moments as NAME:exp_avg ...
        state.json                     format version 2, and the names of the shards

Either kind is read by one process and by any number of them. A checkpoint is written under a temporary name, flushed
to the disk, and renamed: a crash at any moment leaves the last good one. Older ones are deleted only after that.

Shards are written and read by `torch.distributed.checkpoint` in its safetensors form, where a file's header says which
rows it holds. (Its other form keeps that in a pickled file.)
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitbell.training.distributed import ONE_PROCESS, World, is_sharded

FORMAT_VERSION, SHARDED_VERSION = 1, 2
# Types of a model's tensors by the names that safetensors gives them.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class CheckpointError(OSError):
    """A checkpoint could not be written or read; the message says which, why, and which one is good."""


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint on disk, after `step` steps."""

    path: Path
    step: int


def list_checkpoints(run: Path) -> list[Checkpoint]:
    """Finished checkpoints of a run, oldest first."""
    found = [p for p in (run / "checkpoints").glob("step-*") if p.name[5:].isdigit() and _is_whole(p)]
    return sorted((Checkpoint(p, int(p.name[5:])) for p in found), key=lambda c: c.step)


def _is_whole(path: Path) -> bool:
    try:
        shards = json.loads((path / "state.json").read_text(encoding="utf-8")).get("shards")
    except (OSError, ValueError, AttributeError):
        shards = None
    names = shards or ("model.safetensors", "optimizer.safetensors")
    return all(Path(str(name)).name == name and (path / name).is_file() for name in ("state.json", *names))


def save_checkpoint(
    run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int, world: World = ONE_PROCESS
) -> Checkpoint:
    """Write a checkpoint, then delete all but the newest `keep`. All processes of `world` call it.

    One that is there already is left as it is, since the state is a function of the step. Raises CheckpointError with
    the last good one intact.
    """
    folder = run / "checkpoints"
    final, partial = folder / f"step-{step:08d}", folder / f"partial-{step:08d}"
    if world.first(lambda: _is_whole(final)):
        return Checkpoint(final, step)
    try:
        world.first(lambda: _make_anew(partial))
        state = {"format_version": FORMAT_VERSION, "step": step, "random_state": _random_state()}
        if is_sharded(model):
            state |= {"format_version": SHARDED_VERSION, "processes": world.size}
            tensors = _named_state(model, optimizer)
            _write_shards(tensors, partial)
            world.first(lambda: _check_shards(tensors, partial))
        else:
            world.first(lambda: _write_files(model, optimizer, partial))
        world.first(lambda: _put_in_place(state, partial, final))
    except Exception as error:  # safetensors has errors of its own beside OSError
        if world.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        good = list_checkpoints(run)
        last = f"the last good checkpoint is {good[-1].path}" if good else "there is no earlier checkpoint"
        raise CheckpointError(f"could not write the checkpoint of step {step} to {final}: {error}; {last}") from error
    if world.is_first:
        for old in list_checkpoints(run)[:-keep]:
            shutil.rmtree(old.path, ignore_errors=True)
    return Checkpoint(final, step)


def _make_anew(partial: Path) -> None:
    for left_over in partial.parent.glob("partial-*"):  # of a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    partial.mkdir(parents=True)


def _write_files(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(_plain(model.state_dict()), folder / "model.safetensors")
    save_file(_plain(_moments(model, optimizer)), folder / "optimizer.safetensors")


def _write_shards(state: dict[str, Tensor], folder: Path) -> None:
    import torch.distributed.checkpoint as sharded
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    sharded.save(state, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def _check_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Raise CheckpointError unless the files that this process sees hold all rows of all tensors."""
    found = _shapes_in(folder, _shards_in(folder))
    for name, tensor in tensors.items():
        if found.get(name) != (tensor.dtype, tensor.shape):
            raise CheckpointError(f"{name} was not written whole: is {folder} on a disk that all processes share?")


def _shards_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("shard-*.safetensors"))


def _put_in_place(state: dict[str, Any], partial: Path, final: Path) -> None:
    shards = _shards_in(partial)
    state = state | ({"shards": shards} if shards else {})
    (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
    for path in (*partial.iterdir(), partial):
        _flush(path)
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    _flush(final.parent)


def load_checkpoint(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Load model, moments and random state in place, whoever wrote them. Raises CheckpointError naming the file or
    tensor that does not fit."""
    path = checkpoint.path
    state = _read_state(path)
    if "shards" in state or is_sharded(model):
        _load_parts(path, state, model, optimizer)
    else:
        _load_tensors(model, _read_tensors(path / "model.safetensors"), path)
        if optimizer is not None:
            _restore_moments(model, optimizer, _read_tensors(path / "optimizer.safetensors"), path)
    if optimizer is not None:
        torch.set_rng_state(torch.tensor(list(bytes.fromhex(state["random_state"])), dtype=torch.uint8))


def _load_parts(path: Path, state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Read of every file what this process holds of its tensors."""
    import torch.distributed.checkpoint as sharded
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    shapes = _shapes_in(path, state.get("shards", ("model.safetensors", "optimizer.safetensors")))
    own = model.state_dict()
    _check_shapes(own, {name: shape for name, shape in shapes.items() if ":" not in name}, path)
    wanted = {name: torch.empty_like(tensor) for name, tensor in own.items()}
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and optimizer is not None}
    for name, parameter in parameters.items():
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}:{key}" in shapes]
        if not keys:
            raise CheckpointError(f"{path}: the moments of {name} are missing")
        for key in keys:
            wanted[f"{name}:{key}"] = torch.zeros(()) if key == "step" else torch.empty_like(parameter.detach())
    alone = not is_sharded(model)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is (disabled|unavailable)", UserWarning)
            sharded.load(wanted, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=alone)
    except Exception as error:  # of several kinds, some of them gathered from other processes
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    model.load_state_dict({name: wanted[name] for name in own})
    if optimizer is not None:
        for name, parameter in parameters.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if (moment := wanted.get(f"{name}:{key}")) is not None:
                    optimizer.state[parameter][key] = moment.to(parameter.device)


def _shapes_in(path: Path, files: Sequence[str]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Type and whole shape of every tensor in a checkpoint's files, by their headers. Raises CheckpointError for a file
    that cannot be read, and for a tensor of which there are only some rows."""
    from safetensors import safe_open

    found: dict[str, tuple[torch.dtype, torch.Size]] = {}
    elements: Counter[str] = Counter()
    for file in files:
        try:
            with safe_open(path / file, "pt") as tensors:
                offsets = json.loads((tensors.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
                for name in tensors.keys():  # noqa: SIM118 (no dictionary)
                    part = tensors.get_slice(name)
                    start = offsets.get(name, {}).get("saved_offsets", [0] * len(part.get_shape()))
                    ends = [o + n for o, n in zip(start, part.get_shape(), strict=True)]
                    before = found[name][1] if name in found else ends
                    found[name] = DTYPES[part.get_dtype()], torch.Size(map(max, before, ends))
                    elements[name] += math.prod(part.get_shape())
        except Exception as error:  # safetensors has errors of its own beside OSError
            raise CheckpointError(f"{path / file} cannot be read: {error}") from None
    for name, (_, shape) in found.items():  # whose rest would be read as whatever is in memory
        if elements[name] < shape.numel():
            raise CheckpointError(f"{path}: only {elements[name]} of the {shape.numel()} elements of {name} are there")
    return found


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # clone(): safetensors refuses tensors that share memory, as tied weights do.
    return {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}


def _random_state() -> str:
    return bytes(torch.get_rng_state().tolist()).hex()


def _named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in (model.state_dict() | _moments(model, optimizer)).items()}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{names[id(parameter)]}:{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def _restore_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], path: Path
) -> None:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if missing := sorted(parameters.keys() - {name.rpartition(":")[0] for name in tensors}):
        raise CheckpointError(f"{path / 'optimizer.safetensors'}: the moments of {missing[0]} are missing")
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition(":")
        if name not in parameters or (value.dim() and value.shape != parameters[name].shape):
            raise CheckpointError(
                f"{path / 'optimizer.safetensors'}: {full_name} {tuple(value.shape)} fits no parameter of this model"
            )
        # AdamW keeps `step` on the CPU unless it is fused, in which case it follows the parameter.
        optimizer.state[parameters[name]][key] = value.to(parameters[name].device)


def _load_tensors(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    _check_shapes(model.state_dict(), found, path / "model.safetensors")
    model.load_state_dict(tensors)


def _check_shapes(own: dict[str, Tensor], found: dict[str, tuple[torch.dtype, torch.Size]], path: Path) -> None:
    """Raise CheckpointError, naming the first tensor, unless a model's tensors are those `found` at `path`."""
    for name in sorted(own.keys() ^ found.keys()):
        where = "is missing from the checkpoint" if name in own else "is in the checkpoint but not in the model"
        raise CheckpointError(f"{path}: {name} {where}; was the run made with another recipe?")
    for name, (dtype, shape) in found.items():
        if shape != own[name].shape or dtype != own[name].dtype:
            raise CheckpointError(
                f"{path}: {name} is {dtype} {tuple(shape)}, the model has {own[name].dtype} {tuple(own[name].shape)}"
            )


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / 'state.json'} cannot be read: {error}") from None
    if state.get("format_version") not in (FORMAT_VERSION, SHARDED_VERSION):
        raise CheckpointError(
            f"{path / 'state.json'} has format version {state.get('format_version')!r}; "
            f"this bitbell reads {FORMAT_VERSION} and {SHARDED_VERSION}"
        )
    return state


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # safetensors has errors of its own beside OSError
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
