"""What fold puts in the place of layers in full precision: the same numbers, in fewer calls, where nobody looks on."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitbell.kernels import native
from bitbell.models import build_model
from bitbell.packing import fold
from bitbell.packing.full_precision import FloatConv2d, FloatLinear, GlobalAvgPool2d, MaxPool2d, in_place_of

LAST = torch.channels_last


def kinds(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.modules()]


def stem(*after: nn.Module, channels: int = 3) -> nn.Sequential:
    norm = nn.BatchNorm2d(20)
    nn.init.normal_(norm.weight)
    return nn.Sequential(nn.Conv2d(channels, 20, 7, 2, 3), norm, *after).eval()


def same(model: nn.Module, folded: nn.Module, images: Tensor) -> bool:
    with torch.no_grad():
        expected, got = model(images), folded(images)
    size = float(expected.abs().max()) if expected.numel() else 0
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=0, atol=1e-5 * size)


@pytest.mark.parametrize("level", [native.REFERENCE, "portable", "auto"])
@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
@pytest.mark.parametrize("order", ["relu", "relu, pool", "pool, relu", "pool"])
def test_a_stem_is_one_module(order: str, layout: torch.memory_format, level: str) -> None:
    torch.manual_seed(0)
    found = {"relu": nn.ReLU(inplace=True), "pool": nn.MaxPool2d(3, 2, 1)}
    model = stem(*[found[name] for name in order.split(", ")])
    folded, images = fold(model), torch.randn(2, 3, 30, 33).contiguous(memory_format=layout)
    assert [name for name in kinds(folded) if name in ("BatchNorm2d", "ReLU", "MaxPool2d", "FloatConv2d")] == [
        "FloatConv2d",
        *["MaxPool2d"] * ("pool" in order),  # within it
    ]
    with native.using(level):
        assert same(model, folded, images)
        assert same(model, folded, images[:0])
        assert torch.equal(copy.deepcopy(folded)(images), folded(images))


def test_resnet_checks_its_channels_and_folds() -> None:
    model: Any = build_model("resnet-micro", image_size=16).eval()
    folded: Any = fold(model)
    inner = folded.resnet.embedder
    assert sum(isinstance(m, FloatConv2d) and m.clip for m in inner.traced.modules()) == 1
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected, got = model(images).logits, folded(images).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
        with pytest.raises(ValueError, match="channel dimension"):
            folded(torch.randn(2, 4, 16, 16))


class Sizes(nn.Module):
    """Other ways for other sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.pool = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv(x))
        if x.shape[2] == 12:
            y = self.pool(y)
        if x.shape[3] != 12:
            return y * 2
        return y - 1


def test_sizes_of_another_way_go_it() -> None:
    model = Sizes().eval()
    folded: Any = fold(model)
    assert folded._sizes == [(0, 2, 12), (0, 3, 12)]
    assert isinstance(folded.traced.conv, FloatConv2d)
    for height in (11, 12):
        for width in (11, 12):
            assert same(model, folded, torch.randn(1, 3, height, width))


class Seen(nn.Module):
    """A convolution whose output, or whose ReLU's, is used again."""

    def __init__(self, relu: bool) -> None:
        super().__init__()
        self.conv, self.relu, self.pool, self.of_relu = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2, 2, 1), relu

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.relu(y)
        return self.pool(z) + (z if self.of_relu else y).mean()


@pytest.mark.parametrize("relu", [False, True])
def test_what_is_used_twice_stays(relu: bool) -> None:
    model = Seen(relu).eval()
    folded: Any = fold(model)
    assert (folded.conv.clip, folded.conv.pool) == (relu, None)
    assert isinstance(folded.pool, MaxPool2d)
    assert same(model, folded, torch.randn(1, 3, 9, 9))


