"""Training on integers: the product's codes are multiplied as such, and everything else stays what it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitbell
from bitbell.kernels import native
from bitbell.layers import QuantLinear, quantize
from bitbell.layers.recipes import VARIANTS
from bitbell.quantizers import METHODS, Quantizer

TABLES = ("nf", "quest-fp4")


def near(variant: str, bits: int) -> str:
    """The recipe of a variant with the widths that it has nearest to these."""
    method = METHODS[VARIANTS[variant][0]]
    inputs = METHODS[method.activation_method or method.method]
    w, a = (min(kind.widths, key=lambda b: abs(b - bits)) for kind in (method, inputs))
    return f"{variant}-w{w}a{a}"


UNIFORM = [variant for variant, (method, _, _) in VARIANTS.items() if method not in TABLES]
RECIPES = [
    *sorted({near(variant, bits) for variant in UNIFORM for bits in (1, 2, 3, 4)}),
    "bbq-w3a2:learn_offset=true",
    "bbq-w2a2:w.learn_offset=true,zero_point=-0.25",
    "bbq-w4a4:normalise=false,estimator=clip,w.granularity=tensor",
    "bbq-w2a2:rms_gradient=false,rotation=none",
    "bbq-w2a2:restore_rms=true",
    "bbq-w8a8",
    "lsq-plus-w2a2:w.asymmetric=true,w.granularity=row",
    "ternary-w2a2:w.granularity=row,activation_method=quest",
    "bbq-w2a4:activation_method=lsq",
]


def twins(recipe: str, bias: bool = True, width: int = 128, out: int = 5) -> tuple[QuantLinear, QuantLinear]:
    """A calibrated layer that multiplies levels as floats, in float64, and one that multiplies integers, in float32."""
    torch.manual_seed(0)
    layer = QuantLinear(width, out, recipe, bias=bias)
    bitbell.calibrate(nn.Sequential(layer), 2 * torch.randn(9, width) + 0.3)
    fake, exact = copy.deepcopy(layer).double(), layer
    exact.multiply_integers()
    return fake, exact


def step(layer: nn.Module, x: Tensor, g: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    """Output and all gradients of one forward and backward pass."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    y.backward(g.to(y.dtype))
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **grads}


