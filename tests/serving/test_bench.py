"""What `bench` says of a model adds up, whichever way it runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch

import bitbell
from bitbell.kernels import native
from bitbell.serving import Bench, NativeLlama, bench
from bitbell.serving.bench import layer_speeds

with_kernels = pytest.mark.skipif(native.extension is None, reason="installed without the C++ extension")

MODULE = import_module("bitbell.serving.bench")  # whose name in the package is the function's
MakeLlama = Callable[..., Any]
SMALL = {"prompt_tokens": 8, "new_tokens": 4, "rounds": 2}


@pytest.fixture(autouse=True)
def fastest_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(MODULE, "STREAM_LIMITS", (1, 2))  # megabytes
    with native.using("auto"):
        yield


def check(result: Bench) -> None:
    assert (result.prompt_tokens, result.new_tokens) == (8, 4)
    assert result.prefill_tokens_per_second > 0
    assert result.decode_tokens_per_second > 0
    assert result.spread >= 0
    assert result.peak_bytes > 50e6  # torch alone
    stream = result.stream_bytes_per_second
    if native.extension is None:
        assert stream is result.share_of_stream is None
        return
    assert stream is not None
    assert 1e8 < stream < 1e13
    expected = result.weight_bytes * result.decode_tokens_per_second / stream
    assert result.share_of_stream == pytest.approx(expected)
    shown = json.loads(json.dumps(result.to_dict()))
    assert shown["share_of_stream"] == pytest.approx(expected)
    assert shown["decode_tokens_per_second"] == result.decode_tokens_per_second
    for layer, one in zip(shown["layers"], result.layers, strict=True):
        assert (layer["name"], tuple(layer["shape"]), layer["weight_bytes"]) == (one.name, one.shape, one.weight_bytes)
        assert layer["gigabytes_per_second"] == pytest.approx(one.weight_bytes / one.microseconds / 1e3)


@with_kernels
def test_a_packed_llama_by_the_step(packed: Any) -> None:
    result = bench(packed, **SMALL)
    check(result)
    assert result.engine == f"C++ step, {native.level()} kernels"
    assert result.threads == torch.get_num_threads()
    assert result.weight_bytes == NativeLlama(packed).weight_bytes
    heads = 257 * 64 * 4
    codes = 2 * (4 * 64 * 64 + 3 * 64 * 128) * 2 // 8  # two blocks, two bits
    assert result.weight_bytes == heads + codes
    assert result.cache_bytes_per_token == 2 * 2 * 64 * 4  # keys and values of two blocks, float32
    shapes = {layer.name: (layer.count, layer.shape, layer.recipe, layer.weight_bytes) for layer in result.layers}
    square = (2, (64, 64), "bbq-w2a2", 64 * 64 // 4)
    assert shapes == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), square),
        **dict.fromkeys(("gate_proj", "up_proj"), (2, (128, 64), "bbq-w2a2", 64 * 128 // 4)),
        "down_proj": (2, (64, 128), "bbq-w2a2", 64 * 128 // 4),
    }
    assert all(layer.microseconds > 0 for layer in result.layers)


@with_kernels
def test_head_bits_are_measured(packed: Any) -> None:
    whole, sixteen, eight = (bench(packed, head_bits=bits, **SMALL) for bits in (None, 16, 8))
    assert whole.weight_bytes - sixteen.weight_bytes == 2 * 257 * 64
    panels = -(-257 // 64) * 64 * 64  # the head's rows in whole panels of 64, a byte each
    assert eight.weight_bytes == whole.weight_bytes - 4 * 257 * 64 + panels
    for result in (sixteen, eight):
        check(result)


def test_the_modules_of_a_packed_llama(packed: Any) -> None:
    result = bench(packed, native_step=False, **SMALL)
    check(result)
    assert result.engine == "modules in PyTorch (native_step=False)"
    codes = 2 * (4 * 64 * 64 + 3 * 64 * 128) * 2 // 8
    assert 0 <= result.weight_bytes - (257 * 64 * 4 + codes) < 20_000  # norms, scales and quantizers besides
    assert len(result.layers) == 7


def test_full_precision(make_llama: MakeLlama) -> None:
    model = make_llama(None)
    result = bench(model, **SMALL)
    check(result)
    assert result.layers == []
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)) * 4
    assert 0 <= result.weight_bytes - linear < 4096  # norms, by the modules


def test_tied_embeddings_are_read_as_the_head(make_llama: MakeLlama) -> None:
    sizes = [
        bench(make_llama(None, tie_word_embeddings=tied), native_step=step, **SMALL).weight_bytes
        for step in ([None, False] if native.extension else [False])
        for tied in (False, True)
    ]
    assert sizes[0::2] == sizes[1::2]


def test_gpt_2_goes_by_its_modules(gpt: Any, packed_gpt: Any) -> None:
    for model in (gpt, packed_gpt):
        result = bench(model, **SMALL)
        check(result)
        assert result.engine.startswith("modules in PyTorch (")
        if native.extension is not None:
            assert "this is a GPT2LMHeadModel" in result.engine
        assert result.cache_bytes_per_token == 2 * 2 * 64 * 4
    names = {(layer.name, layer.count, layer.shape) for layer in result.layers}
    shapes = {("c_attn", 2, (192, 64)), ("c_proj", 2, (64, 64)), ("c_fc", 2, (256, 64)), ("c_proj", 2, (64, 256))}
    assert names == shapes
    positions = gpt.transformer.wpe.weight.numel() + gpt.transformer.wte.weight.numel()  # the head is tied
    total = sum(parameter.numel() for parameter in gpt.parameters())
    expected = 4 * (total - positions + 257 * 64)
    assert bench(gpt, **SMALL).weight_bytes == pytest.approx(expected, rel=1e-3)


def test_a_cache_in_16_bits_is_half_as_large(make_llama: MakeLlama) -> None:
    result = bench(make_llama(None).bfloat16(), native_step=False, **SMALL)
    assert result.cache_bytes_per_token == 2 * 2 * 64 * 2


def test_the_model_stays_in_training_mode(make_llama: MakeLlama) -> None:
    model = make_llama("bbq-w2a2").train()
    result = bench(model, **SMALL)
    assert model.training
    assert result.layers == []


@with_kernels
def test_threads_are_those_asked_for_and_only_meanwhile(packed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def note(*arguments: Any) -> Any:
        seen.append((native.threads(), torch.get_num_threads()))
        return layer_speeds(*arguments)

    monkeypatch.setattr(MODULE, "layer_speeds", note)
    before = torch.get_num_threads()
    for step in (None, False):
        assert bench(packed, threads=2, native_step=step, **SMALL).threads == 2
        assert (native.threads(), torch.get_num_threads()) == (before, before)
    assert seen == [(2, 2)] * 2
    for threads in (0, 257):
        with pytest.raises(ValueError, match=f"threads must be 1 to 256, or None, got {threads}"):
            bench(packed, threads=threads, **SMALL)
    try:
        native.set_threads(3)
        bench(packed, threads=2, **SMALL)
        assert native.threads() == 3
    finally:
        native.set_threads(None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens must be at least 1, got 0"),
        ({"new_tokens": -1}, "new_tokens must be at least 1, got -1"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"prompt_tokens": 61}, "prompt_tokens=61 and new_tokens=4 exceed the model's 64 positions"),
        (
            {"native_step": False, "head_bits": 8},
            "head_bits=8 needs the native step, which is not possible here: native_step=False",
        ),
    ],
)
def test_wrong_settings_are_named(packed: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench(packed, **(SMALL | settings))


def test_the_last_position_can_be_used(packed: Any) -> None:
    assert bench(packed, prompt_tokens=60, new_tokens=4, rounds=1).prompt_tokens == 60


def test_the_step_is_not_quietly_replaced_by_the_modules(packed: Any, gpt: Any) -> None:
    reason = "GPT2LMHeadModel" if native.extension is not None else "no C"
    for how in ({"native_step": True}, {"head_bits": 8}):
        with pytest.raises(ValueError, match=f"is not possible here: .*{reason}"):
            bench(gpt, **(SMALL | how))  # type: ignore[arg-type]
    with native.using(native.REFERENCE):
        with pytest.raises(ValueError, match="is not possible here: no C"):
            bench(packed, native_step=True, **SMALL)
        assert bench(packed, **SMALL).engine.startswith("modules in PyTorch (no C++ kernels are in use")


def test_layers_that_differ_are_listed_apart(make_llama: MakeLlama) -> None:
    rules = {"*.layers.0.*.q_proj": "bbq-w4a4", "*.v_proj": None, "*": "bbq-w2a2"}
    layers = layer_speeds(bitbell.pack(make_llama(rules)), rounds=1)
    found = [(layer.name, layer.count, layer.recipe) for layer in layers if layer.name in ("q_proj", "v_proj")]
    assert found == [("q_proj", 1, "bbq-w4a4"), ("q_proj", 1, "bbq-w2a2")]


@with_kernels
def test_bytes_of_a_layer_are_those_that_a_pass_reads(make_llama: MakeLlama) -> None:
    packed = bitbell.pack(make_llama({"*.q_proj": "bbq-w5a8", "*.k_proj": "bbq-w3a8", "*": None}))
    size = {layer.name: layer.weight_bytes for layer in layer_speeds(packed, rounds=1)}
    assert size == {"q_proj": 64 * 64, "k_proj": 64 * 64 * 3 // 8}
    with native.using(native.REFERENCE):
        size = {layer.name: layer.weight_bytes for layer in layer_speeds(packed, rounds=1)}
    assert size == {"q_proj": 64 * 64 * 5 // 8, "k_proj": 64 * 64 * 3 // 8}


@with_kernels
@pytest.mark.parametrize("step", [True, False])
def test_one_thread_is_timed_by_its_own_clock(packed: Any, step: bool) -> None:
    assert bench(packed, threads=1, native_step=step, **SMALL).clock == "thread CPU time"
    assert bench(packed, threads=2, native_step=step, **SMALL).clock == "wall time"
