"""Loading what is damaged, foreign or malicious: an error that names the file and the problem, never a crash."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import bitbell
from bitbell.packing import PackedFileError

Config = dict[str, Any]
UP = "model.layers.0.mlp.up_proj"
Q = "model.layers.0.self_attn.q_proj"


def edit_config(directory: Path, change: Callable[[Config], Any]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def quantization(change: Callable[[Config], Any]) -> Callable[[Config], Any]:
    return lambda config: change(config["quantization_config"])


def refused(directory: Path, match: str) -> None:
    with pytest.raises(PackedFileError, match=match):
        bitbell.load(directory)


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(directory: Path, name: str) -> None:
    (directory / name).unlink()
    refused(directory, rf"{name} (cannot be read \(No such file or directory\)|does not exist)")


def test_a_path_that_is_a_file_or_nothing_is_no_packed_model(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", r"file is not a packed model: .*config.json cannot be read \(Not a directory\)")
    refused(tmp_path / "nowhere", r"nowhere is not a packed model: .*config.json cannot be read \(No such file")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_directory_in_the_place_of_a_file_is_refused(directory: Path, name: str) -> None:
    (directory / name).unlink()
    (directory / name).mkdir()
    refused(directory, rf"{name} (cannot be read|is damaged or no safetensors file)")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"{'a': 1}", b"[" * 100_000])
def test_invalid_json_is_refused(directory: Path, content: bytes) -> None:
    (directory / "config.json").write_bytes(content)
    refused(directory, r"config.json is no valid JSON")


@pytest.mark.parametrize("content", ["[]", "3", "null", "{}", '{"quantization_config": null}'])
def test_a_configuration_without_quantization_is_refused(directory: Path, content: str) -> None:
    (directory / "config.json").write_text(content)
    refused(directory, r"config.json has no quantization_config, so .* is not a packed model")


def test_truncated_tensors_are_refused_at_any_length(directory: Path) -> None:
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    lengths = {0, 1, 7, 8, 9, len(whole) - 1} | {random.Random(0).randrange(len(whole)) for _ in range(20)}
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        refused(directory, r"model.safetensors is damaged or no safetensors file")


def test_trailing_bytes_are_refused(directory: Path) -> None:
    with (directory / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    refused(directory, r"model.safetensors is damaged or no safetensors file")


def test_flipped_bits_in_the_header_are_refused_or_harmless(directory: Path) -> None:
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    chance, loaded = random.Random(1), 0
    for _ in range(150):
        place, bit = chance.randrange(end), chance.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        try:
            bitbell.load(directory)
        except PackedFileError:
            continue
        loaded += 1
    assert loaded < 30  # metadata and padding may change, names and shapes may not


# Tensors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"{UP}.weight_packed", f"{Q}.activation_quantizer.scale", "lm_head.weight"])
def test_a_missing_tensor_is_named(directory: Path, name: str) -> None:
    edit_tensors(directory, lambda tensors: tensors.pop(name))
    refused(directory, rf"model.safetensors: the tensor {name} is missing")


def test_a_tensor_without_a_place_is_named(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({"model.extra": torch.ones(1)}))
    refused(directory, r"the tensor model.extra has no place in the model")


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        (f"{UP}.weight_packed", lambda t: t[:, :-1], r"is I32 \(128, 3\), but must be I32 \(128, 4\)"),
        (f"{UP}.weight_packed", lambda t: t[:-1], r"is I32 \(127, 4\), but must be I32 \(128, 4\)"),
        (f"{UP}.weight_packed", lambda t: t.flatten(), r"is I32 \(512,\), but must be I32 \(128, 4\)"),
        (f"{UP}.weight_packed", lambda t: t.long(), r"is I64 \(128, 4\), but must be I32"),
        (f"{UP}.weight_packed", lambda t: t.float(), r"is F32 \(128, 4\), but must be I32"),
        (f"{UP}.weight_scale", lambda t: t.half(), r"is F16 \(128, 1\), but must be F32"),
        (f"{UP}.weight_scale", lambda t: t[:0], r"is F32 \(0, 1\), but must be F32 \(128, 1\)"),
        (f"{UP}.weight_shape", lambda t: t.int(), r"is I32 \(2,\), but must be I64"),
        (f"{Q}.activation_quantizer.scale", lambda t: t[0], r"is F32 \(\), but must be F32 \(1,\)"),
        (f"{Q}.activation_quantizer.calibrated", lambda t: t.byte(), r"is U8 \(1,\), but must be BOOL"),
        ("lm_head.weight", lambda t: t.double(), r"is F64 \(96, 64\), but must be F32"),
        ("model.norm.weight", lambda t: torch.ones(10**6), r"is F32 \(1000000,\), but must be F32 \(64,\)"),
    ],
)
def test_a_tensor_of_another_shape_or_type_is_named(
    directory: Path, name: str, change: Callable[[Tensor], Tensor], match: str
) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}))
    refused(directory, rf"the tensor {name} {match}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        f"{UP}.weight_scale",
        f"{Q}.activation_quantizer.scale",
        f"{Q}.activation_quantizer.running_inverse_rms",
        "model.norm.weight",
    ],
)
def test_a_scale_that_is_not_finite_is_named(directory: Path, name: str, value: float) -> None:
    edit_tensors(directory, lambda tensors: tensors[name].view(-1)[0].fill_(value))
    refused(directory, rf"the tensor {name} holds NaN or infinity")


def test_a_quantizer_without_a_scale_is_named(directory: Path) -> None:
    name = f"{Q}.activation_quantizer.calibrated"
    edit_tensors(directory, lambda tensors: tensors[name].fill_(False))
    refused(directory, rf"{name} is false, so the quantizer has no scale")


def test_a_stored_shape_that_is_not_the_layers_is_named(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors[f"{UP}.weight_shape"].copy_(torch.tensor([128, 63])))
    refused(directory, rf"{UP}.weight_shape is \[128, 63\], but must be \[128, 64\]")


def test_half_precision_is_welcome_where_a_model_is_full_precision(directory: Path, tokens: Tensor) -> None:
    edit_tensors(directory, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].bfloat16()}))
    assert bitbell.load(directory).model.lm_head.weight.dtype == torch.bfloat16


OFFSETS = "bbq-w2a2:learn_offset=true"
THRESHOLDS = "bbq-w2a2:activation_method=n2uq-activations,rotation=none"
RUNNING = "nf-w2a2:a.granularity=running"
OF_Q = f"{Q}.activation_quantizer"


@pytest.fixture
def packed_as(make_llama: Callable[..., Any], tmp_path: Path) -> Callable[[str], Path]:
    """The packed directory of a recipe."""
    return lambda recipe: bitbell.pack(make_llama(recipe)).save(tmp_path / "packed-as")


@pytest.mark.parametrize(
    ("recipe", "name", "change", "match"),
    [
        (OFFSETS, f"{UP}.weight_offset", lambda t: None, r"weight_offset is missing"),
        (OFFSETS, f"{UP}.weight_offset", lambda t: t.half(), r"is F16 \(128, 1\), but must be F32 \(128, 1\)"),
        (OFFSETS, f"{UP}.weight_offset", lambda t: t[:1], r"is F32 \(1, 1\), but must be F32 \(128, 1\)"),
        (OFFSETS, f"{UP}.weight_offset", lambda t: t / 0, r"weight_offset holds NaN or infinity"),
        (OFFSETS, f"{OF_Q}.offset", lambda t: None, r"offset is missing"),
        (OFFSETS, f"{OF_Q}.offset", lambda t: t[0], r"is F32 \(\), but must be F32 \(1,\)"),
        (OFFSETS, f"{OF_Q}.offset", lambda t: t.bfloat16(), r"is BF16 \(1,\), but must be F32"),
        (OFFSETS, f"{OF_Q}.offset", lambda t: t + float("nan"), r"offset holds NaN or infinity"),
        (OFFSETS, f"{OF_Q}.scale", lambda t: t.half(), r"is F16 \(1,\), but must be F32"),
        (THRESHOLDS, f"{OF_Q}.segments", lambda t: t[:2], r"is F32 \(2,\), but must be F32 \(3,\)"),
        (THRESHOLDS, f"{OF_Q}.segments", lambda t: t / 0, r"segments holds NaN or infinity"),
        (THRESHOLDS, f"{OF_Q}.start", lambda t: None, r"start is missing"),
        (THRESHOLDS, f"{OF_Q}.interval", lambda t: t.half(), r"is F16 \(1,\), but must be F32"),
        (RUNNING, f"{OF_Q}.running_size", lambda t: None, r"running_size is missing"),
        (RUNNING, f"{OF_Q}.running_size", lambda t: t / 0, r"running_size holds NaN or infinity"),
        ("bbq-w2a2", f"{UP}.weight_offset", lambda t: torch.zeros(128, 1), r"weight_offset has no place in the model"),
        ("nf-w2a2", f"{OF_Q}.running_size", lambda t: torch.ones(1), r"running_size has no place in the model"),
    ],
)
def test_what_a_method_stores_beside_its_scale_is_checked(
    packed_as: Callable[[str], Path], recipe: str, name: str, change: Callable[[Any], Tensor | None], match: str
) -> None:
    directory = packed_as(recipe)
    bitbell.load(directory)

    def edit(tensors: dict[str, Tensor]) -> None:
        changed = change(tensors.pop(name, None))
        if changed is not None:
            tensors[name] = changed.contiguous()

    edit_tensors(directory, edit)
    refused(directory, rf"model.safetensors: the tensor {re.escape(name.rpartition('.')[0])}.*{match}")


def test_odd_values_that_are_finite_load_and_give_finite_logits(
    packed_as: Callable[[str], Path], tokens: Tensor
) -> None:
    for recipe, name in ((THRESHOLDS, f"{OF_Q}.segments"), (OFFSETS, f"{UP}.weight_offset"), (RUNNING, "running_size")):
        directory = packed_as(recipe)
        for value in (0.0, -1.0):
            edit_tensors(directory, lambda t, n=name, v=value: [t[k].fill_(v) for k in t if k.endswith(n)])
            assert bitbell.load(directory)(tokens).logits.shape == (2, 12, 96)
        shutil.rmtree(directory)


# Configuration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [99, 4, 0, "1", None, [1], True, 2.0])
def test_another_format_version_is_refused(directory: Path, version: Any) -> None:
    edit_config(directory, quantization(lambda q: q.update(format_version=version)))
    refused(directory, r"config.json: format_version is .*, this bitbell reads 1 to 3")


def test_a_missing_format_version_is_refused(directory: Path) -> None:
    edit_config(directory, quantization(lambda q: q.pop("format_version")))
    refused(directory, r"format_version is None, this bitbell reads 1 to 3")


def test_another_quantization_method_is_refused(directory: Path) -> None:
    edit_config(directory, quantization(lambda q: q.update(quant_method="gptq")))
    refused(directory, r"quant_method is 'gptq', bitbell reads 'bitbell'")


@pytest.mark.parametrize("key", ["recipes", "layers", "shared_inputs"])
@pytest.mark.parametrize("value", [None, 3, "layers"])
def test_the_three_parts_of_the_quantization_are_needed(directory: Path, key: str, value: Any) -> None:
    edit_config(directory, quantization(lambda q: q.update({key: value})))
    refused(directory, r"quantization_config needs recipes, layers and shared_inputs")


def test_a_directory_without_layers_is_refused(directory: Path) -> None:
    edit_config(directory, quantization(lambda q: q.update(layers={})))
    refused(directory, r"quantization_config needs recipes, layers and shared_inputs")


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [("recipe", value, r"recipe must be 0 to 0, got") for value in (1, -1, True, "0", None, 0.0, [0])]
    + [("shape", value, r"shape must be two positive integers below 2\*\*31, got") for value in (None, [], [128])]
    + [("shape", [128, n], r"shape must be two positive integers") for n in (-64, 0, 64.0, True, "64", 2**31)]
    + [("shape", [64, 128], rf"{UP} has shape \[64, 128\] there, but \[128, 64\] in the model")]
    + [("weight_zero_point", value, r"weight_zero_point must be a number") for value in (None, "x", True, [0])]
    + [("bias", value, r"bias true or false") for value in (None, 0, "false")]
    + [("bias", True, rf"the tensor {UP}.bias is missing")]
    + [("rotation", 32, rf"{UP} has rotation 32 and zero point -0.5, its recipe gives 64 and -0.5")]
    + [("rotation", value, r"has rotation") for value in (None, "auto", [64], -1)]
    + [("weight_zero_point", 0, r"has rotation 64 and zero point 0, its recipe gives 64 and -0.5")]
    + [("weight_zero_point", float("nan"), r"zero point nan, its recipe gives")],
)
def test_a_wrong_field_of_a_layer_is_named(directory: Path, field: str, value: Any, match: str) -> None:
    edit_config(directory, quantization(lambda q: q["layers"][UP].update({field: value})))
    refused(directory, match)


@pytest.mark.parametrize("field", ["recipe", "shape", "weight_zero_point", "bias", "rotation"])
def test_a_missing_field_of_a_layer_is_refused(directory: Path, field: str) -> None:
    edit_config(directory, quantization(lambda q: q["layers"][UP].pop(field)))
    refused(directory, rf"config.json.*{UP}")


@pytest.mark.parametrize("entry", [None, 3, [], "bbq-w2a2"])
def test_a_layer_entry_that_is_no_object_is_named(directory: Path, entry: Any) -> None:
    edit_config(directory, quantization(lambda q: q["layers"].update({UP: entry})))
    refused(directory, rf"layer '{UP}' must be an object, got")


@pytest.mark.parametrize(
    "name", ["model.layers.7.mlp.up_proj", "", "model.norm", "model", f"{UP}.weight_packed", "a b"]
)
def test_an_entry_for_what_is_no_linear_layer_is_refused(directory: Path, name: str) -> None:
    edit_config(directory, quantization(lambda q: q["layers"].update({name: q["layers"][UP]})))
    refused(directory, r"config.json: (the model has no layer|.* is a \w+ in the model, not a linear layer)")


def test_a_layer_without_an_entry_is_refused(directory: Path) -> None:
    edit_config(directory, quantization(lambda q: q["layers"].pop("model.layers.0.mlp.down_proj")))
    refused(directory, r"the tensor model.layers.0.mlp.down_proj\..* has no place in the model")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"weights": 9}, r"weights must be an integer from 1 to 8 bits, got weights=9"),
        ({"weights": True}, r"weights must be an integer from 1 to 8 bits, got weights=True"),
        ({"activations": 0}, r"activations must be an integer from 1 to 8 bits, got activations=0"),
        ({"activations": "2"}, r"activations must be an integer from 1 to 8 bits"),
        ({"method": "gptq"}, r"unknown method 'gptq'"),
        ({"method": 5}, r"method must be a name, got 5"),
        ({"method": []}, r"method must be a name, got \[\]"),
        ({"rotation": 3}, r"rotation must be 'auto', 'vision', a power of two or None, got 3"),
        ({"rotation": 2**40}, r"rotation=1099511627776 does not divide the layer's input width"),
        ({"surprise": 1}, r"unexpected keyword argument 'surprise'"),
        ({"weight_options": {"zero": 1}}, r"bbq has no option 'zero'"),
        ({"weight_options": []}, r"is not valid"),
        ({"weight_options": "bits"}, r"is not valid"),
        ({"weight_options": {"bits": 3}}, r"may not hold 'bits'"),
        ({"weight_options": {"rows": 7}}, r"weight_options may not hold 'rows'"),
        ({"activation_options": {"rows": 7}}, r"activation_options may not hold 'rows'"),
        ({"activation_options": {"rms": "never"}}, r"rms must be one of"),
        ({"activation_options": {"rms": ["running"]}}, r"rms of bbq must be a name or none, got rms=\['running'\]"),
        (
            {"activation_options": {"zero_point": "x"}},
            r"zero_point of bbq must be a number or none, got zero_point='x'",
        ),
        (
            {"activation_options": {"zero_point": float("nan")}},
            r"zero_point of bbq must be a number or none, got zero_point=nan",
        ),
        (
            {"activation_options": {"zero_point": float("inf")}},
            r"zero_point of bbq must be a number or none, got zero_point=inf",
        ),
        ({"activation_options": {"rms": "token"}}, r"running_inverse_rms has no place in the model"),
        ({"weight_options": {"zero_point": True}}, r"zero_point of bbq must be a number or none, got zero_point=True"),
        ({"weight_options": {"normalise": 1}}, r"normalise of bbq must be true or false, got normalise=1"),
        ({"weight_options": {"estimator": "ste"}}, r"estimator must be one of bell, trust, clip, identity"),
        ({"weight_options": {"start": -1}}, r"start must be positive"),
        ({"weight_options": {"start": 10**400}}, r"start of bbq must be a number or none"),
        ({"weight_options": {"learn_offset": True}}, r"_proj.weight_offset is missing"),
        ({"activation_options": {"learn_offset": True}}, r"_proj.activation_quantizer.offset is missing"),
        ({"activation_options": {"granularity": "tensor", "rms": "token"}}, r"holds both 'rms' and 'granularity'"),
        ({"weight_options": {"granularity": "token"}}, r"granularity of weights must be 'row' or 'tensor'"),
        ({"activation_method": "gptq"}, r"unknown method 'gptq'"),
        ({"activation_method": 5}, r"unknown method 5"),
        ({"activation_method": []}, r"unknown method \[\]"),
        ({"activation_method": ""}, r"unknown method ''"),
        ({"activation_method": "lsq"}, r"running_inverse_rms has no place in the model"),
        ({"activation_method": "n2uq-activations"}, r"_proj.activation_quantizer.input_scale is missing"),
        ({"activation_method": "nf", "activations": 5}, r"activations must be an integer from 2 to 4 bits for nf"),
        ({"method": "n2uq-activations"}, r"quantizes activations only; give it as activation_method"),
        ({"method": "nf", "weights": 5}, r"weights must be an integer from 2 to 4 bits for nf"),
        ({"method": "ternary"}, r"has rotation 64 and zero point -0.5, its recipe gives None and 0.0"),
        ({"weights": 3}, r"zero point"),
        ({"activations": None}, r"activation_quantizer.* has no place|shared_inputs joins"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_reason(directory: Path, change: Config, match: str) -> None:
    edit_config(directory, quantization(lambda q: q["recipes"][0].update(change)))
    refused(directory, match)


@pytest.mark.parametrize("recipe", [None, 3, [], "bbq-w2a2", {}, [["method", "bbq"]]])
def test_a_recipe_that_is_no_recipe_is_refused(directory: Path, recipe: Any) -> None:
    edit_config(directory, quantization(lambda q: q.update(recipes=[recipe])))
    refused(directory, r"config.json: the recipe .* is not valid")


@pytest.mark.parametrize(
    "groups", [[3], [[]], [[Q]], [[Q, "nowhere"]], [[Q, 3]], [[Q, [Q]]], ["ab"], [None], [{Q: UP}]]
)
def test_groups_that_are_no_groups_are_refused(directory: Path, groups: Any) -> None:
    edit_config(directory, quantization(lambda q: q.update(shared_inputs=groups)))
    refused(directory, r"shared_inputs .* is no list of two or more known layers")


@pytest.mark.parametrize("groups", [[[Q, Q]], [[Q, UP], [UP, f"{Q[:-6]}k_proj"]]])
def test_a_layer_is_in_one_group_at_most(directory: Path, groups: Any) -> None:
    edit_config(directory, quantization(lambda q: q.update(shared_inputs=groups)))
    refused(directory, r"shared_inputs .* names a layer that has a group already")


def test_layers_of_different_widths_share_nothing(directory: Path) -> None:
    edit_config(directory, quantization(lambda q: q.update(shared_inputs=[[Q, "model.layers.0.mlp.down_proj"]])))
    refused(directory, r"shared_inputs joins layers of different widths or recipes")


def test_a_group_that_was_not_saved_as_one_is_refused(directory: Path) -> None:
    edit_config(directory, quantization(lambda q: q.update(shared_inputs=[])))
    refused(directory, r"the tensor .*(up|k|v)_proj.activation_quantizer.calibrated is missing")


@pytest.mark.parametrize(
    ("tied", "match"),
    [
        ([], r"tied_tensors must be an object, got \[\]"),
        (
            {"lm_head.weight": "model.norm.weight"},
            r"lm_head.weight is stored as 'model.norm.weight', which the file does",
        ),
        ({"x": "nowhere"}, r"x is stored as 'nowhere', which the file does not bear out"),
        ({"x": ["lm_head.weight"]}, r"which the file does not bear out"),
        ({"x": "lm_head.weight"}, r"the tensor x has no place in the model"),
    ],
)
def test_ties_that_do_not_hold_are_refused(directory: Path, tied: Any, match: str) -> None:
    edit_config(directory, quantization(lambda q: q.update(tied_tensors=tied)))
    refused(directory, match)


def test_a_tie_to_a_tensor_of_another_shape_is_refused(directory: Path) -> None:
    edit_config(directory, quantization(lambda q: q.update(tied_tensors={"lm_head.weight": "model.norm.weight"})))
    edit_tensors(directory, lambda tensors: tensors.pop("lm_head.weight"))
    refused(directory, r"the tensor lm_head.weight is F32 \(64,\), but must be F32 \(96, 64\)")


# Architectures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["num_hidden_layers", "n_layer", "n_layers", "num_layers"])
@pytest.mark.parametrize("value", [10**9, -1, 1.5, "2", True, None, [1]])
def test_more_layers_than_the_file_can_hold_are_refused_at_once(directory: Path, field: str, value: Any) -> None:
    edit_config(directory, lambda config: config.update({field: value}))
    started = time.perf_counter()
    refused(directory, r"num_hidden_layers is .*, but the file holds 45 tensors")
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size", "vocab_size", "head_dim"])
def test_a_huge_model_is_refused_before_anything_of_its_size_is_made(directory: Path, field: str) -> None:
    edit_config(directory, lambda config: config.update({field: 10**9}))
    started = time.perf_counter()
    refused(directory, r"config.json: .* has shape|the tensor .* but must be F32 \(1000000000, 64\)")
    assert time.perf_counter() - started < 5


def test_tables_that_a_model_makes_beside_its_tensors_are_bounded(tmp_path: Path, tokens: Tensor) -> None:
    from transformers import GPTJConfig, GPTJForCausalLM

    model = GPTJForCausalLM(GPTJConfig(vocab_size=96, n_positions=64, n_embd=64, n_layer=1, n_head=2, rotary_dim=32))
    bitbell.calibrate(bitbell.quantize(model, "bbq-w2a2"), tokens)
    directory = bitbell.pack(model.eval()).save(tmp_path / "packed")
    assert torch.equal(bitbell.load(directory)(tokens).logits, model(tokens).logits)
    edit_config(directory, lambda config: config.update(n_positions=5 * 10**6))
    refused(directory, r"config.json: the model builds \d+ bytes of tables that the file does not hold")


@pytest.mark.parametrize("model_type", ["nothing", None, 3, [], "bert", "gpt2", "vit", "t5", "mamba", "../llama"])
def test_another_kind_of_model_is_refused(directory: Path, model_type: Any) -> None:
    edit_config(directory, lambda config: config.update(model_type=model_type))
    refused(directory, r"config.json: (model_type|no model can be built from it|the model has no layer)")


def test_a_missing_model_type_asks_for_the_model(directory: Path) -> None:
    edit_config(directory, lambda config: config.pop("model_type"))
    refused(directory, r"has no model_type, so this was packed from a model of your own")


def test_no_code_of_the_directory_is_run(directory: Path, tokens: Tensor) -> None:
    (directory / "evil.py").write_text("raise SystemExit('this code must not run')")
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    before = bitbell.load(directory)(tokens).logits
    edit_config(directory, lambda c: c.update(auto_map=code, architectures=["Evil"], trust_remote_code=True))
    assert torch.equal(bitbell.load(directory)(tokens).logits, before)


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_no_attention_kernel_is_fetched_by_name(directory: Path, field: str) -> None:
    edit_config(directory, lambda config: config.update({field: "someone/their-kernel"}))
    assert bitbell.load(directory).config._attn_implementation == "sdpa"


# Anything else -------------------------------------------------------------------------------------------------------

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2, 3, 64, 65, 10**9, -(10**9), 2**63, 10**30]),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(
        [
            "bbq",
            "lsq",
            "float16",
            "float99",
            "int8",
            "load",
            "relu",
            "gpt2",
            "dynamic",
            "yarn",
            "auto",
            "nf",
            "lsq-plus",
        ]
    ),
    st.lists(st.integers(-2, 300), max_size=3),
    st.dictionaries(
        st.sampled_from(["rope_type", "factor", "bits", "zero_point", "start"]), st.integers(-2, 9), max_size=2
    ),
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_change_of_the_configuration_is_refused_or_loads(saved: Path, directory: Path, data: st.DataObject) -> None:
    config = json.loads((saved / "config.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(places(config)))
        if data.draw(st.booleans()) and isinstance(container, dict):
            container.pop(key)
        else:
            container[key] = data.draw(VALUES)
    (directory / "config.json").write_text(json.dumps(config))
    with suppress(PackedFileError):
        bitbell.load(directory)
