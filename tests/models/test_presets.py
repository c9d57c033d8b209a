"""The presets: published sizes, the same weights from the same seed, the papers' initialisation."""

import math

import pytest
import torch
from torch import nn

from bitbell.models import PRESETS, build_model, find_preset, llama_config

PUBLISHED = {"30m": 30_482_560, "50m": 49_556_736, "100m": 102_777_856, "200m": 203_188_480}


def non_embedding_parameters(model: nn.Module) -> int:
    return sum(
        p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name and "lm_head" not in name
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name)
    assert all(p.is_meta for p in model.parameters())
    assert non_embedding_parameters(model) == PUBLISHED[name]
    assert model.config.hidden_size // model.config.num_attention_heads == 128
    assert not any("bias" in parameter for parameter, _ in model.named_parameters())
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.lm_head.weight.shape == (32_000, model.config.hidden_size)


@pytest.mark.parametrize("name", PRESETS)
def test_every_width_can_be_rotated_in_blocks_of_128(name: str) -> None:
    preset = find_preset(name)
    assert preset.width % 128 == preset.feed_forward % 128 == 0
    assert preset.width % preset.heads == 0


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    first, second, other = build_model("tiny"), build_model("tiny"), build_model("tiny", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert "norm" in name or not torch.equal(a, c), name


def test_weights_start_as_the_papers_say() -> None:
    model = build_model("tiny")
    layers = find_preset("tiny").layers
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
            continue
        deep = name.endswith(("o_proj.weight", "down_proj.weight"))
        expected = 0.02 / math.sqrt(2 * layers) if deep else 0.02
        assert parameter.std().item() == pytest.approx(expected, rel=0.02), name
        assert abs(parameter.mean().item()) < 0.02 * expected * 2, name


def test_the_tiny_model_predicts_tokens() -> None:
    model = build_model("tiny", vocab_size=50, sequence_length=600)
    assert model.config.max_position_embeddings == 600
    ids = torch.randint(0, 50, (2, 8))
    result = model(input_ids=ids, labels=ids)
    assert result.logits.shape == (2, 8, 50)
    assert result.loss.item() == pytest.approx(math.log(50), abs=0.2)


def test_vocabulary_and_length_default_to_the_presets() -> None:
    config = llama_config("tiny")
    assert (config.vocab_size, config.max_position_embeddings) == (1024, 512)
    assert (config.rope_theta if hasattr(config, "rope_theta") else config.rope_parameters["rope_theta"]) == 10_000
    assert config.rms_norm_eps == 1e-5
    assert llama_config("30m", vocab_size=50_304).vocab_size == 50_304


@pytest.mark.parametrize(
    ("name", "hint"), [("30M", " Did you mean '30m'?"), ("tinny", " Did you mean 'tiny'?"), ("7b", "")]
)
def test_an_unknown_preset_is_refused_with_a_suggestion(name: str, hint: str) -> None:
    for use in (find_preset, build_model, llama_config):
        with pytest.raises(ValueError) as caught:
            use(name)
        assert str(caught.value) == f"unknown preset {name!r}; there are tiny, 30m, 50m, 100m, 200m.{hint}"
