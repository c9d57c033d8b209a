"""calibrate(): every scale from one forward pass, and what stands in the way of it."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitbell.layers import calibrate, quantize, quantized_layers
from bitbell.layers.swap import quantizers


class Pair(nn.Module):
    """Two layers and two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return self.second(torch.relu(self.first(x)) * factor)


class Attention(nn.Module):
    """Siblings that may be fed different tensors, run more than once, or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor, memory: Tensor | None = None, rounds: int = 1) -> Tensor:
        memory = x if memory is None else memory
        for _ in range(rounds):
            x = torch.tanh(self.q_proj(x) + self.k_proj(memory) + self.v_proj(memory))
            memory = x
        return x


def pair(recipe: str = "bbq-w2a2") -> Pair:
    torch.manual_seed(0)
    return quantize(Pair(), recipe)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("recipe", ["bbq-w2a2", "bbq-tensor-w2a2", "quest-w2a2", "lsq-w2a2", "bbq-w2a16"])
def test_every_quantizer_is_calibrated_on_what_it_will_see(recipe: str) -> None:
    model = pair(recipe)
    x = torch.randn(5, 32)
    assert calibrate(model, x) is model
    assert all(q.calibrated.item() for _, q in quantizers(model))
    fresh = pair(recipe)
    fresh.first.weight_quantizer.calibrate(fresh.first.weight)
    fresh.second.weight_quantizer.calibrate(fresh.second.weight)
    if fresh.first.activation_quantizer is not None:
        fresh.first.activation_quantizer.calibrate(x)
        with torch.no_grad():
            fresh.second.activation_quantizer.calibrate(torch.relu(fresh.first.eval()(x)))
    for name, tensor in fresh.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, msg=name)


@pytest.mark.parametrize(
    "batch",
    [torch.ones(2, 32), (torch.ones(2, 32),), [torch.ones(2, 32), 1.0], {"x": torch.ones(2, 32), "factor": 1.0}],
)
def test_a_batch_may_be_a_tensor_a_tuple_or_keywords(batch: Any) -> None:
    expected = state(calibrate(pair(), torch.ones(2, 32)))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state(calibrate(pair(), batch)).items())


def test_a_second_calibration_changes_nothing_unless_asked_to() -> None:
    model = calibrate(pair(), torch.randn(5, 32))
    before = state(model)
    calibrate(model, 9 * torch.randn(5, 32))
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())
    calibrate(model, 9 * torch.randn(5, 32), again=True)
    key = "first.activation_quantizer.scale"
    assert model.state_dict()[key] > 4 * before[key]


def test_only_what_has_no_scale_yet_is_calibrated() -> None:
    model = pair()
    model.first.weight_quantizer.calibrate(3 * model.first.weight)
    before = model.first.weight_quantizer.scale.clone()
    calibrate(model, torch.randn(5, 32))
    assert torch.equal(model.first.weight_quantizer.scale, before)
    assert model.second.weight_quantizer.calibrated.item()


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_left_as_they_were_even_of_single_modules(training: bool) -> None:
    model = pair().train(training)
    model.second.train(not training)
    calibrate(model, torch.randn(5, 32))
    assert model.training == model.first.training == training
    assert model.second.training == (not training)


def test_calibration_makes_no_gradients_and_leaves_no_hooks() -> None:
    model = calibrate(pair(), torch.randn(5, 32))
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_running_average_is_set_and_not_moved() -> None:
    x = torch.randn(5, 32)
    model = calibrate(pair(), x)
    assert model.first.activation_quantizer.running_inverse_rms.item() == pytest.approx(
        1 / x.square().mean().sqrt().item(), rel=1e-5
    )


# What stands in the way -------------------------------------------------------------------------------------


def test_a_weight_with_nan_is_refused_naming_the_layer() -> None:
    model = pair()
    with torch.no_grad():
        model.second.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"weight of second: cannot calibrate bbq on a tensor with NaN or infinity"):
        calibrate(model, torch.randn(5, 32))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.training


@pytest.mark.parametrize(
    ("batch", "what"), [(torch.full((2, 32), float("inf")), "NaN or infinity"), (torch.zeros(0, 32), "an empty")]
)
def test_an_input_that_says_nothing_is_refused_naming_the_layer(batch: Tensor, what: str) -> None:
    with pytest.raises(ValueError, match=rf"input of first: cannot calibrate bbq on .*{what}"):
        calibrate(pair(), batch)


def test_layers_that_the_batch_does_not_reach_are_named() -> None:
    model = nn.Module()
    model.used, model.unused = nn.Linear(32, 32), nn.Linear(32, 32)
    model.forward = lambda x: model.used(x)  # type: ignore[method-assign]
    quantize(model, "bbq-w2a2")
    with pytest.raises(ValueError, match=r"the batch did not reach 2 quantizers.*unused.weight_quantizer"):
        calibrate(model, torch.randn(2, 32))


def test_siblings_fed_different_tensors_are_refused_with_the_remedy() -> None:
    x, memory = torch.randn(2, 32), torch.randn(2, 32)
    model = quantize(Attention(), "bbq-w2a2")
    with pytest.raises(
        ValueError, match=r"k_proj and q_proj share one activation quantizer but are fed different.*share_inputs=False"
    ):
        calibrate(model, (x, memory))
    calibrate(quantize(Attention(), "bbq-w2a2", share_inputs=False), (x, memory))


def test_a_block_that_runs_more_than_once_may_share_its_inputs() -> None:
    model = calibrate(quantize(Attention(), "bbq-w2a2"), {"x": torch.randn(2, 32), "rounds": 3})
    assert all(layer.shared_input is not None for _, layer in quantized_layers(model))


@pytest.mark.parametrize("again", [True, False])
def test_what_runs_more_than_once_is_calibrated_on_its_first_input(again: bool) -> None:
    x = 9 * torch.randn(2, 32)
    model = quantize(Attention(), "bbq-w2a2")
    calibrate(model, {"x": x, "rounds": 3}, again=again)
    assert model.q_proj.activation_quantizer.scale.item() == pytest.approx(1.694 * x.square().mean().sqrt().item())


def test_a_model_without_quantized_layers_is_just_run() -> None:
    model = nn.Sequential(OrderedDict(a=nn.Linear(4, 4)))
    assert calibrate(model, torch.randn(2, 4)) is model
