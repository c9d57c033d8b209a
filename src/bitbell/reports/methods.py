"""A quantization method -> the picture and the numbers of its card: what it does to a standard normal.

    python -m bitbell.reports.methods                          # prints the numbers of every method
    python -m bitbell.reports.methods docs/methods/pictures    # and draws METHOD.svg of each

Both come from the quantizers themselves, made as for one weight row without rotation, and calibrated on what they are
shown. Each SVG carries the data that it was drawn from, as JSON in its description, so that a test can hold it against
the quantizer of today.
"""

from __future__ import annotations

import argparse
import html
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitbell.quantizers import METHODS, Quantizer, entropy_of, make_quantizer
from bitbell.reports.drawing import COLOURS, GRID, INK, MUTED, drawing_rules, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN_WIDTHS = (2, 4)  # bits, of those that the method has
ROW = 640  # numbers that share a scale; their largest magnitude is 3.32 standard deviations on average
LARGEST = 3.32
SAMPLES = 100_000
COLUMN, HEIGHT = 215.0, 400.0  # points, of a picture's part for one width


@dataclass(frozen=True)
class Portrait:
    """What a quantizer does to a standard normal. `values`: outputs in the order of the inputs, one more than the
    `thresholds`, where the code changes. `shares`: of each code. `gradient`: corners (x, dy/dx) of a line."""

    bits: int
    thresholds: list[float]
    values: list[float]
    shares: list[float]
    gradient: list[tuple[float, float]]


@dataclass(frozen=True)
class Numbers:
    """Of the codes and values of a standard normal: entropy in bits, mean squared error, the same after the best
    rescale, cosine between input and output."""

    bits: int
    entropy: float
    error: float
    best_error: float
    cosine: float


def widths_shown(method: str) -> list[int]:
    """The bit widths that a method's picture shows."""
    return [bits for bits in SHOWN_WIDTHS if bits in METHODS[method].widths]


def portray(method: str, bits: int) -> Portrait:
    """Show a standard normal, as stratified quantiles cut off where a row's largest number lies, to a quantizer."""
    x = torch.special.ndtri((torch.arange(SAMPLES, dtype=torch.float64) + 0.5) / SAMPLES)
    x = x.clamp(-LARGEST, LARGEST).unsqueeze(0)
    x = (x / x.square().mean().sqrt()).requires_grad_()
    quantizer = _calibrated(method, bits, x.detach())
    y = quantizer(x)
    y.sum().backward()
    assert x.grad is not None
    codes, inputs = quantizer.encode(x)[0].long(), x.detach()[0]
    ends = (codes.diff() != 0).nonzero().flatten()
    values = y.detach()[0][torch.cat([ends, ends.new_tensor([SAMPLES - 1])])]
    return Portrait(
        bits,
        _rounded((inputs[ends] + inputs[ends + 1]) / 2),
        _rounded(values),
        _rounded(torch.bincount(codes, minlength=2**bits) / SAMPLES),
        _corners(inputs, x.grad[0]),
    )


def measure(method: str, bits: int, rows: int = 2048) -> Numbers:
    """Entropy and error on `rows` rows of 640 random normal numbers, each row with a scale of its own."""
    x = torch.randn(rows, ROW, generator=torch.Generator().manual_seed(0))
    quantizer = _calibrated(method, bits, x)
    with torch.no_grad():
        y = quantizer(x)
    cosine = float((x * y).sum(dtype=torch.float64) / (x.double().norm() * y.double().norm()))
    rescaled = (1 - cosine**2) * float(x.square().mean())  # of the sample, whose variance is not exactly 1
    return Numbers(bits, quantizer.entropy(x), float((x - y).square().mean()), rescaled, cosine)


def _calibrated(method: str, bits: int, x: Tensor) -> Quantizer:
    rows = {"rows": len(x)} if METHODS[method].for_weights else {}
    quantizer = make_quantizer(method, bits=bits, rotation=None, **rows).to(x.dtype)
    quantizer.calibrate(x)
    return quantizer


def _rounded(x: Tensor) -> list[float]:
    return [round(value, 4) for value in x.tolist()]


def _corners(x: Tensor, gradient: Tensor) -> list[tuple[float, float]]:
    """Points of the curve that are enough to draw it: evenly spaced ones and both sides of every jump, but nothing
    inside a flat stretch."""
    even = torch.searchsorted(x, torch.linspace(float(x[0]), float(x[-1]), 81, dtype=x.dtype))
    jumps = (gradient.diff().abs() > 0.02).nonzero().flatten()
    kept = torch.cat([even, jumps, jumps + 1]).unique()
    points = list(zip(_rounded(x[kept]), _rounded(gradient[kept]), strict=True))
    heights = [height for _, height in points]
    inner = [p for i, p in enumerate(points[1:-1]) if len({*heights[i : i + 3]}) > 1]
    return [points[0], *inner, points[-1]]


