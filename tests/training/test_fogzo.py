"""FOGZO: the estimator and its noise by numbers, what it leaves untouched, and runs that use it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitbell.kernels import rotate
from bitbell.layers import QuantConv2d, QuantLinear, calibrate, quantize, quantized_layers
from bitbell.models import build_model
from bitbell.quantizers import make_quantizer
from bitbell.training import Fogzo, TrainConfig, TrainingDiverged, train
from bitbell.training.checkpoint import list_checkpoints
from bitbell.training.fogzo import EPS, Correction, beta_at, draw_noise
from bitbell.training.journal import read_metrics
from bitbell.training.run import load_run

Make = Callable[..., TrainConfig]
QUICK = {"final_windows": 4, "evaluate_every": 1000, "entropy_every": 1000, "checkpoint_every": 1000, "batch_size": 2}


# Noise ---------------------------------------------------------------------------------------------------------------


def noise(shape: str, size: int = 400_000) -> Tensor:
    return draw_noise(shape, torch.empty(size, dtype=torch.float64), torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("shape", "reach"), [("uniform", 3**0.5), ("triangular", 6**0.5), ("logistic", math.inf)])
def test_noise_has_mean_zero_variance_one_and_its_reach(shape: str, reach: float) -> None:
    u = noise(shape)
    assert float(u.mean()) == pytest.approx(0, abs=0.01)
    assert float(u.var()) == pytest.approx(1, abs=0.01)
    assert float(u.abs().max()) <= reach
    assert bool(torch.isfinite(u).all())


@pytest.mark.parametrize(("shape", "kurtosis"), [("uniform", 1.8), ("triangular", 2.4), ("logistic", 4.2)])
def test_noise_has_the_shape_that_it_is_called(shape: str, kurtosis: float) -> None:
    assert float(noise(shape).pow(4).mean()) == pytest.approx(kurtosis, abs=0.05)


def test_the_scales_of_the_paper() -> None:
    assert EPS["uniform"] == pytest.approx(0.28868, abs=1e-5)  # round with identity; a sign's bin is 2 wide:
    assert 2 * EPS["uniform"] == pytest.approx(0.57735, abs=1e-5)
    assert 2 * EPS["logistic"] == pytest.approx(0.90690, abs=1e-5)
    assert 2 * EPS["triangular"] == pytest.approx(0.40825, abs=1e-5)


@pytest.mark.parametrize("x", [-1.3, -0.5, 0.0, 0.2, 0.49, 2.75])
def test_uniform_noise_smooths_rounding_into_the_identity(x: float) -> None:
    assert float((x + EPS["uniform"] * noise("uniform")).round().mean()) == pytest.approx(x, abs=0.004)


@pytest.mark.parametrize("x", [-1.5, -0.8, -0.1, 0.0, 0.3, 0.9, 2.0])
@pytest.mark.parametrize(
    ("shape", "surrogate"),
    [
        ("uniform", lambda x: max(-1.0, min(x, 1.0))),
        ("logistic", math.tanh),
        ("triangular", lambda x: 2 * x - x * abs(x) if abs(x) < 1 else math.copysign(1, x)),
    ],
)
def test_noise_smooths_the_sign_into_its_surrogate(shape: str, surrogate: Callable[[float], float], x: float) -> None:
    assert float((x + 2 * EPS[shape] * noise(shape)).sign().mean()) == pytest.approx(surrogate(x), abs=0.006)


# The estimator -------------------------------------------------------------------------------------------------------


class Quadratic:
    """A layer whose weight is used without quantization, in L = w A w / 2 + b w, and a gradient g that is not L's."""

    def __init__(self, recipe: str, rows: int, columns: int) -> None:
        torch.manual_seed(3)
        self.layer = QuantLinear(columns, rows, recipe, bias=False, dtype=torch.float64)
        calibrate(self.layer, torch.randn(4, columns, dtype=torch.float64))
        size = rows * columns
        root = torch.randn(size, size, dtype=torch.float64) / size**0.5
        self.a, self.b = root @ root.T, torch.randn(size, dtype=torch.float64)
        self.g = torch.randn(rows, columns, dtype=torch.float64)
        self.layer.weight.grad = self.g.clone()

    def loss(self) -> Tensor:
        w = self.layer.weight.flatten()
        return w @ self.a @ w / 2 + self.b @ w

    def gradient(self) -> Tensor:
        return (self.a @ self.layer.weight.detach().flatten() + self.b).view_as(self.g)

    def eps(self) -> Tensor:
        bins = self.layer.weight_quantizer.bin_width(self.layer.weight.detach())
        return EPS["uniform"] * bins.expand(self.g.shape[0], 1)

    def corrected(self, beta: float, **options: int) -> Tensor:
        Fogzo(self.layer, **options).correct(self.loss, beta=beta, step=0)
        assert self.layer.weight.grad is not None
        return self.layer.weight.grad


