"""How every picture looks: palette, type, size, and how a matplotlib figure becomes files and inline SVG.

A picture is drawn once, in light colours on white, and saved as PNG and SVG. The page gets the same SVG with
each colour replaced by a CSS variable, so that it follows the reader's light or dark mode.

matplotlib is imported inside the functions: reading runs must not cost its import.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitbell.reports.formats import shorten
from bitbell.reports.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 330.0  # points; at this width a figure fits a phone with its type at reading size
LABEL_LENGTH = 20
LABEL_SIZE = 7.5

INK, MUTED, GRID, CARD = "#1b2026", "#5d6672", "#e3e6ea", "#ffffff"
# Okabe and Ito's hues, each at least 3 : 1 against white; page.css holds their counterparts for the dark.
COLOURS = ("#0072b2", "#c84e00", "#008060", "#ad4f8d", "#b97f00", "#3d94cc")
LESS, MORE = (
    "#2a62a8",
    "#b35a00",
)  # the two ends of a diverging map: blue and orange differ for every eye; never recoloured
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    CARD: "--card",
} | {colour: f"--run-{i}" for i, colour in enumerate(COLOURS)}
DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")


@dataclass(frozen=True)
class Look:
    """What makes a run recognisable in every picture: a hue (its setting), a dash (its seed), a marker."""

    colour: str
    dash: Any
    marker: str

    @property
    def variable(self) -> str:
        return VARIABLES[self.colour]


@dataclass(frozen=True)
class Picture:
    """A figure with the words that belong to it. `name` is its file name without ending."""

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure


@dataclass
class Label:
    """A run's name to be written at (x, y), in data coordinates."""

    text: str
    x: float
    y: float
    colour: str


