"""From a full-precision checkpoint to low bits: at once, or in stages such as 8 -> 4 -> 2 bits.

Each stage starts from the full-precision weights that the last one left, with new scales for its bits. docs/any-loop.md
says when fine-tuning pays, and has a table made by `--table`.

    python examples/fine_tune.py --method lsq --stages 8 4 2 --pretraining 400 --steps 100
"""

import argparse
import itertools

import torch
from setting import batch, small_llama, validation_loss
from torch import nn

import bitbell
from bitbell.training import parameter_groups

METHODS = ("bbq", "quest", "lsq")


def train(model: nn.Module, first: int, steps: int, rate: float) -> None:
    """`steps` steps from number `first` on, at a rate that falls to zero."""
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for step in range(first, first + steps):
        tokens = batch(step)
        model(tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def at_bits(model: nn.Module, recipe: str) -> nn.Module:
    """A new model with the full-precision weights of `model`, quantized by `recipe` and calibrated."""
    fresh = small_llama()
    state = model.state_dict()
    fresh.load_state_dict({name: state[name] for name in fresh.state_dict()})  # keys of weights stay what they were
    return bitbell.calibrate(bitbell.quantize(fresh, recipe), batch(-1))


def fine_tune(model: nn.Module, method: str, stages: list[int], first: int, steps: int, rate: float) -> list[float]:
    """Validation losses: after each stage's quantization, and after its share of the `steps`."""
    losses = []
    for number, bits in enumerate(stages):
        share = steps // len(stages)
        model = at_bits(model, f"{method}-w{bits}a{bits}")
        losses.append(validation_loss(model))
        train(model, first + number * share, share, rate)
        losses.append(validation_loss(model))
    return losses


def table(full: nn.Module, pretraining: int, steps: int, rate: float) -> None:
    """Every method: from scratch for all the steps, fine-tuned at once, fine-tuned in stages."""
    print("| method | bits | from scratch | full precision, quantized | fine-tuned | in stages 8, 4, 2 |")
    print("|---|---|---|---|---|---|")
    for method, bits in itertools.product(METHODS, (4, 2)):
        scratch = bitbell.calibrate(bitbell.quantize(small_llama(), f"{method}-w{bits}a{bits}"), batch(0))
        train(scratch, 0, pretraining + steps, 4e-3)
        at_once = fine_tune(full, method, [bits], pretraining, steps, rate)
        staged = fine_tune(full, method, [8, 4, 2][: 2 if bits == 4 else 3], pretraining, steps, rate)
        losses = (validation_loss(scratch), *at_once, staged[-1])
        print(f"| {method} | {bits} | " + " | ".join(f"{loss:.3f}" for loss in losses) + " |", flush=True)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--method", default="lsq", choices=METHODS)
parser.add_argument("--stages", type=int, nargs="+", default=[8, 4, 2])
parser.add_argument("--pretraining", type=int, default=20, help="steps in full precision, in place of your checkpoint")
parser.add_argument("--steps", type=int, default=12, help="steps of fine-tuning, over all stages")
parser.add_argument("--learning-rate", type=float, default=1e-3)
parser.add_argument("--table", action="store_true", help="every method, instead of one")
arguments = parser.parse_args()

full = small_llama()
train(full, 0, arguments.pretraining, 4e-3)
print(f"full precision: {validation_loss(full):.3f}")
if arguments.table:
    table(full, arguments.pretraining, arguments.steps, arguments.learning_rate)
else:
    losses = fine_tune(
        full, arguments.method, arguments.stages, arguments.pretraining, arguments.steps, arguments.learning_rate
    )
    for bits, (before, after) in zip(arguments.stages, zip(losses[::2], losses[1::2], strict=True), strict=True):
        print(f"{bits} bits: {before:.3f} as quantized, {after:.3f} after training")
