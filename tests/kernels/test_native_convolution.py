"""Convolutions in C++: the same outputs as plain integer arithmetic, to the last bit, on every level."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitbell.kernels import native, pack_codes
from bitbell.kernels.native import InputPlan
from bitbell.kernels.native_convolution import NativeChain, NativeConvolution, Step

LEVELS = [name for name, why in native.level_names().items() if not why]
WINDOWS: dict[str, dict[str, Any]] = {
    "3x3": {"padding": (1, 1, 1, 1)},
    "strided": {"kernel": (3, 2), "stride": (2, 3), "padding": (0, 2, 1, 0)},
    "dilated": {"kernel": (2, 3), "dilation": (2, 2), "padding": (3, 1, 0, 2)},
    "1x1": {"kernel": (1, 1), "stride": (2, 2)},
    "grouped": {"groups": 2, "padding": (1, 1, 1, 1)},
    "narrow": {"channels": 5, "outputs": 3, "kernel": (5, 4), "padding": (4, 4, 4, 4)},
    "inside": {"channels": 7, "outputs": 64, "kernel": (2, 3)},
    "beside": {"channels": 530, "outputs": 64, "padding": (1, 2, 1, 1)},
    "wide": {"channels": 530, "outputs": 70},
    "panels": {"channels": 16, "outputs": 200, "padding": (1, 1, 1, 1)},
}
pytestmark = pytest.mark.skipif(not LEVELS, reason="the extension is not built")


def window_of(name: str) -> dict[str, Any]:
    plain = {"channels": 24, "outputs": 40, "groups": 1, "kernel": (3, 3), "stride": (1, 1), "dilation": (1, 1)}
    return plain | {"padding": (0, 0, 0, 0)} | WINDOWS[name]


class Problem:
    """Random codes, and the outputs that they have by definition; x_zero and w_zero: of centred codes."""

    def __init__(self, name: str, w_bits: int, x_bits: int, x_zero: float = -0.5, w_zero: float = -0.5) -> None:
        torch.manual_seed(w_bits * 10 + x_bits)
        self.window, self.w_bits, self.w_zero = window_of(name), w_bits, w_zero
        group = self.window["channels"] // self.window["groups"]
        self.columns = self.window["kernel"][0] * self.window["kernel"][1] * group
        self.codes = torch.randint(0, 2**w_bits, (self.window["outputs"], self.columns), dtype=torch.uint8)
        self.scale = torch.rand(self.window["outputs"]) + 0.5
        self.bias = torch.randn(self.window["outputs"])
        self.x = torch.randn(2, 9, 11, self.window["channels"])
        thresholds = torch.linspace(-1, 1, 2**x_bits - 1)
        self.plan = InputPlan(x_bits, thresholds=thresholds, step_plus=0.3, zero_point=x_zero)

    def layer(self, **options: Any) -> NativeConvolution:
        words = pack_codes(self.codes, self.w_bits)
        how: dict[str, Any] = {"plan": self.plan, "bias": self.bias} | options
        return NativeConvolution(words, self.w_bits, self.window, self.scale, self.w_zero, **how)

    def expected(self) -> Tensor:
        """Levels convolved in float64, zeros outside; then the two scales and the bias in float32."""
        thresholds = self.plan.thresholds
        assert thresholds is not None
        x_codes = torch.searchsorted(thresholds, self.x, right=True).double() - 2 ** (self.plan.bits - 1)
        left, right, top, bottom = self.window["padding"]
        image = F.pad(x_codes - self.plan.zero_point, (0, 0, left, right, top, bottom)).permute(0, 3, 1, 2)
        levels = self.codes.double() - 2 ** (self.w_bits - 1) - self.w_zero
        filters = levels.view(len(levels), *self.window["kernel"], -1).permute(0, 3, 1, 2)
        how = {key: self.window[key] for key in ("stride", "dilation", "groups")}
        sums = F.conv2d(image, filters, None, **how).permute(0, 2, 3, 1)
        return sums.float() * self.scale * 0.3 + self.bias


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("bits", [(1, 1), (2, 2), (1, 2), (3, 2), (4, 4), (8, 8)])
def test_every_level_gives_the_outputs_of_the_definition(name: str, bits: tuple[int, int], level: str) -> None:
    problem = Problem(name, *bits)
    with native.using(level):
        assert torch.equal(problem.layer()(problem.x), problem.expected())


@pytest.mark.parametrize("zeros", [(0.0, 0.0), (-0.5, 0.0), (-0.25, -0.5), (0.3, -0.7)])
def test_zero_points_need_not_be_halves(zeros: tuple[float, float]) -> None:
    problem = Problem("strided", 2, 2, *zeros)
    torch.testing.assert_close(problem.layer()(problem.x), problem.expected(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("statistic", ["rms", "absmax", "absmean"])
@pytest.mark.parametrize("level", LEVELS)
def test_statistics_are_those_of_an_image(statistic: str, level: str) -> None:
    problem = Problem("3x3", 2, 2)
    thresholds = problem.plan.thresholds
    sizes = {"divisor": 1.0, "divisor_plus": 0.0, "step_factor": 1.0, "thresholds": thresholds, "zero_point": -0.5}
    problem.plan = InputPlan(2, rotation=8, statistic=statistic, **sizes)
    x = problem.x * torch.tensor([1.0, 7.0]).view(2, 1, 1, 1)
    rows = native.rotate(x, 8).flatten(1)
    size = {"rms": rows.square().mean(1).sqrt(), "absmax": rows.abs().amax(1), "absmean": rows.abs().mean(1)}[statistic]
    static = Problem("3x3", 2, 2)
    static.x = rows.view(x.shape) / size.view(2, 1, 1, 1)
    wanted = (static.expected() - static.bias) / 0.3 * size.view(2, 1, 1, 1) + static.bias
    with native.using(level):
        got = problem.layer()(x)
    off = (got - wanted).abs() > 1e-4 * wanted.abs().max()
    assert off.float().mean() < 0.01  # a code at a threshold may turn over
    x[1, 3, 4, 5] = torch.nan
    bad = problem.layer()(x)
    assert torch.equal(bad[0], problem.layer()(x[:1])[0])
    assert bad[1].isnan().all()


@pytest.mark.parametrize("level", LEVELS)
def test_residuals_and_clipping_come_last(level: str) -> None:
    problem = Problem("panels", 2, 2)
    expected = problem.expected()
    residual = torch.randn(expected.shape)
    residual[0, 0, 0, 0] = torch.nan
    with native.using(level):
        layer = problem.layer()
        torch.testing.assert_close(layer(problem.x, residual), expected + residual, equal_nan=True)
        torch.testing.assert_close(layer(problem.x, residual, True), (expected + residual).relu(), equal_nan=True)
        assert torch.equal(layer(problem.x, clip=True), expected.relu())
    with native.using("portable"):  # offsets take another way
        offset = torch.randn(problem.window["outputs"])
        layer = problem.layer(offset=offset)
        assert torch.equal(layer(problem.x, residual, True)[1], (layer(problem.x)[1] + residual[1]).relu())


@pytest.mark.parametrize("level", LEVELS)
def test_codes_of_the_same_images_serve_again(level: str) -> None:
    """Also those with wider borders than are asked for; narrower ones, and other images, are quantized anew."""
    wide, narrow = Problem("3x3", 2, 2), Problem("3x3", 2, 2)
    narrow.window = narrow.window | {"padding": (0, 0, 0, 1), "stride": (2, 2)}
    assert wide.layer().plan.same_as(narrow.layer().plan)
    with native.using(level):
        first, second = wide.layer(), narrow.layer()
        assert torch.equal(first(wide.x), wide.expected())
        assert torch.equal(second(wide.x, again=True), narrow.expected())
        assert torch.equal(second(wide.x), narrow.expected())
        assert torch.equal(first(wide.x, again=True), wide.expected())
        expected = narrow.expected()
        first(wide.x)
        wide.x.zero_()  # which nobody may do; it shows that the codes are those of before
        assert torch.equal(second(wide.x, again=True), expected)
        wide.x = narrow.x.flip(1).contiguous()
        assert torch.equal(first(wide.x, again=True), wide.expected())


def test_plans_are_the_same_only_where_all_of_them_is() -> None:
    plan = InputPlan(2, thresholds=torch.tensor([-1.0, 0.0, 1.0]))
    assert plan.same_as(InputPlan(2, thresholds=torch.tensor([-1.0, 0.0, 1.0])))
    for other in (InputPlan(2), InputPlan(2, thresholds=torch.tensor([-1.0, 0.0, 2.0])), InputPlan(2, rotation=8)):
        assert not plan.same_as(other)
        assert not other.same_as(plan)


@pytest.mark.parametrize("level", LEVELS)
def test_a_chain_gives_what_its_convolutions_give(level: str) -> None:
    """Two blocks with residuals, the second with a shortcut that reads the same images as the convolution before it."""
    same = [Problem("beside", 2, 2) for _ in range(3)]
    for problem in same:
        problem.window = problem.window | {"channels": 64, "padding": (1, 1, 1, 1), "kernel": (3, 3)}
        problem.codes = torch.randint(0, 4, (64, 9 * 64), dtype=torch.uint8)
        problem.x = torch.randn(2, 9, 11, 64)
    same[1].window = same[1].window | {"stride": (2, 2)}
    short = Problem("1x1", 2, 2)
    short.window = short.window | {"channels": 64, "outputs": 64}
    short.codes, short.scale, short.bias = torch.randint(0, 4, (64, 64), dtype=torch.uint8), *torch.randn(2, 64)
    a, b, c, shortcut = (problem.layer() for problem in (*same, short))
    steps = [Step(a, 0, clip=True), Step(a, 1, 0, True), Step(b, 2, clip=True), Step(shortcut, 2), Step(c, 3, 4, True)]
    chain, x = NativeChain(steps), same[0].x
    with native.using(level):
        first = a(a(x, clip=True), x, True)
        assert torch.equal(chain(x), c(b(first, clip=True), shortcut(first), True))
        assert torch.equal(chain(x[:, :7, :5].contiguous())[0], chain(x[:1, :7, :5].contiguous())[0])
        assert chain(x[:0]).shape == (0, 5, 6, 64)
    assert [chain._reads_again(i) for i in range(5)] == [False, False, False, True, False]
    assert max(chain._slots()) == 2


def test_a_chain_whose_residuals_do_not_fit_is_refused() -> None:
    layer = Problem("1x1", 2, 2).layer()
    chain = NativeChain([Step(layer, 0, 0)])
    x = torch.randn(1, 9, 11, 24)
    assert not chain.fits(x)
    with pytest.raises(ValueError, match="residuals must have the shape"):
        chain(x)
    with pytest.raises(ValueError, match="step 0 must read images 0 to 0, got 1"):
        NativeChain([Step(layer, 1)])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads: int) -> None:
    problem = Problem("panels", 2, 2)
    native.set_threads(threads)
    try:
        assert torch.equal(problem.layer()(problem.x), problem.expected())
        assert problem.layer()(problem.x[:0]).shape == (0, 9, 11, 200)
    finally:
        native.set_threads(None)


def test_nan_is_everywhere_where_all_pixels_share_one_step() -> None:
    problem = Problem("3x3", 2, 2)
    problem.x[0, 8, 10, 3] = torch.inf
    assert problem.layer()(problem.x).isnan().all()


def test_what_does_not_fit_is_refused() -> None:
    problem = Problem("3x3", 2, 2)
    layer = problem.layer()
    with pytest.raises(ValueError, match=r"x must be \(N, H, W, 24\), got \(2, 9, 11, 23\)"):
        layer(problem.x[..., :23])
    with pytest.raises(ValueError, match=r"x must have pixels, got \(2, 0, 11, 24\)"):
        layer(problem.x[:, :0])
    with pytest.raises(ValueError, match=r"residual must be \(2, 9, 11, 40\), got \(2, 9, 11, 24\)"):
        layer(problem.x, problem.x)
    with pytest.raises(ValueError, match=r"x must be torch\.float32 on the CPU, got torch\.float64"):
        layer(problem.x.double())
    with pytest.raises(ValueError, match="words must be"):
        NativeConvolution(torch.zeros(40, 3, dtype=torch.int32), 2, problem.window, problem.scale, 0, plan=problem.plan)
    with pytest.raises(ValueError, match="window must have channels, outputs"):
        NativeConvolution(torch.zeros(40, 3, dtype=torch.int32), 2, {}, problem.scale, 0, plan=problem.plan)
    problem.scale = torch.ones(3)
    with pytest.raises(ValueError, match="scale must have 40 numbers, got 3"):
        problem.layer()
    small = Problem("narrow", 2, 2)
    small.window["padding"] = (0, 0, 0, 0)
    with pytest.raises(ValueError, match="an image of 4 x 11 is smaller than the kernel, which spans 5 pixels"):
        small.layer()(small.x[:, :4])
