"""Image presets: the papers' shapes, one forward pass, and quantized as the paper does."""

import pytest
import torch

import bitbell
from bitbell.layers import QuantConv2d, QuantLinear
from bitbell.models import IMAGE_PRESETS, build_model, preset_config

# Those of torchvision's resnet18 and timm's deit_tiny and deit_small for 1000 classes; resnet10 has one block a stage.
PUBLISHED = {"resnet10": 5_418_792, "resnet18": 11_689_512, "vit-tiny": 5_717_416, "vit-small": 22_050_664}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]
    assert model.config.num_labels == 1000


@pytest.mark.parametrize(("name", "size"), [("resnet-micro", 16), ("vit-micro", 8), ("resnet10", 32)])
def test_a_model_takes_images_of_the_size_and_channels_it_was_made_for(name: str, size: int) -> None:
    model = build_model(name, labels=["cat", "dog", "owl"], image_size=size, channels=1)
    assert model(torch.randn(2, 1, size, size)).logits.shape == (2, 3)
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert model.config.label2id["owl"] == 2


@pytest.mark.parametrize("name", ["resnet-micro", "vit-micro"])
def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_one_alone(name: str) -> None:
    before = torch.get_rng_state()
    first, second, other = (build_model(name, labels=4, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_the_paper_leaves_stem_patch_embedding_and_head_alone_and_quantizes_shortcuts() -> None:
    resnet = bitbell.quantize(build_model("resnet10", labels=10), "bbq-vision-w2a2")
    kept = resnet.__dict__["kept_in_full_precision"]
    assert set(kept) == {"resnet.embedder.embedder.convolution", "classifier.1"}
    layers = {name: module for name, module in resnet.named_modules() if isinstance(module, QuantConv2d)}
    assert len(layers) == 4 * 2 + 3
    assert "resnet.encoder.stages.1.layers.0.shortcut.convolution" in layers
    assert {layer.weight_quantizer.rotation for layer in layers.values()} == {64}
    vit = bitbell.quantize(build_model("vit-tiny", labels=10), "bbq-vision-w2a2")
    assert set(vit.__dict__["kept_in_full_precision"]) == {"vit.embeddings.patch_embeddings.projection", "classifier"}
    blocks = [module for module in vit.modules() if isinstance(module, QuantLinear)]
    assert len(blocks) == 12 * 6
    assert {layer.weight_quantizer.rotation for layer in blocks} == {32}


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="image_size must be a multiple of the 16 pixels of a patch, got 100"):
        build_model("vit-tiny", image_size=100)
    with pytest.raises(ValueError, match="labels must name at least two classes, got 1"):
        preset_config("resnet18", labels=["all"])
    assert set(IMAGE_PRESETS) == {*PUBLISHED, "resnet-micro", "vit-micro"}
