"""What a server counts, for Prometheus."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from bitbell.serving.scheduler import Event, Job, Scheduler

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counts of one server, in a registry of its own. It observes the scheduler; the server tells of its answers."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        labels = ["endpoint", "status"]
        self._answers = Counter("bitbell_requests", "Answered requests", labels, registry=registry)
        self._ends = Counter("bitbell_texts", "Texts that have ended", ["finish"], registry=registry)
        self._prompt = Counter("bitbell_prompt_tokens", "Tokens of prompts, run", registry=registry)
        self._new = Counter("bitbell_new_tokens", "Tokens made", registry=registry)
        self._steps = Histogram("bitbell_step_seconds", "A step", buckets=SECONDS, registry=registry)
        self._first = Histogram(
            "bitbell_first_token_seconds", "Until the first token", buckets=SECONDS, registry=registry
        )
        self._whole = Histogram("bitbell_text_seconds", "Until the last token", buckets=SECONDS, registry=registry)

    def watch(self, scheduler: Scheduler) -> None:
        """Show how many texts run and wait."""
        running = Gauge("bitbell_running", "Texts in a slot", registry=self.registry)
        waiting = Gauge("bitbell_waiting", "Texts that wait for a slot", registry=self.registry)
        running.set_function(lambda: scheduler.running)
        waiting.set_function(lambda: scheduler.waiting)

    def answered(self, endpoint: str, status: int) -> None:
        """A request has got its answer, or the answer's beginning."""
        self._answers.labels(endpoint, str(status)).inc()

    def stepped(self, seconds: float, decoded: int, prefilled: int) -> None:
        """A step of the model."""
        self._steps.observe(seconds)
        self._prompt.inc(prefilled)

    def ended(self, job: Job, event: Event) -> None:
        """A text has ended."""
        self._ends.labels(event.finish).inc()
        self._new.inc(event.tokens)
        if job.first_token is not None:
            self._first.observe(job.first_token - job.begun)
        if event.finish in ("stop", "length"):
            self._whole.observe(time.monotonic() - job.begun)

    def page(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
