"""A training run as one flat, typed configuration: the command line, a file and a Python call are three faces of it."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitbell.data.image_augmentation import Augmentation
from bitbell.data.image_libraries import LIBRARIES

# Fields that may change between a run's start and its resumption. Device, threads, compilation and how processes share
# the work touch the last bits only.
FREE_FIELDS = frozenset(
    {
        "out",
        "data",
        "log_every",
        "evaluate_every",
        "evaluate_windows",
        "final_windows",
        "checkpoint_every",
        "keep_checkpoints",
        "entropy_every",
        "augment_library",  # which library it was is recorded, and compared, where one is needed
    }
    | {"tensorboard", "threads", "stop_after", "device", "compile", "distributed", "reduce_every", "low_bit_gather"}
)


COUNTS = (
    "steps",
    "batch_size",
    "sequence_length",
    "accumulation",
    "fogzo_samples",
    "threads",
    "log_every",
    "entropy_every",
    "evaluate_every",
    "evaluate_windows",
    "final_windows",
    "checkpoint_every",
    "keep_checkpoints",
    "stop_after",
)
# What a run's config.json holds beside the configuration.
RECORDED = ("versions", "data_fingerprint", "vocab_size", "images", "augmented_by", "computed_in")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a training run is made from. Defaults follow the BBQ paper where it says something."""

    data: str
    """Data set directory, made by `bitbell tokenize`, or `bitbell images`."""
    out: str
    """Run directory. If it holds an unfinished run of the same configuration, that run is continued."""
    preset: str = "tiny"
    """Model size: mini, tiny, 30m, 50m, 100m or 200m of LLaMA; gpt-tiny, gpt-30m ... of GPT-2; of image classifiers
    resnet-micro, resnet10, resnet18, vit-micro, vit-tiny or vit-small."""
    recipe: str = "bbq-w2a2"
    """What to quantize with, such as bbq-w2a2, quest-w4a4, lsq-w1a1; "none" trains in full precision."""
    rules: dict[str, str] = field(default_factory=dict)
    """Ordered layer name patterns, each with a recipe or "none"; replaces --recipe. On the command line:
    --rules '*.mlp.*' bbq-w2a2 '*' bbq-w4a4"""
    share_inputs: bool = True
    """Let q/k/v and gate/up projections share one activation quantizer."""
    integer_forward: bool = False
    """Multiply int8 codes with exact int32 sums in the forward pass, instead of floats that hold the same levels."""
    compact: bool = False
    """With integer_forward: keep one byte an activation for BBQ's gradient, known to one of 256 bins."""

    steps: int = 300
    """Optimizer steps."""
    batch_size: int = 8
    """Sequences, or images, in a micro-batch, over all processes."""
    sequence_length: int = 128
    """Tokens in a sequence; of no use for images."""
    augment: str = "none"
    """Of images: none, or any of these joined by +. crop: moved by up to an eighth; flip: half of them mirrored;
    resized-crop; randaugment or trivialaugment; erasing; mixup and cutmix (one of them for each batch). Options follow
    a colon: resized-crop:scale=0.3+randaugment:operations=2,magnitude=9. imagenet is resized-crop+flip; deit is
    resized-crop+flip+randaugment+erasing+mixup+cutmix."""
    augment_library: str = "auto"
    """What augments beyond crop and flip: torchvision, kornia, or auto: torchvision where it loads, else kornia. They
    draw different numbers, so that a run goes on with the one that it began with."""
    label_smoothing: float = 0.0
    """Of images: share of the target that is spread over all classes."""
    accumulation: int = 1
    """Micro-batches in a step."""
    learning_rate: float | None = None
    """Peak learning rate; by default the preset's."""
    scale_rate: float = 1.0
    """Learning rate of what quantizers learn (scales, clips, offsets), as a factor of the weights'."""
    weight_decay: float = 0.1
    """Of linear weights inside the blocks, and of LSQ's step sizes; of nothing else."""
    beta1: float = 0.9
    """AdamW's first momentum."""
    beta2: float = 0.95
    """AdamW's second momentum."""
    clip: float = 1.0
    """Largest global gradient norm."""
    warmup: float = 0.1
    """Share of the steps with a rising learning rate (from 1/100 of the peak)."""
    final: float = 0.1
    """Last learning rate, as a share of the peak."""
    seed: int = 0
    """Of the initial weights, of the order and augmentation of the data, and of FOGZO's noise."""

    fogzo: bool = False
    """Correct the gradients of quantized weights by probing the loss (FOGZO): two more forward passes a step."""
    fogzo_start: float = 0.7
    """Share of the steps that are trained plainly first."""
    fogzo_beta: float = 1 - 1e-9
    """Share of the straight-through direction in the last probe; it falls to this from 1. The rest is noise: keep
    (1 - fogzo_beta) * quantized weights far below 1."""
    fogzo_noise: str = "uniform"
    """Shape of the rest of the probe: uniform, logistic or triangular."""
    fogzo_samples: int = 1
    """Probes a step, each of two forward passes."""

    device: str = "auto"
    """cpu, cuda, or auto."""
    precision: str = "auto"
    """float32, bfloat16 (autocast), or auto: bfloat16 where the hardware multiplies it fast."""
    compile: bool = False
    """Use torch.compile (needs a C++ compiler; pays off after some hundred steps)."""
    threads: int | None = None
    """CPU threads; by default PyTorch's choice."""
    distributed: str = "ddp"
    """What several processes (torchrun) hold: ddp, each the whole model; fsdp, each rows of every parameter."""
    low_bit_gather: bool = False
    """With fsdp: gather quantized weights as codes of their bits. The same numbers, in an eighth of bfloat16's bytes
    for 2 bits; layers whose method has one scale for a whole weight go on as they are."""
    sync_statistics: bool = True
    """Take statistics over all processes' shares of a batch. Without: each over its own, and the running averages
    are averaged once a step, which saves two short messages a quantizer."""
    reduce_every: bool = False
    """Under fsdp, reduce gradients after every micro-batch of a step, not once: more messages, but no process holds
    whole gradients."""

    log_every: int = 10
    """Steps between lines of metrics."""
    entropy_every: int = 50
    """Steps between measurements of code entropy and scales."""
    evaluate_every: int = 100
    """Steps between validations."""
    evaluate_windows: int = 64
    """Sequences, or images, in a validation during training."""
    final_windows: int = 4096
    """Sequences, or images, in the last validation, at most."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    stop_after: int | None = None
    """Stop cleanly, with a checkpoint, after this many steps in all; the run can be continued."""

    def __post_init__(self) -> None:
        for name in COUNTS:
            value = getattr(self, name)
            _check(self, name, value is None or value >= 1, "at least 1")
        _check(self, "learning_rate", self.learning_rate is None or 0 < self.learning_rate < math.inf, "positive")
        _check(self, "scale_rate", 0 < self.scale_rate < math.inf, "positive")
        _check(self, "compact", self.integer_forward or not self.compact, "left out without integer_forward")
        _check(self, "weight_decay", 0 <= self.weight_decay < math.inf, "0 or more")
        _check(self, "clip", self.clip > 0, "positive")
        Augmentation.parse(self.augment)
        known = self.augment_library in ("auto", *LIBRARIES)
        _check(self, "augment_library", known, f"auto, {' or '.join(LIBRARIES)}")
        _check(self, "label_smoothing", 0 <= self.label_smoothing < 1, "from 0 up to but without 1")
        for name in ("beta1", "beta2"):
            _check(self, name, 0 <= getattr(self, name) < 1, "from 0 up to but without 1")
        for name in ("warmup", "final"):
            _check(self, name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        _check(self, "fogzo_start", 0 <= self.fogzo_start < 1, "from 0 up to but without 1")
        _check(self, "fogzo_beta", 0 <= self.fogzo_beta <= 1, "from 0 to 1")
        known = self.fogzo_noise in ("uniform", "logistic", "triangular")
        _check(self, "fogzo_noise", known, "uniform, logistic or triangular")
        for name in ("fogzo_start", "fogzo_beta", "fogzo_noise", "fogzo_samples"):
            _check(self, name, self.fogzo or getattr(self, name) == getattr(type(self), name), "left out without fogzo")
        _check(self, "precision", self.precision in ("auto", "float32", "bfloat16"), "auto, float32 or bfloat16")
        _check(self, "distributed", self.distributed in ("ddp", "fsdp"), "ddp or fsdp")
        _check(self, "reduce_every", not self.reduce_every or self.distributed == "fsdp", "left out without fsdp")
        whole = not self.fogzo or self.distributed == "ddp"
        _check(self, "distributed", whole, "ddp with fogzo, which moves whole weights")
        fits = not self.low_bit_gather or self.distributed == "fsdp"
        _check(self, "low_bit_gather", fits, "left out without fsdp")
        known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None
        _check(self, "device", known, "auto, cpu, cuda or cuda:N")

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "configuration") -> TrainConfig:
        """A configuration from plain values. Raises ValueError, with a suggestion, for an unknown field or a wrong
        type."""
        return cls(**check_fields(values, source))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON of every field."""
        return dataclasses.asdict(self)

    def differences(self, other: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """Fields that matter to the numbers and differ: name -> (mine, the other's)."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in FREE_FIELDS]
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in names}
        # Rules are ordered, and dictionaries compare equal in any order.
        return {name: (a, b) for name, (a, b) in pairs.items() if a != b or (name == "rules" and list(a) != list(b))}


def _check(config: TrainConfig, name: str, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {name}={getattr(config, name)!r}")


@functools.cache  # a millisecond, and a sweep reads hundreds of configurations after every run
def _types() -> dict[str, Any]:
    return typing.get_type_hints(TrainConfig)


def check_fields(values: dict[str, Any], source: str) -> dict[str, Any]:
    """The same values, once every name is known and every type right; ints are taken where floats are meant."""
    import difflib

    types = _types()
    checked = {}
    for name, value in values.items():
        if name not in types:
            close = difflib.get_close_matches(name, types, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{source}: unknown field {name!r}.{hint}")
        kinds = typing.get_args(types[name]) if type(None) in typing.get_args(types[name]) else (types[name],)
        plain = tuple(typing.get_origin(kind) or kind for kind in kinds)
        if float in plain and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, plain) or (isinstance(value, bool) and bool not in plain):
            names = " or ".join(kind.__name__ for kind in plain if kind is not type(None))
            raise ValueError(f"{source}: {name} must be {names}, got {value!r}")
        checked[name] = _check_rules(value, source) if name == "rules" else value
    return checked


def _check_rules(rules: dict[str, Any], source: str) -> dict[str, str]:
    for pattern, recipe in rules.items():
        if recipe is not None and not isinstance(recipe, str):
            raise ValueError(f'{source}: rule {pattern!r} must give a recipe\'s name or "none", got {recipe!r}')
    return {pattern: recipe or "none" for pattern, recipe in rules.items()}


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Fields from a .toml or .json file, checked. Raises ValueError naming the file and what is wrong."""
    values = read_values(path, "configuration")
    return check_fields({name: value for name, value in values.items() if name not in RECORDED}, str(path))


def read_values(path: str | Path, what: str) -> dict[str, Any]:
    """The plain values of a .toml or .json file, - in their names made _. `what` names the file's kind in messages.

    Raises ValueError naming the file if it cannot be read, or holds something else.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ValueError(f"cannot read the {what} {path}: {reason}") from None
    try:
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is no valid {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold fields with values, got a {type(values).__name__}")
    return {name.replace("-", "_"): value for name, value in values.items()}
