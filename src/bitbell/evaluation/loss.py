"""Loss of a causal language model on windows of tokens, and what follows from it.

Windows are fixed and every token is predicted from the tokens before it in its window, so the result does not depend
on how windows are grouped into batches (as long as the model itself does not: BBQ with a whole-tensor RMS does,
BBQ-Fast does not).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LanguageModelLoss:
    """loss: mean negative log likelihood of a token, nats. bits_per_byte: per UTF-8 byte of the text the tokens stand
    for."""

    loss: float
    tokens: int
    bytes_per_token: float

    @property
    def perplexity(self) -> float:
        return math.inf if self.loss >= 700 else math.exp(self.loss)  # exp overflows; NaN stays NaN

    @property
    def bits_per_byte(self) -> float:
        return self.loss / math.log(2) / self.bytes_per_token


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits (B, T, vocabulary) of token ids (B, T), or (B, classes) of images: a Hugging Face model's `.logits`, or
    what any other model returns."""
    extra: dict[str, Any] = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    out = model(tokens, **extra)
    return out.logits if hasattr(out, "logits") else out


@torch.no_grad()
def measure_loss(
    model: nn.Module,
    windows: Tensor,
    *,
    bytes_per_token: float,
    batch_size: int = 8,
    precision: torch.dtype = torch.float32,
) -> LanguageModelLoss:
    """Loss over `windows` (N, T + 1) of token ids: each window's first T tokens predict its last T.

    The model is put in evaluation mode for the while. precision: bfloat16 runs under autocast. Raises ValueError for
    no windows.
    """
    if windows.dim() != 2 or not windows.shape[0] or windows.shape[1] < 2:
        raise ValueError(f"windows must be (N, T + 1) with N and T at least 1, got {tuple(windows.shape)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    total = 0.0
    with evaluation_mode(model), autocast(model, precision):
        for batch in windows.split(batch_size):
            batch = batch.to(device_of(model))
            logits = logits_of(model, batch[:, :-1]).float()
            # Summing each window by itself keeps the sum independent of the batch size.
            losses = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            total += math.fsum(losses.view(len(batch), -1).double().sum(-1).tolist())
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    return LanguageModelLoss(total / tokens, tokens, bytes_per_token)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lives."""
    tensors: Iterable[Tensor] = (*model.parameters(), *model.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))


def autocast(model: nn.Module, precision: torch.dtype) -> Any:
    """Autocast to `precision` on the model's device, or nothing for float32."""
    return nullcontext() if precision == torch.float32 else torch.autocast(device_of(model).type, precision)


class evaluation_mode:
    """Put a model in evaluation mode inside a `with`, and back afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.training = {module: module.training for module in self.model.modules()}
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        for module, training in self.training.items():
            module.training = training
