"""torch.compile: the whole model without a graph break.

python examples/compiled.py --backend inductor --steps 100        inductor needs a C++ compiler on CPUs
"""

import argparse
import time

import torch
from setting import batch, small_llama, validation_loss

import bitbell
from bitbell.training import parameter_groups

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--recipe", default="bbq-w2a2")
parser.add_argument("--backend", default="inductor", help="aot_eager traces everything and generates no code")
arguments = parser.parse_args()

model = bitbell.quantize(small_llama(use_cache=False, num_hidden_layers=1), arguments.recipe)
bitbell.calibrate(model, batch(0))  # before compiling: what has no scale is an error only outside of a graph
optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=4e-3)
compiled = torch.compile(model, backend=arguments.backend, fullgraph=True)

model.train()
for step in range(arguments.steps):
    begun = time.perf_counter()
    tokens = batch(step)
    loss = compiled(tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in (0, arguments.steps - 1):
        print(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - begun:.3f} s")
print(f"validation loss {validation_loss(model):.3f}")

# `model` is the module that was compiled; its state has the plain names, and pack takes either.
print(bitbell.verify(model, bitbell.pack(compiled)))