OTHERS = {
    "channels": nn.Conv2d(5, 8, 3),
    "groups": nn.Conv2d(4, 8, 3, groups=2),
    "dilation": nn.Conv2d(3, 8, 3, dilation=2),
    "mode": nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
    "same": nn.Conv2d(3, 8, 3, padding="same"),
    "double": nn.Conv2d(3, 8, 3, dtype=torch.float64),
    "transposed": nn.ConvTranspose2d(3, 8, 3),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_convolutions_are_pytorchs(name: str) -> None:
    conv: Any = OTHERS[name]
    model = nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(2)).eval()
    folded = fold(model)
    assert "FloatConv2d" not in kinds(folded)
    assert same(model, folded, torch.randn(1, conv.in_channels, 9, 9, dtype=conv.weight.dtype))


def test_other_poolings_are_pytorchs() -> None:
    pools = nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(2, dilation=2), nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(2)
    pools[3].register_forward_hook(lambda *_: None)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), *pools).eval()
    folded: Any = fold(model)
    assert [isinstance(getattr(folded, str(i)), MaxPool2d) for i in range(1, 5)] == [False, False, True, False]
    assert same(model, folded, torch.randn(1, 3, 25, 22))
    assert same(model, folded, torch.randn(1, 3, 25, 22).contiguous(memory_format=LAST))


def test_hooks_of_the_convolution_are_called() -> None:
    model, seen = stem(nn.ReLU()), []
    del model[1]
    model[0].register_forward_hook(lambda *_: seen.append(1))
    folded = fold(model)
    assert same(model, folded, torch.randn(1, 3, 9, 9))
    assert len(seen) == 2


def test_gradients_types_and_changed_filters() -> None:
    model = stem(nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    folded: Any = fold(model)
    x, z = (torch.ones(1, 3, 16, 16).requires_grad_() for _ in range(2))
    folded(x).sum().backward()
    model(z).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, z.grad)
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        before = folded(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert folded(images).dtype == torch.bfloat16
        conv = next(m for m in folded.modules() if isinstance(m, nn.Conv2d))
        conv.weight.mul_(2)
        conv.bias.mul_(2)
        torch.testing.assert_close(folded(images), 2 * before)
        conv.bias = None
        assert not torch.equal(folded(images), 2 * before)
        assert same(folded.double(), copy.deepcopy(folded), images.double())
        with pytest.raises(RuntimeError):
            folded(torch.randn(1, 2, 16, 16))


def test_pooling_keeps_gradients_and_the_layout() -> None:
    pool = MaxPool2d(3, 2, 1)
    x = torch.randn(1, 4, 8, 8).contiguous(memory_format=LAST)
    assert torch.equal(pool(x), nn.MaxPool2d(3, 2, 1)(x.contiguous()))
    x.requires_grad_()
    pool(x).sum().backward()
    assert x.grad is not None
    with pytest.raises(RuntimeError):
        pool(torch.ones(1, 4, 0, 3))


def test_bad_poolings_still_raise_pytorchs_error() -> None:
    folded = fold(nn.Sequential(nn.Conv2d(3, 16, 3), nn.MaxPool2d(3, 2, 2)).eval())
    with pytest.raises(RuntimeError, match="pad should be"):
        folded(torch.randn(1, 3, 9, 9))


@pytest.mark.parametrize("level", [native.REFERENCE, "portable", "auto"])
@pytest.mark.parametrize("images", [0, 1, 9])
def test_the_head_is_as_pytorchs(images: int, level: str) -> None:
    head = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(24, 7))
    model = nn.Sequential(nn.Conv2d(3, 24, 3), head).eval()
    folded: Any = fold(model)
    assert [isinstance(m, FloatLinear | GlobalAvgPool2d) for m in folded.modules()].count(True) == 2
    with native.using(level):
        assert same(model, folded, torch.randn(images, 3, 9, 8))
        assert same(model, folded, torch.randn(images, 3, 9, 8).contiguous(memory_format=LAST))
    assert same(model.double(), folded.double(), torch.randn(images, 3, 9, 8).double())


