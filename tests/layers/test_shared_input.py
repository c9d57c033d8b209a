"""q, k and v are fed the same tensor: one quantizer, one call, the same numbers as three."""

import copy

import pytest
import torch
from torch import Tensor, nn

from bitbell.layers import SharedInput, calibrate, quantize, quantized_layers
from bitbell.layers.swap import quantizers
from bitbell.quantizers import BBQ, Quantizer

NAMES = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(128, n) for n in (16, 24, 24))
        self.gate_proj, self.up_proj = nn.Linear(128, 8), nn.Linear(128, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = 2 * x
        parts = self.q_proj(x), self.k_proj(x), self.v_proj(x), self.gate_proj(y), self.up_proj(y)
        return torch.cat(parts, dim=-1)


def build(recipe: str = "bbq-w2a2", share_inputs: bool = True, seed: int = 0) -> Attention:
    torch.manual_seed(seed)
    model = Attention()
    quantize(model, recipe, share_inputs=share_inputs)
    calibrate(model, torch.randn(4, 128))
    return model


class Calls:
    """Counts the tensors that a quantizer is asked to quantize."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.count, self._quantize = 0, quantizer.quantize
        quantizer.quantize = self  # type: ignore[method-assign, assignment]

    def __call__(self, x: Tensor) -> object:
        self.count += 1
        return self._quantize(x)


def test_siblings_share_one_quantizer_and_others_do_not() -> None:
    model = build()
    assert model.q_proj.activation_quantizer is model.k_proj.activation_quantizer is model.v_proj.activation_quantizer
    assert model.gate_proj.activation_quantizer is model.up_proj.activation_quantizer
    assert model.gate_proj.activation_quantizer is not model.q_proj.activation_quantizer
    assert model.q_proj.weight_quantizer is not model.k_proj.weight_quantizer


def test_the_shared_quantizer_is_in_the_state_and_among_the_parameters_once() -> None:
    model = build()
    keys = [key for key in model.state_dict() if "activation_quantizer.scale" in key]
    assert keys == ["q_proj.activation_quantizer.scale", "gate_proj.activation_quantizer.scale"]
    assert [name for name, _ in model.named_parameters() if "activation" in name] == keys
    assert sum("activation" in name for name, _ in quantizers(model)) == 2


@pytest.mark.parametrize("grad", [True, False])
def test_the_shared_quantizer_is_called_once_a_forward_pass(grad: bool) -> None:
    model = build()
    calls = Calls(model.q_proj.activation_quantizer), Calls(model.gate_proj.activation_quantizer)
    for passes in (1, 2, 3):
        with torch.set_grad_enabled(grad):
            model(torch.randn(2, 128))
        assert [c.count for c in calls] == [passes, passes]


def test_the_same_input_twice_is_quantized_twice() -> None:
    model = build()
    calls = Calls(model.q_proj.activation_quantizer)
    x = torch.randn(2, 128)
    model(x), model(x)
    assert calls.count == 2


@pytest.mark.parametrize(
    "recipe",
    [
        *("bbq-w2a2", "bbq-token-w4a4", "bbq-w2a2:learn_offset=true", "quest-w2a2", "absmax-w2a2"),
        *("lsq-w2a2", "lsq-plus-w2a2", "n2uq-w3a3", "seq-w2a2", "pact-w4a4", "nf-w3a3:a.granularity=running"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_shared_and_unshared_inputs_give_the_same_output_and_gradients(recipe: str, training: bool) -> None:
    shared, unshared = build(recipe).double(), build(recipe, share_inputs=False).double()
    x = torch.randn(3, 128, dtype=torch.float64)
    grads = []
    for model in (shared.train(training), unshared.train(training)):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.backward(torch.ones_like(y).cumsum(-1))
        grads.append((y.detach(), leaf.grad, model.q_proj.weight.grad, model.up_proj.weight.grad))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)
    for name, parameter in shared.q_proj.activation_quantizer.named_parameters():
        parts = [getattr(unshared, layer).activation_quantizer.get_parameter(name).grad for layer in NAMES]
        torch.testing.assert_close(parameter.grad, sum(parts), rtol=1e-11, atol=1e-12)
    for name, moved in shared.q_proj.activation_quantizer.named_buffers():
        torch.testing.assert_close(moved, unshared.q_proj.activation_quantizer.get_buffer(name), rtol=1e-12, atol=0)


def test_a_deep_copy_shares_within_itself_and_with_nothing_else() -> None:
    model = build()
    model.q_proj(torch.randn(2, 128))  # leaves something kept
    twin = copy.deepcopy(model)
    assert twin.q_proj.activation_quantizer is twin.v_proj.activation_quantizer
    assert twin.q_proj.shared_input is twin.v_proj.shared_input
    assert twin.q_proj.shared_input is not model.q_proj.shared_input
    assert twin.q_proj.shared_input.quantizer is twin.q_proj.activation_quantizer
    assert twin.q_proj.activation_quantizer is not model.q_proj.activation_quantizer
    x = torch.randn(2, 128)
    assert torch.equal(model.eval()(x), twin.eval()(x))


def test_moving_the_model_moves_the_shared_quantizer() -> None:
    model = build().double()
    assert model.v_proj.activation_quantizer.scale.dtype == torch.float64
    assert model.v_proj.shared_input.quantizer.scale is model.q_proj.activation_quantizer.scale


@torch.no_grad()
def test_a_layer_called_alone_sees_every_change() -> None:
    model = build().eval()
    x = torch.randn(2, 128)
    first = model.k_proj(x)
    assert torch.equal(model.k_proj(x), first)
    model.q_proj.activation_quantizer.scale.mul_(2)
    torch.testing.assert_close(model.k_proj(x) - model.k_proj.bias, 2 * (first - model.k_proj.bias))


def test_a_layer_called_alone_twice_has_a_graph_of_its_own_each_time() -> None:
    model = build()
    calls = Calls(model.q_proj.activation_quantizer)
    x = torch.randn(2, 128, requires_grad=True)
    for _ in range(2):
        model.k_proj(x).sum().backward()
    assert calls.count == 2


@torch.no_grad()
@pytest.mark.parametrize(
    ("recipe", "changed"),
    [
        ("bbq-w2a2", "scale"),
        ("bbq-w2a2:learn_offset=true,learn_scale=false", "offset"),
        ("n2uq-w2a2", "segments"),
        ("lsq-plus-w2a2", "offset"),
    ],
)
def test_a_sibling_called_later_sees_a_changed_parameter_and_a_changed_input(recipe: str, changed: str) -> None:
    model = build(recipe).eval()
    x = torch.randn(2, 128)
    fresh = copy.deepcopy(model)
    model.q_proj(x)
    for m in (model, fresh):
        getattr(m.q_proj.activation_quantizer, changed).mul_(2).add_(0.5)
    assert torch.equal(model.k_proj(x), fresh.k_proj(x.clone()))
    model.q_proj(x)
    x.mul_(-1)
    assert torch.equal(model.v_proj(x), fresh.v_proj(x.clone()))


def test_nothing_kept_without_gradients_is_used_with_them() -> None:
    model = build()
    x = torch.randn(2, 128, requires_grad=True)
    with torch.no_grad():
        model.q_proj(x)
    model.k_proj(x).sum().backward()
    assert x.grad is not None


def test_nothing_kept_in_training_is_used_in_evaluation() -> None:
    model = build()
    x = 5 * torch.randn(2, 128)
    with torch.no_grad():
        model.train().q_proj(x)
        model.eval()
        assert torch.equal(model.k_proj(x), copy.deepcopy(model).k_proj(x.clone()))


def test_inference_mode_works_as_no_grad_does() -> None:
    model = build().eval()
    x = torch.randn(2, 128)
    with torch.no_grad():
        expected = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
        assert torch.equal(model(x.clone()), expected)


def test_after_a_full_pass_nothing_is_kept() -> None:
    shared = SharedInput(BBQ(2), 3)
    shared.quantizer.calibrate(torch.randn(2, 128))
    x = torch.randn(2, 128)
    kept = [shared.quantize(x, place) for place in range(3)]
    assert kept[0] is kept[1] is kept[2]
    assert shared._kept is None


def test_sharing_needs_all_siblings_one_recipe_and_quantized_inputs() -> None:
    for rules in ({"q_proj": "bbq-w4a4", "*_proj": "bbq-w2a2"}, {"q_proj": None, "*": "bbq-w2a2"}):
        model = quantize(Attention(), rules)
        assert model.k_proj.shared_input is None
        assert model.gate_proj.shared_input is not None
    model = quantize(Attention(), "bbq-w2a16")
    assert all(layer.shared_input is None for _, layer in quantized_layers(model))
    model = quantize(Attention(), "bbq-w2a2", share_inputs=False)
    assert all(layer.shared_input is None for _, layer in quantized_layers(model))


def test_state_of_a_shared_model_round_trips() -> None:
    model, fresh = build(), quantize(Attention(), "bbq-w2a2")
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(2, 128)
    assert torch.equal(model.eval()(x), fresh.eval()(x))
