"""What the architectures have in common, as ONNX operators: linear layers, norms, attention, activation functions."""

from __future__ import annotations

from typing import Any

from torch import nn

from bitbell.export.onnx_graph import Graph
from bitbell.export.onnx_layers import packed_layer
from bitbell.export.refusals import Refused
from bitbell.packing import PackedLinear


def linear(graph: Graph, name: str, layer: Any, x: str) -> str:
    """A linear layer, packed or in full precision, nn.Linear or GPT-2's Conv1D."""
    if isinstance(layer, PackedLinear):
        return packed_layer(graph, name, layer, x)
    weight = graph.constant(layer.weight.float())
    if isinstance(layer, nn.Linear):
        weight = graph.add("Transpose", weight, perm=[1, 0])
    y = graph.add("MatMul", x, weight)
    return y if layer.bias is None else str(graph.add("Add", y, graph.constant(layer.bias.float())))


def layer_norm(graph: Graph, norm: nn.LayerNorm, x: str) -> str:
    sides = graph.constant(norm.weight.float()), graph.constant(norm.bias.float())
    return str(graph.add("LayerNormalization", x, *sides, axis=-1, epsilon=norm.eps))


def split_heads(graph: Graph, x: str, size: int) -> str:
    """(batch, sequence, heads * size) -> (batch, heads, sequence, size)."""
    return str(graph.add("Transpose", graph.reshape(x, (0, 0, -1, size)), perm=[0, 2, 1, 3]))


def attend(graph: Graph, q: str, k: str, v: str, mask: str | None, sizes: tuple[int, int, int], scaling: float) -> str:
    """sizes: heads of queries, of keys and values (of which several queries may share one), and their size."""
    heads, shared, size = sizes
    if heads != shared:
        q = graph.add("Reshape", q, graph.integers(0, shared, heads // shared, -1, size))
        k, v = (graph.add("Unsqueeze", part, graph.integers(2)) for part in (k, v))
    last = [0, 1, 3, 2] if heads == shared else [0, 1, 2, 4, 3]
    scores = graph.add("MatMul", q, graph.add("Transpose", k, perm=last))
    scores = graph.add("Mul", scores, graph.number(scaling))
    scores = scores if mask is None else graph.add("Add", scores, mask)
    y = graph.add("MatMul", graph.add("Softmax", scores, axis=-1), v)
    if heads != shared:
        y = graph.add("Reshape", y, graph.integers(0, heads, -1, size))
    return graph.reshape(graph.add("Transpose", y, perm=[0, 2, 1, 3]), (0, 0, heads * size))


def activation(graph: Graph, name: str, x: str) -> str:
    if name in ("silu", "swish"):
        return str(graph.add("Mul", x, graph.add("Sigmoid", x)))
    if name in ("gelu", "gelu_new", "gelu_pytorch_tanh"):
        return str(graph.add("Gelu", x, approximate="none" if name == "gelu" else "tanh"))
    if name == "relu":
        return str(graph.add("Relu", x))
    raise Refused(f"the activation function {name!r} has no ONNX export; silu, gelu, gelu_new and relu have")