def test_with_beta_one_the_gradient_is_the_direction_times_its_measured_slope() -> None:
    case = Quadratic("lsq-w2a16", 5, 10)  # one step for the whole weight
    unit = case.g / case.g.norm()
    expected = unit * (unit * case.gradient()).sum()
    assert torch.allclose(case.corrected(beta=1.0), expected, rtol=1e-9)


@pytest.mark.parametrize("recipe", ["quest-w2a16", "bbq-w3a16", "nf-w4a16"])
def test_rows_of_their_own_scale_keep_the_direction_of_the_gradient(recipe: str) -> None:
    case = Quadratic(recipe, 3, 16)
    with torch.no_grad():
        case.layer.weight.mul_(torch.tensor([[1.0], [5.0], [0.2]]))
    scaled = case.eps() * case.g
    slope = (scaled * case.eps() * case.gradient()).sum() / scaled.square().sum()
    assert torch.allclose(case.corrected(beta=1.0), slope * case.g, rtol=1e-9)


@pytest.mark.parametrize(("recipe", "rows", "columns"), [("lsq-w2a16", 2, 4), ("quest-w1a16", 2, 16)])
def test_the_mean_of_many_samples_mixes_the_direction_with_the_true_gradient(
    recipe: str, rows: int, columns: int
) -> None:
    case, beta = Quadratic(recipe, rows, columns), 0.6
    eps = case.eps()
    unit = eps * case.g / (eps * case.g).norm()
    along = unit * (unit * eps * case.gradient()).sum() / eps
    expected = beta * along + (1 - beta) * case.gradient()
    found = case.corrected(beta=beta, samples=6000)
    assert float((found - expected).norm() / expected.norm()) < 0.1
    assert float((found - case.gradient()).norm() / expected.norm()) > 0.3
    assert float((found - along).norm() / expected.norm()) > 0.3


@given(step=st.integers(0, 10**9), sign=st.sampled_from([-1, 1]))
@settings(max_examples=20, deadline=None)
def test_agreement_is_the_measured_slope_over_the_predicted_one(step: int, sign: int) -> None:
    layer = QuantLinear(16, 4, "quest-w2a16", dtype=torch.float64)
    slope = torch.linspace(-1, 1, 64, dtype=torch.float64).view(4, 16)
    layer.weight.grad = slope.clone()
    found = Fogzo(layer).correct(lambda: sign * 3 * (slope * layer.weight).sum(), beta=0.9, step=step)
    assert found.agreement == pytest.approx(sign * 3)


def moves_of(layer: QuantLinear, **options: str) -> list[Tensor]:
    """What the two probes of pure noise add to the weight, in the rotated domain."""
    seen, before = [], layer.weight.detach().clone()
    layer.weight.grad = torch.ones_like(before)

    def loss() -> float:
        seen.append(rotate(layer.weight.detach() - before, layer.weight_quantizer.rotation))
        return 0.0

    Fogzo(layer, **options).correct(loss, beta=0.0, step=0)  # type: ignore[arg-type]
    return seen


