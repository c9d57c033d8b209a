"""A tiny LLaMA for any recipe, and windows of token ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bitbell


@pytest.fixture(autouse=True)
def compare_bits(reference_kernels: None) -> None:
    """Trained and packed models are compared bit by bit here."""


MakeLlama = Callable[..., Any]


def llama(recipe: Any = None, **fields: Any) -> Any:
    """Two layers over a vocabulary of 300; quantized and calibrated if there is a recipe, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128}
    settings |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.1}
    settings |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "max_position_embeddings": 128}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(LlamaConfig(**(settings | fields)))
        if recipe is not None:
            bitbell.quantize(model, recipe)
            bitbell.calibrate(model, torch.randint(0, model.config.vocab_size, (4, 32)))
    return model.eval()


@pytest.fixture(scope="session")
def make_llama() -> MakeLlama:
    return llama


@pytest.fixture(scope="session")
def ids() -> Tensor:
    """Seven windows of 17 token ids."""
    return torch.randint(0, 300, (7, 17), generator=torch.Generator().manual_seed(5))
