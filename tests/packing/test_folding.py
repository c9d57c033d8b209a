"""Folding: the same model to float rounding, with fewer operations, and only where the data flow allows it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitbell
from bitbell.kernels import native
from bitbell.models import build_model
from bitbell.packing import fold
from bitbell.packing.conv2d import PackedConv2d


def with_statistics(model: nn.Module) -> nn.Module:
    """Batch norms as training might leave them, signs of weights included."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, -1, 2)
            nn.init.normal_(module.bias)
    return model


def packed(model: nn.Module, images: Tensor, recipe: str = "bbq-vision-w2a2") -> Any:
    bitbell.calibrate(bitbell.quantize(with_statistics(model), recipe), images)
    return bitbell.pack(model.eval())


def kinds(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.modules()]


class Block(nn.Module):
    """A residual block; `leak` uses the first convolution's output a second time."""

    def __init__(self, leak: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.first, self.norm = nn.Conv2d(32, 32, 3, padding=1, bias=bias), nn.BatchNorm2d(32)
        self.second, self.relu, self.leak = nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), leak

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.first(x)
        z = self.second(self.relu(self.norm(y)))
        z += x
        return torch.relu(z) + (y if self.leak else 0)


@pytest.mark.parametrize("level", [native.REFERENCE, "auto"])
@pytest.mark.parametrize("recipe", ["bbq-vision-w2a2", "lsq-plus-w2a2:w.asymmetric=true", "bbq-w4a4"])
def test_a_folded_block_gives_the_same_outputs(recipe: str, level: str) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 8, 9)
    whole = packed(Block(bias=True), images, recipe)
    folded = fold(whole)
    assert "BatchNorm2d" not in kinds(folded)
    assert "ReLU" not in kinds(folded)
    assert [m.clip for m in folded.modules() if isinstance(m, PackedConv2d)] == [True, True]
    with torch.no_grad(), native.using(level):
        expected, got = whole(images), folded(images)
    # Another rounding of what the second convolution is fed may turn a code at a threshold over.
    assert ((got - expected).abs() > 1e-4 * expected.abs().max()).float().mean() < 0.02
    assert whole.model.norm.weight is not None  # the packed model itself is left alone


def test_what_is_used_twice_is_not_folded() -> None:
    torch.manual_seed(1)
    images = torch.randn(2, 3, 8, 8)
    whole = packed(Block(leak=True), images)
    folded = fold(whole)
    assert kinds(folded).count("BatchNorm2d") == 1
    assert [m.clip for m in folded.modules() if isinstance(m, PackedConv2d)] == [False, True]
    with torch.no_grad():
        torch.testing.assert_close(folded(images), whole(images), rtol=1e-4, atol=1e-4)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if float(x.sum()) < 1e9 else x


def test_modules_inside_of_one_that_cannot_be_traced_are_folded() -> None:
    torch.manual_seed(2)
    images = torch.randn(2, 3, 8, 8)
    whole = packed(Untraceable(), images)
    folded = fold(whole)
    assert isinstance(folded, Untraceable)
    assert "BatchNorm2d" not in kinds(folded)
    with torch.no_grad():
        expected, got = whole(images), folded(images)
    assert ((got - expected).abs() > 1e-4 * expected.abs().max()).float().mean() < 0.02


def test_a_resnet_keeps_only_convolutions_pooling_and_its_head() -> None:
    torch.manual_seed(3)
    images = torch.randn(2, 3, 16, 16)
    whole = packed(build_model("resnet-micro", image_size=16), images)
    folded = fold(whole)
    assert "BatchNorm2d" not in kinds(folded)
    assert "ReLU" not in kinds(folded)  # the one of the stem, which is in full precision, is a function now
    with torch.no_grad():
        expected, got = whole(images).logits, folded(images).logits
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_folded_vision_transformer_gives_the_same_outputs() -> None:
    """Its own forward reads the weight of the patches' convolution."""
    images = torch.randn(2, 3, 16, 16)
    whole = packed(build_model("vit-micro", image_size=16), images)
    folded = fold(whole)
    torch.testing.assert_close(folded(images).logits, whole(images).logits)
    patches = folded.vit.embeddings.patch_embeddings  # type: ignore[union-attr]
    assert torch.equal(patches.projection.weight, whole.model.vit.embeddings.patch_embeddings.projection.weight)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        patches.nothing  # noqa: B018
    with pytest.raises(ValueError, match="channel"):
        folded(torch.randn(2, 1, 16, 16))


