"""Text, or images, to batches: sources are tokenized once into flat shards, and training reads windows of them by step.

    sources --documents--> tokenization --tokens--> shards, directory --windows--> loader --batches-->

`tokenizers.py` turns text into token ids and back, `shuffle.py` holds the two pseudo-random functions that
the held-out split and the order of the batches come from. The names below are imported when they are first
used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitbell.data.image_batches import ImageBatches
    from bitbell.data.image_directory import ImageDataset, is_image_set
    from bitbell.data.image_preparation import prepare_images
    from bitbell.data.loader import Batches, TokenDataset, windows
    from bitbell.data.sources import corpus_path, open_corpus
    from bitbell.data.tokenization import tokenize
    from bitbell.data.tokenizers import TextTokenizer, load_tokenizer

__all__ = [
    "Batches",
    "ImageBatches",
    "ImageDataset",
    "TextTokenizer",
    "TokenDataset",
    "corpus_path",
    "is_image_set",
    "load_tokenizer",
    "open_corpus",
    "prepare_images",
    "tokenize",
    "windows",
]

_HOMES = {
    "Batches": "loader",
    "ImageBatches": "image_batches",
    "ImageDataset": "image_directory",
    "TextTokenizer": "tokenizers",
    "TokenDataset": "loader",
    "corpus_path": "sources",
    "is_image_set": "image_directory",
    "load_tokenizer": "tokenizers",
    "open_corpus": "sources",
    "prepare_images": "image_preparation",
    "tokenize": "tokenization",
    "windows": "loader",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
