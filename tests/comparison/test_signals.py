"""Signals are noticed whoever handles them, and a second Ctrl-C does not wait."""

from __future__ import annotations

import os
import signal

import pytest

from bitbell.comparison.signals import StopSignals


def test_a_signal_is_noticed_whoever_handles_it() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        assert not signals.received
        ours = signal.signal(signal.SIGTERM, lambda *_: None)  # as training does while it runs
        os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGTERM, ours)
        assert signals.received
    assert signals.received
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_second_ctrl_c_does_not_wait() -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