class InARow(nn.Module):
    """Two packed convolutions, in a module that is called by one that cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3)
        self.both = nn.Sequential(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.both(self.stem(x)) * scale


@pytest.mark.skipif(native.extension is None, reason="the extension is not built")
@pytest.mark.parametrize("change", ["codes", "state", "scale", "bias"])
def test_a_chain_notices_what_is_changed_after_its_first_call(change: str) -> None:
    images = torch.randn(2, 3, 12, 12)
    folded, other = (fold(packed(InARow(), images)) for _ in range(2))
    assert "_Chain" in kinds(folded)
    conv, its = (model.get_submodule("both.traced.2") for model in (folded, other))
    with native.using("auto"), torch.no_grad():
        before = folded(images)
        if change == "codes":
            conv.weight_packed.copy_(its.weight_packed)
        elif change == "state":
            folded.load_state_dict(other.state_dict())
        elif change == "scale":
            conv.weight_scale = conv.weight_scale * 2
        else:
            conv.bias = conv.bias + 3
        after = folded(images)
        torch.testing.assert_close(after, copy.deepcopy(folded)(images))
    assert (after - before).abs().max() > 0.1


def test_convolutions_with_hooks_are_not_chained() -> None:
    images, calls = torch.randn(1, 3, 12, 12), []
    model = packed(InARow(), images)
    model.model.both[2].register_forward_hook(lambda *_: calls.append(1))
    folded = fold(model)
    folded(images)
    assert "_Chain" not in kinds(folded)
    assert calls == [1]


def test_gradients_still_pass() -> None:
    images = torch.randn(1, 3, 8, 8)
    folded = fold(packed(Block(), images))
    x = images.clone().requires_grad_()
    folded(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0


class Odd(nn.Module):
    """Layers for `forward`s that fold has to be careful with: h are the stem's outputs."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.stem, self.norm, self.relu = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()
        self.conv, self.spread = nn.Conv2d(16, 16, 3, padding=1), nn.Parameter(torch.randn(16, 1, 1))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.way)(self.stem(x))

    def broadcast(self, h: Tensor) -> Tensor:
        return self.conv(h) + self.spread[:1] + h.mean()

    def one_pixel(self, h: Tensor) -> Tensor:
        return self.conv(h.mean((2, 3), keepdim=True)) + h

    def mean(self, h: Tensor) -> Tensor:
        return self.conv(h) + h.mean()

    def alias(self, h: Tensor) -> Tensor:
        same = h
        h += self.conv(h)
        return same * h

    def changed_between(self, h: Tensor) -> Tensor:
        y = self.conv(h)
        return nn.functional.relu(h, inplace=True).sqrt() + y

    def shared_relu(self, h: Tensor) -> Tensor:
        h = self.norm(self.relu(h))
        return self.conv(self.relu(h)) - h


@pytest.mark.parametrize("way", ["broadcast", "one_pixel", "mean", "alias", "changed_between", "shared_relu"])
def test_sums_that_broadcast_and_tensors_changed_in_place_stay_right(way: str) -> None:
    torch.manual_seed(4)
    images = torch.randn(2, 3, 6, 7)
    whole = packed(Odd(way), images)
    with torch.no_grad():
        torch.testing.assert_close(fold(whole)(images), whole(images), rtol=1e-4, atol=1e-4)


class Optional(Odd):
    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        y = self.conv(self.stem(x))
        return y if factor is None else y * 0


class Twice(nn.Module):
    """One convolution in two modules that are traced each for itself; only in one a ReLU follows."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(16, 16, 3, padding=1)
        self.stem, self.first, self.second = nn.Conv2d(3, 16, 3), nn.Sequential(conv, nn.ReLU()), nn.Sequential(conv)

    def forward(self, x: Tensor, twice: bool = True) -> Tensor:
        h = self.stem(x)
        return self.first(h) - self.second(h)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


@pytest.mark.parametrize("kind", ["optional", "twice", "standardised"])
def test_what_a_trace_does_not_show_is_left_alone(kind: str) -> None:
    torch.manual_seed(5)
    images = torch.randn(2, 3, 6, 7)
    layers = Standardised(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3)
    model = {"optional": Optional("mean"), "twice": Twice(), "standardised": nn.Sequential(*layers)}[kind]
    whole = packed(model, images)
    with torch.no_grad():
        torch.testing.assert_close(fold(whole)(images), whole(images), rtol=1e-4, atol=1e-4)


def test_a_folded_model_that_has_run_can_be_copied() -> None:
    images = torch.randn(1, 3, 8, 8)
    layers = [nn.Conv2d(32, 32, 3, padding=1, bias=False) for _ in range(2)]
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Sequential(*layers))
    whole = packed(model, images)
    folded = fold(whole.model[1])
    with torch.no_grad():
        x = torch.randn(1, 32, 6, 6)
        expected = folded(x)
        assert torch.equal(copy.deepcopy(folded)(x), expected)
