"""One call from a model and a token data set to every number of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bitbell.evaluation.codes import LayerCodes, layer_codes
from bitbell.evaluation.loss import LanguageModelLoss, measure_loss

if TYPE_CHECKING:
    from bitbell.data import TokenDataset


@dataclass(frozen=True)
class Evaluation:
    """loss in nats a token; entropies in bits, unweighted means over layers, None for a full-precision model."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    weight_entropy: float | None
    activation_entropy: float | None
    layers: tuple[LayerCodes, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON of every field."""
        return dataclasses.asdict(self)


def evaluate(
    model: nn.Module,
    dataset: TokenDataset,
    *,
    sequence_length: int,
    split: str = "valid",
    limit: int | None = None,
    batch_size: int = 8,
    precision: torch.dtype = torch.float32,
    measured: LanguageModelLoss | None = None,
    code_windows: int | None = None,
) -> Evaluation:
    """Evaluate a full-precision, quantized or packed causal language model on a split of a token data set.

    limit: number of windows at most (None: all). measured: the loss, where it is known already. Activation entropies
    come from the first `code_windows`, by default those of four batches. Raises
    ValueError where the split is shorter than a sequence, the sequence longer than the model's positions, or the
    model's vocabulary smaller than the data's.
    """
    from bitbell.data import windows

    data = windows(dataset, split, sequence_length=sequence_length, limit=limit)
    config = getattr(model, "config", None)
    positions, vocabulary = (getattr(config, name, None) for name in ("max_position_embeddings", "vocab_size"))
    if positions is not None and positions < sequence_length:
        raise ValueError(f"sequence_length must be at most the model's {positions} positions, got {sequence_length}")
    if vocabulary is not None and vocabulary < dataset.vocab_size:
        raise ValueError(
            f"the data's tokens go up to {dataset.vocab_size - 1}, the model's vocabulary has only {vocabulary}"
        )
    bytes_per_token = dataset.num_bytes(split) / dataset.num_tokens(split)
    measured = measured or measure_loss(
        model, data, bytes_per_token=bytes_per_token, batch_size=batch_size, precision=precision
    )
    layers = layer_codes(model, data[: code_windows or 4 * batch_size, :-1].split(batch_size))
    return Evaluation(
        loss=measured.loss,
        perplexity=measured.perplexity,
        bits_per_byte=measured.bits_per_byte,
        tokens=measured.tokens,
        weight_entropy=_mean([row.weight_entropy for row in layers]),
        activation_entropy=_mean([row.activation_entropy for row in layers if row.activation_entropy is not None]),
        layers=tuple(layers),
    )


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
