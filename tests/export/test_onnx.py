"""ONNX files, run in onnxruntime: the codes and the numbers of the packed model, or a refusal that says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitbell
from bitbell.packing import PackedLinear, VerificationError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnxruntime

from bitbell.export import onnx
from bitbell.export.onnx_check import compare, run_graph
from bitbell.export.onnx_graph import Graph, Watched
from bitbell.export.onnx_layers import packed_layer
from bitbell.export.onnx_models import build_graph
from bitbell.export.refusals import Refused

WIDTH, ROWS = 192, 24


def packed_model(rules: Any, preset: str = "tiny", **fields: Any) -> Any:
    config = bitbell.models.preset_config(preset, vocab_size=96, sequence_length=32)  # type: ignore[attr-defined]
    sizes = {"gpt-tiny": {"n_embd": 192, "n_inner": 128, "n_layer": 2, "n_head": 2}}
    sizes["tiny"] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
    for name, value in ({"num_attention_heads": 2, "num_key_value_heads": 2} | sizes[preset] | fields).items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # as training leaves them: no norm of ones, no bias of zeros
            parameter.add_(0.1 * torch.randn_like(parameter) if parameter.dim() == 1 else 0)
        if rules is None:
            return model.eval()
        bitbell.calibrate(bitbell.quantize(model, rules), torch.randint(0, 96, (4, 16)))
    return bitbell.pack(model.eval())


def layer_of(recipe: str, bias: bool = True) -> PackedLinear:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        model: Any = bitbell.quantize(nn.Sequential(nn.Linear(WIDTH, ROWS, bias=bias)), recipe)
        bitbell.calibrate(model, 3 * torch.randn(8, WIDTH) + 0.5)
        for name, parameter in model.named_parameters():
            parameter.mul_(1.1).add_(0.05 if name.endswith("offset") else 0.0)
        layer = bitbell.pack(model.eval()).model[0]
    assert isinstance(layer, PackedLinear)
    return layer


def run_layer(layer: PackedLinear, x: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """A packed layer alone: what its graph calls things, and the tensors onnxruntime makes of `x` (1, T, I)."""
    graph = Graph()
    y = packed_layer(graph, "layer", layer, graph.take_input("input", "float", ("batch", "sequence", WIDTH)))
    at: Watched = graph.watched["layer"]
    graph.give_output(y, "logits", "float", ("batch", "sequence", ROWS))
    if at.codes is not None:
        graph.give_output(at.codes, "codes", "uint8", ("batch", "sequence", WIDTH))
    session = onnxruntime.InferenceSession(graph.model().SerializeToString(), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    found = session.run(names, {"input": x.numpy()})
    return graph.model(), {n: torch.from_numpy(v) for n, v in zip(names, found, strict=True)}


INTEGER = ["bbq-w1a1", "bbq-w2a2", "bbq-w3a3", "bbq-w4a4", "bbq-w2a8", "bbq-token-w2a2", "bbq-token-w4a4"]
INTEGER += ["bbq-w2a2:zero_point=-0.25", "bbq-w2a2:zero_point=-0.3", "bbq-w3a2:learn_offset=true", "bbq-w8a8"]
INTEGER += ["bbq-token-w2a2:restore_rms=true", "quest-w2a2", "quest-w4a4", "lsq-w2a2", "lsq-w8a8", "lsq-plus-w2a2"]
INTEGER += ["lsq-plus-w4a4:w.asymmetric=true", "pact-w3a3", "seq-w2a2", "n2uq-w2a2", "n2uq-w4a4", "absmax-w4a4"]
INTEGER += ["absmax-w8a8", "narrow-w2a2", "ternary-w2a8"]
FLOAT = ["bbq-w1a16", "bbq-w2a16", "bbq-w3a16", "bbq-w4a16", "bbq-w2a16:rotation=none", "quest-w4a16", "nf-w4a16"]
FLOAT += ["quest-fp4-w4a16", "absmax-w8a16", "bbq-w4a16:learn_offset=true"]


@pytest.mark.parametrize("recipe", INTEGER)
def test_a_layer_gives_the_same_codes_and_sums(recipe: str) -> None:
    layer, x = layer_of(recipe), torch.randn(2, 40, WIDTH, generator=torch.Generator().manual_seed(2)) * 3 + 0.5
    _, found = run_layer(layer, x)
    assert layer.activation_quantizer is not None
    expected = layer.activation_quantizer.encode(x)
    assert int((found["codes"] != expected).sum()) <= 1  # of 15,360: one may lie within rounding of a threshold
    same = (found["codes"] == expected).all(-1)
    assert same.sum() >= 79
    y = layer(x)
    assert float((found["logits"] - y)[same].abs().max() / y.abs().max()) < 1e-6


@pytest.mark.parametrize("recipe", FLOAT)
def test_a_layer_of_float_inputs_gives_the_same_values(recipe: str) -> None:
    layer, x = layer_of(recipe), torch.randn(2, 40, WIDTH, generator=torch.Generator().manual_seed(2))
    made, found = run_layer(layer, x)
    y = layer(x)
    assert float((found["logits"] - y).abs().max() / y.abs().max()) < 1e-5
    uses_codes = any(node.op_type == "MatMulNBits" for node in made.graph.node)
    assert uses_codes == (recipe.split("-w")[0] in ("bbq", "quest"))


def test_bytes_of_eight_bits_are_multiplied_unsigned_where_sixteen_bits_would_overflow() -> None:
    """uint8 times int8 saturates on CPUs without VNNI, and no test on a CPU with it can notice."""
    for recipe, unsigned in (("absmax-w8a8", True), ("bbq-w4a4", False), ("ternary-w2a8", False)):
        made, _ = run_layer(layer_of(recipe), torch.zeros(1, 1, WIDTH))
        (product,) = (node for node in made.graph.node if node.op_type == "MatMulInteger")
        assert (len(product.input) == 4) == unsigned


MODELS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "LLaMA": ("bbq-w2a2", "tiny", {}),
    "LLaMA, 4 bits": ("bbq-token-w4a4", "tiny", {"hidden_size": 96}),
    "LLaMA, shared heads": ("lsq-w2a2", "tiny", {"num_attention_heads": 4}),
    "LLaMA, head size of its own": ("bbq-w3a4", "tiny", {"head_dim": 48, "attention_bias": True}),
    "LLaMA, tied": ("bbq-w2a2", "tiny", {"tie_word_embeddings": True}),
    "LLaMA, packed head": ({"lm_head": "bbq-w4a8", "*": "bbq-w2a16"}, "tiny", {}),
    "GPT-2": ("bbq-w2a2", "gpt-tiny", {}),
    "GPT-2, tied": ("quest-w4a4", "gpt-tiny", {"tie_word_embeddings": True, "activation_function": "gelu_new"}),
    "LLaMA, full precision": (None, "tiny", {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_the_same_logits_for_any_batch_and_length(name: str, tmp_path: Path) -> None:
    rules, preset, fields = MODELS[name]
    model = packed_model(rules, preset, **fields)
    written = onnx(model, tmp_path / "model.onnx")
    found = written.comparison
    assert found is not None
    assert max(found.layers, found.between) < 2e-6, str(found)
    assert found.different <= 1e-4 * found.codes
    # Left to themselves, both agree as long as no input happens to lie within rounding of a threshold: few tokens.
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for shape in ((1, 1), (3, 5)):
        tokens = torch.randint(0, 96, shape, generator=torch.Generator().manual_seed(3))
        (logits,) = session.run(["logits"], {"input_ids": tokens.numpy()})
        expected = model(tokens).logits
        assert torch.allclose(torch.from_numpy(logits), expected, atol=1e-5 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("preset", ["tiny", "gpt-tiny"])
def test_with_a_cache_tokens_come_one_by_one(preset: str, tmp_path: Path) -> None:
    model = packed_model("bbq-w2a2", preset)
    onnx(model, tmp_path / "model.onnx", cache=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    tokens = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(4))
    size = {"tiny": 32, "gpt-tiny": 96}[preset]
    pasts = {i.name: torch.zeros(2, 2, 0, size).numpy() for i in session.get_inputs()[1:]}
    assert len(pasts) == 4
    made = []
    for start, stop in ((0, 7), *((n, n + 1) for n in range(7, 12))):
        logits, *kept = session.run(None, {"input_ids": tokens[:, start:stop].numpy()} | pasts)
        made.append(torch.from_numpy(logits))
        pasts = dict(zip(pasts, kept, strict=True))
    expected = model(tokens).logits.detach()
    assert torch.allclose(torch.cat(made, 1), expected, atol=1e-5 * float(expected.abs().max()))


def test_weights_take_their_bits_in_the_file(tmp_path: Path) -> None:
    sizes = {bits: onnx(packed_model(f"bbq-w{bits}a8"), tmp_path / f"{bits}.onnx").size for bits in (2, 4, 8)}
    codes = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert sizes[4] - sizes[2] == pytest.approx(codes / 4, rel=0.1)
    assert sizes[8] - sizes[4] == pytest.approx(codes / 2, rel=0.1)


def test_a_graph_that_computes_something_else_is_found_and_named() -> None:
    model = packed_model("bbq-w2a2").model
    graph = build_graph(model)
    layer: Any = model.get_submodule("model.layers.1.mlp.up_proj")
    layer.weight_scale.mul_(1.001)
    with pytest.raises(VerificationError, match=r"model\.layers\.1\.mlp\.up_proj: onnxruntime's output differs"):
        compare(model, graph.model(), graph.watched)
    layer.weight_scale.div_(1.001)
    layer.activation_quantizer.running_inverse_rms.mul_(1.01)
    with pytest.raises(VerificationError, match="other input codes"):
        compare(model, graph.model(), graph.watched)


def test_what_lies_between_layers_is_compared_too() -> None:
    model = packed_model("bbq-w2a2").model
    graph = build_graph(model)
    with torch.no_grad():
        model.get_submodule("model.layers.0.input_layernorm").weight[5] += 0.1
    with pytest.raises(VerificationError, match=r"inputs of model\.layers\.0\.self_attn"):
        compare(model, graph.model(), graph.watched)


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        ("bbq-tensor-w2a2", r"q_proj: its inputs' statistic is one of a whole batch"),
        ("nf-w4a4", r"q_proj: the levels of nf-w4a4 are no even grid"),
    ],
)
def test_what_has_no_integers_is_refused_by_name(rules: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=why):
        onnx(packed_model(rules), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_other_architectures_and_positions_are_refused(tmp_path: Path) -> None:
    model = bitbell.quantize(nn.Sequential(nn.Linear(64, 8)), "bbq-w2a2")
    bitbell.calibrate(model, torch.randn(4, 64))
    with pytest.raises(Refused, match="Sequential has no ONNX export; there is one for LlamaForCausalLM, GPT2"):
        onnx(model, tmp_path / "model.onnx")
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(Refused, match="'dynamic' change with the text"):
        onnx(packed_model("bbq-w2a2", rope_parameters=dynamic), tmp_path / "model.onnx")


def test_nothing_is_overwritten_silently(tmp_path: Path) -> None:
    model, path = packed_model("bbq-w2a2"), tmp_path / "model.onnx"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="exists already"):
        onnx(model, path)
    assert path.read_text(encoding="utf-8") == "mine"
    onnx(model, path, overwrite=True, check=False)
    with pytest.raises(ValueError, match="is a directory"):
        onnx(model, tmp_path)
    with pytest.raises(ValueError, match="takes a float32 model"):
        onnx(model.bfloat16(), tmp_path / "other.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_the_command_writes_a_run_and_its_packed_twin_alike(
    run: Path, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bitbell.cli.main import main

    assert main(["export", "onnx", str(directory), "--out", str(tmp_path / "packed.onnx")]) == 0
    assert "input codes differ" in capsys.readouterr().out
    assert main(["export", "onnx", str(run), "--out", str(tmp_path / "run.onnx"), "--no-check"]) == 0
    assert "not compared" in capsys.readouterr().out
    assert (tmp_path / "packed.onnx").read_bytes() == (tmp_path / "run.onnx").read_bytes()
    assert main(["export", "onnx", str(run), "--out", str(tmp_path / "run.onnx")]) == 1
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", "tflite", str(run), "--out", str(tmp_path / "run.tflite")])


def test_graphs_run_on_their_own() -> None:
    model = packed_model("lsq-w2a2").model
    tokens = torch.arange(6).view(1, 6)
    made = build_graph(model).model()
    assert run_graph(made, tokens)["logits"].shape == (1, 6, 96)