def looks(groups: Sequence[Sequence[Run]]) -> dict[str, Look]:
    """One look a run, by name. Runs of one group (seeds of one setting) share a hue and differ in their dash.
    Full precision is drawn in ink: it is the yardstick, not a rival."""
    found: dict[str, Look] = {}
    hues, inks = 0, 0
    for group in groups:
        for seed, run in enumerate(group):
            turn = seed + (hues // len(COLOURS) if run.is_quantized else inks)
            colour = COLOURS[hues % len(COLOURS)] if run.is_quantized else INK
            found[run.name] = Look(colour, DASHES[turn % len(DASHES)], MARKERS[len(found) % len(MARKERS)])
        hues, inks = hues + group[0].is_quantized, inks + (not group[0].is_quantized)
    return found


@contextmanager
def drawing_rules() -> Iterator[None]:
    """matplotlib's defaults plus ours, whatever the user's own matplotlibrc says; undone on the way out."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # Names may hold letters that the font of the PNG lacks; the page uses the reader's fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.size": 8,
                "font.family": "DejaVu Sans",
                "text.color": INK,
                "text.parse_math": False,  # a dollar sign in a run's name is a dollar sign
                "axes.edgecolor": MUTED,
                "axes.labelcolor": MUTED,
                "axes.linewidth": 0.6,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.grid": True,
                "axes.axisbelow": True,
                "grid.color": GRID,
                "grid.linewidth": 0.6,
                "xtick.color": MUTED,
                "ytick.color": MUTED,
                "xtick.major.width": 0.6,
                "ytick.major.width": 0.6,
                "figure.facecolor": CARD,
                "axes.facecolor": "none",
                "lines.solid_capstyle": "round",
                "svg.fonttype": "none",
                "svg.hashsalt": "bitbell",  # the same runs give the same file
            }
        )
        yield


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure, sizes in points. It belongs to no window system and no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), dpi=72)


def new_chart(labels: Sequence[str], x_title: str, y_title: str, height: float = 225.0) -> tuple[Figure, Axes]:
    """A figure with one axes and room on its right for direct labels."""
    figure = new_figure(height)
    longest = max((len(shorten(text, LABEL_LENGTH)) for text in labels), default=0)
    right = WIDTH - 10 - longest * LABEL_SIZE * 0.62 - (8 if longest else 0)
    left, bottom, top = 40.0, 34.0, height - 22
    axes = figure.add_axes((left / WIDTH, bottom / height, (right - left) / WIDTH, (top - bottom) / height))
    axes.set_xlabel(x_title)
    # The title of the y axis lies flat above it: nobody has to tilt their head.
    figure.text(8 / WIDTH, (top + 8) / height, y_title, color=MUTED)
    axes.tick_params(length=2.5, pad=2)
    return figure, axes


def label_at_right(axes: Axes, labels: Sequence[Label]) -> None:
    """Write each run's name to the right of the axes, at the height of its point or moved apart from its
    neighbours, with a thin line from point to name."""
    from matplotlib.lines import Line2D

    if not labels:
        return
    figure = axes.figure
    _ = axes.get_xlim(), axes.get_ylim()  # settles the limits: transData alone would answer with stale ones
    box = axes.get_window_extent()
    heights = [axes.transData.transform((label.x, label.y))[1] for label in labels]
    gap = min(LABEL_SIZE * 1.25, (box.height + 16) / max(1, len(labels)))
    placed = spread(heights, gap, box.y0 - 8, box.y1 + 8)
    for label, height in zip(labels, placed, strict=True):
        start = axes.transData.transform((label.x, label.y))
        end = (box.x1 + 7, height)
        elbow = (max(start[0], box.x1) + 1, start[1])
        corners = [start, elbow, end] if elbow[0] > start[0] + 2 else [start, end]
        x, y = zip(*figure.transFigure.inverted().transform(np.array(corners)), strict=True)
        figure.add_artist(Line2D(x, y, color=label.colour, linewidth=0.5, alpha=0.6))
        figure.text(
            (end[0] + 2) / figure.bbox.width,
            height / figure.bbox.height,
            shorten(label.text, LABEL_LENGTH),
            color=label.colour,
            fontsize=min(LABEL_SIZE, gap / 1.1),
            va="center_baseline",
        )


def use_log(axes: Axes, which: str) -> None:
    """A log axis with plain numbers at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import LogLocator, NullFormatter

    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.set_minor_formatter(NullFormatter())


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places near the `wanted` ones, at least `gap` apart and in their order, within `low` to `high` if
    there is room. Neighbours that touch merge into a block centred on what they wanted."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    blocks: list[list[int]] = []

    def bottom(block: list[int]) -> float:
        length = gap * (len(block) - 1)
        middle = sum(wanted[i] for i in block) / len(block)
        return max(low, min(high - length, middle - length / 2))

    for i in order:
        blocks.append([i])
        while len(blocks) > 1 and bottom(blocks[-1]) < bottom(blocks[-2]) + gap * len(blocks[-2]):
            last = blocks.pop()
            blocks[-1] += last
    places = [0.0] * len(wanted)
    for block in blocks:
        for n, i in enumerate(block):
            places[i] = bottom(block) + n * gap
    return places


def save(picture: Picture, folder: Path) -> str:
    """Write NAME.png and NAME.svg into `folder`; return the SVG for the page."""
    picture.figure.savefig(folder / f"{picture.name}.png", dpi=200, metadata={"Software": None})
    svg = to_svg(picture)
    (folder / f"{picture.name}.svg").write_text(svg, encoding="utf-8")
    return inline(svg, picture.name, picture.alt)


def to_svg(picture: Picture) -> str:
    """The picture as an SVG file."""
    buffer = io.StringIO()
    picture.figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def inline(svg: str, name: str, alt: str) -> str:
    """An SVG file as a piece of a page: no prologue, ids of its own, colours as CSS variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.S)
    viewbox = re.search(r'viewBox="[^"]*"', svg)
    assert viewbox is not None, "matplotlib's SVG always has a viewBox"
    body = svg[svg.index(">") + 1 :]
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', body))
    # Only what stands inside tags is ours to change: names of runs may look like anything.
    body = re.sub(r"<[^>]+>", lambda tag: _inline_tag(tag[0], name, used), body)
    body = "\n".join(line.strip() for line in body.splitlines() if line.strip())
    return f'<svg {viewbox[0]} role="img" aria-label="{html.escape(alt)}">\n{body}'


def slug(text: str) -> str:
    """A file name made of letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")[:60] or "run"


def _inline_tag(tag: str, name: str, used: set[str]) -> str:
    tag = tag.replace("xlink:href=", "href=")
    tag = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", tag)
    tag = re.sub(r'(href="|url\()#', rf"\g<1>#{name}-", tag)
    return re.sub(r"#[0-9a-f]{6}\b", lambda m: f"var({VARIABLES[m[0]]})" if m[0] in VARIABLES else m[0], tag)
