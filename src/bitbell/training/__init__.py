"""A model and batches -> a run folder. The names below are imported when they are first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitbell.training.checkpoint import CheckpointError
    from bitbell.training.config import TrainConfig
    from bitbell.training.fogzo import Fogzo
    from bitbell.training.health import TrainingDiverged
    from bitbell.training.loop import TrainingResult, train
    from bitbell.training.optimizer import parameter_groups
    from bitbell.training.run import load_run

_HOMES = {
    "CheckpointError": "checkpoint",
    "Fogzo": "fogzo",
    "TrainConfig": "config",
    "TrainingDiverged": "health",
    "TrainingResult": "loop",
    "load_run": "run",
    "parameter_groups": "optimizer",
    "train": "loop",
}

__all__ = [
    "CheckpointError",
    "Fogzo",
    "TrainConfig",
    "TrainingDiverged",
    "TrainingResult",
    "load_run",
    "parameter_groups",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
