"""The converter in torchtitan's own model; skipped where torchtitan is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bitbell
from bitbell.quantizers import Quantizer

pytest.importorskip("torchtitan", reason="torchtitan is not installed (pip install torchtitan==0.3.0)")

from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention
from torchtitan.models.llama3 import model_registry

from bitbell.training.torchtitan import (
    BitbellConverter,
    TitanLinear,
    calibrated_model,
    for_packing,
    parameter_group_configs,
    write_first_checkpoint,
)

MIXED: dict[str, str | None] = {"lm_head": None, "*.feed_forward.*": "bbq-w2a4", "*": "quest-w3a3"}


def configuration(rules: dict[str, str | None] | None = None) -> Any:
    """The debug model's, with one block and attention that runs on CPUs."""
    converter = BitbellConverter.Config() if rules is None else BitbellConverter.Config(rules=rules)
    config: Any = model_registry("debugmodel", converters=[converter]).model
    for _, _, parent, name in list(config.traverse(FlexAttention.Config)):
        setattr(parent, name, ScaledDotProductAttention.Config())
    del config.layers[1:]
    return config


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, 2048, (2, 16), generator=torch.Generator().manual_seed(seed))


def train_step(model: Any) -> None:
    model.train()
    F.cross_entropy(model(tokens()[:, :-1]).flatten(0, 1), tokens()[:, 1:].flatten()).backward()


def recipes(model: torch.nn.Module) -> dict[str, str]:
    return {name: m.recipe.name for name, m in model.named_modules() if isinstance(m, TitanLinear)}


def test_rules_choose_by_torchtitans_names() -> None:
    model = calibrated_model(configuration(MIXED), tokens())
    model.verify_module_protocol()  # type: ignore[operator]
    feed_forward = {f"layers.0.feed_forward.w{n}": "bbq-w2a4" for n in (1, 2, 3)}
    attention = {f"layers.0.attention.{name}": "quest-w3a3" for name in ("qkv_linear.wqkv", "wo")}
    assert recipes(model) == feed_forward | attention


def test_a_rule_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rule 'blocks.\*' matches no layer; they are called e.g. "):
        configuration({"blocks.*": "bbq-w2a2", "*": None})


def test_quantizers_are_as_made_after_the_model_got_its_memory() -> None:
    with torch.device("meta"):
        model = configuration().build()
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(7)  # whatever the memory held before
    with torch.no_grad():
        model.init_states()
    layer = model.layers["0"].feed_forward.w1
    assert torch.equal(layer.weight_quantizer.scale, torch.ones(layer.out_features, 1))
    assert not any(bool(q.calibrated) for q in model.modules() if isinstance(q, Quantizer))
    with pytest.raises(RuntimeError, match="no scale yet"):
        model(tokens())


def test_scales_do_not_decay() -> None:
    model = calibrated_model(configuration(), tokens())
    groups = parameter_group_configs(1e-3, weight_decay=0.1)
    optimizer = OptimizersContainer.Config(param_groups=groups, implementation="foreach").build(model_parts=[model])
    decayed = {n for o in optimizer.optimizers for g in o.param_groups if g["weight_decay"] for n in g["param_names"]}
    assert decayed == {f"{name}.weight" for name in recipes(model)}
    held = sum(len(g["params"]) for o in optimizer.optimizers for g in o.param_groups)
    assert held == len(list(model.parameters()))


def test_it_trains_and_the_packed_model_is_the_trained_one(tmp_path: Path, reference_kernels: None) -> None:
    model = calibrated_model(configuration(MIXED), tokens())
    train_step(model)
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())
    trained = for_packing(model.eval())
    packed = bitbell.pack(trained)
    assert bitbell.verify(trained, packed, tokens(1)).logit_difference == 0
    folder = packed.save(tmp_path / "packed")
    again = bitbell.load(folder, model=for_packing(calibrated_full_precision()))
    assert torch.equal(again(tokens(1)), packed(tokens(1)))


def calibrated_full_precision() -> torch.nn.Module:
    from torchtitan.models.llama3 import model_registry

    config: Any = model_registry("debugmodel").model
    for _, _, parent, name in list(config.traverse(FlexAttention.Config)):
        setattr(parent, name, ScaledDotProductAttention.Config())
    del config.layers[1:]
    model = config.build()
    with torch.no_grad():
        model.init_states()
    return model  # type: ignore[no-any-return]


def test_the_first_checkpoint_brings_the_scales(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    model = calibrated_model(configuration(), tokens())
    folder = write_first_checkpoint(model, tmp_path / "first")
    with torch.device("meta"):
        other: Any = configuration().build()
    other.to_empty(device="cpu")
    with torch.no_grad():
        other.init_states()
    with pytest.raises(ValueError, match="has no scale yet"):
        write_first_checkpoint(other, tmp_path / "second")
    state = other.state_dict()
    dcp.load(state, checkpoint_id=str(folder), no_dist=True)
    other.load_state_dict(state)
    assert torch.equal(other.eval()(tokens()), model.eval()(tokens()))
