"""Which architectures have an ONNX graph, and who builds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from bitbell.export.onnx_graph import Graph
from bitbell.export.onnx_images import build_resnet, build_vit
from bitbell.export.onnx_language import build_gpt, build_llama
from bitbell.export.refusals import Refused

LANGUAGE: dict[str, Callable[[Graph, Any, bool], None]] = {
    "LlamaForCausalLM": build_llama,
    "GPT2LMHeadModel": build_gpt,
}
IMAGES: dict[str, Callable[[Graph, Any], None]] = {
    "ResNetForImageClassification": build_resnet,
    "ViTForImageClassification": build_vit,
}


def build_graph(model: nn.Module, cache: bool = False) -> Graph:
    """The graph of a packed or full-precision model. Raises Refused for an architecture or layer without an export."""
    graph, kind = Graph(), type(model).__name__
    if kind in LANGUAGE:
        LANGUAGE[kind](graph, model, cache)
    elif kind in IMAGES:
        if cache:
            raise Refused(f"cache=True is for language models: {kind} has no keys and values to keep")
        IMAGES[kind](graph, model)
    else:
        known = ", ".join([*LANGUAGE, *IMAGES])
        raise Refused(f"{kind} has no ONNX export; there is one for {known}. bitbell.load runs every packed model")
    return graph
