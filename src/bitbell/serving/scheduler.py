"""Continuous batching: one thread owns the model, and every step serves all who are there.

A step is one call of the engine: a token of every running text, and a part of the prompts that have just come in, so
that a long prompt does not hold up the running texts. Texts enter and leave between steps.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from bitbell.serving.engines import Engine, Row, Sampler, Sampling
from bitbell.serving.text_stream import Decoder, TextStream

logger = logging.getLogger(__name__)
STOPPING = "the server is shutting down"


@dataclass(frozen=True)
class Event:
    """Text that follows what came before. The last one has a finish: stop, length, cancelled, timeout or error.

    tokens: made so far, the end token included.
    """

    text: str
    tokens: int
    finish: str | None = None
    error: str | None = None


@dataclass(eq=False)
class Job:
    """A text to make. prompt: token ids. deadline: on the clock of `time.monotonic`. listener: is told every event, by
    the scheduler's thread, and must not wait."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    listener: Callable[[Event], None]
    stops: tuple[str, ...] = ()
    deadline: float = math.inf
    begun: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    cancelled: bool = False


class Observer(Protocol):
    """What a scheduler tells of its work (metrics)."""

    def stepped(self, seconds: float, decoded: int, prefilled: int) -> None:
        """A step was made."""

    def ended(self, job: Job, event: Event) -> None:
        """A text has ended, one way or another."""


