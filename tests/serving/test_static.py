"""Decoding over a cache of fixed size, as a GPU captures it: the same text as the model's own modules make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import bitbell
from bitbell.data import TextTokenizer
from bitbell.evaluation import logits_of
from bitbell.serving import generate
from bitbell.serving.bench import time_static
from bitbell.serving.static import StaticDecoder, choose_token, why_not_static

MakeLlama = Callable[..., Any]
PROMPT = [72, 101, 108, 108, 111]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("recipe", ["bbq-w2a2", "quest-w4a4", None])
def test_logits_are_those_of_full_forward_passes(make_llama: MakeLlama, recipe: str | None, attention: str) -> None:
    model = make_llama(recipe, attn_implementation=attention, num_attention_heads=4)
    model = bitbell.pack(model) if recipe else model
    decoder = StaticDecoder(model, positions=20)
    for tokens in (PROMPT, [1, 2]):  # the second prompt finds nothing of the first
        logits, so_far = decoder.prefill(tokens), list(tokens)
        for token in (7, 200, 31):
            expected = logits_of(model, torch.tensor([so_far]))[0, -1].detach()
            assert torch.allclose(logits, expected, atol=1e-4 * float(expected.abs().max()))
            logits = decoder.step(token)
            so_far.append(token)


def test_greedy_text_is_that_of_the_modules(packed: Any, packed_gpt: Any, tokenizer: TextTokenizer) -> None:
    for model in (packed, packed_gpt):
        decoder = StaticDecoder(model)
        new = decoder.generate(tokenizer.encode("Hello"), 24, end_token=tokenizer.end_of_text)
        text = tokenizer.decode([token for token in new if token != tokenizer.end_of_text])
        assert text == generate(model, tokenizer, "Hello", max_new_tokens=24, temperature=0, native=False).text
        assert len(set(new)) > 1 or model is packed_gpt  # which says one letter over and over


def test_one_seed_gives_one_text(packed: Any) -> None:
    decoder = StaticDecoder(packed, positions=40)
    how: dict[str, Any] = {"temperature": 1.0, "top_k": 40, "top_p": 0.9}
    texts = [tuple(decoder.generate(PROMPT, 20, seed=seed, **how)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_it_ends_with_the_end_token_and_keeps_to_what_is_allowed(packed: Any) -> None:
    decoder = StaticDecoder(packed, positions=40)
    new = decoder.generate(PROMPT, 12)
    assert decoder.generate(PROMPT, 12, end_token=new[3])[-1] == new[3]
    assert max(decoder.generate(PROMPT, 12, allowed=50)) < 50


def test_tokens_are_drawn_in_their_shares() -> None:
    logits, generator = torch.tensor([0.0, 2.0, 1.0, -1.0]), torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(2000):
        counts[choose_token(logits, 0.5, 3, 0.99, generator)] += 1
    expected = (logits / 0.5).exp()
    expected[3] = 0
    assert torch.allclose(counts / 2000, expected / expected.sum(), atol=0.03)
    assert all(int(choose_token(logits, 1.0, None, 0.5, generator)) == 1 for _ in range(20))
    assert int(choose_token(logits, 0.0, None, None, generator)) == 1


def test_what_it_cannot_do_is_said(packed: Any) -> None:
    decoder = StaticDecoder(packed, positions=6)
    with pytest.raises(ValueError, match="1 to 6 tokens, got 7"):
        decoder.prefill([1] * 7)
    with pytest.raises(ValueError, match="a prompt and room: 0 of 6"):
        StaticDecoder(packed, positions=6).step(1)
    decoder.prefill([1] * 6)
    with pytest.raises(ValueError, match="6 of 6 positions are taken"):
        decoder.step(1)
    with pytest.raises(ValueError, match="positions must be 1 to the model's 64, got 65"):
        StaticDecoder(packed, positions=65)
    for asked in (0, 5):
        with pytest.raises(ValueError, match=f"max_new_tokens must be 1 to 4 after 3 tokens, got {asked}"):
            decoder.generate([1] * 3, asked)
    assert len(decoder.generate([1] * 3, 4)) == 4
    with pytest.raises(ValueError, match="capture needs a GPU, and the model is on cpu"):
        StaticDecoder(packed, capture=True)
    assert "no causal language model" in str(why_not_static(torch.nn.Linear(2, 2)))


def test_a_model_on_several_devices_is_refused(make_llama: MakeLlama) -> None:
    model = make_llama(None)
    assert why_not_static(model) is None
    model.lm_head.to("meta")
    assert why_not_static(model) == "its tensors are on several devices: cpu, meta"


def test_bench_times_its_steps(packed: Any) -> None:
    times = time_static(packed.model, PROMPT, 3, rounds=2)
    assert len(times) == 2
    assert all(prefill > 0 and decode > 0 for prefill, decode in times)


def test_a_model_in_training_mode_is_refused(make_llama: MakeLlama) -> None:
    with pytest.raises(ValueError, match="the model is in training mode"):
        StaticDecoder(make_llama("bbq-w2a2").train())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_logits_outlive_the_next_captured_step(make_llama: MakeLlama) -> None:
    decoder = StaticDecoder(bitbell.pack(make_llama("bbq-w2a2")).to("cuda"), positions=10)
    decoder.prefill(PROMPT)
    first = decoder.step(7)
    kept = first.clone()
    decoder.step(8)
    assert torch.equal(first, kept)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_captured_step_says_what_an_uncaptured_one_says(make_llama: MakeLlama) -> None:
    model = bitbell.pack(make_llama("bbq-w2a2")).to("cuda")
    texts = [StaticDecoder(model, positions=40, capture=capture).generate(PROMPT, 20) for capture in (True, False)]
    assert texts[0] == texts[1]
