"""Statistics of a batch that several processes hold parts of.

A quantizer whose statistic is one of the whole tensor ("tensor", "running") sees only this process's share of the batch
under data parallelism. `Quantizer.ranks` says how many shares there are, and over which process group to reduce: then
forward pass, gradient and start value are those of the whole batch. Whoever splits the batch sets it; a quantizer knows
no more of it than this.

The reductions are PyTorch's functional collectives, which `torch.compile` traces, and so return new tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Ranks(NamedTuple):
    """Processes that hold equal shares of every batch.

    size: how many; a fraction where shares are not equal, as the rows of a weight need not be. group: name of the
    process group to reduce statistics over; None: each process goes by its own.
    """

    size: float = 1
    group: str | None = None


ALONE = Ranks()


def mean_over(x: Tensor, ranks: Ranks) -> Tensor:
    """The mean of `x` over the processes, on each of them; `x` itself without a group. Not differentiable."""
    return x if ranks.group is None else _all_reduce(x, "sum", ranks.group) / ranks.size


def largest_over(x: Tensor, ranks: Ranks) -> Tensor:
    """The largest of every element of `x` over the processes, infinity where any of them has NaN; `x` itself without a
    group. Not differentiable."""
    if ranks.group is None:
        return x
    # Backends differ in what the larger of NaN and a number is.
    return _all_reduce(x.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf), "max", ranks.group)


def _all_reduce(x: Tensor, operation: str, group: str) -> Tensor:
    reduced = torch.ops._c10d_functional.all_reduce(x.contiguous(), operation, group)
    return torch.ops._c10d_functional.wait_tensor(reduced)