def test_noise_of_half_a_bin_is_uniform_where_rounding_happens() -> None:
    layer = QuantLinear(1024, 8, "quest-w3a16", dtype=torch.float64)
    up, down = moves_of(layer)
    width = layer.weight_quantizer.quantize(layer.weight.detach()).step
    assert torch.allclose(up, -down)
    assert float((up / width).abs().max()) == pytest.approx(0.5, abs=1e-3)
    assert float((up / width).abs().max()) <= 0.5 + 1e-9
    assert float((up / width).var()) == pytest.approx(1 / 12, rel=0.05)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_bin_of_bbq_is_one_code_wide_on_average(bits: int) -> None:
    x = torch.randn(2, 65536, dtype=torch.float64) * torch.tensor([[0.02], [3.0]])
    q = make_quantizer("bbq", bits=bits, rows=2, rotation=None)
    q.calibrate(x)
    x.requires_grad_()
    place = 2**bits * torch.special.ndtr(x / x.detach().square().mean(-1, keepdim=True).sqrt())
    (slope,) = torch.autograd.grad(place.sum(), x)
    rise = slope.mean(-1, keepdim=True) * q.bin_width(x)
    assert rise.flatten().tolist() == pytest.approx([1, 1], rel=0.01)


@pytest.mark.parametrize(
    ("method", "bits", "options", "width"),
    [
        ("quest", 2, {}, 2 * 1.4935346 / 3),
        ("quest", 1, {}, 2 * 0.7978846),
        ("bbq", 2, {}, math.sqrt(math.pi) / 2),
        ("bbq", 4, {"zero_point": -0.3}, math.sqrt(math.pi) / 8),
        ("narrow", 2, {}, 0.6744898),
        ("quest-fp4", 4, {}, 0.4870795 * 12 / 15),
    ],
)
def test_the_width_of_a_bin(method: str, bits: int, options: dict[str, float], width: float) -> None:
    x = torch.randn(3, 128, dtype=torch.float64)
    x *= torch.tensor([[1.0], [3.0], [0.1]]) / x.square().mean(-1, keepdim=True).sqrt()
    q = make_quantizer(method, bits=bits, rows=3, **options)
    q.calibrate(x)
    assert q.bin_width(x).flatten().tolist() == pytest.approx([width, 3 * width, 0.1 * width], rel=1e-6)


def test_learned_steps_are_bins_and_ternary_bins_are_its_scale() -> None:
    x = torch.randn(4, 32)
    lsq, ternary = make_quantizer("lsq", bits=3), make_quantizer("ternary", bits=2, rows=4)
    lsq.calibrate(x)
    assert torch.equal(lsq.bin_width(x), lsq.scale.detach())
    assert torch.allclose(ternary.bin_width(x), x.abs().mean(-1, keepdim=True))


# What it leaves as it was --------------------------------------------------------------------------------------------


@pytest.fixture
def llama() -> nn.Module:
    model = quantize(build_model("micro", seed=1), "bbq-w2a2")
    return calibrate(model, TOKENS).train()


TOKENS = torch.arange(64).view(2, 32)


def loss_of(model: nn.Module) -> Tensor:
    return model(TOKENS, labels=TOKENS).loss


