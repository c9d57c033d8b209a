"""What an integer forward is for: the packed layer has the very accumulators of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bitbell
import bitbell.packing.layers as packed_layers
from bitbell.kernels import native
from bitbell.kernels import training as training_kernels
from bitbell.layers import QuantLinear
from bitbell.layers.recipes import VARIANTS
from bitbell.packing import PackedLinear
from bitbell.quantizers import METHODS

TABLES = ("nf", "quest-fp4")
UNIFORM = [variant for variant, (method, _, _) in VARIANTS.items() if method not in TABLES]


class Recorded:
    """`integer_product`, and every result of it."""

    def __init__(self, product: Callable[..., Tensor]) -> None:
        self.product, self.results = product, []

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        self.results.append(self.product(a, b))
        return self.results[-1]


def named(variant: str, bits: int) -> str:
    method = METHODS[VARIANTS[variant][0]]
    inputs = METHODS[method.activation_method or method.method]
    w, a = (min(kind.widths, key=lambda b: abs(b - bits)) for kind in (method, inputs))
    return f"{variant}-w{w}a{a}"


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("variant", UNIFORM)
def test_accumulators_are_equal(
    make_layer: Callable[..., QuantLinear], monkeypatch: pytest.MonkeyPatch, variant: str, bits: int
) -> None:
    trained = make_layer(named(variant, bits), bias=True)
    packed = PackedLinear.from_trained(trained, trained.activation_quantizer)
    trained.multiply_integers()
    ours, theirs = Recorded(training_kernels.integer_product), Recorded(packed_layers.integer_product)
    monkeypatch.setattr(training_kernels, "integer_product", ours)
    monkeypatch.setattr(packed_layers, "integer_product", theirs)
    x = 3 * torch.randn(7, 64, generator=torch.Generator().manual_seed(bits))
    y, again = trained(x).detach(), packed(x)
    assert [t.dtype for t in (*ours.results, *theirs.results)] == [torch.int32] * 2
    assert torch.equal(ours.results[0], theirs.results[0])
    assert torch.equal(y, again)


@pytest.mark.skipif(native.extension is None, reason="installed without the C++ extension")
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("variant", ["bbq", "bbq-token"])
def test_bbq_on_the_kernels_is_the_packed_layer_on_the_kernels(
    make_layer: Callable[..., QuantLinear], variant: str, bits: int
) -> None:
    """Its codes come from one routine; those of weights are packed by the definition, and none lies on a threshold
    here."""
    trained = make_layer(named(variant, bits), width=192, bias=True)
    packed = PackedLinear.from_trained(trained, trained.activation_quantizer)
    trained.multiply_integers()
    x = 3 * torch.randn(17, 192, generator=torch.Generator().manual_seed(bits))
    with native.using("auto"), torch.no_grad():
        w = trained.weight_quantizer.quantize_codes(trained.weight)
        assert torch.equal(w.codes + 2 ** (bits - 1), packed.weight_codes())
        assert torch.equal(trained(x), packed(x))


def test_a_model_is_verified(make_llama: Callable[..., Any], tokens: Tensor) -> None:
    model = make_llama("bbq-w2a2", integer_forward=True)
    packed = bitbell.pack(model)
    bitbell.verify(model, packed)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, packed(tokens).logits)
