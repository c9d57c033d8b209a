"""A plain PyTorch loop in 2 bits: quantize, calibrate, train, save, load, pack, verify.

python examples/plain_loop.py --steps 300
"""

import argparse
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from setting import batch, small_llama, validation_loss

import bitbell
from bitbell.training import parameter_groups

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--recipe", default="bbq-w2a2")
arguments = parser.parse_args()

model = bitbell.quantize(small_llama(), arguments.recipe)  # before the optimizer: the scales are new parameters
bitbell.calibrate(model, batch(0))  # before the first forward pass
optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=4e-3, betas=(0.9, 0.95))
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)

model.train()
for step in range(arguments.steps):
    tokens = batch(step)
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
print(f"loss {loss.item():.3f} in training, {validation_loss(model):.3f} in validation")

# A state dict is all there is to save. To load one, quantize a fresh model by the same rules first.
folder = Path(tempfile.mkdtemp())
save_file(model.state_dict(), folder / "model.safetensors")
again = bitbell.quantize(small_llama(seed=1), arguments.recipe)
again.load_state_dict(load_file(folder / "model.safetensors"))
assert validation_loss(again) == validation_loss(model)

packed = bitbell.pack(model)
print(bitbell.verify(model, packed, batch(-1)))
print(packed.save(folder / "packed"))
