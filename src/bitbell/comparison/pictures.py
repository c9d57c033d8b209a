"""Pictures of a sweep: loss curves, loss and accuracy against bits, entropy against loss, loss against learning rate.

A method has one look in every picture. A table row's runs, one a seed, are drawn as their mean.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bitbell.comparison.folder import SweepFolder
from bitbell.comparison.kinds import Kind, kind_of
from bitbell.comparison.plan import tune_loss
from bitbell.comparison.rows import Row, bits_of
from bitbell.comparison.sweep import Sweep
from bitbell.reports import curves
from bitbell.reports.curves import Looks
from bitbell.reports.drawing import (
    CARD,
    COLOURS,
    DASHES,
    INK,
    MARKERS,
    MUTED,
    Label,
    Look,
    Picture,
    label_at_right,
    new_chart,
    use_log,
)
from bitbell.reports.runs import Run, finite, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def method_looks(sweep: Sweep) -> Looks:
    """A hue, dash and marker for each label; full precision, the yardstick, is drawn in ink."""
    found: Looks = {}
    quantized = 0
    for label, recipe in sweep.methods.items():
        n = quantized
        if recipe != "none":
            quantized += 1
        colour = INK if recipe == "none" else COLOURS[n % len(COLOURS)]
        found[label] = Look(colour, DASHES[n // len(COLOURS) % len(DASHES)], MARKERS[len(found) % len(MARKERS)])
    return found


def draw_all(folder: SweepFolder, sweep: Sweep, rows: Sequence[Row]) -> list[Picture]:
    """Every picture that the rows have numbers for."""
    looks, kind = method_looks(sweep), kind_of(sweep)
    widths = _widths(rows)
    drawn = [draw_accuracy(rows, looks)] if kind.is_of_images else []
    drawn += [draw_quality(rows, looks, kind), draw_entropy_and_loss(rows, looks, kind)]
    drawn += [draw_rates(folder, sweep, bits, rows, looks) for bits in widths]
    for key in ("loss", *["accuracy"] * kind.is_of_images):
        drawn += [draw_curves(folder, bits, rows, looks, key) for bits in widths]
    return [picture for picture in drawn if picture is not None]


def draw_accuracy(rows: Sequence[Row], looks: Looks) -> Picture | None:
    """Accuracy at each width, as `draw_quality` draws the loss."""
    words = "accuracy", "Accuracy against bits", "Accuracy (%)", "Validation accuracy (%) by width"
    return _draw_by_width(rows, looks, Quality("accuracy", *words, factor=100, decimals=2))


def draw_quality(rows: Sequence[Row], looks: Looks, kind: Kind) -> Picture | None:
    """Loss at each width, with the spread of the seeds, and full precision as a line across."""
    words = "quality", "Quality against bits", kind.loss_axis, "Validation loss by width"
    if kind.is_of_images:
        words = "quality", "Loss against bits", *words[2:]
    return _draw_by_width(rows, looks, Quality("loss", *words))


@dataclass(frozen=True)
class Quality:
    """A number of the rows to be drawn against their widths, in units of 1 / `factor`."""

    key: str
    name: str
    title: str
    axis: str
    alt: str
    factor: float = 1
    decimals: int = 3

    def of(self, row: Row) -> float:
        return self.factor * (row.numbers[self.key] or 0.0)

    def deviation(self, row: Row) -> float:
        return self.factor * (row.deviations[self.key] or 0.0)


def _draw_by_width(rows: Sequence[Row], looks: Looks, quality: Quality) -> Picture | None:
    known = [row for row in rows if row.numbers[quality.key] is not None]
    widths = sorted({row.setting.bits for row in known if row.setting.bits}, key=bits_of)
    if not widths:
        return None
    labels = list(dict.fromkeys(row.setting.label for row in known))
    figure, axes = new_chart([row.label for row in known], "Width", quality.axis, 260)
    marks = []
    quantized = [label for label in labels if any(r.setting.label == label and r.setting.bits for r in known)]
    for row in known:
        if row.setting.bits is None:
            _draw_level(axes, row, looks[row.setting.label], quality)
            marks.append(Label(row.label, len(widths) - 0.6, quality.of(row), INK))
    for place, label in enumerate(quantized):
        mine = sorted((r for r in known if r.setting.label == label), key=lambda r: widths.index(r.setting.bits or ""))
        shift = 0.04 * (place - (len(quantized) - 1) / 2) * min(1.0, 10 / len(quantized))
        x = [widths.index(row.setting.bits or "") + shift for row in mine]
        _draw_points(axes, x, mine, looks[label], quality)
        marks.append(Label(label, x[-1], quality.of(mine[-1]), looks[label].colour))
    axes.set_xticks(range(len(widths)), [bits.upper() for bits in widths])
    axes.set_xlim(-0.4, len(widths) - 0.6)
    label_at_right(axes, marks)
    caption = (
        "Mean over the seeds at each method's own best learning rate; bars and the band are one standard deviation "
        "to either side."
    )
    if any(row.setting.bits is None for row in known):
        caption += " The line across is full precision."
    alt = f"{quality.alt}: " + "; ".join(f"{row.name} {quality.of(row):.{quality.decimals}f}" for row in known) + "."
    return Picture(quality.name, quality.title, caption, alt, figure)


def draw_entropy_and_loss(rows: Sequence[Row], looks: Looks, kind: Kind) -> Picture | None:
    """Each setting by the share of its weight bits that carry information, and its loss."""
    points = []
    for row in rows:
        entropy = row.numbers["weight_entropy"]
        if row.loss is not None and entropy is not None and row.setting.bits:
            points.append((entropy / bits_of(row.setting.bits)[0], row.loss, row))
    if not points:
        return None
    title = "Weight entropy, as a share of the bit width"
    figure, axes = new_chart([], title, kind.loss_axis, 260)
    for x, y, row in points:
        look = looks[row.setting.label]
        axes.plot([x], [y], look.marker, color=look.colour, markersize=6, markeredgecolor=CARD, mew=0.6)
        axes.annotate(
            f"{bits_of(row.setting.bits or '')[0]:g}",
            (x, y),
            xytext=(5, 0),
            textcoords="offset points",
            fontsize=6.5,
            color=MUTED,
            va="center_baseline",
        )
    axes.margins(0.08)
    caption = (
        "One mark a row of the table; the small number is the bit width of the weights. Colours and marks: see there."
    )
    alt = "Scatter chart of validation loss against weight entropy. " + "; ".join(
        f"{row.name} {x:.3f}, {y:.3f}" for x, y, row in points
    )
    return Picture("entropy-loss", "Entropy against loss", caption, alt, figure)


def draw_rates(
    folder: SweepFolder, sweep: Sweep, bits: str | None, rows: Sequence[Row], looks: Looks
) -> Picture | None:
    """Loss of the tune seeds at every learning rate, for the methods of a width; the chosen ones are filled."""
    if len(sweep.learning_rates) < 2:
        return None
    curves = []
    for row in _of_width(rows, bits):
        losses = [(rate, tune_loss(sweep, row.setting, rate, folder.look)) for rate in sweep.learning_rates]
        known = [(rate, loss) for rate, loss in losses if loss is not None and math.isfinite(loss)]
        if known:
            curves.append((row, known))
    if not any(row.setting.bits == bits for row, _ in curves):
        return None
    figure, axes = new_chart([row.label for row, _ in curves], "Learning rate", "Loss of the tune seeds")
    labels = []
    for row, known in curves:
        look = looks[row.setting.label]
        x, y = zip(*known, strict=True)
        axes.plot(x, y, look.marker, color=look.colour, linestyle=look.dash, lw=1.2, ms=4.5, mfc=CARD, mew=1)
        if row.choice:
            best = dict(known)[row.choice.learning_rate]
            axes.plot([row.choice.learning_rate], [best], look.marker, color=look.colour, markersize=6)
        labels.append(Label(row.label, x[-1], y[-1], look.colour))
    use_log(axes, "x")
    axes.set_xticks(sweep.learning_rates, [f"{rate:g}" for rate in sweep.learning_rates])
    axes.minorticks_off()
    label_at_right(axes, labels)
    caption = "Filled: the chosen rate. A rate at which a run diverged has no point."
    alt = "Line chart of loss by learning rate. Chosen: " + ", ".join(
        f"{row.name} {row.choice.learning_rate:g}" for row, _ in curves if row.choice
    )
    return Picture(f"rates-{bits or 'full'}", f"Learning rates, {_width_name(bits)}", caption, alt, figure)


def draw_curves(
    folder: SweepFolder, bits: str | None, rows: Sequence[Row], looks: Looks, key: str = "loss"
) -> Picture | None:
    """Loss, or accuracy, over training at the chosen rates, for the methods of a width: the mean over the seeds."""
    found = [(row, _runs(folder, row)) for row in _of_width(rows, bits) if row.losses]
    mine = [(row, runs) for row, runs in found if runs]
    if not any(row.setting.bits == bits for row, _ in mine):
        return None
    means = [mean_run(row.label, runs) for row, runs in mine]
    look_of = {row.label: looks[row.setting.label] for row, _ in mine}
    picture = curves.draw_loss(means, look_of) if key == "loss" else curves.draw_accuracy(means, look_of, key)
    if picture is None:
        return None
    caption = f"Mean over the seeds, each method at its best learning rate. {picture.caption}"
    title = f"{picture.title}, {_width_name(bits)}"
    return replace(picture, name=f"{key}-{bits or 'full'}", title=title, caption=caption)


def mean_run(name: str, runs: Sequence[Run]) -> Run:
    """One run in place of several seeds: at each step that all have logged, mean losses and accuracies."""
    train, valid = (_mean_events([getattr(run, kind) for run in runs]) for kind in ("train", "valid"))
    summary = {"loss": statistics.fmean(run.number("loss") or math.nan for run in runs)}
    return replace(runs[0], name=name, train=train, valid=valid, summary=summary)


def _mean_events(logs: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    means: dict[int, dict[str, Any]] = {}
    for key in ("loss", "accuracy"):
        by_step = [{event["step"]: event[key] for event in log if finite(event.get(key))} for log in logs]
        for step in sorted(set.intersection(*(set(found) for found in by_step))):
            mean = {key: statistics.fmean(found[step] for found in by_step)}
            means[step] = means.get(step, {"step": step}) | mean
    return list(means.values())


def _runs(folder: SweepFolder, row: Row) -> list[Run]:
    """The finished runs of a row; those of an earlier sweep have left no curve here."""
    finished = [folder.run(trial) for trial in row.trials if folder.look(trial).status == "finished"]
    return [read_run(run) for run in finished if (run / "summary.json").exists()]


def _draw_level(axes: Axes, row: Row, look: Look, quality: Quality) -> None:
    level, deviation = quality.of(row), quality.deviation(row)
    axes.axhline(level, color=look.colour, linewidth=1, linestyle=look.dash)
    axes.axhspan(level - deviation, level + deviation, color=look.colour, alpha=0.08, linewidth=0)


def _draw_points(axes: Axes, x: Sequence[float], rows: Sequence[Row], look: Look, quality: Quality) -> None:
    y, bars = [quality.of(row) for row in rows], [quality.deviation(row) for row in rows]
    axes.errorbar(x, y, bars, color=look.colour, linestyle="none", elinewidth=0.8, capsize=1.5, alpha=0.7)
    axes.plot(x, y, look.marker, color=look.colour, linestyle=look.dash, lw=1, ms=4.5, mec=CARD, mew=0.5)


def _of_width(rows: Sequence[Row], bits: str | None) -> list[Row]:
    """The rows of a width, and full precision as their yardstick."""
    return [row for row in rows if row.setting.bits in (None, bits)]


def _widths(rows: Sequence[Row]) -> list[str | None]:
    """The widths of the table; full precision alone only where there is nothing else."""
    found = list(dict.fromkeys(row.setting.bits for row in rows if row.setting.bits))
    return [*found] or [None]


def _width_name(bits: str | None) -> str:
    return bits.upper() if bits else "full precision"
