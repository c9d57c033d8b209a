"""A packed model -> tokens for others."""

from bitbell.serving.bench import Bench, bench
from bitbell.serving.engines import engine_for
from bitbell.serving.generate import Generation, generate, load_tokenizer_of
from bitbell.serving.native_llama import NativeLlama, why_not_native
from bitbell.serving.static import StaticDecoder, why_not_static

__all__ = [
    "Bench",
    "Generation",
    "NativeLlama",
    "StaticDecoder",
    "bench",
    "engine_for",
    "generate",
    "load_tokenizer_of",
    "why_not_native",
    "why_not_static",
]
