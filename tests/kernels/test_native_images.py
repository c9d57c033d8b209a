"""Convolutions in full precision and pooling in C++, against PyTorch's in float64, on every level."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitbell.kernels import native
from bitbell.kernels.native_images import NativeFloatConvolution, Pooling, float_linear, max_pool, pixel_means

LEVELS = [name for name, why in native.level_names().items() if not why]
CASES: dict[str, dict[str, Any]] = {  # channels, outputs, kernel, stride, padding (left, right, top, bottom), pooling
    "resnet": {"kernel": (7, 7), "stride": (2, 2), "padding": (3, 3, 3, 3), "pooling": Pooling((3, 3), (2, 2), (1, 1))},
    "3x3": {"channels": 1, "outputs": 20, "padding": (1, 1, 1, 1)},
    "3x3/2": {"channels": 4, "outputs": 130, "stride": (2, 2), "padding": (0, 1, 1, 0)},
    "5x5/2": {"outputs": 130, "kernel": (5, 5), "stride": (2, 2), "padding": (2, 2, 2, 2)},
    "8x8/3": {"channels": 2, "outputs": 70, "kernel": (8, 8), "stride": (3, 3)},
    "patches": {"kernel": (4, 4), "stride": (4, 4), "outputs": 5},
    "beyond": {"kernel": (2, 4), "padding": (9, 8, 7, 6), "pooling": Pooling((2, 3), (3, 1), (1, 0))},
    "skipping": {"kernel": (1, 3), "stride": (3, 1), "pooling": Pooling((1, 2), (2, 3), (0, 1))},
    "wide": {"channels": 9, "kernel": (3, 8), "stride": (1, 2), "padding": (2, 5, 0, 3), "outputs": 70},
}
pytestmark = pytest.mark.skipif(not LEVELS, reason="the extension is not built")


class Problem:
    def __init__(self, name: str, images: int = 2, height: int = 17, width: int = 23) -> None:
        torch.manual_seed(len(name))
        plain = {"channels": 3, "outputs": 64, "kernel": (3, 3), "stride": (1, 1), "padding": (0, 0, 0, 0)}
        self.of: dict[str, Any] = plain | {"pooling": None} | CASES[name]
        shape = self.of["outputs"], self.of["channels"], *self.of["kernel"]
        self.weight, self.bias = torch.randn(shape), torch.randn(self.of["outputs"])
        self.x = torch.randn(images, self.of["channels"], height, width) + 0.5

    def layer(self) -> NativeFloatConvolution:
        return NativeFloatConvolution(self.weight, self.bias, self.of["stride"], self.of["padding"])

    def expected(self, clip: bool = False, x: Tensor | None = None) -> Tensor:
        x = F.pad(self.x if x is None else x, self.of["padding"]).double()
        y = F.conv2d(x, self.weight.double(), self.bias.double(), self.of["stride"])
        y = y.relu() if clip else y
        return y if self.of["pooling"] is None else pooled(y, self.of["pooling"])


def pooled(x: Tensor, pooling: Pooling) -> Tensor:
    return F.max_pool2d(x, pooling.kernel, pooling.stride, pooling.padding)


def near(got: Tensor, expected: Tensor) -> bool:
    """To 1e-5 of the largest output, and NaN and infinity where they are."""
    size = expected[expected.isfinite()].abs().max()
    return torch.allclose(got.double(), expected, rtol=0, atol=1e-5 * float(size), equal_nan=True)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", CASES)
def test_every_level_convolves_clips_and_pools(name: str, level: str) -> None:
    problem = Problem(name)
    layer, pooling = problem.layer(), problem.of["pooling"]
    with native.using(level):
        for clip in (False, True):
            y = layer(problem.x, pooling, clip)
            assert near(y, problem.expected(clip))
            assert y.is_contiguous(memory_format=torch.channels_last)
        last = problem.x.to(memory_format=torch.channels_last)
        assert torch.equal(layer(last, pooling, True), y)
        assert torch.equal(layer(problem.x[1:], pooling, True), y[1:])
        assert layer(problem.x[:0], pooling).shape == (0, *y.shape[1:])


@pytest.mark.parametrize("name", CASES)
def test_threads_and_levels_with_fused_products_give_the_same_bits(name: str) -> None:
    problem, found = Problem(name, images=3, height=11), []
    for level in LEVELS[1:]:
        for threads in (1, 2, 5):
            native.set_threads(threads)
            try:
                with native.using(level):
                    found.append(problem.layer()(problem.x, problem.of["pooling"]))
            finally:
                native.set_threads(None)
    assert all(torch.equal(y, found[0]) for y in found)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30, -3e38])
@pytest.mark.parametrize("name", ["resnet", "3x3", "patches"])
def test_numbers_that_are_none_go_where_pytorch_has_them(name: str, value: float) -> None:
    problem = Problem(name, images=3)
    x = problem.x.clone()
    x[1, 0, 5, 7] = value
    got = problem.layer()(x, problem.of["pooling"])
    assert near(got[1].unsqueeze(0), problem.expected(x=x[1:2]).float().double())
    assert torch.equal(got[::2], problem.layer()(problem.x, problem.of["pooling"])[::2])
    large = problem.weight.clone()
    problem.weight[0, 0, 0, 0] = 1e25  # too large for the products at points
    assert near(problem.layer()(problem.x, problem.of["pooling"]), problem.expected())
    problem.weight, problem.bias[0] = large, value
    assert near(problem.layer()(problem.x, problem.of["pooling"], True), problem.expected(True).float().double())


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape_is_convolved(data: st.DataObject) -> None:
    small = st.integers(0, 4)
    kernel, stride = data.draw(st.tuples(*[st.integers(1, 8)] * 2)), data.draw(st.tuples(*[st.integers(1, 4)] * 2))
    padding = data.draw(st.tuples(small, small, small, small))
    x = torch.randn(
        data.draw(st.integers(1, 2)), data.draw(st.integers(1, 5)), *data.draw(st.tuples(*[st.integers(1, 30)] * 2))
    )
    weight = torch.randn(data.draw(st.sampled_from([1, 16, 33, 64, 65, 130])), x.shape[1], *kernel)
    layer = NativeFloatConvolution(weight, None, stride, padding)
    if min(layer.output_size(*x.shape[2:])) < 1:
        with pytest.raises(ValueError, match="too small"):
            layer(x)
        return
    expected = F.conv2d(F.pad(x.double(), padding), weight.double(), None, stride)
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=1e-5 * float(weight[0].numel() ** 0.5) * 6)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape_is_pooled_as_pytorch_does(data: st.DataObject) -> None:
    pair = st.tuples(*[st.integers(1, 5)] * 2)
    kernel, stride = data.draw(pair), data.draw(pair)
    padding = data.draw(st.tuples(*[st.integers(0, k // 2) for k in kernel]))
    pooling = Pooling(kernel, stride, padding)
    size = data.draw(st.tuples(*[st.integers(1, 15)] * 2))
    x = torch.randn(data.draw(st.integers(0, 2)), data.draw(st.integers(1, 90)), *size)
    strange = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, -0.0, 0.0])
    places = torch.rand(x.shape) < data.draw(st.sampled_from([0.0, 0.1, 1.0]))
    x[places] = strange[torch.randint(0, len(strange), (int(places.sum()),))]
    x = x.contiguous(memory_format=torch.channels_last)
    if min(pooling.output_size(*size)) < 1:
        with pytest.raises(ValueError, match="too small"):
            max_pool(x, pooling)
        return
    with native.using(data.draw(st.sampled_from(LEVELS))):
        torch.testing.assert_close(max_pool(x, pooling), pooled(x, pooling), rtol=0, atol=0, equal_nan=True)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_means_and_rows_of_any_shape(data: st.DataObject) -> None:
    images, channels, outputs = (data.draw(st.integers(0, most)) for most in (3, 70, 140))
    size = data.draw(st.tuples(*[st.integers(1, 20)] * 2))
    x = (torch.randn(images, channels, *size) + 1).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(outputs, channels), data.draw(st.sampled_from([None, torch.randn(outputs)]))
    with native.using(data.draw(st.sampled_from(LEVELS))):
        means = pixel_means(x)
        y = float_linear(means[:, :, 0, 0], weight, bias)
    torch.testing.assert_close(means.double(), x.double().mean((2, 3), keepdim=True), rtol=1e-6, atol=1e-6)
    expected = F.linear(means[:, :, 0, 0].double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("level", LEVELS)
def test_means_and_rows_keep_what_is_no_number(level: str) -> None:
    x = torch.randn(2, 37, 9, 9).contiguous(memory_format=torch.channels_last)
    x[0, 36, 4, 4], x[1, 3, 2, 1] = torch.nan, -torch.inf
    weight = torch.randn(67, 37)
    with native.using(level):
        means = pixel_means(x)
        torch.testing.assert_close(means, x.mean((2, 3), keepdim=True), equal_nan=True)
        native.set_threads(2)
        try:
            y = float_linear(means.flatten(1), weight, None)
        finally:
            native.set_threads(None)
        torch.testing.assert_close(y, float_linear(means.flatten(1), weight, None), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(y, F.linear(means.flatten(1), weight), equal_nan=True)


def test_errors_name_what_is_wrong() -> None:
    layer = NativeFloatConvolution(torch.randn(2, 3, 3, 3), None)
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
        layer(torch.randn(1, 2, 5, 5))
    with pytest.raises(ValueError, match="float32"):
        layer(torch.randn(1, 3, 5, 5).double())
    with pytest.raises(ValueError, match="too small"):
        layer(torch.randn(1, 3, 2, 5))
    with pytest.raises(ValueError, match="half of the kernel"):
        Pooling((3, 3), (1, 1), (2, 1))
    with pytest.raises(ValueError, match="1 or more"):
        Pooling((3, 0))
    with pytest.raises(ValueError, match="channels last"):
        max_pool(torch.randn(1, 3, 5, 5), Pooling((3, 3)))
    with pytest.raises(ValueError, match="float32"):
        max_pool(torch.randn(1, 1, 5, 5).double(), Pooling((3, 3)))
    with pytest.raises(ValueError, match="weight must be"):
        NativeFloatConvolution(torch.randn(2, 3, 3), None)
    with pytest.raises(ValueError, match="bias must have 2"):
        NativeFloatConvolution(torch.randn(2, 3, 3, 3), torch.randn(3))
    with pytest.raises(ValueError, match="channels last"):
        pixel_means(torch.randn(1, 3, 5, 5))
    with pytest.raises(ValueError, match="pixels"):
        pixel_means(torch.randn(1, 1, 0, 5))
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., 3\)"):
        float_linear(torch.randn(1, 2), torch.randn(4, 3), None)
    with pytest.raises(ValueError, match=r"bias must be \(4,\)"):
        float_linear(torch.randn(1, 3), torch.randn(4, 3), torch.randn(3))
    with pytest.raises(ValueError, match="float32"):
        float_linear(torch.randn(1, 3).double(), torch.randn(4, 3), None)
