"""Gradient checkpointing: activations are computed again in the backward pass, and nothing else changes.

python examples/gradient_checkpointing.py
"""

import argparse

import torch
from setting import batch, small_llama

import bitbell
from bitbell.training import parameter_groups

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=5)
parser.add_argument("--recipe", default="bbq-w2a2")
arguments = parser.parse_args()


def train(checkpointing: bool) -> torch.nn.Module:
    model = small_llama(use_cache=False)
    bitbell.calibrate(bitbell.quantize(model, arguments.recipe), batch(0))
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=4e-3)
    model.train()
    for step in range(arguments.steps):
        model(batch(step), labels=batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


plain, checkpointed = train(False), train(True)
for name, tensor in plain.state_dict().items():  # weights, scales, and running statistics too
    assert torch.equal(tensor, checkpointed.state_dict()[name]), name
print(f"{arguments.steps} steps with and without checkpointing end with the same {len(plain.state_dict())} tensors")
