"""Pictures of the codes: how often each code is used, layer by layer.

A method that spends its bits well uses every one of its 2**b codes equally often. Up to a few dozen layers
get a row of small bars each, against the line at 1/2**b. Deep models get maps instead, one a kind of layer,
depth downwards, where blue marks codes used too rarely, orange those used too often, and nothing at all an
equal share.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bitbell.reports.drawing import (
    INK,
    LESS,
    MORE,
    MUTED,
    WIDTH,
    Look,
    Picture,
    new_figure,
    shorten,
    slug,
)
from bitbell.reports.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

MOST_ROWS = 40  # more layers than this become maps
MOST_KINDS = 16
PARTS = ("weight", "activation")
ROW, HEAD, FOOT = 15.0, 34.0, 8.0  # points
BARS_LEFT = {"weight": 96.0, "activation": 218.0}
BARS_WIDTH = 82.0
PANEL_COLUMNS = 4


@dataclass(frozen=True)
class LayerCodes:
    """One layer's code frequencies: shares of `weight` and `activation` codes, each summing to 1, or None."""

    name: str
    shares: dict[str, NDArray[Any] | None]


def draw_codes(run: Run, look: Look) -> Picture | None:
    """Code frequencies of one run, or None where its summary has no histograms."""
    layers = [codes for layer in run.layers if (codes := read_codes(layer)) is not None]
    if not layers:
        return None
    draw = _draw_rows if len(layers) <= MOST_ROWS else _draw_maps
    return draw(run, layers, look)


def read_codes(layer: dict[str, Any]) -> LayerCodes | None:
    """Shares from the histograms of one layer; None where both are missing or empty."""
    shares = {part: _shares(layer.get(f"{part}_histogram")) for part in PARTS}
    if all(share is None for share in shares.values()):
        return None
    return LayerCodes(str(layer.get("name", "?")), shares)


def short_layer(name: str) -> str:
    """A layer's name without the parts that all layers share: model.layers.0.self_attn.q_proj -> 0 q_proj."""
    match = re.fullmatch(r"(?:.*\.)?(\d+)\.(?:.*\.)?([^.]+)", name)
    return f"{match[1]} {match[2]}" if match else name


def unevenness(layers: list[LayerCodes], part: str) -> tuple[float, float] | None:
    """Lowest and highest share of any code of any layer, as multiples of the equal share."""
    ratios = [share * len(share) for layer in layers if (share := layer.shares[part]) is not None]
    if not ratios:
        return None
    return min(float(r.min()) for r in ratios), max(float(r.max()) for r in ratios)


def _shares(counts: list[float] | None) -> NDArray[Any] | None:
    if not counts or sum(counts) <= 0:
        return None
    return np.array(counts, dtype=float) / sum(counts)


