"""PackedConv2d: the trained convolution in packed codes, the same sums bit for bit, on every kernel."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from convolution_shapes import WINDOWS
from torch import Tensor, nn

import bitbell
from bitbell.kernels import native
from bitbell.layers import QuantConv2d, calibrate, quantized_layers
from bitbell.layers.recipes import VARIANTS
from bitbell.packing import PackedFileError, VerificationError
from bitbell.packing.conv2d import PackedConv2d, _NativeConvolution
from bitbell.quantizers import METHODS

SHAPES = WINDOWS | {
    "groups": {"groups": 2, "padding": 1},
    "reflected": {"padding": 1, "padding_mode": "reflect"},
}
VARIANT_RECIPES = [
    f"{v}-w{b}a{b}" for v, (m, _, _) in VARIANTS.items() for b in (METHODS[m].widths[0], METHODS[m].widths[-1])
]
SHAPED_RECIPES = [
    "bbq-w2a2",
    "bbq-w3a3",
    "bbq-vision-w2a2",
    "quest-w4a4",
    "lsq-plus-w2a2:w.asymmetric=true",
    "bbq-w2a16",
]
KERNELS = [native.REFERENCE, *(name for name, why in native.level_names().items() if not why)]


class Net(nn.Module):
    """A stem, the convolution of a test, and a head."""

    def __init__(self, **shape: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.conv = nn.Conv2d(32, 16, **({"kernel_size": 3} | shape))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.stem(x).relu()).mean((2, 3)))


def trained(recipe: str, shape: dict[str, Any]) -> Net:
    torch.manual_seed(0)
    model = Net(**shape)
    bitbell.quantize(model, {"conv": recipe})
    calibrate(model, torch.randn(4, 3, 7, 8))
    with torch.no_grad():  # as training might leave them
        for name, parameter in model.conv.named_parameters():
            if "quantizer" in name:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape)).add_(0.05 if name.endswith("offset") else 0)
    return model.eval()


@pytest.mark.parametrize(
    ("recipe", "shape"),
    [(recipe, shape) for recipe in SHAPED_RECIPES for shape in SHAPES]
    + [(recipe, "3x3") for recipe in VARIANT_RECIPES],
)
def test_the_packed_output_is_the_trained_one_to_the_last_bit(recipe: str, shape: str, reference_kernels: None) -> None:
    model = trained(recipe, SHAPES[shape])
    packed, x = bitbell.pack(model).model.conv, torch.randn(3, 32, 7, 8).relu()
    assert isinstance(packed, PackedConv2d)
    expected, got = model.conv(x), packed(x)
    if model.conv.recipe.activations is None or packed.weight_grid[1] is not None:
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)  # sums of floats
    else:
        assert torch.equal(got, expected)
    if "tensor" not in recipe:  # one image without a batch
        torch.testing.assert_close(packed(x[0]), got[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(packed.weight_codes(), model.conv.weight_codes())


@pytest.mark.parametrize("level", KERNELS[1:])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "recipe", ["bbq-w2a2", "bbq-vision-w3a2", "lsq-w1a4", "lsq-plus-w4a3", "absmax-w4a8", "bbq-w8a8"]
)
def test_cpp_kernels_give_the_integers_of_the_definition(recipe: str, shape: str, level: str) -> None:
    model = trained(recipe, SHAPES[shape])
    packed, x = bitbell.pack(model).model.conv, torch.randn(3, 32, 7, 8)
    with native.using(native.REFERENCE):
        expected = packed(x)
    with native.using(level):
        assert isinstance(packed.native_layer(), _NativeConvolution)
        got = packed(x)
    # A rotation summed in another order may turn a code at a threshold: a few outputs, by a level or two.
    away = (got - expected).abs() > 1e-5 * expected.abs().max()
    assert away.float().mean() <= (0.2 if "a8" in recipe else 0)


@pytest.mark.parametrize("recipe", ["bbq-w2a2", "lsq-plus-w2a2:w.asymmetric=true", "bbq-w2a16"])
@pytest.mark.parametrize("level", [native.REFERENCE, "auto"])
def test_autocast_changes_no_number(recipe: str, level: str) -> None:
    packed, x = bitbell.pack(trained(recipe, {"padding": 1})).model.conv, torch.randn(3, 32, 7, 8).relu()
    with torch.no_grad(), native.using(level):
        expected = packed(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(packed(x), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_do_not_depend_on_how_many_windows_are_copied_at_once(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = bitbell.pack(trained("bbq-w2a2", SHAPES[shape])).model.conv, torch.randn(5, 32, 7, 8)
    with native.using(native.REFERENCE):
        whole = packed(x)
        monkeypatch.setattr("bitbell.packing.conv2d.COPIED_BYTES", 2 * 7 * 8 * packed.in_features)
        assert torch.equal(packed(x), whole)
        assert packed(x[:0]).shape == (0, *whole.shape[1:])
    assert packed(x[:0]).shape == (0, *whole.shape[1:])


def test_a_native_convolution_notices_changed_tensors_and_bad_numbers() -> None:
    packed, x = bitbell.pack(trained("bbq-w2a2", {"padding": 1, "bias": False})).model.conv, torch.randn(2, 32, 7, 8)
    before = packed(x)
    packed.weight_scale.mul_(2)
    torch.testing.assert_close(packed(x), 2 * before)
    packed.activation_quantizer.scale.data.mul_(2)
    torch.testing.assert_close(packed(x), 4 * before)
    x[1, 3, 2, 2] = torch.nan
    assert not torch.isfinite(packed(x)).all()
    assert torch.equal(packed(x.to(torch.bfloat16)).isnan().any(), torch.tensor(True))


@pytest.mark.parametrize("level", KERNELS)
def test_an_image_of_padding_alone_gives_the_bias(level: str) -> None:
    packed = bitbell.pack(trained("bbq-w2a2", {"padding": 2})).model.conv
    with native.using(level):
        got = packed(torch.randn(2, 32, 0, 3))
    assert torch.equal(got, packed.bias.view(1, -1, 1, 1).expand(2, 16, 2, 5))


def test_gradients_pass_through_to_what_is_before(reference_kernels: None) -> None:
    model = trained("bbq-vision-w2a4", {"padding": 1})
    packed, x = bitbell.pack(model).model.conv, torch.randn(2, 32, 7, 8)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = packed(ours), model.conv(theirs)
    assert torch.equal(y, expected)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    (expected * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


# Files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_saved_loaded_and_verified_it_is_the_same(shape: str, tmp_path: Path) -> None:
    model, images = trained("bbq-vision-w3a2", SHAPES[shape]), torch.randn(2, 3, 7, 8)
    packed = bitbell.pack(model)
    packed.save(tmp_path / "packed")
    loaded = bitbell.load(tmp_path / "packed", model=Net(**SHAPES[shape]))
    assert torch.equal(loaded(images), packed(images))
    assert bitbell.verify(model, loaded, images).layers == 1
    assert bitbell.verify(model, loaded).logit_difference is None  # random inputs of the layers
    row = next(row for row in bitbell.report(loaded).rows if row.name == "conv")
    assert row.bytes_packed == loaded.model.conv.weight_packed.numel() * 4 + 4 * 16 * (
        1 + (model.conv.bias is not None)
    )


def test_a_convolution_of_another_shape_is_refused(tmp_path: Path) -> None:
    bitbell.pack(trained("bbq-w2a2", {"padding": 1})).save(tmp_path / "packed")
    for other, message in (
        ({"padding": 0}, r"conv has the convolution .*'padding': \[1, 1, 1, 1\].* but .*\[0, 0, 0, 0\]"),
        ({"padding": 1, "stride": 2}, r"'stride': \[1, 1\].* but .*'stride': \[2, 2\]"),
        ({"padding": 1, "padding_mode": "circular"}, "'mode': 'zeros'.* but .*'mode': 'circular'"),
        ({"kernel_size": 5, "padding": 2}, r"conv has shape \[16, 288\] there, but \[16, 800\]"),
    ):
        with pytest.raises(PackedFileError, match=message):
            bitbell.load(tmp_path / "packed", model=Net(**other))


def test_verify_names_a_convolution_that_differs() -> None:
    model = trained("bbq-w2a2", {"padding": 1})
    packed = bitbell.pack(model)
    worse = copy.deepcopy(packed)
    worse.model.conv.weight_packed[3, 2] ^= 1
    with pytest.raises(VerificationError, match="conv: 1 of 4608 weight codes differ"):
        bitbell.verify(model, worse)
    assert isinstance(dict(quantized_layers(model))["conv"], QuantConv2d)
    assert "kernel=(3, 3)" in repr(packed.model.conv)
