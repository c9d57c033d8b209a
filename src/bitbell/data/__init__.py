"""Text to batches: sources are tokenized once into flat shards, and training reads windows of them by step.

    sources --documents--> tokenization --tokens--> shards, directory --windows--> loader --batches-->

`tokenizers.py` turns text into token ids and back, `shuffle.py` holds the two pseudo-random functions that
the held-out split and the order of the batches come from. The names below are imported when they are first
used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitbell.data.loader import Batches, TokenDataset, windows
    from bitbell.data.sources import corpus_path, open_corpus
    from bitbell.data.tokenization import tokenize
    from bitbell.data.tokenizers import TextTokenizer, load_tokenizer

__all__ = [
    "Batches",
    "TextTokenizer",
    "TokenDataset",
    "corpus_path",
    "load_tokenizer",
    "open_corpus",
    "tokenize",
    "windows",
]

_HOMES = {
    "Batches": "loader",
    "TextTokenizer": "tokenizers",
    "TokenDataset": "loader",
    "corpus_path": "sources",
    "load_tokenizer": "tokenizers",
    "open_corpus": "sources",
    "tokenize": "tokenization",
    "windows": "loader",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
