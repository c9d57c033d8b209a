"""Packed layers through Triton's interpreter; `test_gpu_layers.py` runs this file in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import bitbell
from bitbell.kernels import native, triton
from bitbell.kernels.triton import product
from bitbell.layers import QuantLinear
from bitbell.layers.recipes import VARIANTS
from bitbell.packing import PackedLinear, gpu
from bitbell.quantizers import METHODS, Quantized

MakeLayer = Callable[..., QuantLinear]
MakeLlama = Callable[..., Any]
OPTIONS = [
    "bbq-w3a2:w.learn_offset=true",
    "bbq-w2a4:a.learn_offset=true,zero_point=-0.25,a.granularity=token",
    "lsq-plus-w2a2:w.asymmetric=true,w.granularity=row",
    "ternary-w2a4:w.granularity=row,activation_method=quest,rotation=16",
    "lsq-w8a8",
    "absmax-w5a7",
    "bbq-w6a16:learn_offset=true",
    "nf-w2a16",
    "quest-w3a16",
]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def recipes() -> Iterator[str]:
    for variant, (method, _, _) in VARIANTS.items():
        if variant == "bbq-vision":  # of convolutions
            continue
        widths = METHODS[method].widths
        inputs_of = METHODS[METHODS[method].activation_method or method].widths
        yield f"{variant}-w{min({1, 2, 4} & set(widths))}a{max({1, 2, 4} & set(inputs_of))}"


@pytest.fixture(autouse=True)
def one_quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes come from the definitions on both ways: what is compared here is the product."""
    quantize_input = PackedLinear.quantize_input

    def by_definition(layer: PackedLinear, x: Tensor) -> Quantized:
        with triton.using("off"):
            return quantize_input(layer, x)

    monkeypatch.setattr(PackedLinear, "quantize_input", by_definition)


def pack_layer(trained: QuantLinear) -> PackedLinear:
    return PackedLinear.from_trained(trained, trained.activation_quantizer)


@pytest.mark.parametrize("recipe", [*recipes(), *OPTIONS])
def test_packed_layers_of_every_method(recipe: str, make_layer: MakeLayer) -> None:
    trained = make_layer(recipe, rows=5, bias=True)
    packed = pack_layer(trained)
    for rows in (1, 6):
        x = torch.randn(rows, 64, generator=generator(rows))
        assert gpu.suits(packed, x)
        with torch.no_grad():
            found = packed(x)
            with triton.using("off"), native.using(native.REFERENCE):
                expected = packed(x)
        if "nf" in recipe or "fp4" in recipe or "a16" in recipe:  # sums of floats
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
        else:
            assert torch.equal(found, expected)


def test_inputs_in_bfloat16_keep_their_type(make_layer: MakeLayer) -> None:
    packed = pack_layer(make_layer("quest-w2a2", rows=3))
    x = torch.randn(2, 3, 64, generator=generator(0)).bfloat16()
    with torch.no_grad():
        y = packed(x)
        with triton.using("off"), native.using(native.REFERENCE):
            expected = packed(x)
    assert y.dtype == torch.bfloat16
    assert y.shape == (2, 3, 3)
    assert torch.allclose(y.float(), expected.float(), rtol=2**-7)


def test_a_layer_notices_that_it_was_changed(make_layer: MakeLayer) -> None:
    packed, x = pack_layer(make_layer("bbq-w2a2", rows=3)), torch.randn(1, 64, generator=generator(0))
    with torch.no_grad():
        before = packed(x)
        packed.weight_scale.mul_(2)
        assert torch.equal(packed(x), 2 * before)


def test_gradients_go_through_the_definition(make_layer: MakeLayer) -> None:
    packed, x = pack_layer(make_layer("bbq-w2a2", rows=3)), torch.randn(2, 64, requires_grad=True)
    packed(x).sum().backward()
    assert x.grad is not None


def test_a_model_says_what_it_says_on_the_definitions(make_llama: MakeLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, tokens = bitbell.pack(make_llama("bbq-w2a2")), torch.randint(0, 96, (1, 6), generator=generator(1))
    with torch.no_grad(), triton.using("off"), native.using(native.REFERENCE):
        expected = packed(tokens).logits
    calls = []
    many = product._many
    monkeypatch.setattr(product, "_many", lambda *args, **tile: calls.append(1) or many(*args, **tile))
    with torch.no_grad():
        assert torch.allclose(packed(tokens).logits, expected, atol=1e-5)
    assert len(calls) == 7
