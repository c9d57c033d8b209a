"""The C++ step of LLaMA models against the modules of `transformers`: logits, text, sampling, and what it refuses."""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bitbell
from bitbell.evaluation import logits_of
from bitbell.kernels import native
from bitbell.quantizers import AbsMax
from bitbell.serving import NativeLlama, why_not_native

pytestmark = pytest.mark.skipif(native.extension is None, reason="installed without the C++ extension")

MakeLlama = Callable[..., Any]
ROUNDING = 3e-5  # of the largest logit: what sums in another order leave, with room; measured up to 1e-5
LONG = 300  # tokens: three chunks


@pytest.fixture(autouse=True)
def fastest_kernels() -> Iterator[None]:
    with native.using("auto"):
        yield


@pytest.fixture(scope="session")
def plain(make_llama: MakeLlama) -> Any:
    """Full precision, 512 positions, grouped queries, biases. Read only."""
    more = {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "max_position_embeddings": 512}
    return make_llama(None, **more)


@pytest.fixture(scope="session")
def wide(make_llama: MakeLlama) -> Any:
    """Packed, and with layers so large that several threads are worth it. Read only."""
    rules = {"*.self_attn.*": None, "*": "bbq-w4a8"}
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "max_position_embeddings": 512}
    return bitbell.pack(make_llama(rules, num_hidden_layers=1, **sizes))


def tokens_for(model: Any, count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (count,), generator=generator).tolist()


@torch.no_grad()
def by_modules(model: Any, tokens: list[int]) -> Tensor:
    """Logits (tokens, vocabulary) of the module path."""
    return logits_of(model, torch.tensor([tokens]))[0].float()


