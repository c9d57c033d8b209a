"""A trained model -> its packed twin."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitbell.layers import SharedInput, TrainedLayer, quantized_layers
from bitbell.packing.conv2d import PackedConv2d, packed_kind
from bitbell.packing.layers import PackedLinear

FORMAT_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)
QUANT_METHOD = "bitbell"


class PackedModel(nn.Module):
    """A model whose quantized layers are packed. Called, generated from and evaluated like the model it holds.

    model: the module itself. `save(directory)` writes it; `bitbell.load(directory)` reads it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval()
        inner: Any = model
        if hasattr(inner, "save_pretrained"):  # so that it says how to read what it writes
            inner.config.quantization_config = quantization_of(model)
        self.kept_in_full_precision: dict[str, str] = model.__dict__.get("kept_in_full_precision", {})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Modules under the names they have in the model itself, so that reports of both name the same layers."""
        return self.model.named_modules(*args, **kwargs)

    @property
    def config(self) -> Any:
        """The Hugging Face configuration, where the model has one."""
        return self.model.config

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """The model's own `generate`."""
        return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    def save(
        self,
        directory: str | Path,
        *,
        tokenizer: str | Path | None = None,
        card: str | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write the packed directory; see `bitbell.packing.files.save`."""
        from bitbell.packing.files import save

        return save(self, directory, tokenizer=tokenizer, card=card, overwrite=overwrite)


def pack(model: nn.Module) -> PackedModel:
    """The packed twin of a trained, quantized model; `model` itself is not changed, and full-precision weights are
    copied.

    Raises ValueError for a model without quantized layers, or with one that has no scale yet or whose weights are not
    finite.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    trained = dict(quantized_layers(model))
    if not trained:
        raise ValueError("the model has no quantized layer; quantize and train it first (bitbell.quantize)")
    memo: dict[int, Any] = {}
    packed: dict[str, PackedLinear] = {}
    for name, layer in trained.items():
        if not isinstance(layer, TrainedLayer):
            raise ValueError(f"{name} is a {type(layer).__name__}: the model is packed already")
        _check_ready(name, layer)
        quantizer = copy.deepcopy(layer.activation_quantizer, memo)
        packed[name] = memo[id(layer)] = packed_kind(layer).from_trained(layer, quantizer)
    for names in shared_groups(trained):
        quantizer = packed[names[0]].activation_quantizer
        assert quantizer is not None
        shared = SharedInput(quantizer, len(names))
        for place, name in enumerate(names):
            packed[name].share_input(shared, place)
    twin = copy.deepcopy(model, memo)
    return PackedModel(twin.requires_grad_(False))


def quantization_of(model: nn.Module) -> dict[str, Any]:
    """The `quantization_config` of a model with packed layers: everything about them but their tensors."""
    layers = dict(quantized_layers(model))
    recipes: list[dict[str, Any]] = []
    entries: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        recipe = layer.recipe.to_dict()
        if recipe not in recipes:
            recipes.append(recipe)
        entries[name] = {
            "recipe": recipes.index(recipe),
            "shape": [layer.out_features, layer.in_features],
            "rotation": layer.rotation,
            "weight_zero_point": layer.weight_zero_point,
            "bias": layer.bias is not None,
        } | convolution_of(layer)
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "packing": "little-endian-int32-rows",
        "recipes": recipes,
        "layers": entries,
        "shared_inputs": shared_groups(layers),
        "tied_tensors": tied_tensors(model),
    }


def convolution_of(layer: nn.Module) -> dict[str, Any]:
    """What a layer's entry says beside, as JSON, if it is a convolution."""
    if not isinstance(layer, PackedConv2d):
        return {}
    fields = layer.geometry._asdict()
    return {"convolution": {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()}}


def tied_tensors(model: nn.Module) -> dict[str, str]:
    """Name -> stored name of what the model has under another name already: tied embeddings, a shared layer."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(t), name) for name, t in model.state_dict(keep_vars=True).items()}
    return {name: stored for name, stored in names.items() if name != stored}


def shared_groups(layers: dict[str, Any]) -> list[list[str]]:
    """Names of layers that share an input quantizer, the owner first."""
    groups: dict[int, list[str]] = {}
    for name, layer in layers.items():
        if layer.shared_input is not None:
            groups.setdefault(id(layer.shared_input), []).append(name)
    return [sorted(names, key=lambda n: layers[n].place_in_shared_input) for names in groups.values()]


def _check_ready(name: str, layer: TrainedLayer) -> None:
    for what, quantizer in (("weight", layer.weight_quantizer), ("input", layer.activation_quantizer)):
        if quantizer is not None and not bool(quantizer.calibrated):
            raise ValueError(
                f"{name}: the {what} quantizer has no scale yet; train the model, or call bitbell.calibrate on it"
            )
    for parameter_name, parameter in layer.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"{name}.{parameter_name} holds NaN or infinity and cannot be packed")
