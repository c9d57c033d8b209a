"""A model -> one ONNX file that stock onnxruntime runs, and the comparison of the two.

    bitbell.export.onnx(packed, "model.onnx")

What is in the graph: onnx_inputs.py and onnx_layers.py (packed layers), onnx_language.py and onnx_images.py (the
architectures); docs/onnx.md for users.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from bitbell.export.onnx_check import Comparison, compare
from bitbell.export.refusals import check_target, packed_on_cpu
from bitbell.layers import quantized_layers


@dataclass(frozen=True)
class OnnxFile:
    """What was written, its size in bytes, and how it compares; None: not compared."""

    path: Path
    size: int
    comparison: Comparison | None = None

    def __str__(self) -> str:
        found = "not compared" if self.comparison is None else str(self.comparison)
        return f"{self.path}: {self.size / 1e6:.2f} MB; {found}"


def onnx(
    model: nn.Module, out: str | Path, *, cache: bool = False, check: bool = True, overwrite: bool = False
) -> OnnxFile:
    """Write `model`, a LLaMA, GPT-2, ResNet or ViT of transformers (packed, trained or in full precision), as an ONNX
    file.

    cache: take and give keys and values, for decoding token by token (language models). check: run the graph in
    onnxruntime on random tokens or images and compare it with the model, layer by layer (onnx_check.py); not done above
    2 GB.
    Raises ValueError (Refused) for what has no export, naming the layer and the reason, and for a file that is there
    already; ImportError without the packages of the extra `onnx`; VerificationError where the comparison fails. Only a
    graph that has passed it is written.
    """
    _need("onnx", *(["onnxruntime"] if check else []))
    from bitbell.export.onnx_graph import is_large, write_model
    from bitbell.export.onnx_models import build_graph

    path = Path(out)
    check_target(path, overwrite)
    inner = packed_on_cpu(model)
    graph = build_graph(inner, cache)
    made = graph.model(_metadata(inner))
    large = is_large(made)
    comparison = compare(inner, made, graph.watched) if check and not large else None
    path.parent.mkdir(parents=True, exist_ok=True)
    write_model(made, path)
    size = path.stat().st_size + (path.with_name(f"{path.name}.data").stat().st_size if large else 0)
    return OnnxFile(path, size, comparison)


def _metadata(model: Any) -> dict[str, str]:
    """Recipes; of a classifier, as JSON, the names of classes 0, 1, 2 ..., and how pictures become its inputs."""
    metadata = {"bitbell.recipes": ", ".join(sorted({layer.recipe.name for _, layer in quantized_layers(model)}))}
    if model.main_input_name == "pixel_values":
        names = [model.config.id2label[label] for label in range(model.config.num_labels)]
        metadata["bitbell.labels"] = json.dumps(names, ensure_ascii=False)
        if (image_input := getattr(model.config, "image_input", None)) is not None:  # which training says
            metadata["bitbell.image_input"] = json.dumps(image_input)
    return metadata


def _need(*packages: str) -> None:
    for package in packages:
        if find_spec(package) is None:
            raise ImportError(f"the package {package} is missing; pip install 'bitbell[onnx]' brings it")