def weights_and_others(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of quantized weights, and of everything else."""
    own = {f"{name}.weight" for name, _ in quantized_layers(model)}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {n: g for n, g in gradients.items() if n in own}, {n: g for n, g in gradients.items() if n not in own}


def test_only_gradients_of_quantized_weights_change_and_nothing_else_does(llama: nn.Module) -> None:
    loss_of(llama).backward()
    state = {name: t.clone() for name, t in llama.state_dict().items()}
    weights, others = weights_and_others(llama)
    random = torch.get_rng_state()
    Fogzo(llama).correct(lambda: loss_of(llama) + 0 * torch.rand(3).sum(), beta=0.9999, step=4)
    after, others_after = weights_and_others(llama)
    assert all(torch.equal(state[name], t) for name, t in llama.state_dict().items())
    assert any("running_inverse_rms" in name for name in state)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(others[name], g) for name, g in others_after.items())
    assert not any(torch.equal(weights[name], g) for name, g in after.items())
    shared = [layer.shared_input for _, layer in quantized_layers(llama) if layer.shared_input is not None]
    assert shared
    assert all(s._kept is None for s in shared)


def test_training_goes_on_as_if_the_probes_had_not_been(llama: nn.Module) -> None:
    import copy

    twin = copy.deepcopy(llama)
    for model in (llama, twin):
        loss_of(model).backward()
    Fogzo(llama).correct(lambda: loss_of(llama), beta=0.99, step=0)
    assert torch.equal(loss_of(llama), loss_of(twin))


def test_both_probes_see_the_same_random_numbers_and_leave_the_state(llama: nn.Module) -> None:
    seen = []

    def loss() -> Tensor:
        seen.append(torch.rand(4))
        return loss_of(llama)

    loss_of(llama).backward()
    torch.manual_seed(8)
    Fogzo(llama, samples=2).correct(loss, beta=0.99, step=0)
    following = torch.rand(4)
    assert len(seen) == 4
    assert all(torch.equal(s, following) for s in seen)


def test_one_seed_and_step_give_one_gradient(llama: nn.Module) -> None:
    def corrected(seed: int, step: int) -> Tensor:
        llama.zero_grad()
        loss_of(llama).backward()
        Fogzo(llama, seed=seed).correct(lambda: loss_of(llama), beta=0.999, step=step)
        return torch.cat([g.flatten() for g in weights_and_others(llama)[0].values()])

    torch.manual_seed(0)
    first = corrected(2, 7)
    torch.manual_seed(1)
    llama.eval()(TOKENS)
    llama.train()
    assert torch.equal(first, corrected(2, 7))
    assert not torch.equal(first, corrected(2, 8))
    assert not torch.equal(first, corrected(3, 7))


def test_statistics_that_a_module_replaces_come_back_too() -> None:
    class Counting(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))
            self.linear = QuantLinear(16, 2, "quest-w2a16")

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.seen + 1
            return self.linear(x).square().mean()

    model, x = Counting(), torch.randn(3, 16)
    model(x).backward()
    before = model.seen
    Fogzo(model).correct(lambda: model(x), beta=0.9, step=0)
    assert model.seen is before
    assert float(before) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_probe_that_is_not_finite_raises_and_leaves_weights_and_gradients(llama: nn.Module, value: float) -> None:
    loss_of(llama).backward()
    state, weights = {n: t.clone() for n, t in llama.state_dict().items()}, weights_and_others(llama)[0]
    losses = iter([1.0, value])
    with pytest.raises(TrainingDiverged, match=f"the loss of a FOGZO probe is {value}"):
        Fogzo(llama).correct(lambda: next(losses), beta=0.9, step=0)
    assert all(torch.equal(state[name], t) for name, t in llama.state_dict().items())
    assert all(torch.equal(weights[name], g) for name, g in weights_and_others(llama)[0].items())


def test_an_error_in_the_loss_leaves_the_weights(llama: nn.Module) -> None:
    loss_of(llama).backward()
    state = {n: t.clone() for n, t in llama.state_dict().items()}
    with pytest.raises(ZeroDivisionError):
        Fogzo(llama).correct(lambda: 1 / 0, beta=0.9, step=0)
    assert all(torch.equal(state[name], t) for name, t in llama.state_dict().items())


# Gradients of every kind ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_gradient_of_zero_stays_zero(beta: float) -> None:
    case = Quadratic("quest-w2a16", 2, 16)
    case.layer.weight.grad = torch.zeros_like(case.g)
    found = Fogzo(case.layer).correct(case.loss, beta=beta, step=0)
    assert torch.equal(case.layer.weight.grad, torch.zeros_like(case.g))
    assert found.agreement == 0


def test_single_weights_without_a_gradient_are_neither_moved_nor_corrected() -> None:
    case = Quadratic("quest-w2a16", 2, 16)
    still = torch.rand_like(case.g) < 0.5
    case.layer.weight.grad, before, moved = case.g.masked_fill(still, 0), case.layer.weight.detach().clone(), []

    def loss() -> Tensor:
        moved.append(case.layer.weight.detach() != before)
        return case.loss()

    Fogzo(case.layer).correct(loss, beta=0.5, step=0)
    assert all(torch.equal(m, ~still) for m in moved)
    assert torch.equal(case.layer.weight.grad == 0, still)


def test_a_gradient_that_is_not_finite_is_left_for_the_caller() -> None:
    case = Quadratic("quest-w2a16", 2, 16)
    case.layer.weight.grad[0, 0] = math.nan  # type: ignore[index]
    before = case.layer.weight.grad.clone()  # type: ignore[union-attr]
    found = Fogzo(case.layer).correct(lambda: 1 / 0, beta=0.9, step=0)
    assert math.isnan(found.loss)
    assert torch.equal(case.layer.weight.grad.nan_to_num(7), before.nan_to_num(7))  # type: ignore[union-attr]


def test_frozen_weights_are_neither_moved_nor_corrected() -> None:
    model = nn.Sequential(QuantLinear(16, 16, "quest-w2a16"), QuantLinear(16, 4, "quest-w2a16"))
    model[0].weight.requires_grad_(False)
    x, before, seen = torch.randn(5, 16), model[0].weight.clone(), []

    def loss() -> Tensor:
        seen.append(torch.equal(before, model[0].weight))
        return model(x).square().mean()

    loss().backward()
    Fogzo(model).correct(loss, beta=0.9, step=0)
    assert seen == [True] * 3
    assert model[0].weight.grad is None


def test_a_weight_in_two_places_counts_once() -> None:
    model = nn.Sequential(QuantLinear(16, 16, "quest-w2a16"), QuantLinear(16, 16, "quest-w2a16"))
    model[1].weight = model[0].weight
    assert Fogzo(model).num_weights == 256


def test_a_weight_stored_in_columns_is_corrected_like_one_in_rows() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    x, linear, conv = torch.randn(6, 32), nn.Linear(32, 16), conv1d(16, 32)
    with torch.no_grad():
        linear.weight.mul_(torch.logspace(-1, 1, 16)[:, None])
        conv.weight.copy_(linear.weight.T)
        conv.bias.copy_(linear.bias)
    gradients = []
    for layer in (linear, conv):
        model = calibrate(quantize(nn.Sequential(layer), "bbq-w2a16"), x)
        model(x).square().mean().backward()
        Fogzo(model, seed=4).correct(lambda model=model: model(x).square().mean(), beta=0.99, step=0)
        gradients.append(model[0].weight.grad)
    assert torch.allclose(gradients[0], gradients[1].T, rtol=1e-4, atol=1e-6)


def test_a_convolution_is_corrected_like_the_linear_layer_over_its_channels() -> None:
    torch.manual_seed(0)
    linear, conv = QuantLinear(32, 8, "bbq-w2a2"), QuantConv2d(32, 8, 1, recipe="bbq-w2a2")
    with torch.no_grad():
        conv.weight.copy_(linear.weight[:, :, None, None])
        conv.bias.copy_(linear.bias)
    x, gradients = torch.randn(16, 32), []
    for layer, data in ((linear, x), (conv, x[:, :, None, None])):
        calibrate(nn.Sequential(layer), data)

        def loss(layer: nn.Module = layer, data: torch.Tensor = data) -> torch.Tensor:
            return layer(data).square().mean()

        loss().backward()
        plain = layer.weight.grad.clone()
        Fogzo(layer, seed=3).correct(loss, beta=0.9, step=0)
        assert not torch.equal(layer.weight.grad, plain)
        gradients.append(layer.weight.grad.flatten(1))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    wide = QuantConv2d(32, 8, 3, padding=1, recipe="bbq-w2a2")
    image = torch.randn(2, 32, 5, 5)
    calibrate(nn.Sequential(wide), image)
    wide(image).square().mean().backward()
    before = wide.weight.detach().clone()
    assert Fogzo(wide).correct(lambda: wide(image).square().mean(), beta=1.0, step=0).agreement > 0
    assert torch.equal(wide.weight, before)


# Bad input -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_corrected_is_refused(llama: nn.Module) -> None:
    with pytest.raises(ValueError, match="quantized weights, and this model has none"):
        Fogzo(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"vanish in weights of torch\.bfloat16; keep float32 weights"):
        Fogzo(QuantLinear(16, 4, "quest-w2a16", dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="uniform, logistic, triangular, got noise='normal'"):
        Fogzo(llama, noise="normal")
    with pytest.raises(ValueError, match="samples must be at least 1, got samples=0"):
        Fogzo(llama, samples=0)
    with pytest.raises(ValueError, match=r"call correct\(\) after backward\(\)"):
        Fogzo(llama).correct(lambda: 0.0, beta=0.9, step=0)
    loss_of(llama).backward()
    with pytest.raises(ValueError, match=r"beta must be from 0 to 1, got beta=1\.1"):
        Fogzo(llama).correct(lambda: 0.0, beta=1.1, step=0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("fogzo_start", 1.0, "fogzo_start must be from 0 up to but without 1, got fogzo_start=1.0"),
        ("fogzo_start", math.nan, "fogzo_start must be"),
        ("fogzo_beta", 1.5, "fogzo_beta must be from 0 to 1"),
        ("fogzo_noise", "gauss", "fogzo_noise must be uniform, logistic or triangular, got fogzo_noise='gauss'"),
        ("fogzo_samples", 0, "fogzo_samples must be at least 1"),
        ("fogzo_start", 0.5, "fogzo_start must be left out without fogzo, got fogzo_start=0.5"),
        ("fogzo_samples", 2, "fogzo_samples must be left out without fogzo"),
    ],
)
def test_a_configuration_out_of_range_is_named(make_config: Make, field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**{field: value})


def test_full_precision_is_refused_before_a_run_is_made(make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this model has none"):
        train(make_config(recipe="none", fogzo=True))
    assert not (tmp_path / "run").exists()


# Runs ----------------------------------------------------------------------------------------------------------------


def test_beta_is_absent_at_first_and_then_falls_from_one_to_its_end() -> None:
    at = [beta_at(step, steps=10, start=0.6, last=0.7) for step in range(10)]
    assert at[:6] == [None] * 6
    assert at[6:] == pytest.approx([1, 0.9, 0.8, 0.7])
    assert beta_at(0, steps=1, start=0.0, last=0.5) == 1
    assert beta_at(0, steps=300, start=0.0, last=0.5) == 1


def train_events(run: Path) -> list[dict[str, float]]:
    return [e for e in read_metrics(run / "metrics.jsonl") if e["event"] == "train"]


@pytest.mark.parametrize("recipe", ["bbq-w2a2", "quest-w1a1", "lsq-w2a16"])
def test_a_mixed_schedule_is_plain_first_and_corrected_later(make_config: Make, tmp_path: Path, recipe: str) -> None:
    fields = QUICK | {"recipe": recipe}
    plain = train(make_config(out=str(tmp_path / "plain"), **fields))
    mixed = train(make_config(out=str(tmp_path / "mixed"), fogzo=True, fogzo_start=0.5, **fields))
    a, b = ([e["loss"] for e in train_events(r.run)] for r in (plain, mixed))
    assert a[:11] == b[:11]  # the eleventh loss is taken before the first corrected step
    assert a[11:] != b[11:]
    assert ["fogzo_agreement" in e for e in train_events(mixed.run)] == [False] * 10 + [True] * 10
    assert not any("fogzo_agreement" in e for e in train_events(plain.run))
    assert (plain.summary["fogzo"], mixed.summary["fogzo"]) == (False, True)
    assert mixed.summary["loss"] < a[0] - 0.3


def test_twenty_corrected_steps_equal_ten_a_stop_and_ten_more(make_config: Make, tmp_path: Path) -> None:
    fields = QUICK | {"fogzo": True, "fogzo_start": 0.2, "fogzo_beta": 0.999, "accumulation": 2}
    whole = train(make_config(out=str(tmp_path / "whole"), **fields))
    train(make_config(out=str(tmp_path / "halves"), stop_after=10, **fields))
    rest = train(make_config(out=str(tmp_path / "halves"), **fields))
    assert rest.summary["loss"] == whole.summary["loss"]
    ours, theirs = (load_run(r.run)[0].state_dict() for r in (whole, rest))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    kept = ("loss", "gradient_norm", "fogzo_agreement")
    assert [[e.get(k) for k in kept] for e in train_events(whole.run)] == [
        [e.get(k) for k in kept] for e in train_events(rest.run)
    ]


def test_probes_run_over_the_micro_batches_of_the_gradient(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, betas = [], []

    def correct(self: Fogzo, loss: Callable[[], float], *, beta: float, step: int) -> Correction:
        assert self.model.training
        with torch.no_grad():
            seen.append(loss())
        betas.append(beta)
        return Correction(0.0, 1.0)

    monkeypatch.setattr(Fogzo, "correct", correct)
    fields = QUICK | {"fogzo": True, "fogzo_start": 0.0, "fogzo_beta": 0.97}
    result = train(make_config(recipe="quest-w2a2", steps=4, accumulation=3, **fields))
    assert seen == pytest.approx([e["loss"] for e in train_events(result.run)], rel=1e-6)
    assert betas == pytest.approx([1, 0.99, 0.98, 0.97])


def test_a_diverging_probe_stops_the_run_with_its_step(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def correct(self: Fogzo, loss: Callable[[], float], *, beta: float, step: int) -> Correction:
        if step == 7:
            raise TrainingDiverged("the loss of a FOGZO probe is nan")
        return Correction(0.0, 1.0)

    monkeypatch.setattr(Fogzo, "correct", correct)
    config = make_config(fogzo=True, fogzo_start=0.0)
    message = r"the loss of a FOGZO probe is nan at step 8, first in the probe's forward pass.*step-00000005"
    with pytest.raises(TrainingDiverged, match=message):
        train(config)
    assert list_checkpoints(Path(config.out))[-1].step == 5
    assert read_metrics(Path(config.out) / "metrics.jsonl")[-1]["event"] == "diverged"


def test_a_run_from_before_fogzo_is_continued(make_config: Make) -> None:
    run = train(make_config(stop_after=5)).run
    values = json.loads((run / "config.json").read_text())
    old = {name: value for name, value in values.items() if not name.startswith("fogzo")}
    assert len(old) < len(values)
    (run / "config.json").write_text(json.dumps(old))
    assert train(make_config(stop_after=6)).step == 6
    with pytest.raises(ValueError, match="fogzo was False, is True"):
        train(make_config(fogzo=True))


@pytest.mark.slow
def test_a_compiled_run_is_corrected_too(make_config: Make, tmp_path: Path) -> None:
    fields = QUICK | {"fogzo": True, "fogzo_start": 0.5, "recipe": "quest-w2a2", "precision": "float32"}
    eager = train(make_config(out=str(tmp_path / "eager"), **fields))
    compiled = train(make_config(out=str(tmp_path / "compiled"), compile=True, **fields))
    assert compiled.summary["loss"] == pytest.approx(eager.summary["loss"], abs=0.15)
    assert sum("fogzo_agreement" in e for e in train_events(compiled.run)) == 10
