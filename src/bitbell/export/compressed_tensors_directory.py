"""A model of packed weights as a directory of compressed-tensors, with the very same weights.

    bitbell.export.compressed_tensors(packed, "out")

Its format `pack-quantized` says: value = code * scale, codes signed integers of 1 to 8 bits, a scale for each row.
Levels that are halves fit after doubling, in wider codes: -1.5, -0.5, 0.5, 1.5 become -3, -1, 1, 3 with half the scale.
What it cannot say is refused. docs/compressed-tensors.md is for users.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bitbell.export.refusals import Refused, packed_on_cpu
from bitbell.kernels import pack_codes
from bitbell.layers import quantized_layers
from bitbell.layers.product import levels_of
from bitbell.packing import PackedFileError, PackedLinear, VerificationError
from bitbell.packing.files import TOKENIZER_FILES, put_in_place, read_config
from bitbell.packing.layers import values_of
from bitbell.packing.model import tied_tensors

QUANT_METHOD, FORMAT = "compressed-tensors", "pack-quantized"
USUAL_BITS = (2, 4, 8)  # which every release packs in the same way; runtimes have kernels for 4 and 8
INSTEAD = "export it to ONNX, or run it with bitbell.load"


@dataclass(frozen=True)
class CompressedTensorsDirectory:
    """What was written, and the size of its tensors in bytes. layers: bits of codes -> how many layers have them.
    transforms: whether inputs have to be rotated by the `transform_config`."""

    path: Path
    size: int
    layers: dict[int, int]
    transforms: bool

    def __str__(self) -> str:
        layers = ", ".join(f"{count} layers in {bits}-bit codes" for bits, count in sorted(self.layers.items()))
        also = "; inputs are rotated by the transform_config, which transformers ignores" if self.transforms else ""
        return f"{self.path}: {self.size / 1e6:.2f} MB, {layers}; read back by compressed-tensors: weights equal{also}"


def compressed_tensors(
    model: nn.Module,
    out: str | Path,
    *,
    code_bits: int | None = None,
    transforms: bool = False,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
) -> CompressedTensorsDirectory:
    """Write `model`, one of transformers whose linear layers have packed weights and float inputs (a16), to `out`.

    code_bits: of the codes that are written; by default 2, 4 or 8, the narrowest that hold a layer's levels.
    transforms: describe rotations of inputs by a `transform_config`, for a runtime that applies it (transformers does
    not). tokenizer: a folder whose tokenizer travels along. Every weight is read back by the library and compared bit
    by bit.
    Raises ValueError (Refused) for what the format cannot say, naming the layer, and for a directory that is there
    already; ImportError without the extra `compressed-tensors`; VerificationError where a weight reads back otherwise.
    """
    if find_spec("compressed_tensors") is None:
        raise ImportError(
            "the package compressed-tensors is missing; pip install 'bitbell[compressed-tensors]' brings it"
        )
    if code_bits is not None and not 1 <= code_bits <= 8:
        raise ValueError(f"code_bits must be 1 to 8, or None for 2, 4 or 8 as needed, got {code_bits}")
    target = Path(out).resolve()
    _check_target(target, overwrite)
    if tokenizer is not None and not (Path(tokenizer) / TOKENIZER_FILES[0]).is_file():
        raise ValueError(f"{tokenizer} holds no {TOKENIZER_FILES[0]}; give a folder that has one, or leave it out")
    inner: Any = packed_on_cpu(model)
    linear = _linear_layers(inner)
    if not any(True for _ in quantized_layers(inner)):
        raise Refused(f"no layer of this {type(inner).__name__} is quantized; transformers' save_pretrained writes it")
    layers = {name: _check(name, layer, linear, transforms) for name, layer in quantized_layers(inner)}
    carried = {name: _carry(name, layer, code_bits) for name, layer in layers.items()}
    config = inner.config.to_dict() | {"architectures": [type(inner).__name__], "dtype": "float32"}
    config["quantization_config"] = _describe(layers, carried, ignored=sorted(linear - layers.keys()))
    if "lm_head" in layers:
        config["tie_word_embeddings"] = False  # an embedding of floats and a head of codes are tied no more
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(partial, config, _tensors(inner, layers, carried), tokenizer)
        _compare(partial, layers)
        put_in_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    count: dict[int, int] = defaultdict(int)
    for made in carried.values():
        count[made.bits] += 1
    size = (target / "model.safetensors").stat().st_size
    return CompressedTensorsDirectory(Path(out), size, dict(count), "transform_config" in config["quantization_config"])


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    try:
        ours = read_config(target)["quantization_config"].get("quant_method") == QUANT_METHOD
    except PackedFileError:
        ours = False
    if not ours:
        raise ValueError(f"{target} exists and is no directory of compressed-tensors; choose another one")
    if not overwrite:
        raise ValueError(f"{target} exists already; choose another directory, or overwrite it (--overwrite)")


# What fits ------------------------------------------------------------------------------------------------------------


def _linear_layers(model: Any) -> set[str]:
    """Names of the architecture's nn.Linear, which is what the library quantizes. Raises Refused for other models."""
    if not hasattr(model, "save_pretrained"):
        raise Refused(f"{type(model).__name__} is no model of transformers; run it with bitbell.load")
    with torch.device("meta"):
        outline = type(model)(model.config)
    return {name for name, module in outline.named_modules() if isinstance(module, nn.Linear)}


