"""A LLaMA whose weights alone are quantized -> a GGUF file with the same weights, for llama.cpp.

    bitbell.export.gguf(packed, "model.gguf")

What GGUF cannot say is refused: llama.cpp has no operator that rotates a layer's input by Hadamard blocks, or that
rounds it as a trained quantizer does. gguf_blocks.py says which levels fit which type; docs/gguf.md is for users.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitbell.export.gguf_blocks import Array, choose_blocks
from bitbell.export.refusals import Refused, check_target, packed_on_cpu
from bitbell.layers.product import levels_of
from bitbell.packing import PackedLinear, VerificationError

SMALLEST_STEP = 2.0**-13  # below it float16 has fewer than 11 bits for a step
LARGEST_STEP = 2.0**15
INSTEAD = "export it to ONNX, or run it with bitbell.load"
# Names of a block's layers, there and here.
LAYERS = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
LAYERS |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
LAYERS |= {"ffn_down": "mlp.down_proj"}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


@dataclass(frozen=True)
class GgufFile:
    """What was written. types: GGUF's type -> how many packed layers have it. rounding: the largest relative change of
    a step by becoming float16 (of 2**-13, where it is smaller); apart from that the values are the model's own."""

    path: Path
    size: int
    types: dict[str, int]
    rounding: float

    def __str__(self) -> str:
        types = ", ".join(f"{count} layers as {name}" for name, count in self.types.items())
        return (
            f"{self.path}: {self.size / 1e6:.2f} MB, {types}; read back: levels equal, steps rounded to float16 "
            f"by {self.rounding:.1e} at most"
        )


def gguf(
    model: nn.Module, out: str | Path, *, tokenizer: str | Path | None = None, overwrite: bool = False
) -> GgufFile:
    """Write `model`, a LLaMA of transformers with packed weights and float inputs (a16, rotation=none), as GGUF.

    tokenizer: a folder with a byte-level BPE `tokenizer.json`; without one the file has no vocabulary, and llama.cpp
    takes token ids only. The file is read back and compared. Raises ValueError (Refused) for what llama.cpp cannot
    compute, naming the layer and what is missing, and for a file that is there already; ImportError without `gguf`.
    """
    if find_spec("gguf") is None:
        raise ImportError("the package gguf is missing; pip install 'bitbell[gguf]' brings it")
    import gguf as package

    path = Path(out)
    check_target(path, overwrite)
    inner: Any = packed_on_cpu(model)
    tensors = _tensors(inner)
    writer = package.GGUFWriter(None, "llama")
    _describe(writer, inner.config)
    _add_vocabulary(writer, inner.config.vocab_size, tokenizer)
    types: dict[str, int] = {}
    rounding = 0.0
    for name, made in tensors.items():
        kind = None if made.type is None else package.GGMLQuantizationType[made.type]
        writer.add_tensor(name, made.data, raw_dtype=kind)
        if made.type is not None:
            types[made.type] = types.get(made.type, 0) + 1
            rounding = max(rounding, made.rounding)
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _compare(partial, tensors)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return GgufFile(path, path.stat().st_size, types, rounding)


@dataclass(frozen=True)
class _Made:
    """A tensor of the file: its bytes, its type (None: float32), the values it has to have."""

    data: Array
    type: str | None
    values: Array
    rounding: float = 0.0


def _tensors(model: Any) -> dict[str, _Made]:
    if type(model).__name__ != "LlamaForCausalLM":
        raise Refused(f"{type(model).__name__} has no GGUF export; there is one for LlamaForCausalLM. {INSTEAD}")
    config, inner = model.config, model.model
    if (rope := inner.rotary_emb.rope_type) != "default" or config.hidden_act != "silu":
        raise Refused(f"rotary positions of type {rope!r} with {config.hidden_act!r} have no GGUF export; {INSTEAD}")
    made = {"token_embd.weight": _floats(inner.embed_tokens.weight), "output_norm.weight": _floats(inner.norm.weight)}
    if model.lm_head.weight is not inner.embed_tokens.weight:
        made["output.weight"] = _layer("lm_head", model.lm_head)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for number, block in enumerate(inner.layers):
        for theirs, ours in NORMS.items():
            made[f"blk.{number}.{theirs}.weight"] = _floats(block.get_submodule(ours).weight)
        for theirs, ours in LAYERS.items():
            layer, name = block.get_submodule(ours), f"model.layers.{number}.{ours}"
            made[f"blk.{number}.{theirs}.weight"] = _layer(name, layer, heads.get(theirs))
    return made


def _floats(weight: Tensor) -> _Made:
    values = weight.detach().float().contiguous().numpy()
    return _Made(values, None, values)


