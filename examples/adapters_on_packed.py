"""Low-rank adapters (LoRA) on a frozen, packed base: the base stays in its 2 bits, gradients pass through it.

python examples/adapters_on_packed.py --steps 300
"""

import argparse
from collections.abc import Iterator

import torch
from setting import batch, small_llama, validation_loss
from torch import Tensor, nn

import bitbell
from bitbell.packing import PackedLinear
from bitbell.training import parameter_groups

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--recipe", default="bbq-w2a2")
parser.add_argument("--rank", type=int, default=4)
arguments = parser.parse_args()


class Adapted(nn.Module):
    """y = base(x) + x . down . up, with `up` zero at first, so that training starts from the base itself."""

    def __init__(self, base: PackedLinear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(base.in_features, rank) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(rank, base.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down @ self.up


def train(model: nn.Module, parameters: Iterator[nn.Parameter] | list[dict], steps: range) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=4e-3)
    model.train()
    for step in steps:
        tokens = batch(step)
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


model = bitbell.quantize(small_llama(), arguments.recipe)
bitbell.calibrate(model, batch(0))
train(model, parameter_groups(model, weight_decay=0.1), range(arguments.steps))

base = bitbell.pack(model).model  # in real life: bitbell.load(directory).model, or from_pretrained
before = validation_loss(base)
for name, layer in list(base.named_modules()):
    if isinstance(layer, PackedLinear):
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, Adapted(layer, arguments.rank))
assert validation_loss(base) == before
codes = {name: t.clone() for name, t in base.state_dict().items() if ".base." in name}

adapters = [parameter for parameter in base.parameters() if parameter.requires_grad]
train(base, iter(adapters), range(arguments.steps, 2 * arguments.steps))
print(f"{sum(p.numel() for p in adapters):,} trained numbers beside the packed ones: ", end="")
print(f"validation loss {before:.3f} -> {validation_loss(base):.3f}")
assert all(torch.equal(tensor, codes[name]) for name, tensor in base.state_dict().items() if name in codes)
