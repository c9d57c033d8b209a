"""QuantConv2d: the convolution of what its two quantizers give, exactly; real zeros around the image."""

import copy
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitbell.kernels import rotate
from bitbell.layers import Geometry, QuantConv2d, QuantLinear, calibrate, quantize, report
from bitbell.layers.convolution import convolve
from bitbell.layers.product import levels_of
from bitbell.layers.recipes import VARIANTS
from bitbell.quantizers import METHODS

SHAPES: dict[str, dict[str, Any]] = {
    "3x3": {"padding": 1},
    "strided": {"stride": 2, "padding": (2, 1), "kernel_size": (3, 2)},
    "uneven": {"padding": "same", "dilation": (1, 2), "kernel_size": 2},
    "valid": {"padding": "valid", "bias": False},
    "1x1": {"kernel_size": 1, "stride": 2},
    "groups": {"groups": 2, "padding": 1},
    "reflected": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": (0, 1), "padding_mode": "circular"},
}
RECIPES = ["bbq-w2a2", "bbq-tensor-w4a4", "bbq-token-w3a1", "bbq-vision-w2a2", "quest-w2a3", "lsq-w2a2", "bbq-w2a16"]
VARIANT_RECIPES = [f"{v}-w{b}a{b}" for v, (m, _, _) in VARIANTS.items() for b in [METHODS[m].widths[-1]]] + [
    "lsq-plus-w2a2:w.asymmetric=true,w.granularity=row",
    "bbq-w3a2:learn_offset=true",
    "bbq-vision-w2a2:learn_scale=true,a.granularity=running",
    "nf-w2a4:granularity=tensor",
]


def calibrated(recipe: str, channels: int = 32, seed: int = 0, **shape: Any) -> QuantConv2d:
    torch.manual_seed(seed)
    layer = QuantConv2d(channels, 6, **({"kernel_size": 3} | shape), recipe=recipe)
    calibrate(nn.Sequential(layer), torch.randn(3, channels, 6, 7).relu())
    with torch.no_grad():  # as training might leave them
        for name, parameter in layer.named_parameters():
            if "offset" in name:
                parameter.add_(0.05)
    return layer


def composition(layer: QuantConv2d, x: Tensor) -> Tensor:
    """The layer written out with its quantizers' values, which live in one rotated domain."""
    edges = layer._reversed_padding_repeated_twice
    if layer.padding_mode != "zeros":
        x, edges = F.pad(x, edges, mode=layer.padding_mode), (0, 0, 0, 0)
    image = x.permute(0, 2, 3, 1)
    filters, taps = layer.weight.permute(0, 2, 3, 1), layer.weight.shape
    w = layer.weight_quantizer(filters.reshape(len(filters), -1)).view(filters.shape).permute(0, 3, 1, 2)
    assert w.shape == taps
    if layer.activation_quantizer is None:
        a = rotate(image, layer.weight_quantizer.rotation)
    else:
        a = layer.activation_quantizer(image.reshape(len(x), -1)).view(image.shape)
    padded = F.pad(a.permute(0, 3, 1, 2), edges)
    return F.conv2d(padded, w, layer.bias, layer.stride, 0, layer.dilation, layer.groups)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("recipe", "shape"),
    [(recipe, shape) for recipe in RECIPES for shape in SHAPES] + [(recipe, "3x3") for recipe in VARIANT_RECIPES],
)
def test_output_and_gradients_are_those_of_the_composition(recipe: str, shape: str, training: bool) -> None:
    layer = calibrated(recipe, **SHAPES[shape]).double().train(training)
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 32, 6, 7, dtype=torch.float64).relu()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(ours), composition(twin, theirs)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    g = torch.randn(y.shape, dtype=torch.float64)
    y.backward(g)
    expected.backward(g)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)
    others = dict(twin.named_parameters())
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, others[name].grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("recipe", ["bbq-w2a2", "bbq-vision-w3a2", "quest-w4a4", "lsq-w2a2", "lsq-plus-w2a2"])
def test_a_1x1_convolution_over_one_pixel_is_the_linear_layer(recipe: str) -> None:
    conv, linear = nn.Conv2d(32, 6, 1), nn.Linear(32, 6)
    with torch.no_grad():
        linear.weight.copy_(conv.weight[:, :, 0, 0])
        linear.bias.copy_(conv.bias)
    ours, theirs = QuantConv2d.from_conv(conv, recipe), QuantLinear.from_linear(linear, recipe)
    x = torch.randn(5, 32)
    calibrate(nn.Sequential(ours), x[:, :, None, None])
    calibrate(nn.Sequential(theirs), x)
    assert torch.equal(ours(x[:, :, None, None])[:, :, 0, 0], theirs(x))
    assert torch.equal(ours.weight_codes(), theirs.weight_codes())


