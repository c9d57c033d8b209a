"""LLaMA and GPT-2 of `transformers` as ONNX graphs, built from their modules.

    input_ids (batch, sequence) int64  [, past_key_values.N.key/value (batch, heads, past, head size)]
    -> logits (batch, sequence, vocabulary) float32  [, present.N.key/value (batch, heads, past + sequence, head size)]

Attention is causal; there is no mask for padding. Everything outside packed layers is float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from bitbell.export.onnx_blocks import activation, attend, layer_norm, linear, split_heads
from bitbell.export.onnx_graph import Graph
from bitbell.export.refusals import Refused

# Kinds of rotary positions whose frequencies depend on nothing but the configuration.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class Places(NamedTuple):
    """Where the tokens of a call stand: positions (T,), what hides later ones (T, S), rotary tables (T, D)."""

    positions: str
    mask: str
    cosine: str = ""
    sine: str = ""


# LLaMA ---------------------------------------------------------------------------------------------------------------


def build_llama(graph: Graph, model: Any, cache: bool) -> None:
    """Add a LlamaForCausalLM. Raises Refused."""
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
        q, k = (_rotate_half(graph, split_heads(graph, part, size), places, size) for part in (q, k))
        v = split_heads(graph, v, size)
        k, v = _remember(graph, number, k, v, pasts)
        y = attend(graph, q, k, v, places.mask, (heads, shared, size), attention.scaling)
        x = graph.add("Add", x, linear(graph, f"{name}.self_attn.o_proj", attention.o_proj, y))
        h = _rms_norm(graph, block.post_attention_layernorm, x)
        gate, up = (
            linear(graph, f"{name}.mlp.{part}", getattr(block.mlp, part), h) for part in ("gate_proj", "up_proj")
        )
        h = graph.add("Mul", activation(graph, config.hidden_act, gate), up)
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


def build_gpt(graph: Graph, model: Any, cache: bool) -> None:
    """Add a GPT2LMHeadModel. Raises Refused."""
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
        h = layer_norm(graph, block.ln_1, x)
        joined = linear(graph, f"{name}.attn.c_attn", block.attn.c_attn, h)
        parts = graph.add("Split", joined, graph.integers(width, width, width), outputs=3, axis=-1)
        q, k, v = (split_heads(graph, part, size) for part in parts)
        k, v = _remember(graph, number, k, v, pasts)
        y = attend(graph, q, k, v, places.mask, (heads, heads, size), block.attn.scaling)
        x = graph.add("Add", linear(graph, f"{name}.attn.c_proj", block.attn.c_proj, y), x)
        h = linear(graph, f"{name}.mlp.c_fc", block.mlp.c_fc, layer_norm(graph, block.ln_2, x))
        h = activation(graph, config.activation_function, h)
        x = graph.add("Add", x, linear(graph, f"{name}.mlp.c_proj", block.mlp.c_proj, h))
    logits = linear(graph, "lm_head", model.lm_head, layer_norm(graph, inner.ln_f, x))
    _give_outputs(graph, logits, config.vocab_size, heads, size)


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


def _remember(graph: Graph, number: int, k: str, v: str, pasts: list[tuple[str, str]]) -> tuple[str, str]:
    """Keys and values with those of earlier calls before them."""
    if not pasts:
        return k, v
    k, v = (graph.add("Concat", past, new, axis=2) for past, new in zip(pasts[number], (k, v), strict=True))
    graph.made["present", number] = k, v
    return k, v


def _give_outputs(graph: Graph, logits: str, vocabulary: int, heads: int, size: int) -> None:
    graph.give_output(logits, "logits", "float", ("batch", "sequence", vocabulary))
    number = 0
    while ("present", number) in graph.made:
        for part, name in zip(graph.made["present", number], ("key", "value"), strict=True):
            graph.give_output(part, f"present.{number}.{name}", "float", ("batch", heads, "past + sequence", size))
        number += 1
