"""ONNX files of image classifiers, run in onnxruntime: codes, borders and logits of the packed model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from convolution_shapes import WINDOWS
from torch import Tensor, nn

import bitbell
from bitbell.models import build_model
from bitbell.packing import VerificationError
from bitbell.packing.conv2d import PackedConv2d

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnxruntime

from bitbell.export import onnx
from bitbell.export.onnx_check import compare
from bitbell.export.onnx_graph import Graph
from bitbell.export.onnx_layers import packed_layer
from bitbell.export.onnx_models import build_graph
from bitbell.export.refusals import Refused

LABELS = ["cat", "dog", "owl"]


def conv_of(recipe: str, **shape: Any) -> PackedConv2d:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        model: Any = nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 24, **({"kernel_size": 3} | shape)))
        bitbell.calibrate(bitbell.quantize(model, {"1": recipe}), torch.randn(4, 3, 9, 8))
        for name, parameter in model.named_parameters():
            parameter.mul_(1.1).add_(0.05 if name.endswith("offset") else 0.0)
        layer = bitbell.pack(model.eval()).model[1]
    assert isinstance(layer, PackedConv2d)
    return layer


def run_conv(layer: PackedConv2d, x: Tensor) -> dict[str, Tensor]:
    """What onnxruntime makes of images `x` (N, H, W, I): codes, and the output (N, rows, columns, O)."""
    graph = Graph()
    y = packed_layer(graph, "layer", layer, graph.take_input("input", "float", ("batch", "height", "width", 32)))
    graph.give_output(y, "output", "float", ("batch", "rows", "columns", 24))
    if (codes := graph.watched["layer"].codes) is not None:
        graph.give_output(codes, "codes", "uint8", ("batch", "height", "width", 32))
    session = onnxruntime.InferenceSession(graph.model().SerializeToString(), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return {n: torch.from_numpy(v) for n, v in zip(names, session.run(names, {"input": x.numpy()}), strict=True)}


RECIPES = ["bbq-w1a1", "bbq-w2a2", "bbq-w3a3", "bbq-w4a4", "bbq-w2a8", "bbq-w8a8", "bbq-vision-w2a2", "bbq-token-w3a2"]
RECIPES += ["bbq-w2a2:zero_point=-0.25", "bbq-w2a2:zero_point=-0.3", "bbq-w3a2:learn_offset=true", "quest-w2a2"]
RECIPES += ["lsq-w4a4", "lsq-plus-w2a2", "lsq-plus-w4a4:w.asymmetric=true", "pact-w3a3", "seq-w2a2", "n2uq-w2a2"]
RECIPES += ["absmax-w4a4", "absmax-w8a8", "narrow-w2a2", "ternary-w2a8"]
CASES = [(recipe, "3x3") for recipe in RECIPES]
CASES += [(r, s) for r in ("bbq-w2a2", "lsq-plus-w4a4:w.asymmetric=true", "absmax-w8a8") for s in WINDOWS if s != "3x3"]


@pytest.mark.parametrize(("recipe", "shape"), CASES)
def test_a_convolution_gives_the_same_codes_and_sums_up_to_the_border(recipe: str, shape: str) -> None:
    layer = conv_of(recipe, **WINDOWS[shape])
    x = torch.randn(3, 32, 7, 8, generator=torch.Generator().manual_seed(2)).relu()
    found, quantizer = run_conv(layer, x.permute(0, 2, 3, 1)), layer.activation_quantizer
    assert quantizer is not None
    expected = quantizer.encode(layer.quantizer_input(x)).view(3, 7, 8, 32)
    differs = (found["codes"] != expected).any(-1, keepdim=True)
    assert int(differs.sum()) <= 1  # of 168 pixels, one may have an input within rounding of a threshold
    same = ~layer.geometry.patches(differs).any(-1)
    y = layer(x).permute(0, 2, 3, 1)
    assert float((found["output"] - y)[same].abs().max() / y.abs().max()) < 1e-6


@pytest.mark.parametrize("shape", WINDOWS)
@pytest.mark.parametrize("recipe", ["bbq-w1a16", "bbq-w2a16:rotation=none", "nf-w4a16", "bbq-w4a16:learn_offset=true"])
def test_a_convolution_of_floats_gives_the_same_values(recipe: str, shape: str) -> None:
    layer, x = conv_of(recipe, **WINDOWS[shape]), torch.randn(3, 32, 7, 8, generator=torch.Generator().manual_seed(2))
    y, found = layer(x), run_conv(layer, x.permute(0, 2, 3, 1))["output"].permute(0, 3, 1, 2)
    assert float((found - y).abs().max() / y.abs().max()) < 2e-6


def packed_model(preset: str, rules: Any, size: int = 16, channels: int = 1) -> Any:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = build_model(preset, labels=LABELS, image_size=size, channels=channels)
        for parameter in model.parameters():  # as training leaves them: no norm of ones, no bias of zeros
            parameter.add_(0.1 * torch.randn_like(parameter) if parameter.dim() == 1 else 0)
        images = torch.randn(4, channels, size, size)
        if rules is not None:
            bitbell.calibrate(bitbell.quantize(model, rules), images)
        model.train()(images)  # batch norms and running statistics move
        return model.eval() if rules is None else bitbell.pack(model.eval())


RULES: list[Any] = ["bbq-vision-w2a2", "bbq-w1a1", "bbq-w3a3", "quest-w4a4", "lsq-w2a2", "bbq-w2a16", None]
MODELS: list[tuple[str, Any]] = [(preset, rules) for preset in ("resnet-micro", "vit-micro") for rules in RULES]
EVERYTHING = {"resnet.embedder.*": "bbq-w4a8:rotation=none", "vit.embeddings.*": "bbq-w4a8:rotation=none"}
EVERYTHING |= {"classifier*": "bbq-token-w4a8", "*": "bbq-w2a2"}
MODELS += [("resnet-micro", EVERYTHING), ("vit-micro", EVERYTHING), ("resnet10", "bbq-w2a2"), ("vit-tiny", "bbq-w2a2")]


@pytest.mark.parametrize(("preset", "rules"), MODELS)
def test_a_classifier_gives_the_same_logits(preset: str, rules: Any, tmp_path: Path) -> None:
    if isinstance(rules, dict):
        first = "resnet.embedder.*" if preset == "resnet-micro" else "vit.embeddings.*"
        rules = {key: recipe for key, recipe in rules.items() if key in (first, "classifier*", "*")}
    model = packed_model(preset, rules, 32 if preset == "vit-tiny" else 16)
    written = onnx(model, tmp_path / "model.onnx")
    found = written.comparison
    assert found is not None
    assert max(found.layers, found.between) < 2e-6, str(found)
    assert found.different <= 1e-4 * found.codes
    assert (found.codes > 0) == (rules not in (None, "bbq-w2a16"))
    assert found.logits < 1e-5 or found.codes  # a code next to a threshold may differ, and changes what follows


@pytest.mark.parametrize(("preset", "size"), [("resnet-micro", (19, 24)), ("vit-micro", (16, 16))])
def test_batches_and_a_resnets_images_are_of_any_size(preset: str, size: tuple[int, int], tmp_path: Path) -> None:
    for rules in ("bbq-w2a2", "bbq-w4a16"):
        model = packed_model(preset, rules)
        images = torch.randn(3, 1, *size, generator=torch.Generator().manual_seed(4))
        graph = build_graph(model.model)
        found = compare(model.model, graph.model(), graph.watched, images)
        assert max(found.layers, found.between) < 2e-6, str(found)
    onnx(model, tmp_path / "model.onnx", check=False)  # weights alone are quantized: no threshold is near
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"pixel_values": images.numpy()})
    expected = model(images).logits.detach()
    assert logits.shape == (3, 3)
    assert torch.allclose(torch.from_numpy(logits), expected, atol=2e-5 * float(expected.abs().max()))


def test_any_resnet_and_images_that_are_not_square(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "patch_size": 8}
    models: list[Any] = [ViTForImageClassification(ViTConfig(num_attention_heads=2, image_size=(16, 24), **sizes))]
    models += [ResNetForImageClassification(ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1]))]
    assert not hasattr(models[1].config, "image_size")
    for model in models:
        assert onnx(model.eval(), tmp_path / "model.onnx", overwrite=True).comparison is not None


def test_a_graph_that_is_not_right_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = packed_model("vit-micro", "bbq-w2a2"), tmp_path / "model.onnx"
    (tmp_path / "model.onnx.data").write_text("of a larger model that was here before")
    written = onnx(model, out)
    assert written.comparison is not None
    assert written.size == out.stat().st_size
    before = out.read_bytes()
    monkeypatch.setattr("bitbell.export.onnx_check.LAYER_TOLERANCE", 0.0)
    with pytest.raises(VerificationError):
        onnx(model, out, overwrite=True)
    assert out.read_bytes() == before


def test_the_file_names_the_classes_and_takes_its_bits(tmp_path: Path) -> None:
    model, image_input = packed_model("resnet-micro", "bbq-vision-w2a2", channels=3), {"size": 16, "mean": [0.5] * 3}
    model.config.image_input = image_input
    model.config.id2label = {label: LABELS[label] for label in (1, 0, 2)}  # files may have them in another order
    written = onnx(model, tmp_path / "packed.onnx")
    plain = onnx(packed_model("resnet-micro", None, channels=3), tmp_path / "plain.onnx")
    metadata = onnxruntime.InferenceSession(tmp_path / "packed.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(metadata["bitbell.labels"]) == LABELS
    assert json.loads(metadata["bitbell.image_input"]) == image_input
    assert metadata["bitbell.recipes"] == "bbq-vision-w2a2"
    assert written.size < plain.size / 3.5


def test_a_graph_that_computes_something_else_is_found_and_named() -> None:
    model = packed_model("resnet-micro", "bbq-w2a2").model
    graph, name = build_graph(model), "resnet.encoder.stages.1.layers.0.layer.1.convolution"
    layer: Any = model.get_submodule(name)
    layer.weight_scale.mul_(1.001)
    with pytest.raises(VerificationError, match=f"{name}: onnxruntime's output differs"):
        compare(model, graph.model(), graph.watched)
    layer.weight_scale.div_(1.001)
    layer.activation_quantizer.running_inverse_rms.mul_(1.01)
    with pytest.raises(VerificationError, match=f"{name}: onnxruntime gives other input codes"):
        compare(model, graph.model(), graph.watched)


def test_a_border_of_codes_in_place_of_zeros_would_be_found() -> None:
    """The lowest constant of a graph that is no zero outside: shifting the padding by one level has to be noticed."""
    model = packed_model("resnet-micro", "bbq-w2a2").model
    graph = build_graph(model)
    made = graph.model()
    pad = next(node for node in made.graph.node if node.op_type == "Pad")
    (outside,) = (t for t in made.graph.initializer if t.name == pad.input[2])
    assert outside.raw_data == b"\x02"
    outside.raw_data = b"\x03"
    with pytest.raises(VerificationError, match=r"convolution: onnxruntime's output differs"):
        compare(model, made, graph.watched)


def test_what_has_no_export_is_refused_by_name(tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    with pytest.raises(Refused, match="cache=True is for language models"):
        onnx(packed_model("vit-micro", "bbq-w2a2"), out, cache=True)
    with pytest.raises(Refused, match=r"stages\.0.*convolution: its inputs' statistic is one of a whole batch"):
        onnx(packed_model("resnet-micro", "bbq-tensor-w2a2"), out)
    for shape, what in (({"groups": 2}, "2 groups"), ({"padding": 1, "padding_mode": "reflect"}, "mode 'reflect'")):
        with pytest.raises(Refused, match=f"layer: a convolution with .*{what} has no ONNX export"):
            run_conv(conv_of("bbq-w2a2", **shape), torch.randn(1, 7, 8, 32))
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_packed_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bitbell.cli.main import main

    packed_model("resnet-micro", "bbq-vision-w2a2").save(tmp_path / "packed")
    assert main(["export", "onnx", str(tmp_path / "packed"), "--out", str(tmp_path / "model.onnx")]) == 0
    assert "of 4,608 input codes differ" in capsys.readouterr().out
