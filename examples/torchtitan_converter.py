"""torchtitan: its converter hook makes the linear layers of its debug model bitbell's, trained here by a plain loop.

torchtitan's own Trainer wants a GPU, so this takes its model and its optimizer container only, and attention that runs
on CPUs. docs/any-loop.md shows the Trainer's configuration, which has not been run.

    python examples/torchtitan_converter.py        needs: pip install torchtitan==0.3.0
"""

import argparse
import tempfile

import torch.nn.functional as F
from setting import batch
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention
from torchtitan.models.llama3 import model_registry

import bitbell
from bitbell.training.torchtitan import (
    BitbellConverter,
    calibrated_model,
    for_packing,
    parameter_group_configs,
    write_first_checkpoint,
)

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=20)
arguments = parser.parse_args()

rules = {"lm_head": None, "*.feed_forward.*": "bbq-w2a4", "*": "bbq-w2a2"}
spec = model_registry("debugmodel", converters=[BitbellConverter.Config(rules=rules)])
configuration = spec.model
for _, _, parent, name in list(configuration.traverse(FlexAttention.Config)):
    setattr(parent, name, ScaledDotProductAttention.Config())
del configuration.layers[2:]  # a smaller debug model

model = calibrated_model(configuration, batch(0))
print(write_first_checkpoint(model, tempfile.mkdtemp()), "is for the Trainer's checkpoint.initial_load_path")
groups = parameter_group_configs(learning_rate=4e-3)
optimizers = OptimizersContainer.Config(param_groups=groups, implementation="foreach").build(model_parts=[model])

model.train()
losses = []
for step in range(arguments.steps):
    tokens = batch(step)
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    optimizers.step()
    optimizers.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

trained = for_packing(model.eval())
packed = bitbell.pack(trained)
print(bitbell.verify(trained, packed, batch(-1)))
print(packed.save(f"{tempfile.mkdtemp()}/packed"))
