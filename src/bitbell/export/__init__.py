"""Out of the house: what lets other libraries read what bitbell packs.

The names below are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitbell.export.cards import model_card
    from bitbell.export.compressed_tensors_directory import compressed_tensors
    from bitbell.export.gguf_file import gguf
    from bitbell.export.huggingface import BitbellConfig, BitbellQuantizer
    from bitbell.export.onnx_file import onnx

_HOMES = {"BitbellConfig": "huggingface", "BitbellQuantizer": "huggingface", "model_card": "cards"}
_HOMES |= {"compressed_tensors": "compressed_tensors_directory", "gguf": "gguf_file", "onnx": "onnx_file"}

__all__ = ["BitbellConfig", "BitbellQuantizer", "compressed_tensors", "gguf", "model_card", "onnx"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
