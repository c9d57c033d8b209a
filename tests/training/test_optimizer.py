"""Parameter groups follow the paper; the learning rate is a function of the step."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from bitbell.layers import quantize
from bitbell.models import build_model
from bitbell.training.config import TrainConfig
from bitbell.training.optimizer import learning_rate_at, make_optimizer, parameter_groups


def decayed_names(recipe: str | None, preset: str = "micro") -> set[str]:
    model = build_model(preset)
    if recipe:
        quantize(model, recipe)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, 0.1)
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert sum(len(g["params"]) for g in groups) == len(names)  # type: ignore[arg-type]
    return {names[id(p)] for p in groups[0]["params"]}  # type: ignore[attr-defined]


def test_only_linear_weights_in_the_blocks_decay() -> None:
    plain = decayed_names(None)
    assert len(plain) == 2 * 7
    assert all(name.endswith("proj.weight") for name in plain)
    assert decayed_names("bbq-w2a2") == plain
    assert decayed_names("quest-w2a2") == plain


def test_of_a_gpt_the_weights_of_conv1d_decay_and_positions_biases_and_the_head_do_not() -> None:
    plain = decayed_names(None, "micro-gpt")
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert plain == {f"transformer.h.{block}.{part}.weight" for block in range(2) for part in parts}
    assert decayed_names("bbq-w2a2", "micro-gpt") == plain


def test_the_step_of_lsq_decays_as_in_the_published_comparison() -> None:
    extra = decayed_names("lsq-w2a2") - decayed_names(None)
    assert len(extra) == 2 * (7 + 4)  # weights: seven layers; inputs: qkv, o, gate and up, down
    assert all(name.endswith("quantizer.scale") for name in extra)


def test_the_schedule_rises_by_a_cosine_and_falls_to_its_end() -> None:
    at = [learning_rate_at(s, steps=100, peak=1.0, warmup=0.1, final=0.1) for s in range(100)]
    assert at[0] == pytest.approx(0.01)
    assert at[5] == pytest.approx((0.01 + 1) / 2)
    assert at[10] == 1.0
    assert at[-1] == pytest.approx(0.1)
    assert all(a < b for a, b in pairwise(at[:11]))
    assert all(a > b for a, b in pairwise(at[10:]))
    middle = learning_rate_at(55, steps=101, peak=1.0, warmup=10 / 101, final=0.1)
    assert middle == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 0.5)) / 2)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_very_short_runs_have_a_rate_for_each_step(steps: int) -> None:
    for warmup in (0.0, 0.1, 1.0):
        assert all(0 < learning_rate_at(s, steps=steps, peak=1.0, warmup=warmup, final=0.1) <= 1 for s in range(steps))


def test_scale_rate_is_the_factor_of_what_quantizers_learn() -> None:
    model = quantize(build_model("micro"), "lsq-w2a2")
    config = TrainConfig(data="d", out="r", scale_rate=0.1)
    groups = make_optimizer(model, config, 1e-3).param_groups
    rates = {id(p): group["rate"] for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert len(rates) == len(named)
    for name, parameter in named.items():
        assert rates[id(parameter)] == (0.1 if "quantizer" in name else 1.0), name
    with pytest.raises(ValueError, match="scale_rate must be positive, got scale_rate=0"):
        TrainConfig(data="d", out="r", scale_rate=0.0)
