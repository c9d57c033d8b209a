"""The packed directory, read: every check comes before a kernel, or an allocation, sees what the files claim."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitbell.layers import Recipe, SharedInput, is_linear, quantized_layers, replace_module, shape_of
from bitbell.packing.conv2d import packed_kind
from bitbell.packing.files import PackedFileError, read_config
from bitbell.packing.layers import PackedLinear
from bitbell.packing.model import QUANT_METHOD, READABLE_VERSIONS, PackedModel, convolution_of

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # of one model or another
LARGEST_UNSAVED_BUFFERS = 2**28  # bytes; rotary tables and the like, which a model builds and the file does not hold


def load(
    directory: str | Path, *, model: nn.Module | None = None, device: torch.device | str | None = None
) -> PackedModel:
    """Read a packed directory.

    model: for what is no Hugging Face causal language model, an instance of the same full-precision architecture; its
    linear layers are replaced in place. device: where it goes, by default the CPU. Raises PackedFileError (a
    ValueError) naming file, tensor and problem for a directory that is damaged, of another version, or not what its own
    configuration says.
    """
    folder = Path(directory)
    config = read_config(folder)
    quantization = check_quantization(folder, config["quantization_config"])
    header = read_header(folder / "model.safetensors")
    tied = check_tied(folder, quantization, header)
    build = (lambda: model) if model is not None else _hugging_face_builder(folder, config, len(header))
    if model is None:
        # Nothing of the claimed size is allocated before the file has shown that it holds that much.
        with torch.device("meta"):
            outline = with_packed_layers(folder, build(), quantization)
        check_tensors(folder, outline, header)
        _check_unsaved_buffers(folder, outline)
    twin = with_packed_layers(folder, build(), quantization)
    check_tensors(folder, twin, header)
    twin.load_state_dict(_read_tensors(folder / "model.safetensors", twin, tied), assign=True)
    check_values(folder, twin)
    packed = PackedModel(twin.requires_grad_(False))
    return packed if device is None else packed.to(device)


def check_quantization(folder: Path, quantization: dict[str, Any]) -> dict[str, Any]:
    """The quantization_config, once its version is ours and every entry is what it must be."""
    where = folder / "config.json"
    if quantization.get("quant_method") != QUANT_METHOD:
        raise PackedFileError(
            f"{where}: quant_method is {quantization.get('quant_method')!r}, bitbell reads {QUANT_METHOD!r}"
        )
    version = quantization.get("format_version")
    if type(version) is not int or version not in READABLE_VERSIONS:
        reads = f"{READABLE_VERSIONS[0]} to {READABLE_VERSIONS[-1]}"
        raise PackedFileError(f"{where}: format_version is {version!r}, this bitbell reads {reads}")
    recipes, layers, groups = (quantization.get(key) for key in ("recipes", "layers", "shared_inputs"))
    if not isinstance(recipes, list) or not isinstance(layers, dict) or not isinstance(groups, list) or not layers:
        raise PackedFileError(f"{where}: quantization_config needs recipes, layers and shared_inputs")
    for name, entry in layers.items():
        _check_entry(f"{where}, layer {name!r}", entry, len(recipes))
    _check_groups(where, groups, layers)
    return quantization


def _check_groups(where: Path, groups: list[Any], layers: dict[str, Any]) -> None:
    seen: set[str] = set()
    for group in groups:
        if not isinstance(group, list) or len(group) < 2 or not all(isinstance(n, str) and n in layers for n in group):
            raise PackedFileError(f"{where}: shared_inputs {group!r} is no list of two or more known layers")
        if len(set(group)) < len(group) or seen & set(group):
            raise PackedFileError(f"{where}: shared_inputs {group!r} names a layer that has a group already")
        seen |= set(group)


def check_tied(folder: Path, quantization: dict[str, Any], header: dict[str, Any]) -> dict[str, str]:
    """tied_tensors: name -> the name that the tensor is stored under. The `header` gets them under both."""
    tied: Any = quantization.get("tied_tensors", {})
    where = f"{folder / 'config.json'}: tied_tensors"
    if not isinstance(tied, dict):
        raise PackedFileError(f"{where} must be an object, got {tied!r}")
    for name, stored in tied.items():
        if name in header or not isinstance(stored, str) or stored not in header:
            raise PackedFileError(f"{where} says that {name} is stored as {stored!r}, which the file does not bear out")
    header |= {name: header[stored] for name, stored in tied.items()}
    return tied


def _check_entry(where: str, entry: Any, num_recipes: int) -> None:
    if not isinstance(entry, dict):
        raise PackedFileError(f"{where} must be an object, got {entry!r}")
    recipe, shape = entry.get("recipe"), entry.get("shape")
    if type(recipe) is not int or not 0 <= recipe < num_recipes:
        raise PackedFileError(f"{where}: recipe must be 0 to {num_recipes - 1}, got {recipe!r}")
    if not isinstance(shape, list) or len(shape) != 2 or any(type(n) is not int or not 0 < n < 2**31 for n in shape):
        raise PackedFileError(f"{where}: shape must be two positive integers below 2**31, got {shape!r}")
    if type(entry.get("weight_zero_point")) not in (int, float) or type(entry.get("bias")) is not bool:
        raise PackedFileError(f"{where}: weight_zero_point must be a number and bias true or false")


def _hugging_face_builder(folder: Path, config: dict[str, Any], num_tensors: int) -> Callable[[], nn.Module]:
    """What builds the full-precision architecture of a Hugging Face configuration; no code of the directory is run."""
    from transformers import AutoConfig

    where = folder / "config.json"
    if "model_type" not in config:
        raise PackedFileError(
            f"{where} has no model_type, so this was packed from a model of your own: pass an instance of its "
            "architecture, bitbell.load(directory, model=...)"
        )
    depths = config.get("depths", [])  # blocks of each stage
    for depth in [*(config.get(name, 0) for name in DEPTHS), *(depths if isinstance(depths, list) else [depths])]:
        _check_depth(where, depth, num_tensors)
    automatic, names = _kind_of_model(where, config)
    try:
        architecture = AutoConfig.for_model(str(config.get("model_type")), **_without_code(config), **names)
        _check_depth(where, getattr(architecture, "num_hidden_layers", 0), num_tensors)
    except PackedFileError:
        raise
    except Exception as error:  # whatever transformers raises for a field of a wrong type
        raise PackedFileError(
            f"{where}: model_type {config.get('model_type')!r} with these fields is not one that this transformers "
            f"knows ({str(error)[:200]}); for a model of your own, pass bitbell.load(directory, model=...)"
        ) from None

    def build() -> nn.Module:
        try:
            with torch.random.fork_rng(devices=[]):  # its weights are replaced, so they should cost no random numbers
                return automatic.from_config(architecture)
        except Exception as error:  # likewise
            raise PackedFileError(f"{where}: no model can be built from it: {error}") from None

    return build


def _kind_of_model(where: Path, config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What builds the model, by its type, and the names of classes where it is an image classifier."""
    from transformers import AutoModelForCausalLM, AutoModelForImageClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    if str(config["model_type"]) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return AutoModelForCausalLM, {}
    labels = config.get("id2label", {0: "LABEL_0", 1: "LABEL_1"})  # which transformers leaves out
    names = {str(key): name for key, name in labels.items()} if isinstance(labels, dict) else {}
    wanted = [str(index) for index in range(len(names))]  # files have them in any order, often 0, 1, 10, 100 ...
    if not names or names.keys() != set(wanted) or not all(isinstance(name, str) for name in names.values()):
        raise PackedFileError(f"{where}: id2label must name classes 0, 1, 2 ..., got {str(labels)[:100]}")
    id2label = {index: names[key] for index, key in enumerate(wanted)}
    return AutoModelForImageClassification, {"id2label": id2label, "label2id": {v: k for k, v in id2label.items()}}


