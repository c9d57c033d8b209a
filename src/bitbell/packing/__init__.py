"""A trained model -> few bytes, and back: packed layers, the packed directory, and the proof that nothing changed."""

from bitbell.packing.files import PackedFileError, save
from bitbell.packing.folding import fold
from bitbell.packing.layers import PackedLinear
from bitbell.packing.model import PackedModel, pack
from bitbell.packing.reading import load
from bitbell.packing.verify import Verification, VerificationError, verify

__all__ = [
    "PackedFileError",
    "PackedLinear",
    "PackedModel",
    "Verification",
    "VerificationError",
    "fold",
    "load",
    "pack",
    "save",
    "verify",
]
