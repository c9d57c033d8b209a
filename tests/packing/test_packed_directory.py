"""Saving and loading: what comes back is what was saved, and a directory is written whole or not at all."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bitbell
from bitbell.layers import Recipe
from bitbell.layers.recipes import VARIANTS
from bitbell.packing import PackedFileError, PackedModel
from bitbell.quantizers import METHODS

MakeLlama = Callable[..., Any]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the system refuse to write more than `size` bytes to a file, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def small_network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 5, bias=False))


@pytest.mark.parametrize(
    "recipe",
    ["bbq-w2a2", "bbq-tensor-w3a4", "bbq-token-w8a8", "quest-w1a1", "quest-tuned-w3a3", "lsq-w4a2", "bbq-w3a16"],
)
def test_what_is_loaded_gives_the_logits_of_what_was_saved(
    make_llama: MakeLlama, tokens: Tensor, tmp_path: Path, recipe: str
) -> None:
    model = make_llama(recipe)
    packed = bitbell.pack(model)
    loaded = bitbell.load(packed.save(tmp_path / "packed"))
    assert torch.equal(loaded(tokens).logits, packed(tokens).logits)
    assert bitbell.verify(model, loaded).layers == 7


def drifted(model: nn.Module) -> nn.Module:
    """`model` with its quantizers' parameters and statistics moved, as training does."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "quantizer" in name:
                parameter.mul_(1.1).add_(0.01)
    model.train()(torch.randn(8, 64))
    return model.eval()


@pytest.mark.parametrize(
    "recipe",
    [
        f"{variant}-w{METHODS[method].widths[-1]}a4"
        for variant, (method, _, _) in VARIANTS.items()
        if method != "ternary"
    ]
    + [
        "ternary-w2a8",
        "bbq-w3a2:learn_offset=true,rms_gradient=false",
        "bbq-w2a2:zero_point=-0.25,normalise=false,start=0.5",
        "lsq-plus-w3a3:w.asymmetric=true,w.granularity=row",
        "quest-w4a4:estimator=identity,granularity=tensor",
        "nf-w4a16:granularity=tensor",
        "nf-w3a2:a.granularity=running,rotation=32",
        "n2uq-w4a4:w.estimator=identity",
        "ternary-w2a4:activation_method=lsq-plus",
    ],
)
def test_every_method_and_its_options_survive_the_files(tmp_path: Path, recipe: str) -> None:
    model, x = bitbell.quantize(small_network(), recipe), torch.randn(6, 64)
    bitbell.calibrate(model, x)
    packed = bitbell.pack(drifted(model))
    directory = packed.save(tmp_path / "packed")
    loaded = bitbell.load(directory, model=small_network())
    assert bitbell.verify(model, loaded).layers == 2
    assert torch.equal(loaded(x), packed(x))
    ours, theirs = loaded.model.state_dict(), packed.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert loaded.model[0].recipe == Recipe.parse(recipe)
    again = loaded.save(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (directory / name).read_bytes()


@pytest.mark.parametrize(("recipe", "options"), [("bbq-w2a2", {}), ("bbq-tensor-w2a2", {"rms": "tensor"})])
def test_directories_of_the_first_version_are_read(
    make_llama: MakeLlama, tokens: Tensor, tmp_path: Path, recipe: str, options: dict[str, Any]
) -> None:
    model = make_llama(recipe)
    directory = bitbell.pack(model).save(tmp_path / "packed")
    path = directory / "config.json"
    config = json.loads(path.read_text())
    quantization = config["quantization_config"]
    assert quantization["format_version"] == 3
    quantization["format_version"] = 1
    quantization["recipes"][0].pop("activation_method")
    quantization["recipes"][0]["activation_options"] = options
    path.write_text(json.dumps(config))
    tensors = load_file(directory / "model.safetensors")
    empty = [name for name, tensor in tensors.items() if not tensor.numel()]
    assert len(empty) == len(quantization["layers"])  # what version 3 brought
    save_file({name: t for name, t in tensors.items() if name not in empty}, directory / "model.safetensors")
    assert torch.equal(bitbell.load(directory)(tokens).logits, model(tokens).logits)


def test_a_loaded_model_is_a_packed_model_that_can_be_saved_again(saved: Path, tmp_path: Path) -> None:
    again = bitbell.load(saved).save(tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    first, second = (json.loads((d / "config.json").read_text()) for d in (saved, again))
    assert first["quantization_config"] == second["quantization_config"]
    assert isinstance(bitbell.load(again), PackedModel)


def test_input_quantizers_are_shared_after_loading_too(saved: Path) -> None:
    attention = bitbell.load(saved).model.model.layers[0].self_attn
    assert attention.k_proj.shared_input is attention.q_proj.shared_input is not None
    assert attention.k_proj.activation_quantizer is attention.q_proj.activation_quantizer


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gpt_neox"])
def test_other_architectures_go_the_same_way(tmp_path: Path, tokens: Tensor, name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 96}
    extra = {} if name == "gpt2" else {"intermediate_size": 128}
    if name == "qwen2":
        extra["num_key_value_heads"] = 2
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes, **extra))
    # GPT-2's projections are no nn.Linear, so that its head is all there is to quantize.
    bitbell.quantize(model, {"*lm_head": "lsq-w4a8"} if name == "gpt2" else "bbq-w2a2")
    bitbell.calibrate(model, tokens)
    loaded = bitbell.load(bitbell.pack(model.eval()).save(tmp_path / "packed"))
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_a_model_of_your_own_is_loaded_into_an_instance_of_it(tmp_path: Path) -> None:
    model, x = small_network(), torch.randn(6, 64)
    bitbell.quantize(model, "bbq-w3a3")
    bitbell.calibrate(model, x)
    packed = bitbell.pack(model.eval())
    directory = packed.save(tmp_path / "packed")
    loaded = bitbell.load(directory, model=small_network())
    assert torch.equal(loaded(x), model(x))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with pytest.raises(PackedFileError, match=r"packed from a model of your own: pass an instance"):
        bitbell.load(directory)
    other = nn.Sequential(nn.Linear(64, 31), nn.BatchNorm1d(31), nn.ReLU(), nn.Linear(31, 5, bias=False))
    with pytest.raises(PackedFileError, match=r"0 has shape \[32, 64\] there, but \[31, 64\] in the model"):
        bitbell.load(directory, model=other)


