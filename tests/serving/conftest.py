"""Tiny LLaMAs over the byte tokenizer: quantized, packed, in full precision."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import bitbell
from bitbell.data import TextTokenizer, load_tokenizer

MakeLlama = Callable[..., Any]


def llama(rules: Any, **fields: Any) -> Any:
    """rules: None leaves it in full precision. In evaluation mode; norms and biases are not what they start as."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 128}
    settings |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.1}
    settings |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "max_position_embeddings": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(LlamaConfig(**(settings | fields)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    parameter.add_(0.3 * torch.randn_like(parameter))
        if rules is not None:
            bitbell.quantize(model, rules)
            bitbell.calibrate(model, torch.randint(0, model.config.vocab_size, (4, 32)))
    return model.eval()


@pytest.fixture(scope="session")
def make_llama() -> MakeLlama:
    return llama


@pytest.fixture(scope="session")
def packed() -> Any:
    """Read only."""
    return bitbell.pack(llama("bbq-w2a2"))


@pytest.fixture(scope="session")
def gpt() -> Any:
    """A GPT-2 in full precision. Read only."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 257, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()


@pytest.fixture(scope="session")
def packed_gpt(gpt: Any) -> Any:
    """Read only."""
    model = bitbell.quantize(copy.deepcopy(gpt), "bbq-w2a2")
    bitbell.calibrate(model, torch.randint(0, 257, (4, 32), generator=torch.Generator().manual_seed(0)))
    return bitbell.pack(model)


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    return load_tokenizer("bytes")
