"""QuantConv1D: QuantLinear of the transposed weight, bit for bit, under Conv1D's own names."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitbell.layers import QuantConv1D, QuantLinear, calibrate, quantize

RECIPES = ["bbq-w2a2", "bbq-tensor-w4a4", "quest-w3a4", "quest-tuned-w1a1", "lsq-w2a2", "lsq-w1a8", "bbq-w2a16"]


def pair(recipe: str) -> tuple[QuantConv1D, QuantLinear]:
    """A Conv1D layer and the nn.Linear layer of the same numbers, quantized and calibrated."""
    torch.manual_seed(0)
    conv, linear = Conv1D(24, 64), nn.Linear(64, 24)
    with torch.no_grad():
        conv.bias.normal_()
        linear.weight.copy_(conv.weight.T)
        linear.bias.copy_(conv.bias)
    twins = QuantConv1D.from_linear(conv, recipe), QuantLinear.from_linear(linear, recipe)
    for twin in twins:
        calibrate(nn.Sequential(twin), torch.randn(8, 64, generator=torch.Generator().manual_seed(1)))
    return twins


def gradients(layer: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return y, {"x": x.grad} | {name: parameter.grad for name, parameter in layer.named_parameters()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_outputs_gradients_and_codes_are_those_of_the_transposed_linear_layer(recipe: str) -> None:
    conv, linear = pair(recipe)
    x = torch.randn(2, 5, 64)
    (y, ours), (expected, theirs) = gradients(conv, x), gradients(linear, x)
    assert torch.equal(y, expected)
    assert ours.keys() == theirs.keys()
    assert ours.pop("weight").shape == (64, 24)
    assert torch.equal(conv.weight.grad.T, theirs.pop("weight"))
    for name, gradient in ours.items():
        assert torch.equal(gradient, theirs[name]), name
    assert torch.equal(conv.weight_codes(), linear.weight_codes())
    assert conv.weight_codes().shape == (24, 64)


def test_it_keeps_parameters_keys_mode_and_kind_of_the_layer_it_replaces() -> None:
    conv = Conv1D(24, 64).eval()
    layer = QuantConv1D.from_linear(conv, "bbq-w2a2")
    assert isinstance(layer, Conv1D)
    assert layer.weight is conv.weight
    assert layer.bias is conv.bias
    assert not layer.training
    assert {name for name in layer.state_dict() if "quantizer" not in name} == set(conv.state_dict())
    assert repr(layer).startswith("QuantConv1D(\n  nf=24, nx=64, recipe=bbq-w2a2")


def test_a_new_layer_takes_the_state_of_a_trained_one_and_a_copy_is_equal() -> None:
    trained = pair("bbq-w2a2")[0].eval()
    fresh, x = QuantConv1D(24, 64, "bbq-w2a2").eval(), torch.randn(3, 64)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(x), trained(x))
    assert torch.equal(copy.deepcopy(trained)(x), trained(x))


def test_a_layer_on_the_meta_device_stays_there() -> None:
    with torch.device("meta"):
        conv = Conv1D(24, 64)
    layer = QuantConv1D.from_linear(conv, "lsq-w2a2")
    assert all(tensor.is_meta for tensor in layer.state_dict().values())


def test_widths_that_cannot_be_rotated_and_single_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="100"):
        QuantConv1D(24, 100, "bbq-w2a2")
    with pytest.raises(ValueError, match=r"for a single layer use QuantConv1D\.from_linear"):
        quantize(Conv1D(24, 64), "bbq-w2a2")


def test_a_subclass_of_conv1d_is_left_alone_with_the_reason() -> None:
    class Special(Conv1D):
        pass

    model = quantize(nn.Sequential(Special(32, 32), Conv1D(32, 32)), "bbq-w2a2")
    assert model.__dict__["kept_in_full_precision"] == {"0": "a Special is not a plain Conv1D"}


def test_models_without_conv1d_do_not_load_transformers() -> None:
    script = (
        "import sys, torch, bitbell, bitbell.layers as layers;"
        "bitbell.quantize(torch.nn.Sequential(torch.nn.Linear(32, 32)), 'bbq-w2a2');"
        "print('transformers' in sys.modules); layers.QuantConv1D; print('transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "True"]
