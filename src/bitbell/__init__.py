"""bitbell trains neural networks whose weights and activations have 1 to 4 bits, and runs them in those bits.

The folders are the road that the data takes, and imports point back along it only:

    kernels      the maths as operators: rotate, pack, integer product
    data         text -> batches
    models       presets of well-kept libraries' architectures
    quantizers   a tensor -> codes, levels, gradients; one file a method
    layers       a model -> the same model with quantized layers
    evaluation   a model and batches -> numbers
    training     a model and batches -> a run folder
    packing      a trained model -> few bytes, and back
    export       packed models for other libraries; `import bitbell` lets transformers read them
    reports      runs -> pictures
    comparison   methods x bits x seeds x learning rates -> one fair table
    serving      a packed model -> tokens
    cli          the command `bitbell`

>>> import bitbell
>>> bitbell.Recipe.parse("bbq-w2a2").weights
2
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bitbell.export.registration import register_with_transformers

if TYPE_CHECKING:
    from bitbell.evaluation import evaluate
    from bitbell.layers import Recipe, calibrate, quantize, report
    from bitbell.models import build_model
    from bitbell.packing import PackedModel, load, pack, verify
    from bitbell.serving import generate
    from bitbell.training import TrainConfig, train

__version__ = "0.1.0"

# Names are imported when they are first used: `bitbell --help` must not wait for PyTorch.
_HOMES = {
    "PackedModel": "packing",
    "Recipe": "layers",
    "TrainConfig": "training",
    "build_model": "models",
    "calibrate": "layers",
    "evaluate": "evaluation",
    "generate": "serving",
    "load": "packing",
    "pack": "packing",
    "quantize": "layers",
    "report": "layers",
    "train": "training",
    "verify": "packing",
}

__all__ = [
    "PackedModel",
    "Recipe",
    "TrainConfig",
    "build_model",
    "calibrate",
    "evaluate",
    "generate",
    "load",
    "pack",
    "quantize",
    "report",
    "train",
    "verify",
]


register_with_transformers()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # also where a folder has the name, as `report` does
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
