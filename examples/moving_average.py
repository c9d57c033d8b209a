"""A moving average of weights (EMA), which is packed instead of the last weights.

Averaged are the full-precision weights and the scales; the average is quantized, not the other way round. Running
statistics are copied, since they are averages themselves.

    python examples/moving_average.py --steps 300
"""

import argparse

import torch
from setting import batch, small_llama, validation_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import bitbell
from bitbell.training import parameter_groups

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--recipe", default="bbq-w2a2")
parser.add_argument("--decay", type=float, default=0.9)
arguments = parser.parse_args()

model = bitbell.quantize(small_llama(), arguments.recipe)
bitbell.calibrate(model, batch(0))
average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(arguments.decay))  # after calibrating: it copies
optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=4e-3)

model.train()
for step in range(arguments.steps):
    tokens = batch(step)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    average.update_parameters(model)
print(f"validation loss {validation_loss(model):.3f}, of the average {validation_loss(average.module):.3f}")

print(bitbell.verify(average.module, bitbell.pack(average.module)))
