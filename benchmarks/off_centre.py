"""Does full precision gain from the path that an off-centre grid adds?

    python benchmarks/off_centre.py --preset mini --data data/kjv --out results/off-centre-path --seeds 0 1 2

Moving a grid by d in the rotated domain adds d times sqrt(block) to the first channel of every block, since a rotated
constant is a spike there. So an off-centre BBQ layer is the centred one with both operands moved along
e = sqrt(block) (1, 0, ..., 0 | 1, 0, ... | ...): nothing else. Here plain linear layers get the same:

    y = (x + dx e) (w + dw e)^T        dw: one a row, dx: one, learned as BBQ's scales are, or fixed

starting at BBQ's own size, 1.694 RMS / 8 of weight and input. "weights" moves only w, which lets every output read the
sum of the blocks' first channels; "inputs" moves only x, which adds a bias to each output that its weights can change.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitbell.training.loop as loop
from bitbell.data import Batches, TokenDataset
from bitbell.kernels import ROTATION_BLOCK
from bitbell.quantizers.steps import BELL_SCALE, scale_gradient
from bitbell.training import TrainConfig, train
from bitbell.training.run import build_run_model

# variant -> does the weight move, does the input move, are the moves learned
VARIANTS = {
    "none": (False, False, False),
    "both": (True, True, True),
    "weights": (True, False, True),
    "inputs": (False, True, True),
    "both-fixed": (True, True, False),
}


class MovedLinear(nn.Linear):
    """A linear layer whose weight and input are moved along e."""

    @classmethod
    def around(cls, linear: nn.Linear, input_rms: float, share: float, variant: str) -> MovedLinear:
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        moves_weight, moves_input, learned = VARIANTS[variant]
        unit = BELL_SCALE * share
        dw = unit * float(linear.weight.detach().square().mean().sqrt()) * moves_weight
        layer.dw = nn.Parameter(torch.full((linear.out_features, 1), dw), requires_grad=learned and moves_weight)
        layer.dx = nn.Parameter(torch.full((1,), unit * input_rms * moves_input), requires_grad=learned and moves_input)
        e = torch.zeros(linear.in_features)
        e[::ROTATION_BLOCK] = math.sqrt(ROTATION_BLOCK)
        layer.register_buffer("e", e, persistent=False)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        e: Any = self.e
        dw = scale_gradient(self.dw, self.weight.numel() ** -0.5)
        dx = scale_gradient(self.dx, x.numel() ** -0.5)
        return F.linear(x + (dx * e).to(x.dtype), self.weight + dw * e, self.bias)


def with_path(data: Path, variant: str, share: float) -> Callable[[TrainConfig, Mapping[str, Any]], nn.Module]:
    """`build_run_model`, with the linear layers inside the blocks moved."""

    def build(config: TrainConfig, facts: Mapping[str, Any]) -> nn.Module:
        model = build_run_model(config, facts)
        if variant == "none":
            return model
        batches = Batches(
            TokenDataset.open(data),
            "train",
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
            seed=config.seed,
        )
        sizes = input_sizes(model, batches.batch(0)[:, :-1])
        for name, size in sizes.items():
            parent, _, child = name.rpartition(".")
            linear: Any = model.get_submodule(name)
            setattr(model.get_submodule(parent), child, MovedLinear.around(linear, size, share, variant))
        return model

    return build


@torch.no_grad()
def input_sizes(model: nn.Module, tokens: Tensor) -> dict[str, float]:
    """RMS of the input of every linear layer inside the blocks."""
    sizes: dict[str, float] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: sizes.__setitem__(name, float(args[0].square().mean().sqrt()))
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/kjv"))
    parser.add_argument("--out", type=Path, default=Path("results/off-centre-path"))
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--share", type=float, default=1 / 8, help="size of the move, in units of 1.694 RMS")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[2e-3])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, nargs=2, default=[8, 256], help="sequences and tokens in each")
    args = parser.parse_args()
    print("| path | rate | loss | spread | seeds |\n|---|---|---|---|---|")
    for variant in args.variants:
        for rate in args.learning_rates:
            losses = []
            for seed in args.seeds:
                config = TrainConfig(
                    data=str(args.data),
                    out=str(args.out / f"{variant}-{args.share:g}-lr{rate:g}-seed{seed}"),
                    recipe="none",
                    preset=args.preset,
                    seed=seed,
                    learning_rate=rate,
                    steps=args.steps,
                    batch_size=args.batch[0],
                    sequence_length=args.batch[1],
                    threads=1,
                    evaluate_every=args.steps,
                    checkpoint_every=args.steps,
                    tensorboard=False,
                )
                loop.build_run_model = with_path(args.data, variant, args.share)
                losses.append(train(config).summary["loss"])
            spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
            print(
                f"| {variant} | {rate:g} | {statistics.mean(losses):.4f} | {spread:.4f} | {len(losses)} |", flush=True
            )
            (args.out / "losses.jsonl").open("a").write(
                json.dumps({"variant": variant, "share": args.share, "rate": rate, "losses": losses}) + "\n"
            )


if __name__ == "__main__":
    main()
