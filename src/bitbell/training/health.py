"""Finding the first layer whose numbers are no longer finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitbell.evaluation import logits_of


class TrainingDiverged(RuntimeError):
    """Loss, gradients or weights are no longer finite; the message says at which step and where."""


@torch.no_grad()
def first_not_finite(model: nn.Module, tokens: Tensor) -> str:
    """Where NaN or infinity first shows: a parameter, else the first module in a forward pass that puts it out."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return f"the parameter {name}"
    found: list[str] = []

    def after(name: str, out: Any) -> None:
        tensor = out[0] if isinstance(out, tuple) and out else out
        if (
            not found
            and isinstance(tensor, Tensor)
            and tensor.is_floating_point()
            and not bool(torch.isfinite(tensor).all())
        ):
            found.append(name)

    hooks = [
        module.register_forward_hook(lambda module, args, out, name=name: after(name, out))
        for name, module in model.named_modules()
        if name
    ]
    try:
        logits_of(model, tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return f"the output of {found[0]}" if found else "the loss itself; weights and outputs are finite"


def first_bad_gradient(model: nn.Module) -> str:
    """The first parameter with a gradient that is not finite."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return f"the gradient of {name}"
    return "the norm of all gradients; each one is finite"
