"""An IMITATION of the few interfaces of vLLM that the plug-in touches; nothing here is vLLM's, and vLLM does not run.

Written from what vLLM 0.33 documents and does: how joined layers are named and sized, which loader gets which part of a
checkpoint, and what is called when. Enough of a LLaMA's linear layers is here to load a packed directory into.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

JOINED = {"qkv_proj": {"q_proj": "q", "k_proj": "k", "v_proj": "v"}, "gate_up_proj": {"gate_proj": 0, "up_proj": 1}}


class LinearMethodBase:
    pass


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(self, layer: nn.Module, inputs: int, sizes: list[int], *_: Any, **__: Any) -> None:
        layer.weight = nn.Parameter(torch.empty(sum(sizes), inputs), requires_grad=False)
        offsets = [sum(sizes[:n]) for n in range(len(sizes))]
        shards = {"q": 0, "k": 1, "v": 2, None: 0}

        def load(parameter: Tensor, loaded: Tensor, shard: Any = None) -> None:
            place = shards.get(shard, shard)
            parameter.data[offsets[place] : offsets[place] + sizes[place]].copy_(loaded)

        layer.weight.weight_loader = load

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, layer.weight, bias)


class LinearBase(nn.Module):
    """A linear layer, joined from as many as there are `sizes`, on one of `ranks` GPUs."""

    def __init__(self, inputs: int, sizes: list[int], config: Any, prefix: str, bias: bool, ranks: int = 1) -> None:
        super().__init__()
        self.quant_method = config.get_quant_method(self, prefix)
        here = [size // ranks for size in sizes]
        options: dict[str, Any] = {"weight_loader": self._not_used}
        self.quant_method.create_weights(self, inputs, here, inputs, sum(sizes), torch.get_default_dtype(), **options)
        self.bias = nn.Parameter(torch.empty(sum(here)), requires_grad=False) if bias else None
        if self.bias is not None:
            self.bias.weight_loader = UnquantizedBias(here).load

    def _not_used(self, *_: Any) -> None:
        raise AssertionError("vLLM's own loader knows nothing of packed tensors")

    def forward(self, x: Tensor) -> Tensor:
        return self.quant_method.apply(self, x, self.bias)


class UnquantizedBias:
    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def load(self, parameter: Tensor, loaded: Tensor, shard: Any = None) -> None:
        place = {"q": 0, "k": 1, "v": 2, None: 0}.get(shard, shard)
        start = sum(self.sizes[:place])
        parameter.data[start : start + self.sizes[place]].copy_(loaded)


class Block(nn.Module):
    """The linear layers of a LLaMA's block, as vLLM joins them."""

    def __init__(self, config: Any, quantization: Any, prefix: str) -> None:
        super().__init__()
        heads, shared = config.num_attention_heads, config.num_key_value_heads
        width, inner, size = config.hidden_size, config.intermediate_size, config.hidden_size // heads
        layers = {"qkv_proj": (width, [heads * size, shared * size, shared * size]), "o_proj": (width, [width])}
        parts = {"self_attn": layers, "mlp": {"gate_up_proj": (width, [inner] * 2), "down_proj": (inner, [width])}}
        for part, kinds in parts.items():
            bias = config.attention_bias and part == "self_attn"
            module = nn.Module()
            for name, (inputs, sizes) in kinds.items():
                made = LinearBase(inputs, sizes, quantization, f"{prefix}.{part}.{name}", bias)
                module.add_module(name, made)
            self.add_module(part, module)


def load_model(config: Any, quantization: Any, tensors: Mapping[str, Tensor]) -> nn.ModuleList:
    """The blocks, with the tensors of a checkpoint, processed."""
    quantization.packed_modules_mapping = {name: list(parts) for name, parts in JOINED.items()}
    blocks = nn.ModuleList(Block(config, quantization, f"model.layers.{n}") for n in range(config.num_hidden_layers))
    for name, tensor in tensors.items():
        if "model.layers." not in name or "layernorm" in name:
            continue
        path, shard = joined_name(name.removeprefix("model.layers."))
        module, _, last = path.rpartition(".")
        parameter: Any = blocks.get_submodule(module)._parameters[last]
        parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))
    for module in blocks.modules():
        if isinstance(module, LinearBase) and hasattr(module.quant_method, "process_weights_after_loading"):
            module.quant_method.process_weights_after_loading(module)
    return blocks


def joined_name(name: str) -> tuple[str, Any]:
    """A tensor's name in the joined model, and which part it is of."""
    for joined, parts in JOINED.items():
        for part, shard in parts.items():
            if f".{part}." in name:
                return name.replace(f".{part}.", f".{joined}."), shard
    return name, None


def imitate(monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    """Put the imitation in the place of vLLM; gives the methods that will be registered, by name."""
    registered: dict[str, type] = {}
    known: list[str] = ["awq"]

    def register_quantization_config(name: str) -> Any:
        def add(kind: type) -> type:
            registered[name] = kind
            known.append(name)
            return kind

        return add

    layers = "vllm.model_executor.layers"
    content: dict[str, dict[str, Any]] = {name: {} for name in ("vllm", "vllm.model_executor", layers)}
    content[f"{layers}.quantization"] = {
        "QUANTIZATION_METHODS": known,
        "register_quantization_config": register_quantization_config,
    }
    content[f"{layers}.quantization.base_config"] = {"QuantizationConfig": QuantizationConfig}
    linear = {"LinearBase": LinearBase, "LinearMethodBase": LinearMethodBase}
    content[f"{layers}.linear"] = linear | {"UnquantizedLinearMethod": UnquantizedLinearMethod}
    for name, values in content.items():
        module = ModuleType(name)
        module.__dict__.update(values | {"__path__": []})
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "bitbell.export.vllm_plugin", raising=False)
    return registered