# Beside code, transformers would fetch attention kernels by name, and make label tables of any length.
_NOT_ARCHITECTURE = {
    "quantization_config",
    "auto_map",
    "architectures",
    "model_type",
    "num_labels",
    "id2label",
    "label2id",
}


def _without_code(config: Any, *, nested: bool = False) -> Any:
    """The fields of a configuration that describe the architecture and nothing that runs or loads code."""
    if isinstance(config, list):
        return [_without_code(value, nested=True) for value in config]
    if not isinstance(config, dict):
        return config
    dropped = _NOT_ARCHITECTURE - ({"model_type"} if nested else set())
    kept = {name: value for name, value in config.items() if name not in dropped and "_implementation" not in name}
    return {name: _without_code(value, nested=True) for name, value in kept.items()}


def _check_depth(where: Path, depth: Any, num_tensors: int) -> None:
    if type(depth) is not int or not 0 <= depth <= num_tensors:
        raise PackedFileError(f"{where}: num_hidden_layers is {depth!r}, but the file holds {num_tensors} tensors")


def with_packed_layers(folder: Path, model: nn.Module, quantization: dict[str, Any]) -> nn.Module:
    """`model` with the layers of the quantization_config replaced, in place, by packed ones that wait for tensors."""
    where = folder / "config.json"
    packed: dict[str, PackedLinear] = {}
    recipes = [_read_recipe(where, recipe) for recipe in quantization["recipes"]]
    for name, entry in quantization["layers"].items():
        try:
            linear: Any = model.get_submodule(name)
        except AttributeError:
            raise PackedFileError(f"{where}: the model has no layer {name!r}") from None
        if not is_linear(linear):
            kind = type(linear).__name__
            raise PackedFileError(f"{where}: {name!r} is a {kind} in the model, not a linear layer or a convolution")
        shape = list(shape_of(linear))
        if shape != entry["shape"]:
            raise PackedFileError(f"{where}: {name} has shape {entry['shape']} there, but {shape} in the model")
        recipe = recipes[entry["recipe"]]
        try:
            layer = packed_kind(linear).outline(linear, recipe, entry["bias"])
        except ValueError as error:
            raise PackedFileError(f"{where}: {name}: {error}") from None
        ours, theirs = convolution_of(layer).get("convolution"), entry.get("convolution")
        if ours != theirs:
            raise PackedFileError(f"{where}: {name} has the convolution {theirs!r} there, but {ours!r} in the model")
        if (layer.rotation, layer.weight_zero_point) != (entry.get("rotation"), entry["weight_zero_point"]):
            raise PackedFileError(
                f"{where}: {name} has rotation {entry.get('rotation')!r} and zero point "
                f"{entry['weight_zero_point']!r}, its recipe gives {layer.rotation!r} and {layer.weight_zero_point!r}"
            )
        packed[name] = layer
        paths = [path for path, module in model.named_modules(remove_duplicate=False) if module is linear]
        for path in paths:  # a layer may hang in several places
            replace_module(model, path, layer)
    for group in quantization["shared_inputs"]:
        _share(where, [packed[name] for name in group])
    return model.eval()