def exact_sums(layer: QuantConv2d, x: Tensor) -> dict[tuple[int, ...], Fraction]:
    """Sums of products of levels in exact arithmetic, window by window; nothing is added outside the image."""
    a = layer.activation_quantizer.quantize(layer.quantizer_input(x))
    w = layer.weight_quantizer.quantize(layer.matrix)
    per_group = layer.in_channels // layer.groups
    x_codes = a.codes.view(len(x), *x.shape[2:], layer.in_channels).tolist()
    w_codes = w.codes.view(layer.out_channels, *layer.kernel_size, per_group).tolist()
    z_x, z_w = Fraction(layer.activation_quantizer.zero_point), Fraction(layer.weight_quantizer.zero_point)
    (dy, dx), (sy, sx), (height, width) = layer.dilation, layer.stride, x.shape[2:]
    left, _, top, _ = layer._reversed_padding_repeated_twice
    sums = {}
    for n, o, i, j in torch.cartesian_prod(*map(torch.arange, layer(x).shape)).tolist():
        first, total = o // (layer.out_channels // layer.groups) * per_group, Fraction(0)
        for r in range(layer.kernel_size[0]):
            for s in range(layer.kernel_size[1]):
                row, column = i * sy + r * dy - top, j * sx + s * dx - left
                if 0 <= row < height and 0 <= column < width:
                    pixel, tap = x_codes[n][row][column], w_codes[o][r][s]
                    total += sum((pixel[first + c] - z_x) * (tap[c] - z_w) for c in range(per_group))
        sums[n, o, i, j] = total
    return sums


@pytest.mark.parametrize("shape", ["3x3", "strided", "uneven", "groups"])
@pytest.mark.parametrize("recipe", ["bbq-w2a2:rotation=none", "bbq-vision-w4a3", "quest-w1a1", "lsq-w2a8"])
def test_sums_are_exact_and_padding_adds_nothing(recipe: str, shape: str) -> None:
    layer = calibrated(recipe, **(SHAPES[shape] | {"bias": False})).eval()
    x = torch.randn(1, 32, 4, 3)
    y, a = layer(x), layer.activation_quantizer.quantize(layer.quantizer_input(x))
    step = layer.weight_quantizer.quantize(layer.matrix).step
    for (n, o, i, j), total in exact_sums(layer, x).items():
        expected = torch.tensor(float(total)) * step.expand(6, 1)[o, 0] * a.step.reshape(-1)[0]
        assert torch.equal(y[n, o, i, j], expected)


