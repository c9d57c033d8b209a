"""The picture of a classifier's confusions: a row a class, a column what it is taken for."""

from __future__ import annotations

import math

from bitbell.evaluation.predictions import Predictions
from bitbell.reports.drawing import CARD, COLOURS, INK, MUTED, WIDTH, Picture, new_figure, shorten, slug
from bitbell.reports.predictions import top_confusions

MOST_CLASSES = 20  # more are not readable as a map; the page lists the most frequent mistakes instead
RIGHT, WRONG = COLOURS[0], COLOURS[1]
LABEL = 7.0  # points, of the names
EDGE, HEAD = 8.0, 13.0  # points: at the right and below; of the line that says what rows and columns are


def draw_confusion(run_name: str, predictions: Predictions, names: list[str]) -> Picture | None:
    """The map of a run's confusions; None for more than MOST_CLASSES classes."""
    if len(names) > MOST_CLASSES:
        return None
    short = [shorten(name, 14) for name in names]
    left = 14 + 0.62 * LABEL * max(map(len, short))
    cell = min(26.0, (WIDTH - left - EDGE) / len(names))
    fits = max(map(len, short)) * 0.62 * LABEL < cell  # so that column names need not be turned
    top = HEAD + (12.0 if fits else 6 + 0.62 * LABEL * max(map(len, short)))
    height = top + cell * len(names) + EDGE
    figure = new_figure(height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    axes.text(EDGE, 9, "true class, by row; taken for, by column", color=MUTED, fontsize=LABEL)
    for place, name in enumerate(short):
        middle = (place + 0.5) * cell
        axes.text(left - 4, top + middle, name, color=INK, fontsize=LABEL, ha="right", va="center_baseline")
        turned = 0 if fits else 90
        axes.text(left + middle, top - 4, name, color=INK, fontsize=LABEL, ha="center", va="bottom", rotation=turned)
    _draw_cells(axes, predictions, len(names), left, top, cell)
    return Picture(f"confusion-{slug(run_name)}", run_name, _caption(predictions), _alt(predictions, names), figure)


def _draw_cells(axes: object, predictions: Predictions, classes: int, left: float, top: float, cell: float) -> None:
    from matplotlib.patches import Rectangle

    totals = [sum(predictions.confusion.get((row, column), 0) for column in range(classes)) for row in range(classes)]
    worst = max((_share(predictions, pair, totals) for pair in predictions.confusion if pair[0] != pair[1]), default=1)
    worst = max(worst, 0.2)  # so that rare mistakes look rare
    for row in range(classes):
        for column in range(classes):
            x, y, count = left + column * cell, top + row * cell, predictions.confusion.get((row, column), 0)
            share = _share(predictions, (row, column), totals) / (1 if row == column else worst)
            strength = 0.06 if not count else 0.12 + 0.88 * share
            colour = MUTED if not count else RIGHT if row == column else WRONG
            patch = Rectangle((x + 0.5, y + 0.5), cell - 1, cell - 1, facecolor=colour, alpha=strength, linewidth=0)
            axes.add_patch(patch)  # type: ignore[attr-defined]
            if count:
                written = str(count) if count < 1000 else f"{count / 1000:.1f}k"
                size = min(LABEL, 0.9 * cell / (0.62 * max(2, len(written))))
                where = {"ha": "center", "va": "center_baseline", "fontsize": size}
                ink = CARD if strength > 0.75 else INK
                axes.text(x + cell / 2, y + cell / 2, written, color=ink, **where)  # type: ignore[attr-defined]


def _share(predictions: Predictions, pair: tuple[int, int], totals: list[int]) -> float:
    """Of the images of the class."""
    return predictions.confusion.get(pair, 0) / max(1, totals[pair[0]])


def _right(predictions: Predictions) -> int:
    return sum(count for (label, guess), count in predictions.confusion.items() if label == guess)


def _caption(predictions: Predictions) -> str:
    right = _right(predictions)
    accuracy = 100 * right / predictions.images if predictions.images else math.nan
    return (
        f"How many images of each class are taken for which. Blue, right: {right} of the {predictions.images} images "
        f"measured ({accuracy:.1f} %); orange, wrong. Stronger is a larger share of the class."
    )


def _alt(predictions: Predictions, names: list[str]) -> str:
    found = top_confusions(predictions, names, 5)
    worst = "; ".join(f"{c.label} taken for {c.guess}, {c.count} of {c.images}" for c in found)
    return f"Table of {len(names)} classes and what they are taken for. Most frequent mistakes: {worst or 'none'}."
