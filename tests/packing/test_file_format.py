"""The packed directory, read by NumPy with nothing but docs/file-format.md, gives what the trained layer gives."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

import bitbell
from bitbell.layers.recipes import VARIANTS
from bitbell.quantizers import METHODS

Array = Any
HALVES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
TABLES = {
    ("quest-fp4", 4): [-v for v in reversed(HALVES)] + HALVES,
    ("nf", 2): [-1, 0, 0.435818164583, 1],
    ("nf", 3): [-1, -0.535022708486, -0.246931431812, 0, 0.183337480335, 0.381993954321, 0.622985741714, 1],
    ("nf", 4): [
        *(-1, -0.696192805632, -0.525072959447, -0.39491742592, -0.284441308921, -0.1847734028, -0.091049975986, 0),
        *(0.079580314958, 0.16093014438, 0.246112251347, 0.337915136713, 0.440709731864, 0.56261688797),
        *(0.722956644159, 1),
    ],
}
CLIP = [0, 0.7978845608, 1.4935346, 2.0510684, 2.5139306, 2.9160939, 3.2765973, 3.6010497, 3.8849387]
THRESHOLD_STEP, LEVEL_STEP = (
    [0, 1.5957691, 0.6744898, 0.3694858, 0.1999421],
    [0, 1.5957691, 0.8275964, 0.4264473, 0.2215203],
)
OWN_ACTIVATIONS = {"n2uq": "n2uq-activations", "ternary": "absmax"}


def unpack(words: Array, bits: int, columns: int) -> Array:
    """Centred codes of a matrix of words."""
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : columns * bits]
    return (stream.reshape(len(words), columns, bits) * 2 ** np.arange(bits)).sum(-1) - 2 ** (bits - 1)


def rotate(x: Array, block: int | None) -> Array:
    if block is None:
        return x
    matrix = [[(-1) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    return (x.reshape(-1, block) @ (np.array(matrix) / math.sqrt(block))).reshape(x.shape)


class Input:
    """Steps 1 to 3 of the page, for one layer."""

    def __init__(self, tensors: dict[str, Array], recipe: dict[str, Any]) -> None:
        self.tensors, self.options = tensors, recipe["activation_options"]
        self.method = recipe["activation_method"] or OWN_ACTIVATIONS.get(recipe["method"], recipe["method"])
        self.bits = recipe["activations"]
        self.n = 2**self.bits
        self.group = self.options.get("granularity", "running" if self.method == "bbq" else "token")
        self.offset = tensors.get("offset", 0)
        self.table = TABLES.get((self.method, self.bits))

    def size(self, h: Array, kind: str) -> Array:
        if self.group == "running":
            return self.tensors["running_size"]
        axis = None if self.group == "tensor" else -1
        measure = {
            "rms": lambda: np.sqrt((h**2).mean(axis, keepdims=True)),
            "max": lambda: np.abs(h).max(axis, keepdims=True),
            "mean": lambda: np.abs(h).mean(axis, keepdims=True),
        }[kind]()
        return measure if self.method == "quest" else np.maximum(measure, 1e-8)

    def mid(self, t: Array) -> Array:
        return np.clip(np.round(t - 0.5), -self.n / 2, self.n / 2 - 1)

    def codes_and_step(self, h: Array) -> tuple[Array, Array]:
        n, scale = self.n, self.tensors["scale"]
        match self.method:
            case "bbq":
                if not self.options.get("normalise", True):
                    r = 1
                else:
                    r = self.tensors["running_inverse_rms"] if self.group == "running" else 1 / self.size(h, "rms")
                place = n / 2 * np.vectorize(math.erf)(h * r / math.sqrt(2)) + (n - 1) / 2
                restored = self.options.get("restore_rms", False)
                return np.clip(np.round(place), 0, n - 1) - n / 2, scale / (n / 2) / (r if restored else 1)
            case "quest":
                step = 2 * (CLIP[self.bits] * self.size(h, "rms") + 1e-8) / (n - 1)
            case "quest-fp4":
                step = 0.4870795 * self.size(h, "rms")
            case "lsq" | "lsq-plus":
                step = np.maximum(scale, 1e-8)
            case "pact":
                step = 2 * np.maximum(scale, 1e-8) / (n - 1)
            case "seq":
                reach = np.maximum(scale, 1e-5)
                if n > 2:
                    return self.mid(np.clip(h / reach, -0.99, 0.99) / (2 / n)), reach / (n / 2)
                step = 2 * reach
            case "n2uq":
                s = (n - 1) / (n / 2) * self.size(h, "mean")
                return np.round((np.clip(h / s, -1, 1) + 1) * (n - 1) / 2) - n / 2, 2 * s / (n - 1)
            case "n2uq-activations":
                interval = self.tensors["interval"]
                widths = np.maximum(self.tensors["segments"], interval / 1000)
                thresholds = self.tensors["start"] + np.cumsum(widths) - widths / 2
                count = (thresholds < (h * self.tensors["input_scale"])[..., None]).sum(-1)
                return count - n / 2, scale * interval
            case "nf":
                step = self.size(h, "max")
            case "absmax":
                step = 2 * self.size(h, "max") / (n - 1)
            case "narrow":
                size = self.size(h, "rms")
                return self.mid(h / (THRESHOLD_STEP[self.bits] * size)), LEVEL_STEP[self.bits] * size
            case "ternary":
                step = self.size(h, "mean")
                return np.clip(np.round(h / step), -1, 1), step
        if self.table is not None:
            middles = (np.array(self.table[1:]) + self.table[:-1]) / 2
            return np.searchsorted(middles, h / step) - n / 2, step
        return self.mid((h - self.offset) / step), step

    def zero_point(self) -> float:
        if self.method == "bbq":
            given = self.options.get("zero_point")
            return (-0.5 if self.bits <= 2 else 0.0) if given is None else given
        return 0.0 if self.method == "ternary" else -0.5


def levels(codes: Array, zero_point: float, table: list[float] | None) -> Array:
    return codes - zero_point if table is None else np.array(table)[(codes + len(table) / 2).astype(int)]


def output_of(directory: Path, x: Array) -> Array:
    """What layer "0" of the directory makes of x."""
    tensors = {name[2:]: value for name, value in load_file(directory / "model.safetensors").items()}
    quantization = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert quantization["format_version"] == 3
    layer = quantization["layers"]["0"]
    recipe = quantization["recipes"][layer["recipe"]]
    _, inputs = layer["shape"]
    bits = recipe["weights"]
    c_w = unpack(tensors["weight_packed"], bits, inputs)
    level_w = levels(c_w, layer["weight_zero_point"], TABLES.get((recipe["method"], bits)))
    step_w, o_w = tensors["weight_scale"].T, tensors.get("weight_offset", np.zeros((1, 1))).T
    h = rotate(x, layer["rotation"])
    if recipe["activations"] is None:
        return h @ (level_w * step_w.T + o_w.T).T + tensors["bias"]
    prefix = "activation_quantizer."
    a = Input({name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}, recipe)
    c_x, step_x = a.codes_and_step(h)
    level_x = levels(c_x, a.zero_point(), a.table)
    if a.table is None and TABLES.get((recipe["method"], bits)) is None:
        z_x, z_w = a.zero_point(), layer["weight_zero_point"]
        total = c_x @ c_w.T - z_w * c_x.sum(-1, keepdims=True) - z_x * c_w.sum(-1) + inputs * z_x * z_w
        assert np.allclose(total, level_x @ level_w.T)
    else:
        total = level_x @ level_w.T
    offsets = a.offset * level_w.sum(-1) * step_w + level_x.sum(-1, keepdims=True) * step_x * o_w
    return total * step_w * step_x + tensors["bias"] + offsets + inputs * a.offset * o_w


def image_output_of(directory: Path, image: Array) -> Array:
    """What convolution "0" of the directory, of one group, makes of `image` (N, channels, H, W)."""
    tensors = {name[2:]: value for name, value in load_file(directory / "model.safetensors").items()}
    quantization = json.loads((directory / "config.json").read_text())["quantization_config"]
    layer = quantization["layers"]["0"]
    recipe, shape = quantization["recipes"][layer["recipe"]], layer["convolution"]
    (height, width), (down, right), (dy, dx) = shape["kernel"], shape["stride"], shape["dilation"]
    c_w = unpack(tensors["weight_packed"], recipe["weights"], layer["shape"][1])
    filters = c_w.reshape(len(c_w), height, width, shape["in_channels"])
    x = image.transpose(0, 2, 3, 1)
    before, after, top, bottom = shape["padding"]
    around = ((0, 0), (top, bottom), (before, after), (0, 0))
    if shape["mode"] != "zeros":
        x = np.pad(x, around, mode={"circular": "wrap"}[shape["mode"]])
    prefix = "activation_quantizer."
    a = Input({name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}, recipe)
    codes, step = a.codes_and_step(rotate(x, layer["rotation"]).reshape(len(x), -1))
    codes, inside = codes.reshape(x.shape), np.ones(x.shape)
    if shape["mode"] == "zeros":
        codes, inside = np.pad(codes, around), np.pad(inside, around)
    z_x, z_w = a.zero_point(), layer["weight_zero_point"]
    rows = (codes.shape[1] - dy * (height - 1) - 1) // down + 1
    columns = (codes.shape[2] - dx * (width - 1) - 1) // right + 1
    y = np.zeros((len(x), len(c_w), rows, columns))
    for i in range(rows):
        for j in range(columns):
            down_to, right_to = i * down + dy * height, j * right + dx * width
            taps = (slice(None), slice(i * down, down_to, dy), slice(j * right, right_to, dx))
            c_x, there = codes[taps][:, None], inside[taps][:, None]
            products = c_x * filters - z_w * c_x - z_x * there * filters + z_x * z_w * there
            total = products.sum((2, 3, 4))
            y[:, :, i, j] = total * tensors["weight_scale"].T * step + tensors["bias"]
    return y


@pytest.mark.parametrize("recipe", ["bbq-w2a2", "bbq-vision-w3a2", "quest-w4a4:granularity=tensor", "absmax-w2a3"])
@pytest.mark.parametrize(
    "shape",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 2, "padding": "same", "dilation": (1, 3)},
        {"kernel_size": (2, 3), "stride": (2, 1), "padding": (0, 2), "padding_mode": "circular"},
    ],
)
def test_the_page_is_enough_to_read_a_convolution(tmp_path: Path, recipe: str, shape: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(48, 5, **shape)), torch.randn(2, 48, 5, 6)
    bitbell.calibrate(bitbell.quantize(model, {"0": recipe}), x)
    expected = model.eval()(x).detach().numpy()
    got = image_output_of(bitbell.pack(model).save(tmp_path / "packed"), x.numpy().astype(np.float64))
    wrong = np.abs(got - expected) > 1e-4 * np.abs(expected).max()
    assert wrong.mean() <= 0.02  # a value next to a threshold may get the neighbouring code


def recipes() -> list[str]:
    """Every variant at its narrowest and widest, and what has options of its own in the files."""
    found = []
    for variant, (name, _, _) in VARIANTS.items():
        method = METHODS[name]
        of_inputs = METHODS[method.activation_method or name].widths
        found += [f"{variant}-w{method.widths[end]}a{of_inputs[end]}" for end in (0, -1)]
    return [
        *dict.fromkeys(found),
        "bbq-w3a3:learn_offset=true,granularity=tensor",
        "bbq-w2a2:zero_point=-0.25,w.learn_offset=true,normalise=false",
        "bbq-w3a16:learn_offset=true",
        "lsq-plus-w2a4:w.asymmetric=true,a.asymmetric=false,rotation=32",
        "lsq-plus-w4a2:w.granularity=row",
        "quest-w4a3:granularity=tensor,rotation=none",
        "quest-fp4-w4a4:a.granularity=running",
        "nf-w2a3:a.granularity=tensor,rotation=16",
        "nf-w4a16",
        "ternary-w2a2:activation_method=ternary,a.granularity=running",
        "ternary-w2a3:activation_method=n2uq",
        "absmax-w4a2:a.granularity=running",
        "seq-w2a2:activation_method=nf",
    ]


@pytest.mark.parametrize("recipe", recipes())
def test_the_page_is_enough_to_read_a_directory(tmp_path: Path, recipe: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(96, 8)), torch.randn(6, 96) * torch.arange(1, 7)[:, None]
    bitbell.calibrate(bitbell.quantize(model, recipe), x)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "quantizer" in name:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape)).add_(0.05 if name.endswith("offset") else 0.0)
    expected = model.eval()(x).detach().numpy()
    got = output_of(bitbell.pack(model).save(tmp_path / "packed"), x.numpy().astype(np.float64))
    # In float64 a value next to a threshold may get the neighbouring code, of one input in a hundred at most.
    wrong = np.abs(got - expected) > 1e-4 * np.abs(expected).max()
    assert wrong.any(-1).sum() <= (1 if "w8" in recipe else 0)


def test_the_tables_of_the_page_are_those_of_this_reader() -> None:
    page = (Path(__file__).parents[2] / "docs" / "file-format.md").read_text(encoding="utf-8")
    for (method, bits), table in TABLES.items():
        numbers = ", ".join(f"{v:g}" if method == "quest-fp4" else repr(v) for v in table).replace("-0,", "0,")
        name = f"`{method}`" if method == "quest-fp4" else f"`{method}`, {bits} bits"
        assert f"| {name} | {numbers} |" in page
    for name, row in (("clip_b", CLIP), ("t_b", THRESHOLD_STEP), ("s_b", LEVEL_STEP)):
        assert f"| {name} | {' | '.join(map(str, row[1:]))}" in page
