"""A packed model -> tokens for others."""

from bitbell.serving.generate import Generation, generate, load_tokenizer_of

__all__ = ["Generation", "generate", "load_tokenizer_of"]
