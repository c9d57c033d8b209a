"""Accelerate: the plain loop with `prepare`, and checkpoints that hold the scales.

python examples/accelerate_loop.py --steps 300        needs: pip install accelerate
"""

import argparse
import tempfile

import torch
from accelerate import Accelerator
from setting import batch, small_llama, validation_loss
from torch.utils.data import DataLoader

import bitbell
from bitbell.training import parameter_groups

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--recipe", default="bbq-w2a2")
arguments = parser.parse_args()

accelerator = Accelerator(cpu=True)
model = bitbell.quantize(small_llama(), arguments.recipe)
bitbell.calibrate(model, batch(0))  # before prepare, and the same on every process: its batch must be too
optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=4e-3, betas=(0.9, 0.95))
sequences = torch.cat([batch(step) for step in range(arguments.steps)])
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(sequences, batch_size=8))

model.train()
for step, tokens in enumerate(loader):
    if step == arguments.steps // 2:
        checkpoint = accelerator.save_state(tempfile.mkdtemp())
    loss = model(tokens, labels=tokens).loss
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
trained = accelerator.unwrap_model(model)
print(f"validation loss {validation_loss(trained):.3f}")

# From the checkpoint in the middle the same numbers come out.
ended = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
accelerator.load_state(checkpoint)
for tokens in accelerator.skip_first_batches(loader, arguments.steps // 2):
    accelerator.backward(model(tokens, labels=tokens).loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
assert all(map(torch.equal, ended.values(), trained.state_dict().values()))

print(bitbell.verify(trained, bitbell.pack(trained)))
