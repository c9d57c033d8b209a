"""The presets: published sizes, the same weights from the same seed, the papers' initialisation."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from bitbell.models import IMAGE_PRESETS, PRESETS, build_model, find_preset, preset_config

PUBLISHED = {"30m": 30_482_560, "50m": 49_556_736, "100m": 102_777_856, "200m": 203_188_480}
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "wpe")


def non_embedding_parameters(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if not any(part in name for part in EMBEDDINGS))


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


@pytest.mark.parametrize("size", PUBLISHED)
def test_a_gpt_is_as_large_as_the_llama_of_its_name(size: str) -> None:
    with torch.device("meta"):
        model = build_model(f"gpt-{size}")
    width, layers = model.config.n_embd, model.config.n_layer
    biases_and_norms = layers * (3 + 1 + 4 + 1 + 4) * width + 2 * width
    assert non_embedding_parameters(model) == 12 * layers * width**2 + biases_and_norms
    assert non_embedding_parameters(model) == pytest.approx(PUBLISHED[size], rel=0.04)
    assert find_preset(f"gpt-{size}").learning_rate == find_preset(size).learning_rate
    assert model.lm_head.weight is not model.transformer.wte.weight


@pytest.mark.parametrize("name", PRESETS)
def test_every_width_can_be_rotated_in_blocks_of_128(name: str) -> None:
    preset = find_preset(name)
    assert preset.width % 128 == preset.feed_forward % 128 == 0
    assert preset.width % preset.heads == 0


@pytest.mark.parametrize("preset", ["tiny", "gpt-tiny"])
def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_one_alone(preset: str) -> None:
    before = torch.get_rng_state()
    first, second, other = build_model(preset), build_model(preset), build_model(preset, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.dim() == 1 or not torch.equal(a, c), name


@pytest.mark.parametrize("preset", ["tiny", "gpt-tiny"])
def test_weights_start_as_the_papers_say(preset: str) -> None:
    model = build_model(preset)
    layers = find_preset(preset).layers
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0 if name.endswith("bias") else 1)).all()
            continue
        deep = name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight"))
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


def test_a_gpt_has_the_positions_it_is_trained_on_and_drops_nothing_out() -> None:
    model = build_model("gpt-tiny", vocab_size=50, sequence_length=24)
    assert model.transformer.wpe.weight.shape == (24, 256)
    assert all(module.p == 0 for module in model.modules() if isinstance(module, nn.Dropout))
    ids = torch.randint(0, 50, (2, 24))
    assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(math.log(50), abs=0.2)
    config = preset_config("gpt-tiny")
    assert (config.vocab_size, config.n_positions, config.activation_function) == (1024, 512, "gelu")


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="architecture must be one of llama, gpt, got 'mamba'"):
        dataclasses.replace(find_preset("tiny"), architecture="mamba")


def test_vocabulary_and_length_default_to_the_presets() -> None:
    config = preset_config("tiny")
    assert (config.vocab_size, config.max_position_embeddings) == (1024, 512)
    assert (config.rope_theta if hasattr(config, "rope_theta") else config.rope_parameters["rope_theta"]) == 10_000
    assert config.rms_norm_eps == 1e-5
    assert preset_config("30m", vocab_size=50_304).vocab_size == 50_304


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("30M", " Did you mean '30m'?"),
        ("tinny", " Did you mean 'tiny'?"),
        ("gpt30m", " Did you mean 'gpt-30m'?"),
        ("7b", ""),
    ],
)
def test_an_unknown_preset_is_refused_with_a_suggestion(name: str, hint: str) -> None:
    for use in (find_preset, build_model, preset_config):
        with pytest.raises(ValueError) as caught:
            use(name)
        assert str(caught.value) == f"unknown preset {name!r}; there are {', '.join([*PRESETS, *IMAGE_PRESETS])}.{hint}"
