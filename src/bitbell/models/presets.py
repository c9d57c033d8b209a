"""Named model sizes as `transformers` configurations; bitbell has no model code of its own.

The sizes are those of the BBQ and QuEST papers (non-embedding parameters; head dimension 128, untied head) and a
`tiny` one that trains in minutes on two CPU cores; `mini` has half its width. `gpt-` presets are the papers' GPT
(LayerNorm, learned positions, a GELU MLP of 4 widths) in the depths, widths and training settings of the LLaMA sizes.
The papers' models have no biases; GPT-2 of `transformers` has them, starting at zero, in its linear layers and norms.
`images.py` has image classifiers.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bitbell.models.images import IMAGE_PRESETS, ImagePreset, build_image_model, image_config

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

# Architecture -> its model class in `transformers`.
ARCHITECTURES = {"llama": "LlamaForCausalLM", "gpt": "GPT2LMHeadModel"}


@dataclass(frozen=True)
class Preset:
    """A model size. learning_rate and tokens are the published training settings (peak rate; budget).

    Raises ValueError for an architecture other than "llama" and "gpt".
    """

    layers: int
    width: int
    heads: int
    feed_forward: int
    learning_rate: float
    tokens: float
    vocabulary: int = 32_000
    architecture: str = "llama"

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {self.architecture!r}")


PRESETS: dict[str, Preset] = {
    "mini": Preset(layers=4, width=128, heads=2, feed_forward=384, learning_rate=4e-3, tokens=3e5, vocabulary=1024),
    "tiny": Preset(layers=4, width=256, heads=4, feed_forward=768, learning_rate=4e-3, tokens=3e5, vocabulary=1024),
    "30m": Preset(layers=6, width=640, heads=5, feed_forward=1792, learning_rate=1.2e-3, tokens=3e9),
    "50m": Preset(layers=7, width=768, heads=6, feed_forward=2048, learning_rate=1.2e-3, tokens=5e9),
    "100m": Preset(layers=8, width=1024, heads=8, feed_forward=2816, learning_rate=6e-4, tokens=1e10),
    "200m": Preset(layers=10, width=1280, heads=10, feed_forward=3584, learning_rate=3e-4, tokens=2e10),
}
PRESETS |= {
    f"gpt-{name}": replace(preset, architecture="gpt", feed_forward=4 * preset.width)
    for name, preset in PRESETS.items()
}


def find_preset(name: str) -> Preset | ImagePreset:
    """The preset called `name`. Raises ValueError with a suggestion for an unknown one."""
    presets: dict[str, Preset | ImagePreset] = {**PRESETS, **IMAGE_PRESETS}
    if name not in presets:
        close = difflib.get_close_matches(name.lower(), presets, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown preset {name!r}; there are {', '.join(presets)}.{hint}")
    return presets[name]


def preset_config(
    name: str,
    *,
    vocab_size: int | None = None,
    sequence_length: int = 512,
    labels: Sequence[str] | int = 1000,
    image_size: int | None = None,
    channels: int = 3,
) -> Any:
    """The `transformers` configuration of a preset; `vocab_size` and `image_size` default to the preset's own.

    labels, image_size, channels: of image classifiers alone; classes by name, or how many.
    """
    preset = find_preset(name)
    if isinstance(preset, ImagePreset):
        return image_config(preset, labels=_names(labels), image_size=image_size, channels=channels)
    common: dict[str, Any] = {
        "vocab_size": vocab_size or preset.vocabulary,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return (_gpt_config if preset.architecture == "gpt" else _llama_config)(preset, sequence_length, common)


def _llama_config(preset: Preset, sequence_length: int, common: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        **common,
        hidden_size=preset.width,
        intermediate_size=preset.feed_forward,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.heads,
        max_position_embeddings=max(sequence_length, 512),
        rms_norm_eps=1e-5,
    )


def _gpt_config(preset: Preset, sequence_length: int, common: dict[str, Any]) -> Any:
    from transformers import GPT2Config

    return GPT2Config(
        **common,
        n_embd=preset.width,
        n_inner=preset.feed_forward,
        n_layer=preset.layers,
        n_head=preset.heads,
        n_positions=sequence_length,  # a learned position that no training step reaches would stay noise
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


def _names(labels: Sequence[str] | int) -> Sequence[str]:
    return [f"class {index}" for index in range(labels)] if isinstance(labels, int) else labels


def build_model(
    name: str,
    *,
    vocab_size: int | None = None,
    sequence_length: int = 512,
    seed: int = 0,
    labels: Sequence[str] | int = 1000,
    image_size: int | None = None,
    channels: int = 3,
) -> nn.Module:
    """A randomly initialised causal language model of a preset: N(0, 0.02), outputs of a block N(0, 0.02 / sqrt(2
    layers)); or an image classifier, as `transformers` initialises it.

    A GPT has exactly `sequence_length` positions. labels, image_size, channels: of image classifiers alone, see
    `preset_config`. The same seed gives the same weights. Source: BBQ's published training code.
    """
    import torch
    import transformers

    preset = find_preset(name)
    if isinstance(preset, ImagePreset):
        image = {"labels": _names(labels), "image_size": image_size, "channels": channels}
        return build_image_model(preset, seed=seed, **image)  # type: ignore[arg-type]
    config = preset_config(name, vocab_size=vocab_size, sequence_length=sequence_length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = getattr(transformers, ARCHITECTURES[preset.architecture])(config)
        deep = 0.02 / math.sqrt(2 * config.num_hidden_layers)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight")):
                    parameter.normal_(0.0, deep)
    return model
