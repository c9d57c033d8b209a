"""Image classifiers of `transformers` in named sizes: ResNets and vision transformers.

resnet10 and resnet18 are basic blocks, one or two in each of four stages; vit-tiny and vit-small have the shape of
DeiT-Ti and DeiT-S without the distillation token. Those are the models of the BBQ paper's image experiments. The micro
ones train on images of 8 to 32 pixels in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

IMAGE_ARCHITECTURES = {"resnet": "ResNetForImageClassification", "vit": "ViTForImageClassification"}


@dataclass(frozen=True)
class ImagePreset:
    """A classifier's size. widths: of a ResNet's stages, or the one of a transformer; depths: blocks of each.

    patch: pixels of a patch's side (transformers). image_size: the side of an image, where the data does not say.
    learning_rate: the peak.
    """

    architecture: str
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    learning_rate: float
    image_size: int = 224
    heads: int = 0
    patch: int = 16


IMAGE_PRESETS: dict[str, ImagePreset] = {
    "resnet-micro": ImagePreset("resnet", (32, 64), (1, 1), learning_rate=4e-3, image_size=16),
    "resnet10": ImagePreset("resnet", (64, 128, 256, 512), (1, 1, 1, 1), learning_rate=2.5e-4),
    "resnet18": ImagePreset("resnet", (64, 128, 256, 512), (2, 2, 2, 2), learning_rate=2.5e-4),
    "vit-micro": ImagePreset("vit", (64,), (4,), learning_rate=2e-3, image_size=8, heads=2, patch=2),
    "vit-tiny": ImagePreset("vit", (192,), (12,), learning_rate=2.5e-4, heads=3),
    "vit-small": ImagePreset("vit", (384,), (12,), learning_rate=1.25e-4, heads=6),
}


def image_config(
    preset: ImagePreset, *, labels: Sequence[str], image_size: int | None = None, channels: int = 3
) -> Any:
    """The `transformers.ResNetConfig` or `ViTConfig` of a preset, for square images of `image_size` pixels.

    Raises ValueError for fewer than two labels, or a size that patches do not divide.
    """
    size = image_size or preset.image_size
    if len(labels) < 2:
        raise ValueError(f"labels must name at least two classes, got {len(labels)}")
    names: dict[str, Any] = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "num_channels": channels,
    }
    return (_vit_config if preset.architecture == "vit" else _resnet_config)(preset, size, names)


def check_image_size(preset: ImagePreset, size: int) -> None:
    """Raise ValueError if the patches of a transformer do not divide images of `size` pixels a side."""
    if preset.architecture == "vit" and size % preset.patch:
        raise ValueError(f"image_size must be a multiple of the {preset.patch} pixels of a patch, got {size}")


def _resnet_config(preset: ImagePreset, size: int, names: dict[str, Any]) -> Any:
    from transformers import ResNetConfig

    shape: dict[str, Any] = {"embedding_size": preset.widths[0], "hidden_sizes": list(preset.widths)}
    shape["depths"] = list(preset.depths)
    config = ResNetConfig(**names, **shape, layer_type="basic")
    config.image_size = size  # any would do; this is what it was trained on
    return config


def _vit_config(preset: ImagePreset, size: int, names: dict[str, Any]) -> Any:
    from transformers import ViTConfig

    check_image_size(preset, size)
    return ViTConfig(
        **names,
        image_size=size,
        patch_size=preset.patch,
        hidden_size=preset.widths[0],
        num_hidden_layers=preset.depths[0],
        num_attention_heads=preset.heads,
        intermediate_size=4 * preset.widths[0],
    )


def build_image_model(
    preset: ImagePreset,
    *,
    labels: Sequence[str],
    image_size: int | None = None,
    channels: int = 3,
    seed: int = 0,
) -> nn.Module:
    """A randomly initialised classifier of a preset, as `transformers` initialises it. The same seed gives the same
    weights."""
    import torch
    import transformers

    config = image_config(preset, labels=labels, image_size=image_size, channels=channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = getattr(transformers, IMAGE_ARCHITECTURES[preset.architecture])(config)
    return model