def assert_near(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor within `tolerance` of its own length; sums over a whole tensor, that may cancel, of one."""
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        error = torch.linalg.vector_norm(got[name].double() - tensor.double())
        length = max(float(torch.linalg.vector_norm(tensor.double())), 1.0 if "quantizer" in name else 1e-6)
        assert float(error) <= tolerance * length, (name, float(error) / length)


# Outputs and gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_outputs_and_gradients_are_those_of_fake_quantization_in_float64(recipe: str, kernels: str) -> None:
    x, g = torch.randn(2, 3, 128), torch.randn(2, 3, 5)
    with native.using(kernels):
        for training in (True, False):
            fake, exact = twins(recipe)
            wanted = step(fake.train(training), x.double(), g.double())
            assert_near(step(exact.train(training), x, g), wanted, 1e-5)
            for ours, theirs in zip(exact.buffers(), fake.buffers(), strict=True):
                torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("recipe", [near(variant, 2) for variant in UNIFORM])
def test_under_bfloat16_they_differ_by_its_rounding(recipe: str, kernels: str) -> None:
    x, g = torch.randn(2, 3, 128).bfloat16(), torch.randn(2, 3, 5).bfloat16()
    with native.using(kernels):
        fake, exact = twins(recipe, bias=False)
        wanted = step(fake, x.double(), g.double())
        got = step(exact, x.float(), g, autocast=True)
        assert got["y"].dtype == torch.bfloat16
        assert torch.equal(got["y"], wanted["y"].bfloat16()) or recipe == "absmax-w2a2"  # one rounding in all
        assert_near(got, wanted, 2**-7)
        assert_near(step(exact, x, g, autocast=True), {**wanted, "y": got["y"]}, 0.02)


def test_float64_stays_float64() -> None:
    fake, exact = twins("bbq-w2a2")
    x, g = torch.randn(3, 128, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    assert_near(step(exact.double(), x, g), step(fake, x, g), 1e-12)


@pytest.mark.parametrize("shape", [(128,), (1, 128), (0, 128), (2, 0, 128), (2, 2, 2, 128)])
@pytest.mark.parametrize("recipe", ["bbq-w2a2", "bbq-token-w2a2", "lsq-plus-w2a2"])
def test_inputs_of_any_rank(recipe: str, shape: tuple[int, ...]) -> None:
    fake, exact = twins(recipe)
    x, g = torch.randn(shape), torch.randn(*shape[:-1], 5)
    assert_near(step(exact, x, g), step(fake, x.double(), g.double()), 1e-5)


@pytest.mark.parametrize("recipe", ["bbq-w2a2", "bbq-token-w2a2", "quest-w2a2"])
def test_nan_in_the_input_is_nan_in_the_output(recipe: str) -> None:
    _, exact = twins(recipe)
    x = torch.randn(3, 128)
    x[1, 7] = torch.nan
    for training in (True, False):
        assert exact.train(training)(x)[1].isnan().all()


# Memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if name not in TABLES])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_values_take_no_memory_and_carry_the_gradient(method: str, kernels: str) -> None:
    kind = METHODS[method]
    quantizer: Quantizer = kind(bits=min(kind.widths, key=lambda b: abs(b - 2)))
    x = torch.randn(16, 128)
    quantizer.calibrate(x)
    with native.using(kernels):
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        q, plain = quantizer.quantize_codes(ours), quantizer.quantize(theirs)
        assert q.values.shape == plain.values.shape
        assert q.values.untyped_storage().nbytes() <= 8
        assert torch.equal(q.codes, plain.codes)
        torch.testing.assert_close(q.step, plain.step, rtol=1e-6, atol=0)
        g = torch.randn(16, 128)
        q.values.backward(g)
        plain.values.backward(g)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def kept_bytes(layer: nn.Module, x: Tensor, autocast: bool) -> int:
    """Bytes of distinct storages that a forward pass saves, beside the layer's own and its input."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers(), x)}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        y = layer(x)
    total = sum(kept.values())
    del y
    return total


@pytest.mark.parametrize(("autocast", "per_input"), [(False, 1 + 4), (True, 1 + 2)])
def test_codes_and_the_rotated_input_are_what_bbq_keeps(autocast: bool, per_input: int) -> None:
    """Of the input a code and the rotated number, of the weight a code; steps and such are a few bytes a row."""
    _, exact = twins("bbq-w2a2", bias=False, out=24)
    x = torch.randn(64, 128)
    bulk = per_input * x.numel() + exact.weight.numel()
    assert bulk <= kept_bytes(exact, x, autocast) <= bulk + 16 * (24 + 2)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_compact_keeps_one_byte_an_input_and_nearly_the_gradient(kernels: str) -> None:
    with native.using(kernels):
        fake, exact = twins("bbq-w2a2", bias=False, out=24)
        exact.multiply_integers(compact=True)
        x, g = torch.randn(64, 128), torch.randn(64, 24)
        for autocast in (False, True):
            bulk = x.numel() + exact.weight.numel()
            assert bulk <= kept_bytes(copy.deepcopy(exact), x, autocast) <= bulk + 16 * (24 + 2)
        got, wanted = step(exact, x, g), step(fake, x.double(), g.double())
        assert_near({name: got[name] for name in ("y", "weight")}, {n: wanted[n] for n in ("y", "weight")}, 1e-5)
        assert_near(got, wanted, 0.006)


# Models ------------------------------------------------------------------------------------------------------


def llama(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    return bitbell.calibrate(quantize(model, "bbq-w2a2", **options), tokens())


def tokens() -> Tensor:
    return torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(0))


def loss_and_gradients(model: Any, run: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = (model if run is None else run)(input_ids=tokens(), labels=tokens(), use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def test_a_model_has_the_loss_and_the_gradients_of_its_fake_quantized_twin() -> None:
    fake, exact = llama(), llama(integer_forward=True)
    assert fake.state_dict().keys() == exact.state_dict().keys()
    (loss, gradients), (wanted, others) = loss_and_gradients(exact.train()), loss_and_gradients(fake.train())
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    assert_near(gradients, others, 1e-4)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kernels", "compact"), [("auto", False), ("auto", True), ("reference", False)])
def test_a_model_compiles_into_one_graph(kernels: str, compact: bool, backend: str) -> None:
    torch._dynamo.reset()
    with native.using(kernels):
        model, twin = (llama(integer_forward=True, compact=compact).train() for _ in range(2))
        compiled = torch.compile(twin, fullgraph=True, dynamic=False, backend=backend)
        (loss, gradients), (wanted, others) = loss_and_gradients(twin, compiled), loss_and_gradients(model)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    assert_near(gradients, others, 1e-4)


def test_every_method_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    for recipe in ("quest-w2a2", "lsq-w2a2", "lsq-plus-w2a2", "n2uq-w2a2", "absmax-w4a4"):
        fake, exact = twins(recipe)
        compiled = torch.compile(exact, fullgraph=True, backend="aot_eager")
        x, g = torch.randn(3, 128), torch.randn(3, 5)
        got = {name.removeprefix("_orig_mod."): t for name, t in step(compiled, x, g).items()}
        assert_near(got, step(fake, x.double(), g.double()), 1e-5)


# What cannot be --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("nf-w4a4", "even levels, and those of nf"),
        ("bbq-w2a4:activation_method=nf", "even levels, and those of nf"),
        ("quest-fp4-w4a4", "even levels, and those of quest-fp4"),
        ("bbq-w2a16", "needs quantized activations"),
    ],
)
def test_layers_without_integers_are_refused_by_name(recipe: str, words: str) -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 4))
    with pytest.raises(ValueError, match=f"^0: integer_forward needs.*{words.removeprefix('needs ')}"):
        quantize(model, recipe, integer_forward=True)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("recipe", ["lsq-w2a2", "bbq-w2a4:activation_method=lsq", "bbq-w2a2:a.estimator=clip"])
def test_compact_is_refused_where_a_byte_is_not_enough(recipe: str) -> None:
    with pytest.raises(ValueError, match=r"^0: compact is for"):
        quantize(nn.Sequential(nn.Linear(128, 128)), recipe, integer_forward=True, compact=True)
    with pytest.raises(ValueError, match="compact=True with integer_forward=False"):
        quantize(nn.Sequential(nn.Linear(128, 128)), recipe, compact=True)


def test_convolutions_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3))
    with pytest.raises(ValueError, match=r"^1: integer_forward is for linear layers"):
        quantize(model, "bbq-w2a2", integer_forward=True)
