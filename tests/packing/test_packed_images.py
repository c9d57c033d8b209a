"""Image classifiers: packed, saved, read back without their code, verified."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bitbell
from bitbell.models import build_model
from bitbell.packing import PackedFileError

LABELS = ["cat", "dog", "owl"]


def packed_model(preset: str, recipe: str = "bbq-vision-w2a2") -> tuple[torch.nn.Module, Any]:
    model = build_model(preset, labels=LABELS, image_size=16, channels=1)
    bitbell.quantize(model, recipe)
    bitbell.calibrate(model, torch.randn(4, 1, 16, 16))
    model.train()(torch.randn(4, 1, 16, 16))  # running statistics and batch norms move
    return model, bitbell.pack(model.eval())


@pytest.mark.parametrize("recipe", ["bbq-vision-w2a2", "bbq-w3a4"])
@pytest.mark.parametrize("preset", ["resnet-micro", "vit-micro"])
def test_a_classifier_is_saved_loaded_and_verified(
    preset: str, recipe: str, tmp_path: Path, reference_kernels: None
) -> None:
    model, packed = packed_model(preset, recipe)
    packed.save(tmp_path / "packed")
    loaded, images = bitbell.load(tmp_path / "packed"), torch.randn(3, 1, 16, 16)
    assert torch.equal(loaded(images).logits, model(images).logits)
    assert loaded.config.id2label == dict(enumerate(LABELS))
    packed.config.id2label = {label: LABELS[label] for label in (1, 2, 0)}  # as text is sorted: 0, 1, 10, 100 ...
    packed.save(tmp_path / "packed", overwrite=True)
    assert bitbell.load(tmp_path / "packed").config.id2label == dict(enumerate(LABELS))
    verified = bitbell.verify(model, loaded)
    assert verified.logit_difference == 0
    assert verified.layers == len(
        json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]["layers"]
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("id2label", {"0": "cat", "2": "owl"}, "id2label must name classes 0, 1, 2"),
        ("id2label", {"0": "cat", "1": 7}, "id2label must name classes"),
        ("id2label", {str(i): "x" for i in range(4)}, r"classifier.1.bias is F32 \(3,\), but must be F32 \(4,\)"),
        ("depths", [1, 10**9], "num_hidden_layers is 1000000000"),
        ("depths", "many", "num_hidden_layers is 'many'"),
        ("hidden_sizes", [32, 10**9], "no model can be built"),
        ("hidden_sizes", [32, 10**5], "has shape .* there, but"),
    ],
)
def test_a_damaged_description_is_refused(field: str, value: object, message: str, tmp_path: Path) -> None:
    _, packed = packed_model("resnet-micro")
    packed.save(tmp_path / "packed")
    file = tmp_path / "packed" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(PackedFileError, match=message):
        bitbell.load(tmp_path / "packed")