def _draw_rows(run: Run, layers: list[LayerCodes], look: Look) -> Picture:
    height = HEAD + ROW * len(layers) + FOOT
    figure = new_figure(height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    tallest = max([1.25, *(spread[1] for part in PARTS if (spread := unevenness(layers, part)))])
    for part in PARTS:
        if unevenness(layers, part) is None:
            continue
        axes.text(BARS_LEFT[part], 12, f"{part}s", color=INK, fontsize=8, weight="bold")
        axes.text(BARS_LEFT[part], 22, _code_range(layers, part), color=MUTED, fontsize=6.5)
    names = _unique_short_names(layers)
    for i, (layer, name) in enumerate(zip(layers, names, strict=True)):
        base = HEAD + ROW * (i + 1) - 2
        axes.text(8, base - 2, shorten(name, 19), color=INK, fontsize=7)
        for part in PARTS:
            _draw_bars(axes, layer.shares[part], BARS_LEFT[part], base, tallest, look)
    caption = (
        "Share of each code, one row a layer; the line is the equal share, one over the number of codes. "
        "The number is the entropy in bits. " + _in_words(layers)
    )
    return Picture(f"codes-{slug(run.name)}", run.name, caption, _alt(run, layers), figure)


def _draw_bars(axes: Axes, shares: NDArray[Any] | None, left: float, base: float, tallest: float, look: Look) -> None:
    """One row of bars. Full height is the tallest bar of the figure, in multiples of the equal share."""
    if shares is None:
        return
    pitch = BARS_WIDTH / len(shares)
    room = ROW - 3.5
    heights = shares * len(shares) / tallest * room
    gap = min(1.5, 0.2 * pitch)
    axes.bar(
        left + pitch * np.arange(len(shares)),
        -heights,
        width=pitch - gap,
        bottom=base,
        align="edge",
        color=look.colour,
        linewidth=0,
    )
    even = base - room / tallest
    axes.plot([left - 1.5, left + BARS_WIDTH], [even, even], color=INK, linewidth=0.6)
    axes.text(left + BARS_WIDTH + 3, base - 2, f"{_entropy(shares):.2f}", color=MUTED, fontsize=6.5)


def _draw_maps(run: Run, layers: list[LayerCodes], look: Look) -> Picture:
    panels = _panels(layers)
    deepest = max(len(rows) for rows in panels.values())
    cell = max(1.2, min(6.0, 150.0 / deepest))
    panel_height = 14 + deepest * cell + 6
    bands = -(-len(panels) // PANEL_COLUMNS)
    parts = [part for part in PARTS if unevenness(layers, part) is not None]
    height = len(parts) * (20 + bands * panel_height) + 26
    figure = new_figure(height)
    y = 0.0
    for part in parts:
        figure.text(8 / WIDTH, 1 - (y + 13) / height, f"{part}s", color=INK, weight="bold")
        figure.text(
            70 / WIDTH,
            1 - (y + 13) / height,
            f"{_code_range(layers, part)} across, {deepest} deep",
            color=MUTED,
            fontsize=6.5,
        )
        for n, (kind, rows) in enumerate(panels.items()):
            corner = (8 + (n % PANEL_COLUMNS) * 79.0, y + 20 + (n // PANEL_COLUMNS) * panel_height)
            _draw_panel(figure, kind, [row.shares[part] for row in rows], corner, cell, height)
        y += 20 + bands * panel_height
    _draw_key(figure, height)
    caption = (
        "Share of each code, one panel a kind of layer, the first layer on top. Blue codes are used too "
        "rarely, orange ones too often, against one over the number of codes; colours end at half and at "
        "double. "
    )
    return Picture(f"codes-{slug(run.name)}", run.name, caption + _in_words(layers), _alt(run, layers), figure)


def _panels(layers: list[LayerCodes]) -> dict[str, list[LayerCodes]]:
    """Layers by kind, which is their name without its number; all in one panel where names show no kinds."""
    kinds: dict[str, list[LayerCodes]] = {}
    for layer in layers:
        kinds.setdefault(re.sub(r"^(?:.*\.)?\d+\.", "", layer.name), []).append(layer)
    return kinds if len(kinds) <= MOST_KINDS else {"all layers": layers}


def _draw_panel(
    figure: Any,
    kind: str,
    rows: list[NDArray[Any] | None],
    corner: tuple[float, float],
    cell: float,
    height: float,
) -> None:
    left, top = corner
    box = (left / WIDTH, 1 - (top + 14 + len(rows) * cell) / height, 70 / WIDTH, len(rows) * cell / height)
    axes = figure.add_axes(box)
    codes = max((len(row) for row in rows if row is not None), default=1)
    colours = np.zeros((len(rows), codes, 4))
    for i, row in enumerate(rows):
        if row is not None:
            colours[i, : len(row)] = diverging(row * len(row))
    axes.imshow(colours, aspect="auto", interpolation="none")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set(visible=True, color=MUTED, linewidth=0.4)
    figure.text(box[0], 1 - (top + 11) / height, shorten(kind.split(".")[-1], 15), color=INK, fontsize=7)


def _draw_key(figure: Any, height: float) -> None:
    axes = figure.add_axes((120 / WIDTH, 8 / height, 100 / WIDTH, 7 / height))
    axes.imshow(diverging(2 ** np.linspace(-1, 1, 41))[None], aspect="auto", interpolation="none")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set(visible=True, color=MUTED, linewidth=0.4)
    for x, text, side in ((116, "half the equal share", "right"), (224, "double", "left")):
        figure.text(x / WIDTH, 11.5 / height, text, ha=side, va="center", color=MUTED, fontsize=6.5)


def diverging(ratios: NDArray[Any]) -> NDArray[Any]:
    """RGBA for multiples of the equal share: see-through at 1, full LESS at one half, full MORE at two."""
    place = np.clip(np.log2(np.maximum(ratios, 1e-9)), -1, 1)
    ends = [[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in (LESS, MORE)]
    rgb = np.where(place[..., None] < 0, ends[0], ends[1])
    return np.concatenate([rgb, np.abs(place)[..., None]], axis=-1)


def _entropy(shares: NDArray[Any]) -> float:
    used = shares[shares > 0]
    return abs(float(-(used * np.log2(used)).sum()))


def _code_range(layers: list[LayerCodes], part: str) -> str:
    lengths = sorted({len(share) for layer in layers if (share := layer.shares[part]) is not None})
    return " and ".join(f"codes 0 to {length - 1}" for length in lengths)


def _unique_short_names(layers: list[LayerCodes]) -> list[str]:
    names = [short_layer(layer.name) for layer in layers]
    if len(set(names)) == len(names):
        return names
    parts = [layer.name.split(".") for layer in layers]
    for place in (0, -1):  # what all have in common at the start, then at the end
        while min(map(len, parts)) > 1 and len({part[place] for part in parts}) == 1:
            for part in parts:
                part.pop(place)
    return [".".join(part) for part in parts]


def _in_words(layers: list[LayerCodes]) -> str:
    words = []
    for part in PARTS:
        spread = unevenness(layers, part)
        if spread is not None:
            words.append(f"{part} codes from {spread[0]:.2f} to {spread[1]:.2f} times the equal share")
    text = "; ".join(words)
    return text[:1].upper() + text[1:] + "."


def _alt(run: Run, layers: list[LayerCodes]) -> str:
    return f"Code histograms of {run.name}, {len(layers)} layers. {_in_words(layers)}"