def draw_method(portraits: Sequence[Portrait]) -> Figure:
    """One column a width: staircase over the bell, gradient, share of each code. Within `drawing_rules`."""
    width = COLUMN * len(portraits) + 12
    figure = new_figure(HEIGHT, width)
    for i, portrait in enumerate(portraits):
        left = COLUMN * i + 28
        for draw, bottom, height in ((_draw_stairs, 192, 180), (_draw_gradient, 96, 60), (_draw_shares, 24, 34)):
            box = (left / width, bottom / HEIGHT, (COLUMN - 35) / width, height / HEIGHT)
            axes = figure.add_axes(box)
            axes.tick_params(length=2.5, pad=2, labelsize=7)
            title = draw(axes, portrait)
            figure.text(left / width, (bottom + height + 5) / HEIGHT, title, color=MUTED, fontsize=7.5)
        figure.text(left / width, 1 - 11 / HEIGHT, f"{portrait.bits} bits", color=INK, fontsize=9, weight="bold")
    return figure


def _draw_stairs(axes: Axes, portrait: Portrait) -> str:
    """Output against input, with the bell below, cut where the code changes; dashed where both are equal."""
    bell = [i / 10 for i in range(-35, 36)]
    axes.fill_between(bell, -3.5, [3 * math.exp(-v * v / 2) - 3.5 for v in bell], color=GRID, linewidth=0)
    axes.vlines(portrait.thresholds, -3.5, -3.1, color=MUTED, linewidth=0.6)
    axes.plot([-3.5, 3.5], [-3.5, 3.5], color=MUTED, linewidth=0.6, linestyle=(0, (4, 3)))
    edges = [-3.5, *portrait.thresholds, 3.5]
    axes.stairs(portrait.values, edges, baseline=None, color=COLOURS[0], linewidth=1.4)
    axes.set(xlim=(-3.5, 3.5), ylim=(-3.5, 3.5), xticks=range(-3, 4), yticks=range(-3, 4))
    return "output against input; the bell and its thresholds"


def _draw_gradient(axes: Axes, portrait: Portrait) -> str:
    axes.plot(*zip(*portrait.gradient, strict=True), color=COLOURS[1], linewidth=1.4)
    axes.set(xlim=(-3.5, 3.5), ylim=(-0.08, 1.6), xticks=(-2, 0, 2), yticks=(0, 1))
    return "gradient to the input"


def _draw_shares(axes: Axes, portrait: Portrait) -> str:
    codes = range(len(portrait.shares))
    axes.bar(codes, portrait.shares, width=0.8, color=COLOURS[0], linewidth=0)
    axes.axhline(1 / len(codes), color=INK, linewidth=0.6)
    tallest = max(1.25 / len(codes), *portrait.shares)
    axes.set(xlim=(-0.6, len(codes) - 0.4), ylim=(0, 1.05 * tallest), xticks=(0, len(codes) - 1), yticks=())
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    entropy = entropy_of(torch.tensor(portrait.shares))
    return f"share of each code; entropy {entropy:.2f} bits"


def write_picture(method: str, folder: Path) -> Path:
    """Draw a method's card picture into `folder`; return its path."""
    portraits = [portray(method, bits) for bits in widths_shown(method)]
    buffer = io.StringIO()
    with drawing_rules():
        about = {"Date": None, "Creator": None, "Description": json.dumps([asdict(p) for p in portraits])}
        draw_method(portraits).savefig(buffer, format="svg", metadata=about)
    path = folder / f"{method}.svg"
    svg = re.sub(r"^ +| +$", "", buffer.getvalue(), flags=re.MULTILINE)
    path.write_text(svg.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif"), encoding="utf-8")
    return path


def read_picture(path: Path) -> list[Portrait]:
    """The data that a picture was drawn from."""
    found = re.search(r"<dc:description>(.*?)</dc:description>", path.read_text(encoding="utf-8"), re.DOTALL)
    if found is None:
        raise ValueError(f"{path} holds no description: draw it with python -m bitbell.reports.methods {path.parent}")
    return [Portrait(**portrait) for portrait in json.loads(html.unescape(found[1]))]


def main() -> None:
    """Print every method's numbers; with a folder, draw its picture too."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", nargs="?", type=Path, help="where to write METHOD.svg")
    folder = parser.parse_args().folder
    for method, kind in METHODS.items():
        print(f"{method}\n| bits | entropy (bits) | squared error | after the best rescale | cosine |")
        print("|---|---|---|---|---|")
        for bits in (b for b in kind.widths if b <= 4):
            n = measure(method, bits)
            print(f"| {bits} | {n.entropy:.3f} | {n.error:.3f} | {n.best_error:.3f} | {n.cosine:.3f} |")
        if folder:
            print(write_picture(method, folder))


if __name__ == "__main__":
    main()
