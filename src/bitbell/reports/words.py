"""The results in plain words: what was measured, by how many runs, and what must not be concluded from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from bitbell.reports import formats
from bitbell.reports.results import WORK, Group, Spread, best_of_each_width, full_precision_like, work
from bitbell.reports.runs import Event, Run, finite

loss_text = formats.decimals(3)


def summarise(runs: Sequence[Run], groups: Sequence[Group]) -> str:
    """One paragraph: the work, the best at each bit width, its distance from full precision, the caveat."""
    if not any(group.spread("loss") for group in groups):
        nothing = "None has finished with a finite validation loss yet, so there is nothing to rank."
        return f"{_what_ran(runs)} {nothing}"
    sentences = [_what_ran(runs)]
    sentences += [f"{_start(g)}." for g in groups if not g.runs[0].is_quantized and g.spread("loss")]
    ranked = best_of_each_width(groups)
    ranks = {id(best): others for best, others in ranked}
    beaten = {id(other) for _, others in ranked for other in others}
    for group in groups:
        if group.runs[0].is_quantized and group.spread("loss") is not None and id(group) not in beaten:
            sentences.append(_tell(group, ranks.get(id(group), []), groups))
    return " ".join([*sentences, _caveat(groups)])


def notes(runs: Sequence[Run], groups: Sequence[Group]) -> list[str]:
    """What a reader of the table must know: unfinished, torn, diverged and incomparable runs."""
    found = []
    if len({work(run) for run in runs}) > 1:
        keys = [k for i, k in enumerate(WORK) if len({work(run)[i] for run in runs}) > 1]
        names = ", ".join(key.replace("_", " ") for key in keys)
        found.append(f"The runs differ in {names}. Only runs of equal work are ranked against each other.")
    for run in runs:
        found += _notes_of(run)
    for group in groups:
        spread = group.spread("loss")
        if group.finished and (spread is None or spread.count < len(group.finished)):
            lost = len(group.finished) - (spread.count if spread else 0)
            found.append(f"{group.name}: {lost} finished without a finite validation loss; it is not ranked.")
        missing = len(group.runs) - len(group.finished)
        if len(group.runs) > 1 and missing:
            found.append(f"{group.name}: {missing} of {len(group.runs)} seeds unfinished; means are over the others.")
    return found


def with_spread(spread: Spread | None, write: Callable[[float], str] = loss_text, factor: float = 1) -> str:
    """Mean and deviation to the same decimals; the mean alone for a single value; a dash for none. factor: that
    `write` multiplies by."""
    if spread is None:
        return formats.DASH
    mean = write(spread.mean)
    if spread.deviation is None:
        return mean
    places = len(mean.partition(".")[2])
    return f"{mean} \N{PLUS-MINUS SIGN} {factor * spread.deviation:.{places}f}"


def _what_ran(runs: Sequence[Run]) -> str:
    unfinished = sum(not run.is_finished for run in runs)
    count = f"{len(runs)} run{'s' * (len(runs) != 1)}"
    if unfinished:
        count += f" ({unfinished} unfinished)" if len(runs) > 1 else " (unfinished)"
    details = []
    config = runs[0].config
    if len({work(run) for run in runs}) == 1:
        if config.get("preset") is not None:
            details.append(f"of the preset {formats.plain(config['preset'])}")
        if config.get("data") is not None:
            details.append(f"on {Path(formats.plain(config['data'])).name}")
        details += _length(config)
    return " ".join([count, *details]) + "."


def _length(config: dict[str, object]) -> list[str]:
    steps, batch, length = (config.get(key) for key in ("steps", "batch_size", "sequence_length"))
    if not isinstance(steps, int):
        return []
    if not isinstance(batch, int) or not isinstance(length, int):
        return [f"for {formats.count(steps)} steps"]
    accumulation = config.get("accumulation")
    if isinstance(accumulation, int):
        batch *= accumulation
    if "images" in config:
        return [f"for {formats.count(steps)} steps of {batch} images ({formats.count(steps * batch)} images)"]
    tokens = formats.millions(steps * batch * length)
    return [f"for {formats.count(steps)} steps of {batch} x {length} tokens ({tokens} million tokens)"]


def _tell(group: Group, rivals: list[Group], groups: Sequence[Group]) -> str:
    """One sentence on a group that leads its bit width, or is alone there, and one on its size."""
    details = [*_tell_rival(group, rivals), *_tell_gap(group, groups)]
    distances = f", {' and '.join(details)}" if details else ""
    return f"{_start(group, bool(rivals))}{distances}.{_tell_size(group)}"


def _start(group: Group, is_best: bool = False) -> str:
    run = group.runs[0]
    if run.is_quantized and run.bits != "mixed":
        who = f"With {_width(run)}, {group.name_at_its_bits}"
    else:
        who = group.name[:1].upper() + group.name[1:]
    what = "the lowest validation loss" if is_best else "a validation loss of"
    colon = ":" if is_best else ""
    loss, perplexity = with_spread(group.spread("loss")), group.spread("perplexity")
    text = f"{who} reached {what}{colon} {loss} nats per {run.sample}"
    if (accuracy := group.spread("accuracy")) is not None:
        text += f" (accuracy {with_spread(accuracy, formats.percent, 100)} %)"
    elif perplexity is not None:
        text += f" (perplexity {formats.significant(3)(perplexity.mean)})"
    return f"{text} after {_steps(group)}"


def _tell_rival(group: Group, rivals: list[Group]) -> list[str]:
    mine, theirs = group.spread("loss"), rivals[0].spread("loss") if rivals else None
    if mine is None or theirs is None:
        return []
    gap = theirs.mean - mine.mean
    name = rivals[0].name_at_its_bits
    text = f"{loss_text(gap)} below {name}" if gap >= 0.0005 else f"level with {name}"
    if mine.deviation is None or theirs.deviation is None:
        return [text]
    is_clear = gap > math.hypot(mine.deviation, theirs.deviation)
    return [f"{text} ({'more than' if is_clear else 'within'} the scatter of the seeds)"]


def _tell_gap(group: Group, groups: Sequence[Group]) -> list[str]:
    full = full_precision_like(group.runs[0], groups)
    mine, theirs = group.spread("loss"), full.spread("loss") if full else None
    if mine is None or theirs is None:
        return []
    gap = mine.mean - theirs.mean
    if gap >= 0:
        return [f"{loss_text(gap)} above full precision after the same work"]
    return [
        f"{loss_text(-gap)} below full precision after the same work (measured at this length of training, "
        "which does not show that fewer bits are better in general)"
    ]


def _tell_size(group: Group) -> str:
    packed, trained = group.runs[0].number("packed_bytes"), group.runs[0].number("bytes")
    if packed is None or trained is None or not finite(packed) or not finite(trained) or packed <= 0:
        return ""
    return f" Packed, it takes {formats.megabytes(packed)} MB instead of {formats.megabytes(trained)} MB."


def _width(run: Run) -> str:
    """ "2-bit weights and activations (W2A2)" and the like."""
    weights, activations = run.weight_bits, run.activation_bits
    if activations is None:
        return f"{weights:g}-bit weights ({run.bits})"
    if weights == activations:
        return f"{weights:g}-bit weights and activations ({run.bits})"
    return f"{weights:g}-bit weights and {activations:g}-bit activations ({run.bits})"


def _caveat(groups: Sequence[Group]) -> str:
    if len(groups) == 1 and len(groups[0].runs) == 1:
        return "This is one run with one seed; the numbers hold for it only."
    if all(len(group.finished) < 2 for group in groups):
        one = "Each setting ran with one seed, so small differences may be chance"
        return f"{one}; these numbers hold for these runs only."
    if any(len(group.finished) < 2 for group in groups):
        return "Some settings ran with one seed only; these numbers hold for these runs only."
    return "These numbers hold for these runs only: this model, this data, this length of training."


def _steps(group: Group) -> str:
    steps = {run.steps for run in group.finished}
    return f"{formats.count(steps.pop())} steps" if len(steps) == 1 else "training"


def _notes_of(run: Run) -> list[str]:
    found = []
    if not run.is_finished:
        steps = formats.count(run.steps) if run.steps is not None else "no"
        planned = run.config.get("steps")
        of = f" of {formats.count(planned)}" if isinstance(planned, int) else ""
        found.append(f"{run.name} is unfinished ({steps}{of} steps); its row says what its metrics say so far.")
    if run.is_torn:
        found.append(f"{run.name}: the last line of its metrics was torn and is left out.")
    for what, events in (("training", run.train), ("validation", run.valid)):
        broken = _not_finite(events)
        if broken:
            found.append(
                f"{run.name}: the {what} loss was not finite at {len(broken)} of {len(events)} logged steps, "
                f"first at step {broken[0]}; curves leave these out."
            )
    return found


def _not_finite(events: Sequence[Event]) -> list[int]:
    return [event["step"] for event in events if "loss" in event and not finite(event["loss"])]
