"""Pictures of training: loss, entropy and scales over the steps, and quality against size.

Each function draws one picture for all runs, or returns None where no run has anything to show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bitbell.reports.drawing import (
    CARD,
    INK,
    MUTED,
    Label,
    Look,
    Picture,
    label_at_right,
    new_chart,
    shorten,
    spread,
    use_log,
)
from bitbell.reports.formats import decimals, megabytes, significant
from bitbell.reports.runs import Event, Run, finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

Looks = dict[str, Look]
MOST_POINTS = 500  # a curve of this many points looks like one of all its points, at a fraction of the file
MOST_MARKS = 20
MOST_RAW_CURVES = 6  # beyond this the faint raw curves hide more than they show


def loss_unit(runs: Sequence[Run]) -> str:
    """ "nats per token"; of runs on text and on images together, just "nats"."""
    samples = {run.sample for run in runs}
    return f"nats per {samples.pop()}" if len(samples) == 1 else "nats"


def draw_loss(runs: Sequence[Run], looks: Looks) -> Picture | None:
    """Training loss, smoothed over faint raw values, and the validation points."""
    curves = {run.name: _points(run.train, "loss") for run in runs}
    points = {run.name: _points(run.valid, "loss") for run in runs}
    shown = [run for run in runs if len(curves[run.name][0]) or len(points[run.name][0])]
    if not shown:
        return None
    figure, axes = new_chart([run.name for run in shown], "Step", f"Loss ({loss_unit(shown)})")
    labels = []
    for run in shown:
        look = looks[run.name]
        x, y = curves[run.name]
        if len(shown) <= MOST_RAW_CURVES:
            axes.plot(*_thin(x, y), color=look.colour, linewidth=0.6, alpha=0.25)
        _plot_line(axes, *_thin(x, smooth(y)), look)
        _plot_marks(axes, *points[run.name], look)
        end = (x, smooth(y)) if len(x) else points[run.name]
        labels.append(Label(run.name, end[0][-1], end[1][-1], look.colour))
    is_cut = _cut_the_start(axes, [curves[run.name] for run in shown], [points[run.name] for run in shown])
    _count_steps(axes)
    label_at_right(axes, labels)
    raw = "; the faint line is the raw value" if len(shown) <= MOST_RAW_CURVES else ""
    most = max(len(points[run.name][0]) for run in shown)
    marks = "The marks" if most <= MOST_MARKS else "The marks (some of many)"
    cut = " The first steps lie above the frame." if is_cut else ""
    caption = f"Training loss, smoothed{raw}. {marks} are validation losses.{cut}"
    ends = [f"{run.name} {decimals(3)(run.number('loss'))}" for run in shown]
    alt = "Line chart of loss over training steps. Last validation loss: " + ", ".join(ends) + "."
    return Picture("loss", "Loss over training", caption, alt, figure)


def draw_accuracy(runs: Sequence[Run], looks: Looks, key: str) -> Picture | None:
    """Validation accuracy over training: `key` is "accuracy", or "accuracy_top5"."""
    found = {run.name: _points(run.valid, key) for run in runs}
    shown = [run for run in runs if len(found[run.name][0])]
    if not shown:
        return None
    is_top5 = key == "accuracy_top5"
    figure, axes = new_chart([run.name for run in shown], "Step", "Top-5 accuracy (%)" if is_top5 else "Accuracy (%)")
    labels = []
    for run in shown:
        look = looks[run.name]
        x, y = found[run.name][0], 100 * found[run.name][1]
        _plot_line(axes, *_thin(x, y), look)
        _plot_marks(axes, x, y, look)
        labels.append(Label(run.name, x[-1], y[-1], look.colour))
    _count_steps(axes)
    label_at_right(axes, labels)
    what = "class is among the five likeliest" if is_top5 else "class is the likeliest"
    caption = (
        f"Share of the validation images whose {what}. During training it is measured on the first "
        "evaluate_windows images, at the end on up to final_windows."
    )
    ends = [f"{run.name} {100 * found[run.name][1][-1]:.1f}" for run in shown]
    title = f"{'Top-5 accuracy' if is_top5 else 'Accuracy'} over training"
    return Picture(key, title, caption, f"Line chart of {title}, in %. Last: " + ", ".join(ends) + ".", figure)


def draw_entropy(runs: Sequence[Run], looks: Looks) -> Picture | None:
    """Mean entropy of the weight codes with the band over layers, and the bit width it cannot exceed."""
    found = {run.name: layer_bands(run.quantizers, "weight_entropy") for run in runs}
    shown = [run for run in runs if len(found[run.name][0])]
    if not shown:
        return None
    figure, axes = new_chart([run.name for run in shown], "Step", "Weight entropy (bits)")
    labels = _plot_bands(axes, shown, found, looks)
    limits = sorted({run.weight_bits for run in shown if run.weight_bits is not None})
    for bits in limits:
        axes.axhline(bits, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(
            f"{bits:g} bit{'s' * (bits != 1)}",
            (0.02, bits),
            xycoords=axes.get_yaxis_transform(),
            xytext=(0, 2.5),
            textcoords="offset points",
            fontsize=7,
        )
    low = min(float(found[run.name][2].min()) for run in shown)
    high = max([float(found[run.name][3].max()) for run in shown] + limits)
    margin = 0.08 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + 1.5 * margin)
    _count_steps(axes)
    label_at_right(axes, labels)
    caption = (
        "Entropy of the weight codes: the line is the mean over layers, the band runs from the lowest layer "
        "to the highest. At the dashed line every code is used equally often: more there cannot be."
    )
    ends = [f"{run.name} {decimals(3)(float(found[run.name][1][-1]))}" for run in shown]
    alt = "Line chart of weight entropy in bits over training steps. Last mean: " + ", ".join(ends) + "."
    return Picture("entropy", "Entropy over training", caption, alt, figure)


def draw_scales(runs: Sequence[Run], looks: Looks, what: str) -> Picture | None:
    """The learned scales of `what`, "weight" or "activation", over training."""
    found = {run.name: layer_bands(run.quantizers, f"{what}_scale") for run in runs}
    shown = [run for run in runs if len(found[run.name][0])]
    if not shown:
        return None
    figure, axes = new_chart([run.name for run in shown], "Step", f"{what.capitalize()} scale")
    labels = _plot_bands(axes, shown, found, looks)
    low = min(float(found[run.name][2].min()) for run in shown)
    high = max(float(found[run.name][3].max()) for run in shown)
    if low > 0 and high > 10 * low:
        use_log(axes, "y")
    _count_steps(axes)
    label_at_right(axes, labels)
    caption = (
        f"Scale of the {what} quantizers, in units of what they quantize: mean over layers, and the band "
        "from the smallest to the largest. Scales of different methods mean different things."
    )
    ends = [f"{run.name} {significant(3)(float(found[run.name][1][-1]))}" for run in shown]
    alt = f"Line chart of {what} scales over training steps. Last mean: " + ", ".join(ends) + "."
    return Picture(f"{what}-scale", f"{what.capitalize()} scales over training", caption, alt, figure)


def draw_size(runs: Sequence[Run], looks: Looks) -> Picture | None:
    """Validation loss against the size of the file: packed where quantized, as trained in full precision."""
    sizes = {run.name: run.number("packed_bytes" if run.is_quantized else "bytes") for run in runs}
    shown = [
        run
        for run in runs
        if run.is_finished and finite(run.number("loss")) and finite(size := sizes[run.name]) and (size or 0) > 0
    ]
    if not shown:
        return None
    figure, axes = new_chart([], "Size of the whole model (MB, log scale)", f"Validation loss ({loss_unit(shown)})")
    points = [((sizes[run.name] or 0) / 1e6, run.number("loss") or 0.0) for run in shown]
    for run, (x, y) in zip(shown, points, strict=True):
        look = looks[run.name]
        axes.plot([x], [y], look.marker, color=look.colour, markersize=6.5, markeredgecolor=CARD, mew=0.8)
    _frame_points(axes, points)
    _label_beside(axes, [Label(run.name, *p, looks[run.name].colour) for run, p in zip(shown, points, strict=True)])
    caption = (
        "Down and to the left is better. Quantized models at their packed size, embeddings and all; full "
        "precision at its size as trained."
    )
    missing = [run.name for run in runs if run.is_finished and run not in shown]
    if missing:
        caption += f" Not shown, since size or loss is not known: {', '.join(missing)}."
    ends = [
        f"{run.name} {megabytes(x * 1e6)} MB, loss {decimals(3)(y)}" for run, (x, y) in zip(shown, points, strict=True)
    ]
    alt = "Scatter chart of validation loss against model size. " + "; ".join(ends) + "."
    return Picture("size", "Quality against size", caption, alt, figure)


def smooth(values: NDArray[Any]) -> NDArray[Any]:
    """Mean over a window of about a twentieth of the curve, centred, so that it does not lag behind."""
    n = len(values)
    reach = max(1, n // 40) if n >= 10 else 0
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(n) - reach, 0)
    high = np.minimum(np.arange(n) + reach + 1, n)
    return (sums[high] - sums[low]) / (high - low)


def layer_bands(events: Sequence[Event], key: str) -> tuple[NDArray[Any], ...]:
    """Steps, and mean, lowest and highest of `key` over layers at each; others do not count."""
    rows = []
    for event in events:
        values = [value for layer in event.get("layers", {}).values() if finite(value := layer.get(key))]
        if values:
            rows.append((event["step"], float(np.mean(values)), min(values), max(values)))
    return tuple(np.array(rows, dtype=float).reshape(-1, 4).T)


def _points(events: Sequence[Event], key: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Steps and finite values of `key`. What is not finite is told in the notes of the page."""
    found = [(event["step"], event[key]) for event in events if finite(event.get(key))]
    x, y = np.array(found, dtype=float).reshape(-1, 2).T
    return x, y


