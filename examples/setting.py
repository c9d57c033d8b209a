"""What every example starts from: a small LLaMA over bytes, and batches of the King James Bible that come with bitbell.

Your own model and data go in its place. An example runs in seconds on a CPU: `python examples/plain_loop.py`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bitbell.data.sources import open_corpus

LENGTH = 64  # tokens in a sequence


def small_llama(*, seed: int = 0, **fields: Any) -> LlamaForCausalLM:
    """A LLaMA of 100,000 weights in full precision; `fields` of its configuration differ from the example's."""
    sizes: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 2 * LENGTH}
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(sizes | heads | ends | fields), tie_word_embeddings=False))


@cache
def text() -> Tensor:
    """The first 300,000 bytes of the corpus, as token ids."""
    with open_corpus() as file:
        return torch.tensor(list(file.read(300_000).encode()))


def batch(step: int, size: int = 8) -> Tensor:
    """Token ids (size, LENGTH) of training step `step`, a function of its number."""
    starts = torch.randint(0, 250_000, (size,), generator=torch.Generator().manual_seed(step))
    return torch.stack([text()[start : start + LENGTH] for start in starts.tolist()])


@torch.no_grad()
def validation_loss(model: torch.nn.Module) -> float:
    """Mean loss, in nats a byte, on 32 sequences that no step sees."""
    was_training = model.training
    windows = text()[250_000:].unfold(0, LENGTH, 1500)[:32]
    loss = model.eval()(input_ids=windows, labels=windows).loss.item()
    model.train(was_training)
    return loss
