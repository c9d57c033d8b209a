"""Finding the first layer whose numbers are no longer finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bitbell.evaluation import logits_of
from bitbell.training.distributed import local_part

Agree = Callable[[int], int]  # of the places that several processes found, the earliest


class TrainingDiverged(RuntimeError):
    """Loss, gradients or weights are no longer finite; the message says at which step and where."""


@torch.no_grad()
def first_not_finite(model: nn.Module, tokens: Tensor, agree: Agree = int) -> str:
    """Where NaN or infinity first shows: a parameter, else the first module in a forward pass that puts it out.

    Several processes call it together, with their share of the batch and the way to `agree` on the earliest place.
    """
    names, values = zip(*model.named_parameters(), strict=True)
    if (place := agree(_first_bad(values))) < len(names):
        return f"the parameter {names[place]}"
    called: list[str] = []  # in order, the same on every process
    found: list[int] = []

    def after(name: str, out: Any) -> None:
        tensor = out[0] if isinstance(out, tuple) and out else out
        if not found and isinstance(tensor, Tensor) and tensor.is_floating_point() and not _is_finite(tensor):
            found.append(len(called))
        called.append(name)

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
    if (place := agree(found[0] if found else len(called))) < len(called):
        return f"the output of {called[place]}"
    return "the loss itself; weights and outputs are finite"


def first_bad_gradient(model: nn.Module, agree: Agree = int) -> str:
    """The first parameter with a gradient that is not finite."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    if (place := agree(_first_bad(p.grad for p in parameters))) < len(names):
        return f"the gradient of {names[place]}"
    return "the norm of all gradients; each one is finite"


def _first_bad(tensors: Iterable[Tensor | None]) -> int:
    """The index of the first tensor that is not finite as far as this process holds it, else their number."""
    place = -1
    for place, tensor in enumerate(tensors):
        if tensor is not None and not _is_finite(local_part(tensor)):
            return place
    return place + 1


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
