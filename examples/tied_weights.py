"""Tied weights: one matrix for the embedding and the head, and one block that runs twice.

A tied head stays in full precision with its embedding. A block in two places is quantized once, trained by both, and
stored once.

    python examples/tied_weights.py --steps 300
"""

import argparse
import tempfile

import torch
from setting import batch, small_llama, validation_loss

import bitbell
from bitbell.training import parameter_groups

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--recipe", default="bbq-w2a2")
arguments = parser.parse_args()


def tied_llama(seed: int) -> torch.nn.Module:
    model = small_llama(seed=seed)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.layers[1].mlp = model.model.layers[0].mlp
    return model


model = bitbell.quantize(tied_llama(seed=0), arguments.recipe)
bitbell.calibrate(model, batch(0))
optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=4e-3)  # each parameter once

model.train()
for step in range(arguments.steps):
    tokens = batch(step)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"validation loss {validation_loss(model):.3f}")

folder = bitbell.pack(model).save(f"{tempfile.mkdtemp()}/packed")
loaded = bitbell.load(folder, model=tied_llama(seed=1))  # ties of your own: from an instance of your architecture
assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
assert loaded.model.model.layers[1].mlp is loaded.model.model.layers[0].mlp
print(bitbell.verify(model, loaded))
