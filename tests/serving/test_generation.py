"""The text that full forward passes would give, one token at a time, and an answer to every wrong setting."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bitbell
from bitbell.data import TextTokenizer
from bitbell.evaluation import logits_of
from bitbell.kernels import native
from bitbell.serving import Generation, NativeLlama, generate, load_tokenizer_of

MakeLlama = Callable[..., Any]


def greedy_by_hand(model: nn.Module, tokenizer: TextTokenizer, prompt: str, count: int) -> list[int]:
    """A full forward pass over everything so far for each token, without a cache."""
    ids = tokenizer.encode(prompt)
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + count and (len(ids) == start or ids[-1] != tokenizer.end_of_text):
            ids.append(int(logits_of(model, torch.tensor([ids]))[0, -1].argmax()))
    return ids[start:]


def end_the_text_at_once(model: Any, token: int) -> None:
    """Make `token` the likeliest by far, whatever came before: the first entry of every hidden state is large."""
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 50.0
        model.lm_head.weight[token].zero_()
        model.lm_head.weight[token, 0] = 1e4


@pytest.mark.parametrize("recipe", ["bbq-w2a2", "bbq-w4a4", "bbq-token-w3a3", "quest-w4a4", "lsq-w2a2", "bbq-w3a16"])
def test_greedy_text_is_that_of_full_forward_passes(
    make_llama: MakeLlama, tokenizer: TextTokenizer, recipe: str
) -> None:
    model = bitbell.pack(make_llama(recipe))
    ids = greedy_by_hand(model, tokenizer, "Hello", 24)
    result = generate(model, tokenizer, "Hello", max_new_tokens=24, temperature=0)
    assert result.tokens == len(ids)
    assert result.text == tokenizer.decode([token for token in ids if token != tokenizer.end_of_text])
    assert len(set(ids)) > 1  # a text, and not one token over and over


def test_trained_and_packed_models_say_the_same(make_llama: MakeLlama, tokenizer: TextTokenizer) -> None:
    model = make_llama("bbq-w2a2")
    for temperature, step in ((0.0, None), (0.0, False), (1.0, False)):
        texts = [
            generate(m, tokenizer, "In", max_new_tokens=30, temperature=temperature, native=step).text
            for m in (model, bitbell.pack(model))
        ]
        assert texts[0] == texts[1]


def test_one_seed_gives_one_text_and_others_others(packed: Any, tokenizer: TextTokenizer) -> None:
    texts = [generate(packed, tokenizer, "In the", max_new_tokens=20, seed=seed).text for seed in (0, 0, 1, 2)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_the_seed_of_the_program_is_neither_used_nor_changed(packed: Any, tokenizer: TextTokenizer) -> None:
    torch.manual_seed(7)
    first = generate(packed, tokenizer, "In", max_new_tokens=10).text
    after = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), after)
    torch.manual_seed(8)
    assert generate(packed, tokenizer, "In", max_new_tokens=10).text == first


def test_the_choice_of_one_token_is_greedy_at_any_temperature(packed: Any, tokenizer: TextTokenizer) -> None:
    greedy = generate(packed, tokenizer, "In", max_new_tokens=12, temperature=0).text
    assert generate(packed, tokenizer, "In", max_new_tokens=12, temperature=3.0, top_k=1).text == greedy
    assert generate(packed, tokenizer, "In", max_new_tokens=12, temperature=1.0, top_k=None, top_p=1e-6).text == greedy
    assert generate(packed, tokenizer, "In", max_new_tokens=12, temperature=1e-4, top_k=None).text == greedy


def test_cuts_of_the_choice_change_the_text(packed: Any, tokenizer: TextTokenizer) -> None:
    texts = {
        generate(packed, tokenizer, "In", max_new_tokens=20, temperature=1.5, top_k=top_k, top_p=top_p).text
        for top_k, top_p in ((None, None), (2, None), (None, 0.3))
    }
    assert len(texts) == 3


def test_no_cut_reaches_every_token(make_llama: MakeLlama, tokenizer: TextTokenizer) -> None:
    model = make_llama("bbq-w2a2")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely as any other
    many = generate(model, tokenizer, "a", max_new_tokens=60, top_k=None)
    few = generate(model, tokenizer, "a", max_new_tokens=60, top_p=0.02, top_k=None)
    assert len(set(many.text)) > 20
    assert len(set(few.text)) <= 6  # of 257 equal ones, a fiftieth


def test_the_end_of_text_stops_and_is_not_printed(make_llama: MakeLlama, tokenizer: TextTokenizer) -> None:
    model = make_llama("bbq-w2a2")
    end_the_text_at_once(model, tokenizer.end_of_text)
    for temperature in (0.0, 0.8):
        result = generate(bitbell.pack(model), tokenizer, "In", max_new_tokens=30, temperature=temperature)
        assert result.text == ""
        assert result.tokens == 1


def test_prompts_in_any_script_are_taken_as_their_bytes(packed: Any, tokenizer: TextTokenizer) -> None:
    prompt = "na\u00efve \u6f22\u5b57 \U0001f600"
    result = generate(packed, tokenizer, prompt, max_new_tokens=5, temperature=0)
    assert result.prompt == prompt
    ids = greedy_by_hand(packed, tokenizer, prompt, 5)
    assert result.text == tokenizer.decode([token for token in ids if token != tokenizer.end_of_text])


def test_the_prompt_is_not_repeated_in_the_text(packed: Any, tokenizer: TextTokenizer) -> None:
    prompt = "a text that is quite unlikely to be made again"
    assert not generate(packed, tokenizer, prompt, max_new_tokens=5).text.startswith(prompt)


def test_the_last_position_can_be_used_and_no_more(packed: Any, tokenizer: TextTokenizer) -> None:
    assert generate(packed, tokenizer, "x" * 60, max_new_tokens=4, temperature=0).tokens <= 4
    match = r"the prompt's 61 tokens and max_new_tokens=4 exceed the model's 64 positions"
    with pytest.raises(ValueError, match=match):
        generate(packed, tokenizer, "x" * 61, max_new_tokens=4)


def test_an_empty_prompt_is_refused(packed: Any, tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match="the prompt is empty; give at least one character"):
        generate(packed, tokenizer, "")


@pytest.mark.parametrize(
    ("setting", "value", "match"),
    [
        ("max_new_tokens", 0, "max_new_tokens must be at least 1, got 0"),
        ("max_new_tokens", -5, "max_new_tokens must be at least 1, got -5"),
        ("temperature", -0.1, r"temperature must be 0 \(greedy\) or more, got -0.1"),
        ("temperature", math.nan, r"temperature must be 0 \(greedy\) or more, got nan"),
        ("temperature", math.inf, r"temperature must be 0 \(greedy\) or more, got inf"),
        ("top_k", 0, "top_k must be at least 1 or None, got 0"),
        ("top_k", -1, "top_k must be at least 1 or None, got -1"),
        ("top_p", 0.0, "top_p must be above 0 and at most 1, or None, got 0.0"),
        ("top_p", 1.1, "top_p must be above 0 and at most 1, or None, got 1.1"),
        ("top_p", math.nan, "top_p must be above 0 and at most 1, or None, got nan"),
    ],
)
def test_settings_out_of_range_are_refused(
    packed: Any, tokenizer: TextTokenizer, setting: str, value: float, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        generate(packed, tokenizer, "In", **{setting: value})  # type: ignore[arg-type]


def test_a_model_with_fewer_tokens_than_the_tokenizer_is_refused(
    make_llama: MakeLlama, tokenizer: TextTokenizer
) -> None:
    model = make_llama("bbq-w2a2", vocab_size=257)
    model.resize_token_embeddings(200)
    with pytest.raises(
        ValueError, match=r"tokens go up to 256, the model's vocabulary has only 200; use the tokenizer"
    ):
        generate(model, tokenizer, "In", max_new_tokens=5)


def test_a_vocabulary_that_is_padded_beyond_the_tokenizers_is_no_obstacle(
    make_llama: MakeLlama, tokenizer: TextTokenizer
) -> None:
    model = make_llama("bbq-w2a2", vocab_size=320)
    end_the_text_at_once(model, 310)  # a token without a text
    result = generate(model, tokenizer, "In", max_new_tokens=10)
    assert 1 <= result.tokens <= 10


def test_a_model_in_training_is_used_as_in_evaluation_and_left_alone(
    make_llama: MakeLlama, tokenizer: TextTokenizer
) -> None:
    model = make_llama("bbq-w2a2")
    expected = generate(model, tokenizer, "In", max_new_tokens=10, temperature=0).text
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert generate(model, tokenizer, "In", max_new_tokens=10, temperature=0).text == expected
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_packed_model_generates_by_itself(packed: Any, tokenizer: TextTokenizer) -> None:
    ids = torch.tensor([tokenizer.encode("In")])
    out = packed.generate(ids, max_new_tokens=4, do_sample=False)
    assert out[0, 2:].tolist() == greedy_by_hand(packed, tokenizer, "In", 4)


def test_tokens_per_second_are_tokens_over_seconds(packed: Any, tokenizer: TextTokenizer) -> None:
    assert Generation("a", "b", 6, 2.0).tokens_per_second == 3.0
    assert math.isfinite(Generation("a", "b", 6, 0.0).tokens_per_second)
    assert generate(packed, tokenizer, "In", max_new_tokens=2).seconds > 0


def test_the_tokenizer_of_a_packed_directory_is_found(packed: Any, small_data: Path, tmp_path: Path) -> None:
    directory = packed.save(tmp_path / "packed", tokenizer=small_data)
    assert load_tokenizer_of(directory).encode("Hi") == [72, 105]


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no tokenizer.json, so text cannot be turned into its tokens"):
        load_tokenizer_of(tmp_path)


# The C++ step, or the modules ----------------------------------------------------------------------------------------

with_kernels = pytest.mark.skipif(native.extension is None, reason="installed without the C++ extension")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """With what each C++ step was made; the modules make none."""
    made: list[dict[str, Any]] = []

    class Noted(NativeLlama):
        def __init__(self, model: nn.Module, **options: Any) -> None:
            made.append(options)
            super().__init__(model, **options)

    monkeypatch.setattr(import_module("bitbell.serving.generate"), "NativeLlama", Noted)
    return made


@with_kernels
def test_greedy_text_is_the_same_by_the_step_and_by_the_modules(
    packed: Any, tokenizer: TextTokenizer, steps: list[dict[str, Any]]
) -> None:
    with native.using("auto"):
        by_modules = generate(packed, tokenizer, "In", max_new_tokens=30, temperature=0, native=False)
        assert steps == []
        for choice in (None, True):
            result = generate(packed, tokenizer, "In", max_new_tokens=30, temperature=0, native=choice)
            assert (result.text, result.tokens) == (by_modules.text, by_modules.tokens)
        assert len(steps) == 2


@with_kernels
def test_what_the_step_cannot_run_goes_by_the_modules(
    make_llama: MakeLlama, gpt: Any, packed: Any, tokenizer: TextTokenizer, steps: list[dict[str, Any]]
) -> None:
    for model in (make_llama("bbq-w2a2"), gpt):
        assert generate(model, tokenizer, "In", max_new_tokens=3).tokens >= 1
        assert generate(model, tokenizer, "In", max_new_tokens=3, native=False).tokens >= 1
    with native.using(native.REFERENCE):
        assert generate(packed, tokenizer, "In", max_new_tokens=3).tokens >= 1
    assert steps == []


@with_kernels
def test_head_bits_and_threads_reach_the_step(
    packed: Any, tokenizer: TextTokenizer, steps: list[dict[str, Any]]
) -> None:
    with native.using("auto"):
        texts = [
            generate(packed, tokenizer, "In", max_new_tokens=20, temperature=0, head_bits=bits, threads=threads).text
            for bits, threads in ((None, 1), (None, 2), (8, None), (16, None))
        ]
        assert texts[0] == texts[1]
        assert [(step["head_bits"], step["threads"]) for step in steps] == [(None, 1), (None, 2), (8, None), (16, None)]
        for native_step in (None, True):
            with pytest.raises(ValueError, match="head_bits must be 8, 16, or None for the head as it is, got 4"):
                generate(packed, tokenizer, "In", max_new_tokens=2, native=native_step, head_bits=4)
        with pytest.raises(ValueError, match="threads must be 1 to 256, or None, got 0"):
            generate(packed, tokenizer, "In", max_new_tokens=2, threads=0)


@with_kernels
def test_the_step_is_not_quietly_replaced_by_the_modules(
    make_llama: MakeLlama, gpt: Any, packed: Any, tokenizer: TextTokenizer
) -> None:
    def refused(model: Any, reason: str, **how: Any) -> None:
        with pytest.raises(ValueError, match=r"is not possible here: ") as caught:
            generate(model, tokenizer, "In", max_new_tokens=3, **how)
        assert reason in str(caught.value)

    refused(gpt, "this is a GPT2LMHeadModel", native=True)
    refused(gpt, "this is a GPT2LMHeadModel", head_bits=8)
    refused(make_llama("bbq-w2a2"), "is a QuantLinear; pack the model first", native=True)
    refused(packed, "native=False", native=False, head_bits=8)
    with native.using(native.REFERENCE):
        refused(packed, "no C++ kernels are in use", native=True)


@pytest.mark.parametrize("step", [None, False])
def test_a_seed_may_be_negative(packed: Any, tokenizer: TextTokenizer, step: bool | None) -> None:
    texts = [generate(packed, tokenizer, "In", max_new_tokens=20, seed=seed, native=step).text for seed in (-3, -3, 3)]
    assert texts[0] == texts[1] != texts[2]
