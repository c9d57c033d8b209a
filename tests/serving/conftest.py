"""A tiny quantized LLaMA over the byte tokenizer, trained and packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import bitbell
from bitbell.data import TextTokenizer, load_tokenizer

MakeLlama = Callable[..., Any]


def llama(recipe: str, **fields: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 128}
    settings |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.1}
    settings |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "max_position_embeddings": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = bitbell.quantize(LlamaForCausalLM(LlamaConfig(**(settings | fields))), recipe)
        bitbell.calibrate(model, torch.randint(0, 257, (4, 32)))
    return model.eval()


@pytest.fixture(scope="session")
def make_llama() -> MakeLlama:
    return llama


@pytest.fixture(scope="session")
def packed() -> Any:
    """Read only."""
    return bitbell.pack(llama("bbq-w2a2"))


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    return load_tokenizer("bytes")
