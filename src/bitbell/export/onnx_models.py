"""LLaMA and GPT-2 of `transformers` as ONNX graphs, built from their modules.

    input_ids (batch, sequence) int64  [, past_key_values.N.key/value (batch, heads, past, head size)]
    -> logits (batch, sequence, vocabulary) float32  [, present.N.key/value (batch, heads, past + sequence, head size)]

Attention is causal; there is no mask for padding. Everything outside packed layers is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from bitbell.export.onnx_graph import Graph
from bitbell.export.onnx_layers import packed_linear
from bitbell.export.refusals import Refused
from bitbell.packing import PackedLinear
from bitbell.packing.conv2d import PackedConv2d

# Kinds of rotary positions whose frequencies depend on nothing but the configuration.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class Places(NamedTuple):
    """Where the tokens of a call stand: positions (T,), what hides later ones (T, S), rotary tables (T, D)."""

    positions: str
    mask: str
    cosine: str = ""
    sine: str = ""


def build_graph(model: nn.Module, cache: bool) -> Graph:
    """The graph of a packed or full-precision model. Raises Refused for an architecture or layer without an export."""
    builders: dict[str, Callable[[Graph, Any, bool], None]] = {"LlamaForCausalLM": _llama, "GPT2LMHeadModel": _gpt}
    kind = type(model).__name__
    if kind not in builders:
        known = " and ".join(builders)
        for name, layer in model.named_modules():
            if isinstance(layer, PackedConv2d):
                raise Refused(f"{name}: packed convolutions have no ONNX export ({kind}); bitbell.load runs them")
        raise Refused(f"{kind} has no ONNX export; there is one for {known}. bitbell.load runs every packed model")
    graph = Graph()
    builders[kind](graph, model, cache)
    return graph


def linear(graph: Graph, name: str, layer: Any, x: str) -> str:
    """A linear layer, packed or in full precision, nn.Linear or GPT-2's Conv1D."""
    if isinstance(layer, PackedLinear):
        return packed_linear(graph, name, layer, x)
    weight = graph.constant(layer.weight.float())
    if isinstance(layer, nn.Linear):
        weight = graph.add("Transpose", weight, perm=[1, 0])
    y = graph.add("MatMul", x, weight)
    return y if layer.bias is None else str(graph.add("Add", y, graph.constant(layer.bias.float())))


# LLaMA ---------------------------------------------------------------------------------------------------------------


def _llama(graph: Graph, model: Any, cache: bool) -> None:
    inner, config = model.model, model.config
    rope = inner.rotary_emb
    if rope.rope_type not in ROPE_TYPES:
        raise Refused(f"rotary positions of type {rope.rope_type!r} change with the text; {', '.join(ROPE_TYPES)} go")
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    ids, pasts = _inputs(graph, config.num_hidden_layers if cache else 0, shared, size)
    places = _rotary(graph, _places(graph, ids, pasts), rope)
    x = graph.add("Gather", graph.constant(inner.embed_tokens.weight.float()), ids, axis=0)
    for number, block in enumerate(inner.layers):
        name, attention = f"model.layers.{number}", block.self_attn
        h = _rms_norm(graph, block.input_layernorm, x)
        parts = (f"{part}_proj" for part in "qkv")
        q, k, v = (linear(graph, f"{name}.self_attn.{part}", getattr(attention, part), h) for part in parts)
        q, k = (_rotate_half(graph, _split_heads(graph, part, size), places, size) for part in (q, k))
        v = _split_heads(graph, v, size)
        k, v = _remember(graph, number, k, v, pasts)
        y = _attend(graph, q, k, v, places.mask, (heads, shared, size), attention.scaling)
        x = graph.add("Add", x, linear(graph, f"{name}.self_attn.o_proj", attention.o_proj, y))
        h = _rms_norm(graph, block.post_attention_layernorm, x)
        gate, up = (
            linear(graph, f"{name}.mlp.{part}", getattr(block.mlp, part), h) for part in ("gate_proj", "up_proj")
        )
        h = graph.add("Mul", _activation(graph, config.hidden_act, gate), up)
        x = graph.add("Add", x, linear(graph, f"{name}.mlp.down_proj", block.mlp.down_proj, h))
    logits = linear(graph, "lm_head", model.lm_head, _rms_norm(graph, inner.norm, x))
    _give_outputs(graph, logits, config.vocab_size, shared, size)


