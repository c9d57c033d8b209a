"""`bitbell bench` as a command: a page of text, or every number as JSON, of packed models, runs and GPT-2."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import bitbell
from bitbell.cli.bench import describe
from bitbell.cli.main import main
from bitbell.kernels import native
from bitbell.models.presets import PRESETS, Preset
from bitbell.serving import Bench
from bitbell.serving.bench import LayerSpeed

MICRO = Preset(layers=1, width=64, heads=2, feed_forward=128, learning_rate=4e-3, tokens=1e4, vocabulary=300)
SMALL = ["--prompt-tokens", "8", "--new-tokens", "4", "--rounds", "1"]
with_kernels = pytest.mark.skipif(native.extension is None, reason="installed without the C++ extension")


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, native.using("auto"):
        patch.setitem(PRESETS, "micro", MICRO)
        patch.setattr(import_module("bitbell.serving.bench"), "STREAM_LIMITS", (1, 2))  # megabytes
        yield


def train(recipe: str, data: Path, out: Path) -> Path:
    sizes = ["--steps", "2", "--batch-size", "2", "--sequence-length", "32", "--evaluate-windows", "2"]
    arguments = ["train", "--preset", "micro", "--recipe", recipe, "--data", str(data), "--out", str(out)]
    assert main([*arguments, *sizes]) == 0
    return out


@pytest.fixture(scope="module")
def packed(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("packed")
    run = train("bbq-w2a2", small_data, folder / "run")
    assert main(["pack", str(run), str(folder / "packed")]) == 0
    return str(folder / "packed")


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=2, n_positions=20)
    model = bitbell.quantize(GPT2LMHeadModel(config).eval(), "bbq-w2a2")
    bitbell.calibrate(model, torch.randint(0, 96, (4, 16)))
    return str(bitbell.pack(model).save(tmp_path_factory.mktemp("gpt") / "packed"))


def numbers_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["bench", *arguments, *SMALL, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@with_kernels
def test_a_packed_model(packed: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["bench", packed, *SMALL]) == 0
    page = capsys.readouterr().out
    assert page.startswith("C++ step, ")
    for line in ("prefill", "decode", "weights", "traffic", "cache", "memory", "q_proj", "down_proj"):
        assert f"\n{line} " in page, line
    assert "8 tokens at a time" in page
    assert "one sequence, 4 tokens" in page
    assert "64x128 bbq-w2a2" in page
    numbers = numbers_of([packed], capsys)
    assert numbers["engine"].startswith("C++ step, ")
    assert numbers["decode_tokens_per_second"] > 0
    assert {layer["name"] for layer in numbers["layers"]} >= {"q_proj", "down_proj"}
    eight = numbers_of([packed, "--head-bits", "8"], capsys)
    assert eight["weight_bytes"] < numbers["weight_bytes"]
    assert numbers_of([packed, "--threads", "2"], capsys)["threads"] == 2
    assert native.threads() == torch.get_num_threads() == numbers["threads"]


def test_native_false_takes_the_modules(packed: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    numbers = numbers_of([packed, "--native", "never"], capsys)
    assert numbers["engine"] == "modules in PyTorch (native_step=False)"
    assert len(numbers["layers"]) == 7


@with_kernels
def test_a_run_in_full_precision(small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train("none", small_data, tmp_path / "run")
    capsys.readouterr()
    assert main(["bench", str(run), *SMALL]) == 0
    page = capsys.readouterr().out
    assert page.startswith("C++ step, ")
    assert "layer " not in page
    assert numbers_of([str(run)], capsys)["layers"] == []


def test_gpt_2_goes_by_its_modules(gpt: str, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = numbers_of([gpt], capsys)
    assert numbers["engine"].startswith("modules in PyTorch (")
    assert {layer["name"] for layer in numbers["layers"]} == {"c_attn", "c_proj", "c_fc"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--new-tokens", "0"], "new_tokens must be at least 1, got 0"),
        (["--prompt-tokens", "0"], "prompt_tokens must be at least 1, got 0"),
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
        (["--threads", "0"], "threads must be 1 to 256, or None, got 0"),
        (["--prompt-tokens", "18"], "prompt_tokens=18 and new_tokens=4 exceed the model's 20 positions"),
        (["--native", "always"], "the native step is not possible here: "),
        (["--head-bits", "8"], "head_bits=8 needs the native step, which is not possible here: "),
    ],
)
def test_what_is_wrong_is_named_without_a_traceback(
    gpt: str, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", gpt, *SMALL, *flags]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err


def test_a_directory_that_is_no_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(tmp_path), *SMALL]) == 1
    assert "is neither a run nor a packed model" in capsys.readouterr().err


def test_the_page_shows_the_numbers() -> None:
    layer = LayerSpeed("q_proj", 22, (2048, 1024), "bbq-w2a2", microseconds=40.0, weight_bytes=524_288)
    result = Bench("engine", 2, "wall time", 128, 64, 1234.5, 87.65, 0.031, 500_000_000, 45_056, 2**30, 80e9, [layer])
    assert describe(result).splitlines() == [
        "engine, 2 threads, medians of wall time (spread 3%)",
        "prefill        1234.5 tokens/s   128 tokens at a time",
        "decode           87.7 tokens/s   one sequence, 64 tokens",
        "weights         500.0 MB         read for every token",
        "traffic          43.8 GB/s       55% of 80.0 GB/s, this machine's in this run",
        "cache            45.1 kB         for every token of text",
        "memory         1073.7 MB         largest so far, Python and torch included",
        "",
        "one row through each kind of packed layer, called from Python, which costs some microseconds:",
        "layer        number          shape recipe               us    GB/s",
        "q_proj           22      2048x1024 bbq-w2a2           40.0    13.1",
    ]
    without = Bench("engine", 1, "thread CPU time", 8, 4, 1.0, 1.0, 0.0, 10**6, 1000, 10**8, None, [])
    assert describe(without).startswith("engine, 1 thread, medians of thread CPU time (spread 0%)\n")
    assert "traffic" not in describe(without)