def test_heads_that_are_seen_or_others_stay() -> None:
    seen, other = nn.Linear(24, 7), nn.AdaptiveAvgPool2d(2)
    seen.register_forward_pre_hook(lambda *_: None)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), other, nn.Flatten(), seen).eval()
    folded = fold(model)
    assert not any(isinstance(m, FloatLinear | GlobalAvgPool2d) for m in folded.modules())
    assert same(model, folded, torch.randn(2, 3, 9, 8))


def test_a_linear_layer_takes_what_it_is_given() -> None:
    layer, x = nn.Linear(5, 3, bias=False).requires_grad_(False), torch.randn(1, 2, 5)
    fast = in_place_of(layer)
    torch.testing.assert_close(fast(x), layer(x))
    torch.testing.assert_close(fast(x.bfloat16().float().requires_grad_()), layer(x.bfloat16().float()))
    layer.weight.mul_(2)
    torch.testing.assert_close(fast(x), layer(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fast(x).dtype == torch.bfloat16
    with pytest.raises(RuntimeError):
        fast(torch.randn(2, 4))


class Marked(Tensor):
    """As libraries have them whose weights are not numbers in memory."""


@pytest.mark.parametrize("layer", [nn.Linear(40, 8), nn.Conv2d(3, 8, 7, 2)])
def test_weights_of_another_kind_are_left_to_pytorch(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folded: Any = fold(nn.Sequential(layer))
    inner = folded.get_submodule("0")
    inner = inner.conv if isinstance(inner, FloatConv2d) else inner
    inner.weight = nn.Parameter(layer.weight.detach().as_subclass(Marked), requires_grad=False)
    for name in ("float_linear", "NativeFloatConvolution"):
        monkeypatch.setattr(f"bitbell.packing.full_precision.{name}", None)
    x = torch.randn(1, 40) if isinstance(layer, nn.Linear) else torch.randn(1, 3, 30, 30)
    torch.testing.assert_close(folded(x).as_subclass(Tensor), layer(x).detach())


@pytest.mark.parametrize("layer", [nn.Linear(40, 8), nn.Conv2d(3, 8, 7, 2)])
def test_a_bias_that_learns_gets_its_gradient(layer: Any) -> None:
    folded: Any = fold(nn.Sequential(layer))
    inner = folded.get_submodule("0")
    inner.bias.requires_grad_(True)
    x = torch.randn(1, 40) if isinstance(layer, nn.Linear) else torch.randn(1, 3, 30, 30)
    folded(x).sum().backward()
    assert inner.bias.grad is not None


@pytest.mark.parametrize("layer", [nn.MaxPool2d(66), nn.MaxPool2d((2,)), nn.Conv2d(3, 16, (65, 1))])
def test_windows_of_any_size_and_form_still_work(layer: Any) -> None:
    x = torch.randn(1, 3, 70, 70).contiguous(memory_format=LAST)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), layer).eval()
    assert same(model, fold(model), x)


@pytest.mark.parametrize("layer", [nn.Linear(40, 8), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)])
def test_what_else_a_layer_has_stays_with_it(layer: Any) -> None:
    layer.factor = 3.0
    folded: Any = fold(nn.Sequential(layer))[0]  # type: ignore[index]
    assert type(folded).__module__ == "bitbell.packing.full_precision"
    assert (folded.factor, folded.extra_repr()) == (3.0, layer.extra_repr())


def test_another_forward_of_this_very_layer_is_kept() -> None:
    layer: Any = nn.Linear(40, 8)
    layer.forward = lambda x: x
    x = torch.randn(1, 40)
    assert torch.equal(fold(nn.Sequential(layer))(x), x)


def test_filters_that_took_a_way_through_another_type_are_arranged_anew() -> None:
    model = stem()
    folded, images = fold(model), torch.randn(1, 3, 30, 33)
    folded(images)
    folded.bfloat16()
    assert same(copy.deepcopy(folded).float(), folded.float(), images)