def _rms_norm(graph: Graph, norm: Any, x: str) -> str:
    mean = graph.add("ReduceMean", graph.add("Mul", x, x), graph.integers(-1))
    root = graph.add("Sqrt", graph.add("Add", mean, graph.number(norm.variance_epsilon)))
    return str(graph.add("Mul", graph.add("Div", x, root), graph.constant(norm.weight.float())))


def _rotary(graph: Graph, places: Places, rope: Any) -> Places:
    positions = graph.add("Unsqueeze", graph.cast(places.positions, "float"), graph.integers(1))
    angles = graph.add("Mul", positions, graph.constant(torch.cat([rope.inv_freq, rope.inv_freq]).float()))
    made = [graph.add(wave, angles) for wave in ("Cos", "Sin")]
    if rope.attention_scaling != 1.0:
        made = [graph.add("Mul", wave, graph.number(rope.attention_scaling)) for wave in made]
    return places._replace(cosine=made[0], sine=made[1])


def _rotate_half(graph: Graph, x: str, places: Places, size: int) -> str:
    first, second = graph.add("Split", x, graph.integers(size // 2, size // 2), outputs=2, axis=-1)
    turned = graph.add("Concat", graph.add("Neg", second), first, axis=-1)
    along, across = graph.add("Mul", x, places.cosine), graph.add("Mul", turned, places.sine)
    return str(graph.add("Add", along, across))


# GPT-2 ---------------------------------------------------------------------------------------------------------------


def _gpt(graph: Graph, model: Any, cache: bool) -> None:
    inner, config = model.transformer, model.config
    if config.add_cross_attention:
        raise Refused("add_cross_attention=True: a GPT-2 that looks at an encoder has no ONNX export")
    heads, width = config.n_head, config.n_embd
    size = width // heads
    ids, pasts = _inputs(graph, config.n_layer if cache else 0, heads, size)
    places = _places(graph, ids, pasts)
    x = graph.add("Gather", graph.constant(inner.wte.weight.float()), ids, axis=0)
    x = graph.add("Add", x, graph.add("Gather", graph.constant(inner.wpe.weight.float()), places.positions, axis=0))
    for number, block in enumerate(inner.h):
        name = f"transformer.h.{number}"
        h = _layer_norm(graph, block.ln_1, x)
        joined = linear(graph, f"{name}.attn.c_attn", block.attn.c_attn, h)
        parts = graph.add("Split", joined, graph.integers(width, width, width), outputs=3, axis=-1)
        q, k, v = (_split_heads(graph, part, size) for part in parts)
        k, v = _remember(graph, number, k, v, pasts)
        y = _attend(graph, q, k, v, places.mask, (heads, heads, size), block.attn.scaling)
        x = graph.add("Add", linear(graph, f"{name}.attn.c_proj", block.attn.c_proj, y), x)
        h = linear(graph, f"{name}.mlp.c_fc", block.mlp.c_fc, _layer_norm(graph, block.ln_2, x))
        h = _activation(graph, config.activation_function, h)
        x = graph.add("Add", x, linear(graph, f"{name}.mlp.c_proj", block.mlp.c_proj, h))
    logits = linear(graph, "lm_head", model.lm_head, _layer_norm(graph, inner.ln_f, x))
    _give_outputs(graph, logits, config.vocab_size, heads, size)


def _layer_norm(graph: Graph, norm: nn.LayerNorm, x: str) -> str:
    sides = graph.constant(norm.weight.float()), graph.constant(norm.bias.float())
    return str(graph.add("LayerNormalization", x, *sides, axis=-1, epsilon=norm.eps))


# Both ----------------------------------------------------------------------------------------------------------------


def _inputs(graph: Graph, cached_layers: int, heads: int, size: int) -> tuple[str, list[tuple[str, str]]]:
    """Token ids, and the keys and values that each layer has seen before."""
    ids = graph.take_input("input_ids", "int64", ("batch", "sequence"))
    shape = "batch", heads, "past", size
    names = [(f"past_key_values.{n}.key", f"past_key_values.{n}.value") for n in range(cached_layers)]
    return ids, [(graph.take_input(k, "float", shape), graph.take_input(v, "float", shape)) for k, v in names]


def _places(graph: Graph, ids: str, pasts: list[tuple[str, str]]) -> Places:
    zero, one = (graph.constant(np.array(n, dtype=np.int64)) for n in (0, 1))
    length = graph.add("Squeeze", graph.add("Shape", ids, start=1, end=2))
    start = graph.add("Squeeze", graph.add("Shape", pasts[0][0], start=2, end=3)) if pasts else zero
    end = graph.add("Add", start, length)
    positions = graph.add("Range", start, end, one)
    seen = graph.add("Unsqueeze", positions, graph.integers(1))
    visible = graph.add("LessOrEqual", graph.add("Range", zero, end, one), seen)
    hidden = graph.number(torch.finfo(torch.float32).min)
    return Places(positions, graph.add("Where", visible, graph.number(0.0), hidden))


def _split_heads(graph: Graph, x: str, size: int) -> str:
    """(batch, sequence, heads * size) -> (batch, heads, sequence, size)."""
    return str(graph.add("Transpose", graph.reshape(x, (0, 0, -1, size)), perm=[0, 2, 1, 3]))


def _remember(graph: Graph, number: int, k: str, v: str, pasts: list[tuple[str, str]]) -> tuple[str, str]:
    """Keys and values with those of earlier calls before them."""
    if not pasts:
        return k, v
    k, v = (graph.add("Concat", past, new, axis=2) for past, new in zip(pasts[number], (k, v), strict=True))
    graph.made["present", number] = k, v
    return k, v


def _attend(graph: Graph, q: str, k: str, v: str, mask: str, sizes: tuple[int, int, int], scaling: float) -> str:
    """sizes: heads of queries, of keys and values (of which several queries may share one), and their size."""
    heads, shared, size = sizes
    if heads != shared:
        q = graph.add("Reshape", q, graph.integers(0, shared, heads // shared, -1, size))
        k, v = (graph.add("Unsqueeze", part, graph.integers(2)) for part in (k, v))
    last = [0, 1, 3, 2] if heads == shared else [0, 1, 2, 4, 3]
    scores = graph.add("MatMul", q, graph.add("Transpose", k, perm=last))
    scores = graph.add("Add", graph.add("Mul", scores, graph.number(scaling)), mask)
    y = graph.add("MatMul", graph.add("Softmax", scores, axis=-1), v)
    if heads != shared:
        y = graph.add("Reshape", y, graph.integers(0, heads, -1, size))
    return graph.reshape(graph.add("Transpose", y, perm=[0, 2, 1, 3]), (0, 0, heads * size))


def _activation(graph: Graph, name: str, x: str) -> str:
    if name in ("silu", "swish"):
        return str(graph.add("Mul", x, graph.add("Sigmoid", x)))
    if name in ("gelu", "gelu_new", "gelu_pytorch_tanh"):
        return str(graph.add("Gelu", x, approximate="none" if name == "gelu" else "tanh"))
    if name == "relu":
        return str(graph.add("Relu", x))
    raise Refused(f"the activation function {name!r} has no ONNX export; silu, gelu, gelu_new and relu have")


def _give_outputs(graph: Graph, logits: str, vocabulary: int, heads: int, size: int) -> None:
    graph.give_output(logits, "logits", "float", ("batch", "sequence", vocabulary))
    number = 0
    while ("present", number) in graph.made:
        for part, name in zip(graph.made["present", number], ("key", "value"), strict=True):
            graph.give_output(part, f"present.{number}.{name}", "float", ("batch", heads, "past + sequence", size))
        number += 1
