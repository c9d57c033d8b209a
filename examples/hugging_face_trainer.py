"""The Trainer of `transformers`: give it the optimizer, because its own would let weight decay shrink the scales.

python examples/hugging_face_trainer.py --steps 300        needs: pip install accelerate
"""

import argparse
import tempfile

import torch
from setting import batch, small_llama, validation_loss
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import bitbell
from bitbell.training import parameter_groups

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--recipe", default="bbq-w2a2")
arguments = parser.parse_args()


class Sequences(Dataset):
    """Sequence `index` is the same in every epoch."""

    def __len__(self):
        return 8 * arguments.steps

    def __getitem__(self, index):
        tokens = batch(index, size=1)[0]
        return {"input_ids": tokens, "labels": tokens}


def quantized_trainer(steps: int, folder: str, resume: bool) -> Trainer:
    model = bitbell.quantize(small_llama(), arguments.recipe)
    if not resume:  # a checkpoint brings its scales
        bitbell.calibrate(model, batch(0))
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=4e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
    settings = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=8,
        save_steps=arguments.steps // 2,
        logging_steps=10,
        report_to="none",
        use_cpu=True,
    )
    return Trainer(model, settings, train_dataset=Sequences(), optimizers=(optimizer, schedule))


folder = tempfile.mkdtemp()
trainer = quantized_trainer(arguments.steps, folder, resume=False)
trainer.train()
print(f"validation loss {validation_loss(trainer.model):.3f}")

# Stopped half way and started again, it ends with the same weights.
half = arguments.steps // 2
resumed = quantized_trainer(arguments.steps, folder, resume=True)
resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{half}")
assert all(map(torch.equal, trainer.model.state_dict().values(), resumed.model.state_dict().values()))

print(bitbell.verify(resumed.model, bitbell.pack(resumed.model)))