def _read_recipe(where: Path, fields: Any) -> Recipe:
    try:
        if not isinstance(fields.get("method"), str):
            raise ValueError(f"method must be a name, got {fields.get('method')!r}")
        return Recipe(**fields)
    except (ValueError, TypeError, AttributeError) as error:
        raise PackedFileError(f"{where}: the recipe {fields!r} is not valid: {error}") from None


def _share(where: Path, layers: list[PackedLinear]) -> None:
    quantizer = layers[0].activation_quantizer
    if quantizer is None or len({(layer.in_features, str(layer.recipe)) for layer in layers}) != 1:
        raise PackedFileError(f"{where}: shared_inputs joins layers of different widths or recipes")
    shared = SharedInput(quantizer, len(layers))
    for place, layer in enumerate(layers):
        layer.share_input(shared, place)


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of a safetensors file, whose own reader checks sizes and offsets."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except FileNotFoundError:
        raise PackedFileError(f"{path} does not exist") from None
    except Exception as error:  # safetensors has errors of its own
        raise PackedFileError(f"{path} is damaged or no safetensors file: {error}") from None


_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"} | {
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
_OF_QUANTIZERS = re.compile(r"(^|\.)(weight_scale|weight_offset|activation_quantizer\.[a-z_]+)$")  # always float32


def check_tensors(folder: Path, model: nn.Module, header: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Raise PackedFileError unless the file has the tensors of `model`, all of them and no others."""
    path = folder / "model.safetensors"
    expected = model.state_dict()
    for name in sorted(expected.keys() - header.keys() - _empty_weights(model)):
        raise PackedFileError(f"{path}: the tensor {name} is missing")
    for name in sorted(header.keys() - expected.keys()):
        raise PackedFileError(f"{path}: the tensor {name} has no place in the model")
    for name in sorted(expected.keys() & header.keys()):
        tensor, (dtype, shape) = expected[name], header[name]
        narrow = dtype in ("F16", "BF16", "F32") and not _OF_QUANTIZERS.search(name)
        floats = tensor.is_floating_point() and narrow
        if shape != tuple(tensor.shape) or (dtype != _DTYPES.get(tensor.dtype) and not floats):
            raise PackedFileError(
                f"{path}: the tensor {name} is {dtype} {shape}, "
                f"but must be {_DTYPES.get(tensor.dtype)} {tuple(tensor.shape)}"
            )


def _empty_weights(model: nn.Module) -> set[str]:
    """Names of packed layers' empty `weight`, which files of versions 1 and 2 do not have."""
    modules = model.named_modules(remove_duplicate=False)
    return {f"{name}.weight" for name, module in modules if isinstance(module, PackedLinear)}


def _check_unsaved_buffers(folder: Path, outline: nn.Module) -> None:
    saved = outline.state_dict().keys()
    size = sum(b.numel() * b.element_size() for name, b in outline.named_buffers() if name not in saved)
    if size > LARGEST_UNSAVED_BUFFERS:
        raise PackedFileError(
            f"{folder / 'config.json'}: the model builds {size} bytes of tables that the file does not hold"
        )


def _read_tensors(path: Path, model: nn.Module, tied: Mapping[str, str]) -> dict[str, Tensor]:
    """The file's tensors under every name they have in `model`; parameters are parameters here, so that ties hold."""
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except Exception as error:  # safetensors has errors of its own
        raise PackedFileError(f"{path} is damaged: {error}") from None
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in tensors.keys() & parameters:
        tensors[name] = nn.Parameter(tensors[name], requires_grad=False)
    tensors |= {name: tensors[stored] for name, stored in tied.items()}
    return {name: torch.empty(0) for name in _empty_weights(model)} | tensors


def check_values(folder: Path, model: nn.Module) -> None:
    """Raise PackedFileError for a loaded tensor that holds what no packed model has."""
    path = folder / "model.safetensors"
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise PackedFileError(f"{path}: the tensor {name} holds NaN or infinity")
        if name.endswith(".calibrated") and not bool(tensor.all()):
            raise PackedFileError(f"{path}: {name} is false, so the quantizer has no scale")
    for name, layer in quantized_layers(model):
        if layer.weight_shape.tolist() != [layer.out_features, layer.in_features]:
            raise PackedFileError(
                f"{path}: {name}.weight_shape is {layer.weight_shape.tolist()}, "
                f"but must be {[layer.out_features, layer.in_features]}"
            )