def _check(name: str, layer: Any, linear: set[str], transforms: bool) -> PackedLinear:
    if name not in linear:
        raise Refused(f"{name}: compressed-tensors quantizes nn.Linear only; {INSTEAD}")
    if layer.activation_quantizer is not None:
        lacks = f"rounds no inputs as {layer.activation_quantizer.method} does"
        raise Refused(
            f"{name}: compressed-tensors {lacks} ({layer.recipe.name}); {INSTEAD}, or train weights only (a16)"
        )
    if layer.weight_offset is not None:
        raise Refused(f"{name}: compressed-tensors has no offsets of rows ({layer.recipe.name}); {INSTEAD}")
    if layer.rotation not in (None, 1) and not transforms:
        how = "give transforms=True (--transforms) for a runtime that applies it, train with rotation=none"
        raise Refused(
            f"{name}: its inputs are rotated in blocks of {layer.rotation}, and transformers ignores the "
            f"transform_config that says so; {how}, or {INSTEAD}"
        )
    found: PackedLinear = layer
    return found


class Carried(NamedTuple):
    """Levels of a layer as integers: `values` (2**bits of ours,) int64 are `factor` times the levels, in codes of
    `bits`."""

    bits: int
    factor: int
    values: Tensor


def _carry(name: str, layer: PackedLinear, code_bits: int | None) -> Carried:
    half = 2 ** (layer.recipe.weights - 1)
    levels = levels_of(torch.arange(-half, half).to(torch.int8), layer.weight_grid, torch.float64)
    for factor in (1, 2, 4):
        if torch.equal((factor * levels).round(), factor * levels):
            break
    else:
        raise Refused(f"{name}: the levels of {layer.recipe.name} are no multiples of a quarter step; {INSTEAD}")
    values = (factor * levels).long()
    needed = max(int(values.max()).bit_length(), int(-1 - values.min()).bit_length()) + 1
    if needed > 8:
        raise Refused(f"{name}: the levels of {layer.recipe.name} need codes of {needed} bits, more than 8; {INSTEAD}")
    if code_bits is not None and code_bits < needed:
        raise ValueError(
            f"{name}: the levels of {layer.recipe.name} need code_bits of {needed} at least, got {code_bits}"
        )
    return Carried(code_bits or next(bits for bits in USUAL_BITS if needed <= bits), factor, values)


# What is written ------------------------------------------------------------------------------------------------------


def _tensors(model: Any, layers: dict[str, PackedLinear], carried: dict[str, Carried]) -> dict[str, Tensor]:
    tied = tied_tensors(model)
    dropped = {f"{name}.weight" for name in layers}  # the empty ones
    state = {name: t for name, t in model.state_dict().items() if name not in tied and name not in dropped}
    for name, layer in layers.items():
        bits, factor, values = carried[name]
        codes = (values + 2 ** (bits - 1)).to(torch.uint8)[layer.weight_codes().long()]
        state[f"{name}.weight_packed"] = pack_codes(codes, bits)
        state[f"{name}.weight_scale"] = layer.weight_scale / factor
    return {name: t.detach().contiguous().clone() for name, t in state.items()}


def _describe(layers: dict[str, PackedLinear], carried: dict[str, Carried], ignored: list[str]) -> dict[str, Any]:
    """The `quantization_config`: a group for each width of codes, a transform for each block that inputs are rotated
    by."""
    widths, blocks = defaultdict(list), defaultdict(list)
    for name, layer in layers.items():
        widths[carried[name].bits].append(name)
        if layer.rotation not in (None, 1):
            blocks[layer.rotation].append(name)
    weights = {"type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    groups = {
        f"weights_{bits}": {"targets": names, "weights": {"num_bits": bits, **weights}}
        for bits, names in sorted(widths.items())
    }
    made: dict[str, Any] = {"quant_method": QUANT_METHOD, "format": FORMAT, "quantization_status": "compressed"}
    made |= {"config_groups": groups, "ignore": ignored}
    if blocks:
        rotations = {
            f"rotation_{block}": {
                "type": "hadamard",
                "head_dim": block,
                "apply": [{"targets": names, "location": "input"}],
            }
            for block, names in sorted(blocks.items())
        }
        made["transform_config"] = {"config_groups": rotations}
    return made


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], tokenizer: str | Path | None) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors writes for the owner only
    for name in TOKENIZER_FILES:
        if tokenizer is not None and (source := Path(tokenizer) / name).exists():
            shutil.copyfile(source, folder / name)


def _compare(folder: Path, layers: dict[str, PackedLinear]) -> None:
    """Have the library decompress every weight from the files, and compare it with the model's, bit by bit."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    config = QuantizationConfig.model_validate(read_config(folder)["quantization_config"])
    schemes: Any = {name: scheme for scheme in config.config_groups.values() for name in scheme.targets}
    compressor = BaseCompressor.get_value_from_registry(FORMAT)
    for name, layer in layers.items():
        parts = ("weight_packed", "weight_scale", "weight_shape")
        found = compressor.decompress({part: tensors[f"{name}.{part}"] for part in parts}, schemes[name])["weight"]
        expected = values_of(
            layer.weight_codes().to(torch.int16).sub(2 ** (layer.recipe.weights - 1)).to(torch.int8),
            layer.weight_scale,
            None,
            layer.weight_grid,
        )
        if not torch.equal(found, expected):
            raise VerificationError(f"{name}: compressed-tensors reads other weights back; nothing was written")
