"""Quantized models as guests in other people's loops: the Trainer of `transformers`, and Accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bitbell
from bitbell.quantizers import Quantizer
from bitbell.training import parameter_groups

pytest.importorskip("accelerate", reason="the Trainer and Accelerate need the package accelerate")
LSQ_DECAYS = "lsq-w2a2"  # whose published training lets its steps decay, with the weights


def quantized(recipe: str) -> Any:
    model = bitbell.build_model("micro", vocab_size=257)
    return bitbell.calibrate(bitbell.quantize(model, recipe), tokens(0))


def tokens(seed: int) -> Tensor:
    return torch.randint(0, 257, (4, 16), generator=torch.Generator().manual_seed(seed))


def rows() -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for seed in range(3) for row in tokens(seed)]


def trainer(model: Any, folder: Path, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    settings: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 4, "weight_decay": 0.1, "use_cpu": True}
    settings |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    return Trainer(model, TrainingArguments(str(folder), **settings), train_dataset=rows(), **options)


def learned(model: Any) -> dict[int, str]:
    """What the quantizers learn, by id."""
    return {
        id(p): f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, Quantizer)
        for own, p in module.named_parameters()
    }


def decayed(optimizer: Any, model: Any) -> set[str]:
    scales = learned(model)
    groups = [group for group in optimizer.param_groups if group["weight_decay"]]
    return {scales[id(p)] for group in groups for p in group["params"] if id(p) in scales}


def test_left_alone_the_trainer_would_let_scales_decay(tmp_path: Path) -> None:
    """Why docs/any-loop.md says to hand it the optimizer."""
    model = quantized("bbq-w2a2")
    guest = trainer(model, tmp_path)
    guest.create_optimizer()
    assert decayed(guest.optimizer, model) == set(learned(model).values())


def test_with_our_groups_the_trainer_decays_weights_only(tmp_path: Path) -> None:
    model = quantized("bbq-w2a2")
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=1e-3)
    guest = trainer(model, tmp_path, optimizers=(optimizer, None))
    guest.train()
    assert not decayed(guest.optimizer, model)
    held = {id(p) for group in guest.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}, "the very parameters of the model, scales among them"
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_trains_scales_in_float32_and_gives_the_model_back(precision: str) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)  # it remembers the precision of the process's first accelerator
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model = quantized("bbq-w2a2")
    scales = learned(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=1e-3)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    prepared.train()
    for seed in range(2):
        accelerator.backward(prepared(tokens(seed), labels=tokens(seed)).loss)
        optimizer.step()
        optimizer.zero_grad()
    trained = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert not decayed(optimizer, trained)
    assert learned(trained) == scales
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert bitbell.verify(trained, bitbell.pack(trained)).layers == 14


def test_lsqs_steps_decay_in_any_loop_as_in_its_paper() -> None:
    model = quantized(LSQ_DECAYS)
    assert decayed(torch.optim.AdamW(parameter_groups(model, weight_decay=0.1)), model) == set(learned(model).values())


def test_a_state_dict_is_all_that_a_loop_must_keep(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = quantized("bbq-w2a2").eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again: Any = bitbell.quantize(bitbell.build_model("micro", vocab_size=257, seed=1), "bbq-w2a2").eval()
    with pytest.raises(RuntimeError, match="no scale yet"):
        again(tokens(0))
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(again(tokens(1)).logits, model(tokens(1)).logits)
