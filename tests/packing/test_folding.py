"""Folding: the same model to float rounding, with fewer operations, and only where the data flow allows it."""

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
    assert kinds(folded).count("ReLU") == 1  # the stem's, which is in full precision
    with torch.no_grad():
        expected, got = whole(images).logits, folded(images).logits
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()


def test_gradients_still_pass() -> None:
    images = torch.randn(1, 3, 8, 8)
    folded = fold(packed(Block(), images))
    x = images.clone().requires_grad_()
    folded(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0
