"""Checkpoints without pickle, whole or absent.

    RUN/checkpoints/step-00000100/
        model.safetensors        parameters and buffers
        optimizer.safetensors    AdamW's moments, by parameter name
        state.json               format version, step, random state

A checkpoint is written under a temporary name, flushed to the disk, and renamed: a crash at any moment leaves the
last good one. Older ones are deleted only after that.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FORMAT_VERSION = 1


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
    return all((path / name).is_file() for name in ("state.json", "model.safetensors", "optimizer.safetensors"))


def save_checkpoint(run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int) -> Checkpoint:
    """Write a checkpoint, then delete all but the newest `keep`.

    One that is there already is left as it is, since the state is a function of the step. Raises CheckpointError with
    the last good one intact.
    """
    from safetensors.torch import save_file

    folder = run / "checkpoints"
    final, partial = folder / f"step-{step:08d}", folder / f"partial-{step:08d}"
    state = {"format_version": FORMAT_VERSION, "step": step, "random_state": _random_state()}
    if _is_whole(final):
        return Checkpoint(final, step)
    try:
        for left_over in folder.glob("partial-*"):  # of a process that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(_plain(model.state_dict()), partial / "model.safetensors")
        save_file(_plain(_moments(model, optimizer)), partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            _flush(path)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        _flush(folder)
    except Exception as error:  # safetensors has errors of its own beside OSError
        shutil.rmtree(partial, ignore_errors=True)
        good = list_checkpoints(run)
        last = f"the last good checkpoint is {good[-1].path}" if good else "there is no earlier checkpoint"
        raise CheckpointError(f"could not write the checkpoint of step {step} to {final}: {error}; {last}") from error
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old.path, ignore_errors=True)
    return Checkpoint(final, step)


def load_checkpoint(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Load model, moments and random state in place. Raises CheckpointError naming the file or tensor that does not
    fit."""
    state = _read_state(checkpoint.path)
    _load_tensors(model, _read_tensors(checkpoint.path / "model.safetensors"), checkpoint.path)
    if optimizer is not None:
        _restore_moments(model, optimizer, _read_tensors(checkpoint.path / "optimizer.safetensors"), checkpoint.path)
        torch.set_rng_state(torch.tensor(list(bytes.fromhex(state["random_state"])), dtype=torch.uint8))


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # clone(): safetensors refuses tensors that share memory, as tied weights do.
    return {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}


def _random_state() -> str:
    return bytes(torch.get_rng_state().tolist()).hex()


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
    own = model.state_dict()
    for name in sorted(own.keys() ^ tensors.keys()):
        where = "is missing from the checkpoint" if name in own else "is in the checkpoint but not in the model"
        raise CheckpointError(f"{path / 'model.safetensors'}: {name} {where}; was the run made with another recipe?")
    for name, value in tensors.items():
        if value.shape != own[name].shape or value.dtype != own[name].dtype:
            raise CheckpointError(
                f"{path / 'model.safetensors'}: {name} is {value.dtype} {tuple(value.shape)}, "
                f"the model has {own[name].dtype} {tuple(own[name].shape)}"
            )
    model.load_state_dict(tensors)


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / 'state.json'} cannot be read: {error}") from None
    if state.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path / 'state.json'} has format version {state.get('format_version')!r}; "
            f"this bitbell reads {FORMAT_VERSION}"
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