shapes = st.fixed_dictionaries(
    {
        "kernel": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "padding": st.tuples(*[st.integers(0, 2)] * 4),
        "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
        "groups": st.sampled_from([1, 2, 4]),
    }
)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**31))
def test_direct_and_copied_windows_give_the_same_integers(shape: dict[str, Any], seed: int) -> None:
    """The library's convolution against windows that are copied and multiplied, and against float64."""
    generator = torch.Generator().manual_seed(seed)
    geometry = Geometry(8, 8, **shape)
    x = levels_of(
        torch.randint(-8, 8, (2, 6, 5, 8), generator=generator, dtype=torch.int8), (-0.5, None), torch.float32
    )
    w = levels_of(
        torch.randint(-2, 2, (8, geometry.columns), generator=generator, dtype=torch.int8), (-0.5, None), torch.float32
    )
    parts = zip(range(geometry.groups), w.chunk(geometry.groups), strict=True)
    copied = torch.cat([geometry.patches(x, group) @ part.T for group, part in parts], dim=-1)
    assert torch.equal(convolve(x, w, geometry), copied)
    assert torch.equal(convolve(x.double(), w.double(), geometry).float(), copied)
    assert copied.shape[1:3] == geometry.output_size(6, 5)


def test_statistics_are_those_of_a_sample_and_of_a_filter() -> None:
    layer = calibrated("bbq-vision-w2a2", padding=1)
    x = torch.randn(3, 32, 6, 7) * torch.tensor([0.1, 1, 10])[:, None, None, None]
    step = layer.activation_quantizer.quantize(layer.quantizer_input(x)).step
    rms = x.flatten(1).square().mean(1).sqrt()  # a rotation changes no sum of squares
    torch.testing.assert_close(step.flatten(), 2.45 * rms / 2)
    torch.testing.assert_close(layer(x)[1:2], layer(x[1:2]), rtol=0, atol=0)  # samples do not see each other
    w = layer.weight_quantizer.quantize(layer.matrix)
    torch.testing.assert_close(w.step.flatten(), 2.45 * layer.weight.flatten(1).square().mean(1).sqrt() / 2)


def test_rotation_blocks_divide_the_channels_of_a_group() -> None:
    for name, channels, groups, block in (
        ("bbq-w2a2", 96, 1, 32),
        ("bbq-w2a2", 256, 1, 128),
        ("bbq-w2a2", 256, 4, 64),
        ("bbq-vision-w2a2", 256, 1, 64),
        ("bbq-vision-w2a2", 96, 2, 16),
        ("lsq-w2a2", 32, 32, None),
    ):
        layer = QuantConv2d(channels, 32, 3, groups=groups, recipe=name)
        assert (layer.weight_quantizer.rotation, layer.activation_quantizer.rotation) == (block, block)
    assert QuantLinear(256, 8, "bbq-vision-w2a2").weight_quantizer.rotation == 32


def test_it_is_a_conv2d_with_its_parameters_keys_mode_and_memory_format() -> None:
    conv = nn.Conv2d(32, 6, 3, padding=1).eval()
    layer = QuantConv2d.from_conv(conv, "bbq-w2a2")
    assert isinstance(layer, nn.Conv2d)
    assert layer.weight is conv.weight
    assert layer.bias is conv.bias
    assert not layer.training
    assert {name for name in layer.state_dict() if "quantizer" not in name} == set(conv.state_dict())
    x = torch.randn(2, 32, 5, 5)
    calibrate(nn.Sequential(layer), x)
    assert layer(x).is_contiguous()
    channels_last = x.to(memory_format=torch.channels_last)
    assert layer(channels_last).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer(x), layer(channels_last))
    assert torch.equal(layer(x[0]), layer(x[:1])[0])  # one image without a batch
    assert layer(x[:0]).shape == (0, 6, 5, 5)
    fresh = QuantConv2d(32, 6, 3, padding=1, recipe="bbq-w2a2").eval()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert "kernel_size=(3, 3)" in repr(layer)
    assert "recipe=bbq-w2a2" in repr(layer)