def test_tied_embeddings_are_stored_once_and_stay_tied(make_llama: MakeLlama, tmp_path: Path, tokens: Tensor) -> None:
    from safetensors import safe_open

    packed = bitbell.pack(make_llama("bbq-w2a2", tie_word_embeddings=True))
    directory = packed.save(tmp_path / "packed")
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    loaded = bitbell.load(directory)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert torch.equal(loaded(tokens).logits, packed(tokens).logits)


def test_ties_of_your_own_survive_as_well(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self, tie: bool) -> None:
            super().__init__()
            self.embed, self.inner, self.out = nn.Embedding(9, 64), nn.Linear(64, 64), nn.Linear(64, 9, bias=False)
            if tie:
                self.out.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.inner(self.embed(ids)))

    ids = torch.arange(9)
    model = bitbell.quantize(Tied(tie=True), {"inner": "bbq-w2a2"})
    bitbell.calibrate(model, ids)
    loaded = bitbell.load(bitbell.pack(model.eval()).save(tmp_path / "packed"), model=Tied(tie=False))
    assert torch.equal(loaded(ids), model(ids))
    assert loaded.model.out.weight is loaded.model.embed.weight


def test_transformers_reads_the_configuration(saved: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(saved)
    assert config.model_type == "llama"
    assert config.hidden_size == 64
    assert config.quantization_config["quant_method"] == "bitbell"


def test_the_tokenizer_travels(make_llama: MakeLlama, small_data: Path, tmp_path: Path) -> None:
    from bitbell.data import load_tokenizer

    directory = bitbell.pack(make_llama("bbq-w2a2")).save(tmp_path / "packed", tokenizer=small_data)
    assert sorted(p.name for p in directory.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert load_tokenizer(str(directory)).decode([72, 105]) == "Hi"


def test_a_folder_without_a_tokenizer_is_refused(make_llama: MakeLlama, tmp_path: Path) -> None:
    packed = bitbell.pack(make_llama("bbq-w2a2"))
    with pytest.raises(
        ValueError, match=r"holds no tokenizer.json; give a folder that has one, or leave tokenizer out"
    ):
        packed.save(tmp_path / "packed", tokenizer=tmp_path)
    assert not (tmp_path / "packed").exists()


@pytest.fixture(scope="module")
def packed(make_llama: MakeLlama) -> PackedModel:
    return bitbell.pack(make_llama("bbq-w2a2"))


def test_parents_are_made_and_an_empty_directory_is_filled(packed: PackedModel, tmp_path: Path) -> None:
    assert (packed.save(tmp_path / "a" / "b") / "config.json").is_file()
    (tmp_path / "empty").mkdir()
    assert (packed.save(tmp_path / "empty") / "config.json").is_file()


def test_a_foreign_directory_is_refused_even_if_it_may_be_overwritten(packed: PackedModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="exists and is no packed model; choose another directory"):
            packed.save(tmp_path, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("content", ['{"quantization_config": {"quant_method": "gptq"}}', "\xff", "{", "[]"])
def test_a_model_of_another_method_is_foreign(packed: PackedModel, tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match="exists and is no packed model"):
        packed.save(tmp_path, overwrite=True)


def test_a_file_in_the_place_of_the_directory_is_refused(packed: PackedModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file exists and is no packed model"):
        packed.save(tmp_path / "file")


def test_a_packed_model_is_overwritten_only_on_request(packed: PackedModel, directory: Path) -> None:
    (directory / "config.json").write_text((directory / "config.json").read_text() + " ")
    with pytest.raises(ValueError, match="holds a packed model already; choose another directory, or overwrite it"):
        packed.save(directory)
    assert (directory / "config.json").read_text().endswith(" ")
    packed.save(directory, overwrite=True)
    assert not (directory / "config.json").read_text().endswith(" ")
    assert [p.name for p in directory.parent.iterdir()] == ["packed"]


def test_a_directory_below_a_file_cannot_be_written(packed: PackedModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match=r"could not write the packed model to .*file/sub"):
        packed.save(tmp_path / "file" / "sub")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_full_disk_leaves_nothing_behind(packed: PackedModel, tmp_path: Path) -> None:
    with files_of_at_most(20_000), pytest.raises(OSError, match="could not write the packed model to"):
        packed.save(tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_older_model_whole(packed: PackedModel, directory: Path) -> None:
    with files_of_at_most(20_000), pytest.raises(OSError, match="could not write the packed model to"):
        packed.save(directory, overwrite=True)
    assert [p.name for p in directory.parent.iterdir()] == ["packed"]
    assert isinstance(bitbell.load(directory), PackedModel)


def test_the_older_model_comes_back_if_the_last_rename_fails(
    packed: PackedModel, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.replace

    def fail_for_the_new_one(source: Path, target: Path) -> None:
        if source.name.endswith(".partial"):
            raise PermissionError("not today")
        rename(source, target)

    monkeypatch.setattr("os.replace", fail_for_the_new_one)
    with pytest.raises(OSError, match=r"could not write the packed model to .*: not today"):
        packed.save(directory, overwrite=True)
    assert [p.name for p in directory.parent.iterdir()] == ["packed"]
    assert isinstance(bitbell.load(directory), PackedModel)


def test_an_interrupt_leaves_nothing_behind(
    packed: PackedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bitbell.packing.files.describe", interrupt)  # called after the tensors are written
    with pytest.raises(KeyboardInterrupt):
        packed.save(tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_no_obstacle(packed: PackedModel, directory: Path) -> None:
    for name in (".packed.partial", ".packed.old"):
        (directory.parent / name).mkdir()
        (directory.parent / name / "model.safetensors").write_bytes(b"half")
    packed.save(directory, overwrite=True)
    assert [p.name for p in directory.parent.iterdir()] == ["packed"]
    assert isinstance(bitbell.load(directory), PackedModel)
