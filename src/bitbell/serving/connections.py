"""Connections that cannot use the server up: one that sends nothing is closed, sooner where there are many."""

from __future__ import annotations

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

RESERVED_FILES = 64  # descriptors that are for no connection: the model's files, logs, the loop's own
MOST = 10_000  # connections, however many descriptors there are


class Connection(H11Protocol):
    """uvicorn's connection, with a time limit for the head of a request and a bound on their number.

    uvicorn limits how long a connection rests between requests, not how long its first request, or half a head, may
    take. With as many connections as `most`, the one that has waited longest without a request makes room; where all
    of them have one, the newcomer is closed.
    """

    head_timeout = 30.0  # seconds
    most = MOST
    waiting: dict[Connection, None]  # those without a request, the longest wait first; one dict for a server

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            longest = next(iter(self.waiting), self)
            longest.transport.close()
            if longest is self:
                return
            self.waiting.pop(longest)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._is_free():
            self._stop_waiting()
        elif self._limit is None:  # the beginning of another head
            self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_free() and not self.transport.is_closing():  # for a head, or the rest of a body that nobody wants
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _is_free(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _wait(self) -> None:
        self.waiting[self] = None
        self._limit = self.loop.call_later(self.head_timeout, self.transport.close)

    def _stop_waiting(self) -> None:
        self.waiting.pop(self, None)
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None


def connections(*, head_timeout: float = 30.0, most: int | None = None) -> type[Connection]:
    """The class of a server's connections. head_timeout: seconds for a request's head. most: at a time; by default what
    the limit of open files allows, up to 10,000."""
    if not head_timeout > 0 or (most is not None and most < 1):
        raise ValueError(f"head_timeout must be above 0 and most at least 1, got {head_timeout} and {most}")
    most = min(MOST, open_files() - RESERVED_FILES) if most is None else most
    return type("Connection", (Connection,), {"head_timeout": head_timeout, "most": max(most, 1), "waiting": {}})


def open_files() -> int:
    """How many files this process may have open, after asking for as many as it may ask for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST + RESERVED_FILES
    most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    return wanted if soft == resource.RLIM_INFINITY else soft