class Busy(RuntimeError):
    """The queue is full. retry_after: seconds after which there may be room."""

    def __init__(self, waiting: int, limit: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting, allowed are {limit}; try again in {retry_after} s")
        self.retry_after = retry_after


class _Running:
    """A job in a slot: how much of its prompt the model has seen, and what it has said."""

    def __init__(self, job: Job, sampler: Sampler, decoder: Decoder) -> None:
        self.job, self.sampler, self.text = job, sampler, TextStream(decoder, job.stops)
        self.seen = self.made = self.last = 0
        self.begun = time.monotonic()

    def take(self, slot: int, budget: int) -> list[Row]:
        """The rows of the next step: the last token, or as much of the prompt as the budget allows."""
        prompt = self.job.prompt
        if self.made:
            return [Row(self.last, slot, len(prompt) + self.made - 1, True)]
        end = min(self.seen + budget, len(prompt))
        rows = [Row(prompt[i], slot, i, i == len(prompt) - 1) for i in range(self.seen, end)]
        self.seen = end
        return rows


class Scheduler:
    """Runs jobs on an engine, first come first served.

    end_token ends a text and is no part of it; allowed: only tokens below it are chosen. max_waiting: jobs that may
    wait for a slot. prefill_tokens: of prompts in a step (engines that take prompts in parts).
    """

    def __init__(
        self,
        engine: Engine,
        decoder: Decoder,
        *,
        end_token: int | None,
        allowed: int,
        max_waiting: int = 64,
        prefill_tokens: int = 64,
        observer: Observer | None = None,
    ) -> None:
        if max_waiting < 0:
            raise ValueError(f"max_waiting must be 0 or more, got {max_waiting}")
        if prefill_tokens < 1:
            raise ValueError(f"prefill_tokens must be at least 1, got {prefill_tokens}")
        self.engine, self.max_waiting, self.observer = engine, max_waiting, observer
        self._decoder, self._end_token, self._allowed = decoder, end_token, allowed
        self._prefill_tokens = prefill_tokens if engine.chunks else engine.positions
        self._waiting: deque[Job] = deque()
        self._running: dict[int, _Running] = {}  # in the order of their coming
        self._wake = threading.Condition()
        self._stopping = False
        self._mean_seconds = 1.0  # that a text holds its slot, over the last ten or so
        self._thread = threading.Thread(target=self._work, name="bitbell-scheduler", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """End every job as cancelled, and the thread; after `start`, from any other thread, once or more."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread works."""
        return self._thread.is_alive() and not self._stopping

    @property
    def running(self) -> int:
        """How many texts have a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many jobs have none yet."""
        return len(self._waiting)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all of the jobs, or none. Raises Busy where too many would wait, RuntimeError after `stop`, and
        ValueError for a job that the model has no room for."""
        for job in jobs:
            room = self.engine.positions - len(job.prompt)
            if not job.prompt or not 1 <= job.max_tokens <= room:
                raise ValueError(
                    f"the prompt's {len(job.prompt)} tokens and max_tokens={job.max_tokens} must be at least 1 each, "
                    f"and {self.engine.positions} at most together"
                )
        with self._wake:
            if self._stopping:
                raise RuntimeError(STOPPING)
            free = self.engine.slots - len(self._running)
            if len(self._waiting) + len(jobs) > self.max_waiting + free:
                seconds = math.ceil(self._mean_seconds * (len(self._waiting) + 1) / self.engine.slots)
                raise Busy(len(self._waiting), self.max_waiting, min(max(seconds, 1), 60))
            self._waiting.extend(jobs)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """End a job before the next step; one that has ended already is left alone."""
        job.cancelled = True

    def _work(self) -> None:
        while True:
            with self._wake:
                while not (self._stopping or self._waiting or self._running):
                    self._wake.wait()
                if self._stopping:
                    break
                gone = [job for job in self._waiting if _why_over(job)]
                for job in gone:
                    self._waiting.remove(job)
            for job in gone:
                self._tell_end(job, Event("", 0, _why_over(job)))
            for slot, text in list(self._running.items()):
                if why := _why_over(text.job):
                    self._end(slot, why)
            self._admit()
            if self._running:
                self._step()
        for job in [*self._waiting, *(text.job for text in self._running.values())]:
            self._tell_end(job, Event("", 0, "cancelled", STOPPING))
        self._waiting.clear()
        self._running.clear()

    def _admit(self) -> None:
        with self._wake:
            for slot in range(self.engine.slots):
                if self._waiting and slot not in self._running:
                    job = self._waiting.popleft()
                    sampler = self.engine.sampler(job.sampling, self._allowed)
                    self._running[slot] = _Running(job, sampler, self._decoder)

    def _step(self) -> None:
        """One call of the engine, and what follows from it for everyone who had a row in it."""
        rows, asked, prefilled = list[Row](), list[int](), 0
        for slot, text in self._running.items():
            budget = self._prefill_tokens - prefilled
            if not text.made and budget == 0:
                continue
            new = text.take(slot, budget)
            prefilled += 0 if text.made else len(new)
            rows += new
            asked += [slot] if new[-1].want else []
        begun = time.monotonic()
        try:
            logits = self.engine.run(rows)
        except Exception as error:  # whatever it was, those who wait must hear of it, and the next ones be served
            logger.exception("a step of the model failed")
            for slot in list(self._running):
                self._end(slot, "error", f"the model failed: {error}")
            return
        for slot, values in zip(asked, logits, strict=True):
            self._hear(slot, self._running[slot].sampler.choose(values))
        if self.observer is not None:
            self.observer.stepped(time.monotonic() - begun, len(rows) - prefilled, prefilled)

    def _hear(self, slot: int, token: int) -> None:
        """A token for the text in a slot."""
        text = self._running[slot]
        if token < 0:
            self._end(slot, "error", f"logits hold NaN or infinity after {text.made} new tokens")
            return
        text.made, text.last = text.made + 1, token
        if text.job.first_token is None:
            text.job.first_token = time.monotonic()
        if token == self._end_token:
            self._end(slot, "stop")
            return
        piece = text.text.add(token)
        if text.text.stopped:
            self._end(slot, "stop", piece=piece)
        elif text.made == text.job.max_tokens:
            self._end(slot, "length", piece=piece)
        elif piece:
            self._tell(text.job, Event(piece, text.made))

    def _end(self, slot: int, finish: str, error: str | None = None, piece: str = "") -> None:
        text = self._running.pop(slot)
        piece += text.text.end()
        finish = "stop" if text.text.stopped and finish == "length" else finish  # the end may complete a stop string
        self._mean_seconds += 0.1 * (time.monotonic() - text.begun - self._mean_seconds)
        self._tell_end(text.job, Event(piece, text.made, finish, error))

    def _tell_end(self, job: Job, event: Event) -> None:
        self._tell(job, event)
        if self.observer is not None:
            self.observer.ended(job, event)

    def _tell(self, job: Job, event: Event) -> None:
        try:
            job.listener(event)
        except Exception:  # one who cannot listen must not stop the others
            logger.exception("a listener failed")
            job.cancelled = True


def _why_over(job: Job) -> str | None:
    if job.cancelled:
        return "cancelled"
    return "timeout" if time.monotonic() > job.deadline else None
