"""A run on disk: what it was made from, where it stands, and the model that came out of it.

RUN/config.json      the full configuration, versions and the data's fingerprint
RUN/metrics.jsonl    one JSON object a line
RUN/tensorboard/     the same for TensorBoard
RUN/checkpoints/     see `bitbell.training.checkpoint`
RUN/tokenizer.json   so that the run can be packed and used without the data
RUN/predictions.json of a classifier: its confusions and worst mistakes (`bitbell.evaluation.predictions`)
RUN/summary.json     every final number, once the run is finished
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitbell.training.config import TrainConfig

if TYPE_CHECKING:
    from torch import nn

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def open_run(config: TrainConfig, facts: Mapping[str, Any], computed_in: str) -> Path:
    """Make the run's directory, or open that of the same configuration, data and precision to continue it.

    facts: of the data, which build the run's model again; see `build_run_model`. Raises ValueError naming the fields
    that differ if it holds another run, and OSError naming it if it cannot be written.
    """
    run = Path(config.out)
    fingerprint = data_fingerprint(Path(config.data))
    if (run / "config.json").exists():
        old, found = read_run_config(run)
        differ = old.differences(config)
        if found.get("data_fingerprint") != fingerprint:
            differ["data"] = (old.data, config.data)
        if found.get("computed_in") != computed_in:
            differ["precision"] = (found.get("computed_in"), computed_in)
        if found.get("augmented_by") != facts.get("augmented_by"):
            differ["augment_library"] = (found.get("augmented_by"), facts.get("augmented_by"))
        if differ and _has_begun(run):
            listed = "; ".join(f"{name} was {mine!r}, is {theirs!r}" for name, (mine, theirs) in differ.items())
            raise ValueError(
                f"{run} holds a run of another configuration ({listed}). Drop what changed, or choose another --out"
            )
        if not differ:
            return run
    elif run.exists() and (not run.is_dir() or any(path.suffix not in (".partial", ".lock") for path in run.iterdir())):
        raise ValueError(f"{run} exists and is not a run of bitbell (no config.json in it). Choose another --out")
    try:
        run.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            if (Path(config.data) / name).exists():
                (run / name).with_suffix(".partial").write_bytes((Path(config.data) / name).read_bytes())
                os.replace((run / name).with_suffix(".partial"), run / name)
        extra = {"versions": versions(), "data_fingerprint": fingerprint, **facts}
        write_json(
            run / "config.json",
            config.to_dict() | {"data": str(Path(config.data).resolve())} | extra | {"computed_in": computed_in},
        )
    except OSError as error:
        raise _cannot_write(run, error) from error
    return run


def _has_begun(run: Path) -> bool:
    """Whether anything was trained here: a run that was refused at its start leaves a configuration only."""
    return (run / "checkpoints").exists() or (run / "metrics.jsonl").exists()


class RunLocked(ValueError):
    """Another process on this machine is training the run."""


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Hold the run for this process. Raises RunLocked if another process is training it."""
    try:
        import fcntl
    except ImportError:  # not on Windows, where runs are not guarded
        yield
        return
    try:
        run.parent.mkdir(parents=True, exist_ok=True)
        file = (run.parent / f".{run.name}.lock").open("w")
    except OSError as error:
        raise _cannot_write(run, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunLocked(f"another process is training {run}; wait for it, or choose another --out") from None
        yield


def _cannot_write(run: Path, error: OSError) -> OSError:
    return OSError(f"cannot write to the run directory {run}: {error.strerror or error}")


def read_run_config(run: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The configuration of a run, and everything else in its config.json. Raises ValueError for a folder that is no
    run."""
    try:
        values = json.loads((run / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{run} is not a run directory: {run / 'config.json'} cannot be read ({error})") from None
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    if not isinstance(values, dict) or "preset" not in values:
        raise ValueError(f"{run} is not a run directory: its config.json is not a training configuration")
    config = TrainConfig.from_dict({k: v for k, v in values.items() if k in names}, str(run / "config.json"))
    return config, {k: v for k, v in values.items() if k not in names}


def data_fingerprint(data: Path) -> str:
    """A hash of the data set's description, which holds the checksums of its shards."""
    return hashlib.sha256((data / "dataset.json").read_bytes()).hexdigest()[:16]


def build_run_model(config: TrainConfig, facts: Mapping[str, Any]) -> nn.Module:
    """The model of a configuration, quantized but not yet calibrated or trained.

    facts: of the data: "vocab_size" of text; "images", with their classes and how they become inputs. A classifier's
    own configuration gets the latter as `image_input`, so that it goes where the model goes.
    """
    from bitbell.data.image_input import ImageInput
    from bitbell.layers import as_recipe, quantize
    from bitbell.models import build_model

    if "images" in facts:
        of = facts["images"]
        shape: dict[str, Any] = {"labels": of["classes"], "image_size": of["size"], "channels": of["channels"]}
    else:
        shape = {"vocab_size": facts["vocab_size"], "sequence_length": config.sequence_length}
    model: Any = build_model(config.preset, **shape, seed=config.seed)
    if "mean" in facts.get("images", {}):  # which runs of older versions do not say
        model.config.image_input = ImageInput.from_dict(facts["images"]).to_dict()
    rules = config.rules or as_recipe(config.recipe)
    if rules is None:
        return model
    how = {"share_inputs": config.share_inputs, "integer_forward": config.integer_forward, "compact": config.compact}
    return quantize(model, rules, **how)


def load_run(run: str | Path) -> tuple[nn.Module, TrainConfig, int]:
    """The model of a run's newest checkpoint, its configuration and how many steps it has had.

    Raises ValueError for a folder that is no run or has no checkpoint yet.
    """
    from bitbell.training.checkpoint import list_checkpoints, load_checkpoint

    run = Path(run)
    config, extra = read_run_config(run)
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        raise ValueError(f"{run} has no checkpoint yet; train it with `bitbell train --out {run} ...`")
    model = build_run_model(config, extra)
    load_checkpoint(checkpoints[-1], model)
    return model.eval(), config, checkpoints[-1].step


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON so that the file is either the old or the new one, whole."""
    write_at_once(path, json.dumps(values, indent=2) + "\n")


def write_at_once(path: Path, text: str) -> None:
    """Replace a file as a whole, through a neighbour and a rename; several processes may do so at the same time."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file that bitbell wrote."""
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def versions() -> dict[str, str]:
    """Versions of bitbell, Python and the libraries whose numbers a run depends on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("bitbell", "torch", "transformers", "tokenizers", "torchvision", "kornia"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