def _layer(name: str, layer: Any, heads: int | None = None) -> _Made:
    """heads: of queries or keys, whose rows llama.cpp wants in another order (its rotation turns neighbours)."""
    if layer.bias is not None:
        raise Refused(f"{name}: a bias has no GGUF export; {INSTEAD}")
    order = _order(layer.out_features, heads)
    if not isinstance(layer, PackedLinear):
        return _floats(layer.weight[torch.from_numpy(order)])
    if layer.activation_quantizer is not None:
        lacks = f"no operator that quantizes inputs as {layer.activation_quantizer.method} does"
        raise Refused(f"{name}: llama.cpp has {lacks} ({layer.recipe.name}); {INSTEAD}, or train weights only (a16)")
    if layer.rotation not in (None, 1):
        raise Refused(f"{name}: llama.cpp rotates no inputs of layers; {INSTEAD}, or train with rotation=none")
    bits, zero = layer.recipe.weights, layer.weight_zero_point
    ternary = layer.recipe.method == "ternary"
    blocks = None
    if layer.weight_grid[1] is None and layer.weight_offset is None:
        blocks = choose_blocks(bits, zero, ternary, layer.in_features)
    if blocks is None:
        what = f"the levels of {layer.recipe.name} in rows of {layer.in_features}"
        raise Refused(f"{name}: no type of GGUF has {what}; {INSTEAD}")
    step = layer.weight_scale.numpy()
    if (largest := np.abs(step).max()) > LARGEST_STEP:
        raise Refused(f"{name}: a step of {largest:.1e} does not fit float16; {INSTEAD}")
    narrow = np.float16(2) * (step / 2).astype(np.float16)  # so that its half is exact, however small it is
    codes = layer.weight_codes().numpy()
    centred = torch.from_numpy(codes.astype(np.int16) - 2 ** (bits - 1)).to(torch.int8)
    values = levels_of(centred, layer.weight_grid, torch.float32).numpy() * narrow.astype(np.float32)
    rounding = float((np.abs(narrow.astype(np.float64) - step) / np.maximum(np.abs(step), SMALLEST_STEP)).max())
    return _Made(blocks.pack(codes[order], narrow[order]), blocks.type, values[order], rounding)


def _order(rows: int, heads: int | None) -> Array:
    order = np.arange(rows)
    return order if heads is None else order.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _describe(writer: Any, config: Any) -> None:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name("bitbell")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_vocabulary(writer: Any, size: int, folder: str | Path | None) -> None:
    """Tokens and merges of a byte-level BPE; ids that the tokenizer does not have become unused tokens."""
    if folder is None:
        writer.add_tokenizer_model("none")
        return
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no tokenizer.json; give a folder that has one, or leave tokenizer out")
    read = json.loads(file.read_text(encoding="utf-8"))
    kinds = (read.get("model") or {}).get("type"), (read.get("pre_tokenizer") or {}).get("type")
    if kinds != ("BPE", "ByteLevel") or read.get("normalizer"):
        raise Refused(f"{file} is no plain byte-level BPE, the one kind with a GGUF export; leave tokenizer out")
    special = {token["id"]: token["content"] for token in read.get("added_tokens", ())}
    known = {number: token for token, number in read["model"]["vocab"].items()} | special
    if max(known) >= size:
        raise ValueError(f"{file} has tokens up to {max(known)}, the model a vocabulary of {size}")
    normal, control, unused = 1, 3, 5
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([known.get(number, f"[unused{number}]") for number in range(size)])
    writer.add_token_types([control if n in special else normal if n in known else unused for n in range(size)])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in read["model"]["merges"]]
    writer.add_token_merges(merges or ["Ġ Ġ"])
    writer.add_add_bos_token(False)
    if special:
        writer.add_eos_token_id(min(special))


def _compare(path: Path, tensors: dict[str, _Made]) -> None:
    """Read the file back, and compare every value with what it has to be."""
    import gguf as package

    for tensor in package.GGUFReader(path).tensors:
        made = tensors[tensor.name]
        if made.type == "Q1_0":  # which the package cannot turn into values yet
            octets = tensor.data.reshape(-1, 18)
            signs = np.unpackbits(octets[:, 2:], axis=1, bitorder="little").astype(np.float32) * 2 - 1
            found = signs * octets[:, :2].copy().view("<f2").astype(np.float32)
        else:
            found = package.quants.dequantize(tensor.data, tensor.tensor_type)
        if not np.array_equal(found.reshape(made.values.shape), made.values):
            raise VerificationError(f"{tensor.name} reads back as other values; nothing was written")
