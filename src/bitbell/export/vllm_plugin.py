"""Packed linear layers for vLLM, through its interface for quantization methods from outside.

vLLM joins layers that are fed by the same tensor (q, k and v; gate and up). A joined layer holds a PackedLinear for
each of its parts here, which quantize their input once; their outputs are put side by side. Written for the interface
of vLLM 0.33; what was tried of it and what was not is in docs/vllm.md. Importing this file registers it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from bitbell.layers import Recipe, SharedInput
from bitbell.packing import PackedFileError, PackedLinear
from bitbell.packing.model import QUANT_METHOD
from bitbell.packing.reading import check_quantization

SHARDS = {None: 0, "q": 0, "k": 1, "v": 2}  # what vLLM calls the parts of a joined layer, where not by number


@register_quantization_config(QUANT_METHOD)
class BitbellVllmConfig(QuantizationConfig):  # type: ignore[misc]
    """The `quantization_config` of a packed directory, as docs/file-format.md describes it.

    Raises ValueError (PackedFileError) for what is none, and for layers that vLLM has no place for.
    """

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__()
        check_quantization(Path(), fields)
        self.recipes = [Recipe(**recipe) for recipe in fields["recipes"]]
        self.layers: dict[str, dict[str, Any]] = fields["layers"]
        self.groups: list[list[str]] = fields["shared_inputs"]

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of a GPU, times ten: that of Triton's int8 products."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # it is in config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BitbellVllmConfig:
        return cls(config)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take over the names that vLLM's model has for the layers."""
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)
        self.groups = [hf_to_vllm_mapper.apply_list(group) for group in self.groups]

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """How the layer called `prefix` computes; None for what is no linear layer."""
        if not isinstance(layer, LinearBase):
            if prefix in self.layers:
                kind = type(layer).__name__
                raise ValueError(f"{prefix} is packed, but a {kind} in vLLM, of which bitbell knows no packed kind")
            return None
        parent, _, last = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(last, [last])
        names = [f"{parent}.{part}" if parent else part for part in parts]
        packed = [name for name in names if name in self.layers]
        if not packed:
            return UnquantizedLinearMethod()
        if packed != names:
            raise ValueError(
                f"vLLM joins {', '.join(names)}, of which only {', '.join(packed)} are packed: all or none"
            )
        biases = [self.layers[name]["bias"] for name in names]
        return PackedLinearMethod(names, [self._outline(name) for name in names], self._shared(names), biases)

    def _outline(self, name: str) -> PackedLinear:
        """A layer that waits for its tensors. A bias stays with vLLM."""
        entry = self.layers[name]
        if "convolution" in entry:
            raise ValueError(f"{name} is a packed convolution, which bitbell has no way to run in vLLM")
        outputs, inputs = entry["shape"]
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)  # which scales have, whatever type vLLM makes the model in
        try:
            layer = PackedLinear(inputs, outputs, self.recipes[entry["recipe"]], bias=False)
        finally:
            torch.set_default_dtype(before)
        if (layer.rotation, layer.weight_zero_point) != (entry.get("rotation"), entry["weight_zero_point"]):
            raise PackedFileError(f"{name}: rotation and zero point are not those of its recipe")
        return layer.eval()

    def _shared(self, names: list[str]) -> list[list[int]]:
        """Which of these layers share an input quantizer, by their places, the owner first."""
        found = []
        for group in self.groups:
            here = [names.index(name) for name in group if name in names]
            if here and len(here) < len(group):
                raise ValueError(f"{', '.join(group)} share an input quantizer, and vLLM keeps some of them apart")
            found += [here] if here else []
        return found


class PackedLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """A linear layer of vLLM, or several joined, as packed layers.

    names: of the parts in the packed directory. parts: in the same order. shared: places that share a quantizer.
    biases: which parts have one.
    """

    def __init__(
        self, names: list[str], parts: list[PackedLinear], shared: list[list[int]], biases: list[bool]
    ) -> None:
        self.names, self.parts, self.biases = names, parts, biases
        for group in shared:
            quantizer = parts[group[0]].activation_quantizer
            assert quantizer is not None
            joined = SharedInput(quantizer, len(group))
            for place, number in enumerate(group):
                parts[number].share_input(joined, place)
        self.loaded: set[tuple[int, str]] = set()

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Give `layer` its packed parts, and a parameter for each name in the file, which passes on what is loaded."""
        if input_size_per_partition != input_size or sum(output_partition_sizes) != output_size:
            raise ValueError(
                f"{', '.join(self.names)}: packed layers are not split over several GPUs; use tensor_parallel_size=1"
            )
        found = [(size, input_size) for size in output_partition_sizes]
        expected = [(part.out_features, part.in_features) for part in self.parts]
        if found != expected:
            raise ValueError(f"{', '.join(self.names)} have shapes {expected} in the file, but {found} in vLLM")
        layer.packed = nn.ModuleList(self.parts)
        for part in self.parts:
            for name, tensor in part.state_dict().items():
                self._take(layer, name, tensor.dtype)

    def _take(self, layer: nn.Module, name: str, dtype: torch.dtype) -> None:
        """Add an empty parameter called `name` ("weight_scale", "activation_quantizer.scale") for vLLM to load."""
        *path, last = name.split(".")
        for step in path:
            if step not in layer._modules:
                layer.add_module(step, nn.Module())
            layer = layer.get_submodule(step)
        if last not in layer._parameters:
            parameter: Any = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            parameter.weight_loader = lambda _, loaded, shard=None: self._load(name, loaded, shard)
            layer.register_parameter(last, parameter)

    def _load(self, name: str, loaded: Tensor, shard: str | int | None) -> None:
        place = shard if isinstance(shard, int) else SHARDS.get(shard, -1)
        if not 0 <= place < len(self.parts):
            raise ValueError(f"vLLM loads {name} into part {shard!r} of {', '.join(self.names)}")
        tensor = self.parts[place].state_dict().get(name)
        if tensor is None or tensor.shape != loaded.shape or tensor.is_floating_point() != loaded.is_floating_point():
            wanted = "not wanted there" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)} there"
            what = f"{loaded.dtype} {tuple(loaded.shape)}"
            raise PackedFileError(f"{self.names[place]}.{name} is {what} in the file, but {wanted}")
        tensor.copy_(loaded)
        self.loaded.add((place, name))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that everything came, and is what a packed layer can have; drop the empty parameters."""
        has_bias = getattr(layer, "bias", None) is not None
        for place, (prefix, part) in enumerate(zip(self.names, self.parts, strict=True)):
            if self.biases[place] != has_bias:
                here, there = ("no", "a") if has_bias else ("a", "no")
                raise PackedFileError(f"{prefix} has {here} bias in the file, but {there} bias in vLLM")
            self._check(place, prefix, part)
        for name in {name.split(".")[0] for part in self.parts for name in part.state_dict()}:
            layer._parameters.pop(name, None)
            layer._modules.pop(name, None)

    def _check(self, place: int, prefix: str, part: PackedLinear) -> None:
        for name, tensor in part.state_dict().items():
            if (place, name) not in self.loaded and name != "weight":  # which versions 1 and 2 do not have
                raise PackedFileError(f"{prefix}.{name} is missing")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise PackedFileError(f"{prefix}.{name} holds NaN or infinity")
            if name.endswith(".calibrated") and not bool(tensor.all()):
                raise PackedFileError(f"{prefix}.{name} is false, so the quantizer has no scale")
        shape = part.weight_shape.tolist()
        if shape != [part.out_features, part.in_features]:
            raise PackedFileError(
                f"{prefix}.weight_shape is {shape}, of a layer of {part.out_features, part.in_features}"
            )

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The outputs of all parts for `x` (..., in_features), side by side."""
        made = [part(x) for part in layer.packed]  # type: ignore[union-attr]
        y: Tensor = made[0] if len(made) == 1 else torch.cat(made, dim=-1)
        return y if bias is None else y + bias
