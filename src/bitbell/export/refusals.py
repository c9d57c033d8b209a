"""What every exporter asks before it writes: is the model one to write, and is the place free?"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from bitbell.layers import TrainedLayer, quantized_layers
from bitbell.packing import PackedModel, pack


class Refused(ValueError):
    """What the format cannot express; the message names the layer, the reason and a way that works."""


def check_target(path: Path, overwrite: bool) -> None:
    """Raise ValueError where a file must not be written."""
    if path.is_dir():
        raise ValueError(f"{path} is a directory; give the name of a file")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already; choose another name, or overwrite it (--overwrite)")


def packed_on_cpu(model: nn.Module) -> nn.Module:
    """The module itself in evaluation mode, with packed layers; raises ValueError if it is not float32 on the CPU."""
    inner = model.model if isinstance(model, PackedModel) else model
    if any(isinstance(layer, TrainedLayer) for _, layer in quantized_layers(inner)):
        inner = pack(inner).model
    floats = {p.dtype for p in inner.parameters()}
    devices = {t.device.type for t in inner.state_dict().values()}
    if devices - {"cpu"} or floats - {torch.float32}:
        raise ValueError(
            f"export takes a float32 model on the CPU, got {sorted(map(str, floats))} on {sorted(devices)}; "
            "call model.float().cpu() before"
        )
    return inner.eval()
