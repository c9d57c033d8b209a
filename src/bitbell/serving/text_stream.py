"""Tokens to text, piece by piece: no character is torn apart, and nothing of a stop string gets out."""

from __future__ import annotations

from typing import Protocol

UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no character (yet)


class Decoder(Protocol):
    """The part of a tokenizer that a stream needs."""

    def decode(self, ids: list[int], /) -> str:
        """The text of the ids."""
        ...


class TextStream:
    """The text of one sequence. `add` takes a token and returns the text that is certain by now; `end` the rest.

    Text is held back while it may be the beginning of a stop string, or of a character whose other bytes are to come.
    stopped: a stop string has appeared; the text ends before it.
    """

    def __init__(self, decoder: Decoder, stops: tuple[str, ...] = ()) -> None:
        self._decoder, self._stops = decoder, stops
        self._ids: list[int] = []
        self._from = self._read = 0  # ids[from:read] are known text, decoded again since a decoder may look back
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """One more token; the text to hand out."""
        self._ids.append(token)
        text = self._fresh()
        if not text or text.endswith(UNFINISHED):
            return ""
        self._from, self._read = self._read, len(self._ids)
        return self._release(text, final=False)

    def end(self) -> str:
        """What was held back, when no more tokens come."""
        if self.stopped:
            return ""
        text = self._fresh()
        self._from, self._read = self._read, len(self._ids)
        return self._release(text, final=True)

    def _fresh(self) -> str:
        known = self._decoder.decode(self._ids[self._from : self._read])
        return self._decoder.decode(self._ids[self._from :])[len(known) :]

    def _release(self, text: str, final: bool) -> str:
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stops), default=0)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
