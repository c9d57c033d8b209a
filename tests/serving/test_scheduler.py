"""Texts share steps and do not notice; those who leave, time out or fail make room for the next."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from bitbell.data import TextTokenizer
from bitbell.kernels import native
from bitbell.serving import engine_for, generate
from bitbell.serving.engines import Engine, ModuleEngine, NativeEngine, Row, Sampling, _TorchSampler
from bitbell.serving.scheduler import Busy, Event, Job, Scheduler

PROMPTS = ["In the beginning", "a", "And God said, Let there be light: and", "xyz", "The LORD", "?"]


@contextmanager
def working(engine: Engine, tokenizer: TextTokenizer, **options: Any) -> Iterator[Scheduler]:
    made = Scheduler(engine, tokenizer, end_token=tokenizer.end_of_text, allowed=tokenizer.vocab_size, **options)
    made.start()
    try:
        yield made
    finally:
        made.stop()
        assert not made.alive


class Ask:
    """A job, and its events as they come."""

    def __init__(self, prompt: list[int], max_tokens: int = 8, **options: Any) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        sampling = options.pop("sampling", Sampling())
        self.job = Job(prompt, max_tokens, sampling, self.events.put, **options)

    def wait(self) -> tuple[str, Event]:
        """The whole text, and the last event."""
        text = ""
        while True:
            event = self.events.get(timeout=30)
            text += event.text
            if event.finish:
                return text, event


class Gated:
    """An engine without a model: says "aaa...", a step whenever the gate lets it."""

    name, slots, positions, chunks = "gated", 2, 64, True

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.steps: list[list[Row]] = []
        self.failing = False

    def run(self, rows: list[Row]) -> Tensor:
        self.gate.acquire()
        self.steps.append(rows)
        if self.failing:
            raise RuntimeError("out of order")
        logits = torch.zeros(sum(row.want for row in rows), 257)
        logits[:, ord("a")] = 1
        return logits

    def sampler(self, sampling: Sampling, allowed: int) -> Any:
        return _TorchSampler(sampling, allowed)

    def open(self) -> None:
        """Steps without end."""
        self.gate.release(10**6)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("model_name", ["packed", "packed_gpt", "gpt"])
@pytest.mark.parametrize("prefill_tokens", [3, 64])
def test_greedy_texts_are_those_of_generate(
    model_name: str, prefill_tokens: int, tokenizer: TextTokenizer, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(model_name)
    alone = [generate(model, tokenizer, p, max_new_tokens=20, temperature=0).text for p in PROMPTS]
    with working(engine_for(model, slots=3), tokenizer, prefill_tokens=prefill_tokens) as scheduler:
        asks = [Ask(tokenizer.encode(prompt), 20) for prompt in PROMPTS]
        scheduler.submit([ask.job for ask in asks])
        assert [ask.wait()[0] for ask in asks] == alone


@pytest.mark.skipif(native.extension is None, reason="installed without the C++ extension")
def test_drawn_texts_are_those_of_generate_with_the_same_seed(packed: Any, tokenizer: TextTokenizer) -> None:
    how: dict[str, Any] = {"temperature": 0.9, "top_k": 40, "top_p": 0.9}
    alone = [generate(packed, tokenizer, p, max_new_tokens=20, seed=i, **how).text for i, p in enumerate(PROMPTS)]
    assert len(set(alone)) == len(PROMPTS)
    with working(engine_for(packed, slots=4, native_step=True), tokenizer) as scheduler:
        asks = [Ask(tokenizer.encode(p), 20, sampling=Sampling(**how, seed=i)) for i, p in enumerate(PROMPTS)]
        scheduler.submit([ask.job for ask in asks])
        assert [ask.wait()[0] for ask in asks] == alone


def test_modules_draw_one_text_for_one_seed(packed_gpt: Any, tokenizer: TextTokenizer) -> None:
    with working(engine_for(packed_gpt), tokenizer) as scheduler:
        asks = [Ask(tokenizer.encode("In"), 20, sampling=Sampling(1.0, 50, 0.95, seed)) for seed in (1, 2, 1)]
        scheduler.submit([ask.job for ask in asks])
        one, other, again = (ask.wait()[0] for ask in asks)
    assert one == again != other


def test_engines_are_chosen_as_asked(packed: Any, packed_gpt: Any) -> None:
    assert isinstance(engine_for(packed, native_step=False), ModuleEngine)
    assert isinstance(engine_for(packed_gpt), ModuleEngine)
    if native.extension is not None:
        assert isinstance(engine_for(packed), NativeEngine)
    with pytest.raises(ValueError, match="GPT2LMHeadModel"):
        engine_for(packed_gpt, native_step=True)
    with pytest.raises(ValueError, match="head_bits=8 needs the C"):
        engine_for(packed_gpt, head_bits=8)
    with pytest.raises(ValueError, match="got Linear"):
        engine_for(torch.nn.Linear(2, 2), native_step=False)


def test_a_long_prompt_comes_in_parts_while_others_go_on(tokenizer: TextTokenizer) -> None:
    engine = Gated()
    with working(engine, tokenizer, prefill_tokens=4) as scheduler:
        running, long = Ask([1], 30), Ask(list(range(10)), 2)
        scheduler.submit([running.job])
        engine.gate.release()
        until(lambda: len(engine.steps) == 1)
        scheduler.submit([long.job])
        engine.open()
        assert long.wait()[1].tokens == 2
        assert running.wait()[1].finish == "length"
    parts = [[row.position for row in rows if row.slot == 1] for rows in engine.steps]
    assert [part for part in parts if part] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [10]]
    assert all(sum(row.slot == 0 for row in rows) == 1 for rows in engine.steps[:20])  # a token in every step


def test_the_queue_is_bounded_and_says_when_to_come_again(tokenizer: TextTokenizer) -> None:
    engine = Gated()
    with working(engine, tokenizer, max_waiting=1) as scheduler:
        asks = [Ask([1], 3) for _ in range(3)]
        scheduler.submit([ask.job for ask in asks])
        until(lambda: scheduler.running == 2)
        with pytest.raises(Busy, match="1 requests are waiting, allowed are 1") as raised:
            scheduler.submit([Ask([1]).job])
        assert 1 <= raised.value.retry_after <= 60
        engine.open()
        assert [ask.wait()[0] for ask in asks] == ["aaa"] * 3
        scheduler.submit([(last := Ask([1], 3)).job])
        assert last.wait()[0] == "aaa"


def test_who_leaves_frees_the_slot(tokenizer: TextTokenizer) -> None:
    engine = Gated()
    with working(engine, tokenizer) as scheduler:
        asks = [Ask([1], 50) for _ in range(4)]
        scheduler.submit([ask.job for ask in asks])
        until(lambda: scheduler.running == 2)
        for leaving in (asks[0], asks[3]):  # one runs, one waits
            scheduler.cancel(leaving.job)
        engine.gate.release(2)
        assert [asks[i].wait()[1].finish for i in (0, 3)] == ["cancelled"] * 2
        until(lambda: scheduler.running == 2 and scheduler.waiting == 0)
        engine.open()
        assert [asks[i].wait()[0] for i in (1, 2)] == ["a" * 50] * 2
        until(lambda: scheduler.running == 0)


def test_deadlines_hold_for_those_who_run_and_those_who_wait(tokenizer: TextTokenizer) -> None:
    engine = Gated()
    with working(engine, tokenizer) as scheduler:
        asks = [Ask([1], 50, deadline=time.monotonic() + 0.05) for _ in range(3)]
        scheduler.submit([ask.job for ask in asks])
        time.sleep(0.1)
        engine.open()
        assert [ask.wait()[1].finish for ask in asks] == ["timeout"] * 3


def test_a_step_that_fails_is_told_and_the_next_one_works(tokenizer: TextTokenizer) -> None:
    engine = Gated()
    engine.open()
    engine.failing = True
    with working(engine, tokenizer) as scheduler:
        scheduler.submit([(first := Ask([1])).job])
        end = first.wait()[1]
        assert (end.finish, end.error) == ("error", "the model failed: out of order")
        engine.failing = False
        scheduler.submit([(second := Ask([1], 3)).job])
        assert second.wait()[0] == "aaa"


def test_nan_is_an_error_and_no_text(make_llama: Callable[..., Any], tokenizer: TextTokenizer) -> None:
    model = make_llama(None)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    for native_step in (None, False):
        with working(engine_for(model, native_step=native_step), tokenizer) as scheduler:
            scheduler.submit([(ask := Ask([1])).job])
            text, end = ask.wait()
            assert (text, end.finish) == ("", "error")
            assert "NaN" in str(end.error)


def test_stop_strings_end_a_text(tokenizer: TextTokenizer) -> None:
    engine = Gated()
    engine.open()
    with working(engine, tokenizer) as scheduler:
        scheduler.submit([(ask := Ask([1], 30, stops=("aaa",))).job])
        text, end = ask.wait()
        assert (text, end.finish, end.tokens) == ("", "stop", 3)


def test_stopping_tells_everyone(tokenizer: TextTokenizer) -> None:
    engine = Gated()
    with working(engine, tokenizer) as scheduler:
        asks = [Ask([1], 60) for _ in range(4)]
        scheduler.submit([ask.job for ask in asks])
        until(lambda: scheduler.running == 2)
        threading.Timer(0.05, engine.gate.release).start()
    assert [ask.wait()[1].finish for ask in asks] == ["cancelled"] * 4
    with pytest.raises(RuntimeError, match="shutting down"):
        scheduler.submit([Ask([1]).job])


def test_what_the_model_has_no_room_for_is_refused(tokenizer: TextTokenizer) -> None:
    with working(Gated(), tokenizer) as scheduler:
        for prompt, count in (([], 4), ([1] * 61, 4), ([1], 0)):
            with pytest.raises(ValueError, match="64 at most together"):
                scheduler.submit([Ask(prompt, count).job])
    for name in ("max_waiting", "prefill_tokens"):
        with pytest.raises(ValueError, match=name):
            Scheduler(Gated(), tokenizer, end_token=None, allowed=257, **{name: -1})  # type: ignore[arg-type]
