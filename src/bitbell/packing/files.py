"""The packed directory, written: whole or not at all.

    DIR/config.json          the model's Hugging Face configuration, with a versioned `quantization_config`
    DIR/model.safetensors    codes at their true width, scales, the activation quantizers' state, full-precision tensors
    DIR/tokenizer.json       if the model has one
    DIR/README.md            the model card, where there is one

docs/file-format.md describes every byte; `bitbell.packing.reading` reads it. No pickle, and no code is in it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from bitbell.packing.model import QUANT_METHOD, PackedModel, quantization_of, tied_tensors

CARD = "README.md"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class PackedFileError(ValueError):
    """A packed directory is damaged, foreign or of another version; the message names the file, the tensor and the
    problem."""


def save(
    packed: PackedModel,
    directory: str | Path,
    *,
    tokenizer: str | Path | None = None,
    card: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `packed` to `directory`. tokenizer: a folder (a run, a data set) whose tokenizer files travel along.
    card: text of a README.md, such as `bitbell.export.model_card` writes.

    Raises ValueError if the directory holds something already (and `overwrite` is not set, or it is no packed model)
    or if the folder has no tokenizer, and OSError if it cannot be written; nothing half-written is left behind.
    """
    target = Path(directory).resolve()
    _check_target(target, overwrite)
    if tokenizer is not None and not (Path(tokenizer) / TOKENIZER_FILES[0]).is_file():
        raise ValueError(
            f"{tokenizer} holds no {TOKENIZER_FILES[0]}; give a folder that has one, or leave tokenizer out"
        )
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(packed, partial, tokenizer)
        if card is not None:
            (partial / CARD).write_text(card, encoding="utf-8")
        put_in_place(partial, target)
    except Exception as error:  # safetensors has errors of its own beside OSError
        raise OSError(f"could not write the packed model to {target}: {error}") from error
    finally:  # also when interrupted
        shutil.rmtree(partial, ignore_errors=True)
    return Path(directory)


def _write(packed: PackedModel, folder: Path, tokenizer: str | Path | None) -> None:
    from safetensors.torch import save_file

    tied = tied_tensors(packed.model)
    state = packed.model.state_dict()
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in state.items() if name not in tied}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(describe(packed), indent=2) + "\n", encoding="utf-8")
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors writes for the owner only
    for name in TOKENIZER_FILES:
        if tokenizer is not None and (source := Path(tokenizer) / name).exists():
            shutil.copyfile(source, folder / name)


def put_in_place(partial: Path, target: Path) -> None:
    """Rename `partial` to `target`; what is there is removed only once the new one has taken its place."""
    if not target.exists():
        os.replace(partial, target)
        return
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)  # of a run that was killed
    os.replace(target, old)
    try:
        os.replace(partial, target)
    except OSError:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not _is_packed(target):
        raise ValueError(f"{target} exists and is no packed model; choose another directory")
    if not overwrite:
        how = "choose another directory, or overwrite it (--overwrite)"
        raise ValueError(f"{target} holds a packed model already; {how}")


def _is_packed(folder: Path) -> bool:
    """Whether `folder` is ours to overwrite: a config.json whose quant_method is bitbell's."""
    try:
        return bool(read_config(folder)["quantization_config"].get("quant_method") == QUANT_METHOD)
    except PackedFileError:
        return False


def describe(packed: PackedModel) -> dict[str, Any]:
    """The config.json of a packed model."""
    inner: Any = packed.model
    config: dict[str, Any] = {}
    if hasattr(inner, "save_pretrained"):
        config = inner.config.to_dict() | {"architectures": [type(inner).__name__]}
        if isinstance(dtype := getattr(inner, "dtype", None), torch.dtype):  # transformers makes the model in it
            config["dtype"] = str(dtype).removeprefix("torch.")
    return config | {"quantization_config": quantization_of(inner)}


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PackedFileError(f"{folder} is not a packed model: {path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise PackedFileError(f"{path} is no valid JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("quantization_config"), dict):
        raise PackedFileError(f"{path} has no quantization_config, so {folder} is not a packed model")
    return config