def _thin(x: NDArray[Any], y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Of a long curve the lowest and highest point of each stretch, so that no spike is lost."""
    if len(x) <= MOST_POINTS:
        return x, y
    keep: set[int] = {0, len(x) - 1}
    for stretch in np.array_split(np.arange(len(x)), MOST_POINTS // 2):
        keep |= {int(stretch[y[stretch].argmin()]), int(stretch[y[stretch].argmax()])}
    chosen = sorted(keep)
    return x[chosen], y[chosen]


def _thin_band(*band: NDArray[Any]) -> list[NDArray[Any]]:
    """The same for a band: last step, mean of the means, lowest and highest of each stretch."""
    if len(band[0]) <= MOST_POINTS:
        return list(band)
    stretches = np.array_split(np.arange(len(band[0])), MOST_POINTS)
    rules: list[Callable[..., Any]] = [np.max, np.mean, np.min, np.max]
    return [
        np.array([rule(values[stretch]) for stretch in stretches]) for rule, values in zip(rules, band, strict=True)
    ]


def _plot_line(axes: Axes, x: NDArray[Any], y: NDArray[Any], look: Look) -> None:
    marker = look.marker if len(x) == 1 else None  # a line of one point would be invisible
    axes.plot(x, y, color=look.colour, linewidth=1.5, linestyle=look.dash, marker=marker, markersize=3)


def _plot_marks(axes: Axes, x: NDArray[Any], y: NDArray[Any], look: Look) -> None:
    """Validation points: at most about twenty of them, counted from the last."""
    every = -(-len(x) // MOST_MARKS) or 1
    x, y = x[::-1][::every], y[::-1][::every]
    axes.plot(x, y, look.marker, color=look.colour, markersize=4, markeredgecolor=CARD, markeredgewidth=0.6)


def _plot_bands(
    axes: Axes, runs: Sequence[Run], found: dict[str, tuple[NDArray[Any], ...]], looks: Looks
) -> list[Label]:
    labels = []
    for run in runs:
        look = looks[run.name]
        x, mean, low, high = _thin_band(*found[run.name])
        axes.fill_between(x, low, high, color=look.colour, alpha=min(0.12, 0.5 / len(runs)), linewidth=0)
        for edge in (low, high):  # where bands overlap, their edges still tell them apart
            axes.plot(x, edge, color=look.colour, linewidth=0.5, alpha=0.6, linestyle=look.dash)
        _plot_line(axes, x, mean, look)
        labels.append(Label(run.name, x[-1], mean[-1], look.colour))
    return labels


def _cut_the_start(axes: Axes, curves: Sequence[Any], points: Sequence[Any]) -> bool:
    """The first steps fall so far that they flatten all else: frame what comes after a sixth of them."""
    last = max(float(x[-1]) for x, y in [*curves, *points] if len(x))
    late = [y[x >= last / 6] for x, y in [*((x, smooth(y)) for x, y in curves), *points]]
    late = [y for y in late if len(y)]
    everything = np.concatenate([y for x, y in [*curves, *points]])
    top, low, high = max(float(y.max()) for y in late), float(everything.min()), float(everything.max())
    margin = 0.05 * (top - low) or 0.05 * abs(top) or 0.1
    axes.set_ylim(low - margin, top + margin)
    return high > top + margin


def _count_steps(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if abs(x) >= 10_000 else f"{x:g}")


def _frame_points(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Limits with room around the points, at least a factor of four across: near sizes shall look near."""
    x, y = np.array(points).T
    middle, half = math.sqrt(x.min() * x.max()), max(2.0, math.sqrt(x.max() / x.min()) * 1.35)
    axes.set_xlim(middle / half, middle * half)
    room = max(0.12 * (y.max() - y.min()), 0.01 * abs(y.mean()), 1e-3)
    axes.set_ylim(y.min() - room, y.max() + room)
    use_log(axes, "x")


def _label_beside(axes: Axes, labels: Sequence[Label]) -> None:
    """Names to the right of points in the left half, to the left of those in the right half, moved apart."""
    _ = axes.get_xlim(), axes.get_ylim()  # settles the limits
    box = axes.get_window_extent()
    where = [axes.transData.transform((label.x, label.y)) for label in labels]
    sides = [x < (box.x0 + box.x1) / 2 for x, _ in where]
    for is_left in (True, False):
        mine = [i for i, side in enumerate(sides) if side == is_left]
        heights = spread([where[i][1] for i in mine], 9.5, box.y0 + 4, box.y1 - 2)
        for i, height in zip(mine, heights, strict=True):
            offset = (16 if is_left else -16, height - where[i][1])
            axes.annotate(
                shorten(labels[i].text, 24),
                (labels[i].x, labels[i].y),
                xytext=offset,
                textcoords="offset points",
                ha="left" if is_left else "right",
                va="center_baseline",
                fontsize=7.5,
                color=labels[i].colour,
                arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 4},
            )
