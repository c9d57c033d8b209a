"""Ctrl-C and SIGTERM between, before and after runs, which handle them on their own while they train."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from types import FrameType
from typing import Any


class StopSignals:
    """Inside a `with`, `received` tells whether Ctrl-C or SIGTERM came, even while training had handlers of its own; a
    second Ctrl-C interrupts at once."""

    def __enter__(self) -> StopSignals:
        self._seen, self._handled = False, False
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            # Python writes the number of every signal here, whichever handler is installed.
            self._numbers, self._writer = socket.socketpair()
            self._numbers.setblocking(False)
            self._writer.setblocking(False)
            self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._stop)
        return self

    @property
    def received(self) -> bool:
        """Whether one came since the `with` began."""
        if self._previous and not self._seen:
            with contextlib.suppress(BlockingIOError):
                self._seen = any(number in self._previous for number in self._numbers.recv(1024))
        return self._seen

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._handled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._handled = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._previous:
            signal.set_wakeup_fd(self._previous_fd)
            self._seen = self.received
            self._numbers.close()
            self._writer.close()
        self._previous = {}
