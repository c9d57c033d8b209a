"""AdamW's parameter groups and the learning rate of each step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bitbell.layers import is_linear
from bitbell.quantizers import Quantizer
from bitbell.training.config import TrainConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: decayed (linear weights inside the blocks, LSQ's steps) and not decayed (everything else).

    Not decayed: embeddings, norms, biases, the output head, the scales of BBQ. The same split for full precision.
    Source: BBQ's published training code.
    """
    ask: Any = getattr(model, "get_output_embeddings", None)
    head = ask() if ask is not None else None
    decayed: dict[int, Tensor] = {}
    for module in model.modules():
        if is_linear(module) and module is not head:
            decayed[id(module.weight)] = module.weight  # type: ignore[assignment]
        if isinstance(module, Quantizer) and module.scale_decays and isinstance(module.scale, nn.Parameter):
            decayed[id(module.scale)] = module.scale
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            decayed.pop(id(module.weight), None)
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) not in decayed], "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, config: TrainConfig, learning_rate: float) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, in PyTorch's fused form. A group's "rate" is the factor of its learning rate.

    AdamW moves every parameter by about the learning rate, however small its gradient: too far, at the rates that
    suit weights, for a step size of 0.01. Hence a factor for what quantizers learn.
    """
    learned = {id(p) for module in model.modules() if isinstance(module, Quantizer) for p in module.parameters()}
    groups: list[dict[str, Any]] = []
    for group in parameter_groups(model, config.weight_decay):
        weights, scales = ([p for p in group["params"] if (id(p) in learned) is side] for side in (False, True))
        if config.scale_rate == 1 or not scales:
            groups.append(group | {"rate": 1.0})
        else:
            groups += [group | {"params": weights, "rate": 1.0}, group | {"params": scales, "rate": config.scale_rate}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(config.beta1, config.beta2), fused=True)


def learning_rate_at(step: int, *, steps: int, peak: float, warmup: float, final: float) -> float:
    """One-cycle cosine: peak/100 up to the peak over `warmup` of the steps, then down to `final` of it at the last
    step."""
    rising = round(warmup * steps)
    if step < rising:
        return _cosine(peak / 100, peak, step / rising)
    falling = steps - 1 - rising
    return _cosine(peak, peak * final, (step - rising) / falling if falling > 0 else 0.0)


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
