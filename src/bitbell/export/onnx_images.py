"""ResNets and vision transformers of `transformers` as ONNX graphs, built from their modules.

    pixel_values (batch, channels, height, width) float32 -> logits (batch, classes) float32

A ResNet takes images of any size, a transformer those of its configuration. What is outside packed layers is float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitbell.export.onnx_blocks import activation, attend, layer_norm, linear, split_heads
from bitbell.export.onnx_graph import Graph
from bitbell.export.onnx_layers import packed_layer
from bitbell.packing.conv2d import PackedConv2d


def convolution(graph: Graph, name: str, layer: Any, x: str, norm: nn.BatchNorm2d | None = None) -> str:
    """A convolution, packed or in full precision, and its batch norm with the statistics of training.

    `x` and the result are (batch, height, width, channels)."""
    if isinstance(layer, PackedConv2d):
        y = packed_layer(graph, name, layer, x)
        return y if norm is None else _normed(graph, norm, y)
    (top, left), tensors = layer.padding, [layer.weight, *([] if layer.bias is None else [layer.bias])]
    attributes: dict[str, Any] = {"pads": [top, left, top, left], "strides": list(layer.stride)}
    attributes |= {"dilations": list(layer.dilation), "group": layer.groups}
    y = graph.add("Conv", _channels_first(graph, x), *(graph.constant(t.float()) for t in tensors), **attributes)
    if norm is not None:
        y = graph.add("BatchNormalization", y, *(graph.constant(t.float()) for t in _numbers(norm)), epsilon=norm.eps)
    return _channels_last(graph, y)


def _normed(graph: Graph, norm: nn.BatchNorm2d, x: str) -> str:
    """ONNX has batch norm for channels first only."""
    weight, bias, mean, variance = (t.detach().double() for t in _numbers(norm))
    factor = weight / torch.sqrt(variance + norm.eps)
    scaled = graph.add("Mul", x, graph.constant(factor.float()))
    return str(graph.add("Add", scaled, graph.constant((bias - mean * factor).float())))


def _numbers(norm: Any) -> tuple[Tensor, ...]:
    return norm.weight, norm.bias, norm.running_mean, norm.running_var


def _channels_last(graph: Graph, x: str) -> str:
    return str(graph.add("Transpose", x, perm=[0, 2, 3, 1]))


def _channels_first(graph: Graph, x: str) -> str:
    return str(graph.add("Transpose", x, perm=[0, 3, 1, 2]))


# ResNet --------------------------------------------------------------------------------------------------------------


def build_resnet(graph: Graph, model: Any) -> None:
    """Add a ResNetForImageClassification. Raises Refused."""
    inner, config = model.resnet, model.config
    pixels = graph.take_input("pixel_values", "float", ("batch", config.num_channels, "height", "width"))
    x = _with_norm(graph, "resnet.embedder.embedder", inner.embedder.embedder, _channels_last(graph, pixels))
    x = _channels_first(graph, activation(graph, config.hidden_act, x))
    x = _channels_last(graph, graph.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]))
    for number, stage in enumerate(inner.encoder.stages):
        for place, block in enumerate(stage.layers):
            x = _residual(graph, f"resnet.encoder.stages.{number}.layers.{place}", block, x, config.hidden_act)
    pooled = graph.reshape(graph.add("ReduceMean", x, graph.integers(1, 2)), (0, 1, -1))
    _give_logits(graph, linear(graph, "classifier.1", model.classifier[1], pooled), config)


def _residual(graph: Graph, name: str, block: Any, x: str, act: str) -> str:
    y = x
    for place, layer in enumerate(block.layer):
        y = _with_norm(graph, f"{name}.layer.{place}", layer, y)
        y = y if isinstance(layer.activation, nn.Identity) else activation(graph, act, y)
    if not isinstance(block.shortcut, nn.Identity):
        x = _with_norm(graph, f"{name}.shortcut", block.shortcut, x)
    return activation(graph, act, graph.add("Add", y, x))


def _with_norm(graph: Graph, name: str, layer: Any, x: str) -> str:
    return convolution(graph, f"{name}.convolution", layer.convolution, x, layer.normalization)


# Vision transformer --------------------------------------------------------------------------------------------------


def build_vit(graph: Graph, model: Any) -> None:
    """Add a ViTForImageClassification. Raises Refused."""
    inner, config = model.vit, model.config
    size = inner.embeddings.image_size
    x = graph.take_input("pixel_values", "float", ("batch", config.num_channels, *size))
    x = _embedded(graph, inner.embeddings, _channels_last(graph, x))
    for number, block in enumerate(inner.layers):
        x = _transformer_block(graph, f"vit.layers.{number}", block, x, config.hidden_act)
    first = layer_norm(graph, inner.layernorm, graph.add("Slice", x, *(graph.integers(n) for n in (0, 1, 1))))
    _give_logits(graph, linear(graph, "classifier", model.classifier, first), config)


def _embedded(graph: Graph, embeddings: Any, x: str) -> str:
    """Patches as tokens after the class token, with positions."""
    name, layer = "vit.embeddings.patch_embeddings.projection", embeddings.patch_embeddings.projection
    image = convolution(graph, name, layer, x)
    patches = graph.reshape(image, (0, -1, embeddings.cls_token.shape[-1]))
    shape = graph.add("Concat", graph.add("Shape", x, end=1), graph.integers(1, embeddings.cls_token.shape[-1]), axis=0)
    token = graph.add("Expand", graph.constant(embeddings.cls_token.float()), shape)
    tokens = graph.add("Concat", token, patches, axis=1)
    return str(graph.add("Add", tokens, graph.constant(embeddings.position_embeddings.float())))


def _transformer_block(graph: Graph, name: str, block: Any, x: str, act: str) -> str:
    attention, mlp = block.attention, block.mlp
    heads, size = attention.num_attention_heads, attention.head_dim
    h = layer_norm(graph, block.layernorm_before, x)
    parts = (linear(graph, f"{name}.attention.{p}_proj", getattr(attention, f"{p}_proj"), h) for p in "qkv")
    q, k, v = (split_heads(graph, part, size) for part in parts)
    y = attend(graph, q, k, v, None, (heads, heads, size), attention.scaling)
    x = graph.add("Add", linear(graph, f"{name}.attention.o_proj", attention.o_proj, y), x)
    h = linear(graph, f"{name}.mlp.fc1", mlp.fc1, layer_norm(graph, block.layernorm_after, x))
    h = linear(graph, f"{name}.mlp.fc2", mlp.fc2, activation(graph, act, h))
    return str(graph.add("Add", h, x))


def _give_logits(graph: Graph, logits: str, config: Any) -> None:
    """logits: (batch, 1, classes), as a packed head takes and gives them."""
    logits = graph.add("Squeeze", logits, graph.integers(1))
    graph.give_output(logits, "logits", "float", ("batch", config.num_labels))