def test_bfloat16_autocast_multiplies_the_same_levels() -> None:
    layer = calibrated("bbq-w2a2", padding=1, bias=False).eval()
    x = torch.randn(2, 32, 6, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.02, atol=0.02)


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"a width of 3 cannot be rotated.*its input channels, 3"):
        QuantConv2d(3, 8, 3, recipe="bbq-w2a2")
    with pytest.raises(ValueError, match=r"a width of 1 .*rotation=None.*each of its 32 groups, 1"):
        QuantConv2d(32, 32, 3, groups=32, recipe="bbq-w2a2")
    layer = calibrated("bbq-w2a2")
    with pytest.raises(ValueError, match=r"must be \(N, 32, height, width\), got \(2, 16, 5, 5\)"):
        layer(torch.randn(2, 16, 5, 5))
    with pytest.raises(ValueError, match="2 x 5, padded to 2 x 5, is smaller than the kernel, which spans 3 x 3"):
        layer(torch.randn(2, 32, 2, 5))


class Net(nn.Module):
    """Stem, two blocks, a transposed convolution, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.Conv2d(32, 64, 1))
        self.up = nn.ConvTranspose2d(64, 64, 2)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.blocks(self.stem(x))).mean((2, 3)))


def test_quantize_swaps_convolutions_but_for_the_stem_and_report_counts_them() -> None:
    model = quantize(Net(), "bbq-w2a2")
    assert [name for name, m in model.named_modules() if isinstance(m, QuantConv2d)] == ["blocks.0", "blocks.2"]
    calibrate(model, torch.randn(2, 3, 6, 6))
    assert model(torch.randn(2, 3, 6, 6)).shape == (2, 10)
    rows = {row.name: row for row in report(model).rows}
    assert rows["blocks.0"].shape == (32, 9 * 32)
    assert rows["blocks.0"].bytes_packed == 32 * (9 * 32 * 2 // 8) + 4 * 32 + 4 * 32  # codes, scales, bias
    assert "first convolution" in rows["stem"].reason
    assert "output head" in rows["head"].reason
    assert "a ConvTranspose2d is not quantized" in rows["up"].reason


def test_rules_name_convolutions_as_they_do_linear_layers() -> None:
    model = quantize(Net(), {"stem": "lsq-w4a8", "blocks.0": None, "blocks.*": "bbq-vision-w2a2", "head": "lsq-w8a8"})
    assert isinstance(model.stem, QuantConv2d)
    assert isinstance(model.head, QuantLinear)
    assert type(model.blocks[0]) is nn.Conv2d
    assert model.blocks[2].recipe.name == "bbq-vision-w2a2"
    with pytest.raises(ValueError, match=r"^stem: a width of 3 cannot be rotated.*a rule 'stem': None"):
        quantize(Net(), {"stem": "bbq-w2a2"})
    with pytest.raises(ValueError, match="'up', a ConvTranspose2d, for which there is no quantized layer"):
        quantize(Net(), {"up": "bbq-w2a2"})
    with pytest.raises(ValueError, match=r"for a single layer use QuantConv2d\.from_conv"):
        quantize(nn.Conv2d(32, 32, 3), {"re:.*": "bbq-w2a2"})
    with pytest.raises(ValueError, match="the first convolution"):
        quantize(nn.Sequential(nn.Conv2d(32, 32, 3)), "bbq-w2a2")
    assert isinstance(quantize(nn.Sequential(nn.Conv2d(32, 32, 3)), {"0": "bbq-w2a2"})[0], QuantConv2d)


def test_a_subclass_is_left_alone_with_the_reason() -> None:
    class Special(nn.Conv2d):
        pass

    model = quantize(nn.Sequential(nn.Conv2d(3, 32, 1), Special(32, 32, 1), nn.Conv2d(32, 32, 1)), "bbq-w2a2")
    assert model.__dict__["kept_in_full_precision"]["1"] == "a Special is not a plain nn.Conv2d"
    assert isinstance(model[2], QuantConv2d)


def test_a_training_step_is_one_graph() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1))
    images = torch.randn(2, 3, 4, 4)
    calibrate(quantize(model, "bbq-vision-w2a2"), images)
    torch.compile(model.train(), backend="eager", fullgraph=True)(images).sum().backward()  # raises where it breaks
    assert model[1].weight.grad is not None