@torch.no_grad()
def text_by_modules(model: Any, tokens: list[int], count: int) -> list[int]:
    ids = torch.tensor([tokens])
    settings = {"do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    return model.generate(ids, max_new_tokens=count, **settings)[0, len(tokens) :].tolist()


def all_logits(engine: NativeLlama, tokens: list[int], slot: int = 0, start: int = 0) -> Tensor:
    count = len(tokens)
    return engine.forward(tokens, [slot] * count, range(start, start + count), [True] * count)


def error_of(ours: Tensor, truth: Tensor) -> Tensor:
    """(rows,) the largest difference in each row, in units of the largest logit."""
    return (ours - truth).abs().amax(-1) / truth.abs().max()


# Logits --------------------------------------------------------------------------------------------------------------

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
ODD = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10, "hidden_size": 45, "intermediate_size": 71}
SHAPES: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "grouped": {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 120, "head_dim": 20},
    "one-kv-head-odd-widths": ODD | {"vocab_size": 203},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "llama3": {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    "yarn": {"rope_parameters": YARN},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_text_in_full_precision_are_those_of_transformers(make_llama: MakeLlama, shape: str) -> None:
    model = make_llama(None, **({"max_position_embeddings": 512} | SHAPES[shape]))
    engine, tokens = NativeLlama(model), tokens_for(model, LONG)
    expected = by_modules(model, tokens)
    assert float(expected.abs().max()) > 0.5  # there is something to get wrong
    assert float(error_of(all_logits(engine, tokens), expected).max()) < ROUNDING
    assert engine.length() == LONG
    text = engine.generate(tokens[:20], 30)
    assert text == text_by_modules(model, tokens[:20], 30)
    assert len(set(text)) > 1


MIXED = {"*.q_proj": "bbq-w2a2", "*.k_proj": "bbq-w4a16", "*.v_proj": None, "*.mlp.*": "ternary-w2a8"}
MIXED |= {"lm_head": "bbq-w4a8", "*": "bbq-w3a3"}
RULES = ["bbq-w2a2", "quest-w3a3", "lsq-w4a8", "bbq-w1a1", "nf-w4a16", "bbq-w2a16", "absmax-w8a8", "bbq-token-w3a3"]


@pytest.mark.parametrize("rules", [*RULES, MIXED], ids=lambda rules: rules if isinstance(rules, str) else "mixed")
def test_logits_and_text_of_packed_models_are_those_of_their_modules(make_llama: MakeLlama, rules: Any) -> None:
    """A code that rounding turns over changes later rows by far more than rounding: rare, so most rows have none."""
    model = bitbell.pack(make_llama(rules, max_position_embeddings=160, attention_bias=True))
    engine, tokens = NativeLlama(model), tokens_for(model, 140)
    error = error_of(all_logits(engine, tokens), by_modules(model, tokens))
    assert float(error.median()) < ROUNDING
    assert float((error < ROUNDING).float().mean()) > 0.6
    assert engine.generate(tokens[:5], 12) == text_by_modules(model, tokens[:5], 12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_read_as_they_are(make_llama: MakeLlama, dtype: torch.dtype) -> None:
    model = make_llama(None).to(dtype)
    tokens = tokens_for(model, 50)
    ours = all_logits(NativeLlama(model), tokens)
    assert float(error_of(ours, by_modules(model.float(), tokens)).max()) < ROUNDING


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_of_16_bits_is_that_of_rounded_weights(make_llama: MakeLlama, tied: bool) -> None:
    model = make_llama(None, tie_word_embeddings=tied)
    tokens = tokens_for(model, 50)
    engine, whole = NativeLlama(model, head_bits=16), NativeLlama(model)
    assert whole.weight_bytes - engine.weight_bytes == 2 * model.lm_head.weight.numel()
    ours = all_logits(engine, tokens)
    with torch.no_grad():
        for weight in {model.lm_head.weight, model.model.embed_tokens.weight}:
            weight.copy_(weight.bfloat16())
    assert float(error_of(ours, by_modules(model, tokens)).max()) < ROUNDING


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_of_8_bits_is_that_of_absmax_codes(make_llama: MakeLlama, tied: bool, dtype: torch.dtype) -> None:
    model = make_llama(None, tie_word_embeddings=tied).to(dtype)
    tokens = tokens_for(model, 50)
    ours = all_logits(NativeLlama(model, head_bits=8), tokens)
    model = model.float()
    error = error_of(ours, by_modules(model, tokens))
    assert 0 < float(error.median()) < 0.02
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight.detach().clone()
    with torch.no_grad():
        scale = embedding.abs().amax(1, keepdim=True) / 127
        embedding.copy_((embedding / scale).round() * scale)
        hidden = model.model(torch.tensor([tokens])).last_hidden_state[0]
        truth = AbsMax(8)(hidden) @ AbsMax(8, rows=len(head))(head).T
    assert float(error_of(ours, truth).median()) < ROUNDING


@pytest.mark.parametrize("bits", [8, 16])
def test_a_packed_head_stays_as_it_is(make_llama: MakeLlama, bits: int) -> None:
    model = bitbell.pack(make_llama({"lm_head": "bbq-w4a8", "*": "bbq-w2a2"}, vocab_size=97))
    with torch.no_grad():
        model.model.model.embed_tokens.weight.copy_(model.model.model.embed_tokens.weight.bfloat16())
    tokens = tokens_for(model, 20)
    ours, truth = all_logits(NativeLlama(model, head_bits=bits), tokens), all_logits(NativeLlama(model), tokens)
    if bits == 16:
        assert torch.equal(ours, truth)
    assert float(error_of(ours, truth).median()) < 0.5  # the embedding of 8 bits moves codes of 2
    assert NativeLlama(model, head_bits=bits).weight_bytes == NativeLlama(model).weight_bytes


def test_every_level_computes_the_same(make_llama: MakeLlama) -> None:
    model = bitbell.pack(make_llama("bbq-w2a4"))
    tokens = tokens_for(model, 40)
    with native.using("portable"):
        expected = all_logits(NativeLlama(model), tokens)
    for level in [name for name, why in native.level_names().items() if not why]:
        with native.using(level):
            error = error_of(all_logits(NativeLlama(model), tokens), expected)
        assert float(error.median()) < ROUNDING, level
        assert float((error < ROUNDING).float().mean()) > 0.6, level


# Slots, positions, threads -------------------------------------------------------------------------------------------


def test_token_by_token_gives_the_bits_of_the_prompt(plain: Any, packed: Any) -> None:
    for model, count in ((plain, 140), (packed, 64)):
        engine, tokens = NativeLlama(model), tokens_for(model, count)
        at_once = all_logits(engine, tokens)
        first = engine.prefill(tokens[:1])
        rest = [engine.decode(token) for token in tokens[1:]]
        assert engine.length() == count
        assert torch.equal(torch.stack([first, *rest]), at_once)
        assert torch.equal(engine.prefill(tokens), at_once[-1])


def test_slots_do_not_mix(plain: Any) -> None:
    """Rows of two sequences in turns of random lengths, some of their logits wanted; a third slot in between."""
    engine, rng = NativeLlama(plain, slots=3, positions=LONG), random.Random(0)
    texts = {0: tokens_for(plain, LONG, 1), 2: tokens_for(plain, LONG, 2)}
    expected = {slot: by_modules(plain, text) for slot, text in texts.items()}
    worst, compared = 0.0, 0
    engine.prefill(tokens_for(plain, 7, 3), slot=1)
    while any(engine.length(slot) < LONG for slot in texts):
        rows: list[tuple[int, int, int]] = []
        places = {slot: engine.length(slot) for slot in texts}
        for slot in rng.choices([0, 2], k=rng.randint(1, 3)):
            stop = min(LONG, places[slot] + rng.randint(0, 60))
            rows += [(texts[slot][at], slot, at) for at in range(places[slot], stop)]
            places[slot] = stop
        if not rows:
            continue
        want = [rng.random() < 0.5 for _ in rows]
        logits = engine.forward(*zip(*rows, strict=True), want)
        wanted = [row for row, is_wanted in zip(rows, want, strict=True) if is_wanted]
        for ours, (_, slot, at) in zip(logits, wanted, strict=True):
            worst = max(worst, float(error_of(ours[None], expected[slot][at : at + 1])))
            compared += 1
    assert compared > LONG / 2
    assert worst < 10 * ROUNDING  # in units of its own row's largest
    assert engine.length(1) == 7


def test_without_want_come_the_last_rows_of_each_slot(plain: Any) -> None:
    engine = NativeLlama(plain, slots=2)
    a, b = tokens_for(plain, 200, 1), tokens_for(plain, 9, 2)
    rows = [(t, 1, at) for at, t in enumerate(b)] + [(t, 0, at) for at, t in enumerate(a)]
    logits = engine.forward(*zip(*rows, strict=True))
    alone = NativeLlama(plain)
    assert torch.equal(logits, torch.stack([alone.prefill(b), alone.prefill(a)]))
    assert engine.forward([1, 2], [0, 1], [200, 9], [False, False]).shape == (0, 257)


def test_rewinding_forgets(plain: Any) -> None:
    engine, tokens = NativeLlama(plain), tokens_for(plain, 200)
    expected = all_logits(engine, tokens)
    engine.prefill(tokens_for(plain, 300, 9))
    all_logits(engine, tokens[:150])  # from the start
    assert engine.length() == 150
    all_logits(engine, tokens_for(plain, 20, 8), start=130)
    assert torch.equal(all_logits(engine, tokens[130:], start=130), expected[130:])
    assert engine.length() == 200


def test_any_number_of_threads_gives_the_same_bits(wide: Any) -> None:
    tokens = tokens_for(wide, LONG)
    results = []
    for threads in (1, 2, 3):
        engine = NativeLlama(wide, threads=threads)
        prompt = all_logits(engine, tokens)
        results.append(torch.cat([prompt, torch.stack([engine.decode(token) for token in tokens[:10]])]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("kv_heads", [1, 2, 3])
def test_attention_is_shared_out_whatever_the_heads(make_llama: MakeLlama, kv_heads: int) -> None:
    sizes = {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": kv_heads}
    model = make_llama(None, num_hidden_layers=1, max_position_embeddings=512, **sizes)
    tokens, results = tokens_for(model, LONG), []
    for threads in (1, 2, 3, 5):
        engine = NativeLlama(model, threads=threads, slots=3)
        prompt = [all_logits(engine, tokens[slot:], slot) for slot in range(3)]
        together = engine.forward(tokens[:3], range(3), [LONG, LONG - 1, LONG - 2])
        results.append(torch.cat([*prompt, engine.decode(tokens[0])[None], together]))
    for result in results[1:]:
        assert torch.equal(results[0], result)


def test_a_path_is_no_model(tmp_path: Path) -> None:
    for path in (tmp_path, str(tmp_path)):
        with pytest.raises(TypeError, match=r"model must be a module, got .*; bitbell.load\(directory\) makes one"):
            NativeLlama(path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be a module, got None$"):
        why_not_native(None)  # type: ignore[arg-type]


def test_threads_are_those_of_the_kernels_unless_given(plain: Any) -> None:
    try:
        native.set_threads(2)
        engine = NativeLlama(plain)
        assert engine._threads() == 2
        assert NativeLlama(plain, threads=3)._threads() == 3
    finally:
        native.set_threads(None)
    assert engine._threads() == torch.get_num_threads()


def test_several_python_threads_may_call_at_once(packed: Any) -> None:
    """Some share an engine, by a slot each, others have their own."""
    prompts = [tokens_for(packed, 5 + n, n) for n in range(6)]
    expected = [NativeLlama(packed).generate(prompt, 40, temperature=1.0, seed=3) for prompt in prompts]
    shared = NativeLlama(packed, slots=3)
    engines = [(shared, 0), (shared, 1), (shared, 2), *((NativeLlama(packed, threads=2), 0) for _ in range(3))]

    def work(place: int) -> list[list[int]]:
        engine, slot = engines[place]
        return [engine.generate(prompts[place], 40, temperature=1.0, seed=3, slot=slot) for _ in range(10)]

    with ThreadPoolExecutor(6) as pool:
        for texts, truth in zip(pool.map(work, range(6)), expected, strict=True):
            assert texts == [truth] * 10


def test_the_engine_keeps_what_it_reads(make_llama: MakeLlama) -> None:
    model = bitbell.pack(make_llama({"*.v_proj": None, "*": "bbq-w2a2"}))
    tokens = tokens_for(model, 30)
    expected = all_logits(NativeLlama(model), tokens)
    engine = NativeLlama(model, slots=2)
    del model
    gc.collect()
    junk = [torch.full((size,), 7.0) for size in (64, 257, 4096, 64 * 257)] * 4
    assert torch.equal(all_logits(engine, tokens), expected)
    assert len(junk) == 16


# Text ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 5}])
def test_a_batch_is_its_texts_one_by_one(packed: Any, sampling: dict[str, Any]) -> None:
    engine, alone = NativeLlama(packed, slots=3), NativeLlama(packed)
    prompts = [tokens_for(packed, 1 + 7 * n % 20, n) for n in range(8)]
    seed = sampling.pop("seed", 0)

    def one_by_one(end: int | None) -> list[list[int]]:
        return [
            alone.generate(prompt, 20, seed=seed + place, end_token=end, **sampling)
            for place, prompt in enumerate(prompts)
        ]

    texts = one_by_one(None)
    assert [len(text) for text in texts] == [20] * 8
    assert engine.generate_batch(prompts, 20, seed=seed, **sampling) == texts
    end = texts[3][6]
    ended = one_by_one(end)
    assert min(map(len, ended)) < 20
    assert engine.generate_batch(prompts, 20, seed=seed, end_token=end, **sampling) == ended
    assert engine.generate_batch([], 20) == []


def test_an_end_token_ends_and_is_returned(plain: Any) -> None:
    engine = NativeLlama(plain)
    text = engine.generate([1, 2, 3], 20)
    end = text[9]
    assert engine.generate([1, 2, 3], 20, end_token=end) == text[: text.index(end) + 1]


def test_keep_goes_on_from_what_the_slot_holds(plain: Any) -> None:
    engine = NativeLlama(plain)
    text = engine.generate([1, 2, 3], 10)
    assert engine.length() == 3 + 9  # the last one is not fed back
    assert engine.generate([text[-1]], 5, keep=True) == engine.generate([1, 2, 3], 15)[10:]


def test_every_position_can_be_used(packed: Any) -> None:
    engine = NativeLlama(packed, positions=30)
    assert engine.generate([5] * 10, 21) == NativeLlama(packed).generate([5] * 10, 21)
    assert engine.generate_batch([[5] * 10], 21) == [engine.generate([5] * 10, 21)]


def test_on_token_sees_every_token_and_may_stop(plain: Any) -> None:
    engine, seen = NativeLlama(plain), list[int]()
    text = engine.generate([1, 2, 3], 20, on_token=seen.append)
    assert seen == text
    seen.clear()

    def until_four(token: int) -> bool:
        seen.append(token)
        return len(seen) < 4

    assert engine.generate([1, 2, 3], 20, on_token=until_four) == seen == text[:4]


def test_an_error_in_on_token_comes_out_and_does_no_harm(plain: Any) -> None:
    engine = NativeLlama(plain)

    def fail(token: int) -> None:
        raise KeyError(token)

    text = engine.generate([1, 2, 3], 5)
    with pytest.raises(KeyError, match=str(text[0])):
        engine.generate([1, 2, 3], 5, on_token=fail)
    assert engine.generate([1, 2, 3], 5) == text


def test_on_token_may_not_call_the_model_that_called_it(plain: Any) -> None:
    engine, other = NativeLlama(plain), NativeLlama(plain)
    calls: list[Callable[[int], Any]] = [
        lambda token: engine.length(),
        engine.decode,
        lambda token: engine.prefill([1]),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="on_token called the Llama that called it"):
            engine.generate([1, 2, 3], 5, on_token=call)
    with ThreadPoolExecutor(1) as pool:  # others wait, until it has ended
        waiting = list[Any]()
        text = engine.generate([1, 2, 3], 5, on_token=lambda token: waiting.append(pool.submit(engine.length)))
        assert [future.result() for future in waiting] == [7] * 5
    assert engine.generate([1, 2, 3], 5, on_token=lambda token: other.prefill([token])) is not None
    assert engine.generate([1, 2, 3], 5) == text


@pytest.fixture
def listens_to_ctrl_c() -> Iterator[None]:
    """Where the tests run in the background of a shell, they start deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listens_to_ctrl_c")
@pytest.mark.parametrize("prompt", [1, 8000])
def test_ctrl_c_stops(make_llama: MakeLlama, prompt: int) -> None:
    """While it makes tokens, and while it reads a long prompt."""
    model = make_llama(None, max_position_embeddings=100_000)
    engine = NativeLlama(model, positions=100_000)
    begun = time.monotonic()
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        engine.generate(tokens_for(model, prompt), 91_000)
    assert time.monotonic() - begun < 30  # of minutes
    assert 0 < engine.length() < 91_000
    assert len(engine.generate([1], 3)) == 3


def test_many_tokens_take_no_memory(packed: Any) -> None:
    engine = NativeLlama(packed, slots=2)

    def some(count: int) -> None:
        for n in range(count // 50):
            engine.generate([n % 257] * 10, 25, temperature=1.0, seed=n)
            engine.prefill([n % 257], slot=1)
            for token in range(24):
                engine.decode(token, slot=1)

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not Path("/proc/self/statm").exists():
        pytest.skip("memory is read from /proc")
    some(1000)
    before = resident()
    some(10_000)
    assert resident() - before < 5e6


# Sampling ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 20, 1.0), (1.3, 0, 0.8), (0.9, 30, 0.6), (2.0, 5, 0.95), (1.0, 0, 1e-6), (0.5, 1000, 1.0)],
)
def test_tokens_come_as_often_as_transformers_says(temperature: float, top_k: int, top_p: float) -> None:
    from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 2 * torch.randn(120, generator=torch.Generator().manual_seed(0))
    logits[7] = logits[9]
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    chances, draws, state = scores.softmax(-1)[0].double(), 8000, 2
    counts, row = [0] * 120, logits.numpy()
    for _ in range(draws):
        token, state = native.extension.sample(row, temperature, top_k, top_p, 0, state)
        counts[token] += 1
    seen = torch.tensor(counts, dtype=torch.float64)
    assert seen[chances == 0].sum() == 0
    often = chances * draws >= 5
    off = (seen - draws * chances)[often] / (draws * chances * (1 - chances))[often].sqrt().clamp_min(1e-9)
    assert float(off.abs().max()) < 4.5  # standard deviations
    assert float((off**2).mean()) < 1.6


def test_one_seed_gives_one_text_and_others_others(packed: Any) -> None:
    engine = NativeLlama(packed)
    texts = [engine.generate([1, 2], 20, temperature=1.0, seed=seed) for seed in (0, 0, 1, -1, 2**64 - 1, 2**70)]
    assert texts[0] == texts[1] == texts[5]  # of a seed, the 64 lowest bits count
    assert texts[3] == texts[4]
    assert len({tuple(text) for text in texts}) == 3


def test_choosing_among_one_token_is_greedy(packed: Any) -> None:
    engine = NativeLlama(packed)
    greedy = engine.generate([1, 2], 15)
    for how in ({"temperature": 3.0, "top_k": 1}, {"temperature": 1.0, "top_p": 1e-6}, {"temperature": 1e-300}):
        assert engine.generate([1, 2], 15, seed=4, **how) == greedy  # type: ignore[arg-type]


def test_only_allowed_tokens_are_chosen(packed: Any) -> None:
    engine = NativeLlama(packed)
    for how in ({}, {"temperature": 2.0}, {"temperature": 2.0, "top_k": 5, "top_p": 0.9}):
        assert max(engine.generate([1, 2], 40, allowed=50, **how)) < 50  # type: ignore[arg-type]
        assert max(engine.generate([1, 2], 40, **how)) >= 50  # type: ignore[arg-type]
        assert max(map(max, engine.generate_batch([[1, 2]], 40, allowed=50, **how))) < 50  # type: ignore[arg-type]
    logits = engine.prefill([1, 2])
    assert engine.generate([1, 2], 1, allowed=50) == [int(logits[:50].argmax())]


def test_nan_is_an_error_and_stays_in_its_sequence(make_llama: MakeLlama) -> None:
    model = bitbell.pack(make_llama("bbq-w2a2"))
    with torch.no_grad():
        model.model.model.embed_tokens.weight[7] = torch.nan
    engine = NativeLlama(model, slots=2)
    for how in ({}, {"temperature": 1.0}):
        with pytest.raises(RuntimeError, match="logits hold NaN or infinity after 3 tokens"):
            engine.generate([1, 2, 7], 5, **how)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="logits hold NaN or infinity after 3 tokens of prompt 1"):
            engine.generate_batch([[1, 2], [1, 2, 7]], 1, **how)  # type: ignore[arg-type]
    both = engine.forward([7, 3], [0, 1], [0, 0])
    assert both[0].isnan().any()
    assert torch.equal(both[1], NativeLlama(model).prefill([3]))


# What it refuses -----------------------------------------------------------------------------------------------------


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
REFUSED: dict[str, tuple[Callable[[MakeLlama], Any], str]] = {
    "not packed": (lambda make: make("bbq-w2a2"), "q_proj is a QuantLinear; pack the model first"),
    "looked-up inputs": (lambda make: bitbell.pack(make("nf-w4a4")), "q_proj is nf-w4a4, which the kernels have no"),
    "gelu": (lambda make: make(None, hidden_act="gelu"), "its activation is gelu, not silu"),
    "dynamic": (lambda make: make(None, rope_parameters=DYNAMIC), "its rotary embedding is 'dynamic', not one of"),
    "float64": (lambda make: make(None).double(), "is in torch.float64, not one of torch.float32, torch.bfloat16"),
    "no causal head": (lambda make: make(None).model, "this is a LlamaModel"),
    "no data": (lambda make: make(None).to("meta"), "the model is not on the CPU"),
}


def refuse(model: Any, reason: str) -> None:
    assert reason in (why_not_native(model) or "")
    with pytest.raises(ValueError, match="the native LLaMA cannot run this model: ") as caught:
        NativeLlama(model)
    assert reason in str(caught.value)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_it_cannot_run_is_refused_with_the_reason(make_llama: MakeLlama, kind: str) -> None:
    make, reason = REFUSED[kind]
    refuse(make(make_llama), reason)


def test_models_of_other_kinds_are_refused(gpt: Any, packed_gpt: Any) -> None:
    for model in (gpt, packed_gpt, packed_gpt.model):
        refuse(model, "it runs LlamaForCausalLM, and this is a GPT2LMHeadModel")


def test_without_kernels_it_refuses(packed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not_native(packed) is None
    monkeypatch.setenv(native.VARIABLE, native.REFERENCE)
    with native.using(native.REFERENCE):
        assert why_not_native(packed) == "no C++ kernels are in use (BITBELL_KERNELS=reference)"
        with pytest.raises(ValueError, match="no C"):
            NativeLlama(packed)


CONSTRUCTION: list[tuple[dict[str, Any], str]] = [
    ({"head_bits": 4}, "head_bits must be 8, 16, or None for the head as it is, got 4"),
    ({"positions": 0}, "positions must be 1 to the model's 64, got 0"),
    ({"positions": 65}, "positions must be 1 to the model's 64, got 65"),
    ({"slots": 0}, "slots must be at least 1, got 0"),
]


@pytest.mark.parametrize(("options", "message"), CONSTRUCTION, ids=[str(options) for options, _ in CONSTRUCTION])
def test_wrong_sizes_are_refused(packed: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        NativeLlama(packed, **options)
    assert message in str(caught.value)


Call = Callable[[NativeLlama], Any]
CALLS: dict[str, tuple[Call, str]] = {
    "token too large": (lambda e: e.forward([1, 257], [0, 0], [3, 4]), "tokens[1] = 257, must be 0 to 256"),
    "token below 0": (lambda e: e.decode(-1), "tokens[0] = -1, must be 0 to 256"),
    "slot too large": (lambda e: e.forward([1], [2], [0]), "slots[0] = 2, must be 0 to 1"),
    "slot below 0": (lambda e: e.forward([1], [-1], [0]), "slots[0] = -1, must be 0 to 1"),
    "position too large": (lambda e: e.forward([1], [0], [20]), "positions[0] = 20, must be 0 to 19"),
    "position below 0": (lambda e: e.forward([1], [0], [-1]), "positions[0] = -1, must be 0 to 19"),
    "gap": (lambda e: e.forward([1], [0], [5]), "positions[0] = 5, must be at most 3, the length of slot 0"),
    "position twice": (lambda e: e.forward([1, 2], [0, 0], [3, 3]), "positions[1] = 3, must be 4, the next of slot 0"),
    "lengths": (lambda e: e.forward([1, 2], [0], [3, 4]), "must be of one length, got 2, 1, 2"),
    "wants": (lambda e: e.forward([1], [0], [3], [True, True]), "must be of one length, got 1, 1, 1 and 2"),
    "full": (lambda e: [e.decode(1) for _ in range(18)], "positions[0] = 20, must be 0 to 19"),
    "long prompt": (lambda e: e.prefill([1] * 21), "positions[20] = 20, must be 0 to 19"),
    "empty prompt": (lambda e: e.prefill([]), "the prompt must have at least 1 token, got 0"),
    "length of a slot": (lambda e: e.length(2), "slot = 2, must be 0 to 1"),
    "text: slot": (lambda e: e.generate([1], 2, slot=2), "slot = 2, must be 0 to 1"),
    "text: token": (lambda e: e.generate([257], 2), "tokens = 257, must be 0 to 256"),
    "text: empty": (lambda e: e.generate([], 2), "tokens of the prompt = 0, must be 1 or more"),
    "text: none": (lambda e: e.generate([1], 0), "max_new_tokens = 0, must be 1 or more"),
    "text: room": (
        lambda e: e.generate([1] * 10, 12),
        "a prompt of 10 and max_new_tokens=12 exceed the 20 positions",
    ),
    "text: kept": (
        lambda e: e.generate([1] * 10, 9, keep=True),
        "3 tokens in the slot, a prompt of 10 and max_new_tokens=9 exceed the 20 positions",
    ),
    "temperature": (lambda e: e.generate([1], 2, temperature=-1.0), "temperature = -1, must be 0 (greedy) or more"),
    "top_k": (lambda e: e.generate([1], 2, top_k=-1), "top_k = -1, must be 0 (no cut) or more"),
    "top_p": (lambda e: e.generate([1], 2, top_p=0.0), "top_p = 0, must be above 0 and at most 1"),
    "allowed": (lambda e: e.generate([1], 2, allowed=258), "allowed = 258, must be 0 (all) to 257"),
    "batch: none": (lambda e: e.generate_batch([[1]], 0), "max_new_tokens must be at least 1, got 0"),
    "batch: empty": (lambda e: e.generate_batch([[1], []], 5), "must have 1 to 16 tokens"),
    "batch: room": (lambda e: e.generate_batch([[1] * 17], 5), "in 20 positions, got one of 17"),
    "batch: token": (lambda e: e.generate_batch([[300]], 5), "tokens[0] = 300, must be 0 to 256"),
    "batch: top_p": (lambda e: e.generate_batch([[1]], 5, top_p=2.0), "top_p = 2, must be above 0 and at most 1"),
}


@pytest.mark.parametrize("kind", CALLS)
def test_wrong_arguments_name_the_value_and_the_limit(packed: Any, kind: str) -> None:
    engine = NativeLlama(packed, slots=2, positions=20)
    engine.prefill([1, 2, 3])
    call, message = CALLS[kind]
    with pytest.raises(ValueError) as caught:
        call(engine)
    assert message in str(caught.value)


@pytest.mark.parametrize("threads", [0, -1, 257])
def test_wrong_threads_are_named(packed: Any, threads: int) -> None:
    with pytest.raises(ValueError, match=f"threads must be 1 to 256, or None, got {threads}"):
        NativeLlama(packed, threads=threads)
