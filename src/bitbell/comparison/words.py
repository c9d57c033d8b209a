"""What the rows of a sweep say, in a paragraph, and no more than they say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from bitbell.comparison.columns import percent
from bitbell.comparison.folder import SweepFolder, base_config
from bitbell.comparison.kinds import Kind, kind_of
from bitbell.comparison.plan import count, known_trials
from bitbell.comparison.rows import Row, best_rows
from bitbell.comparison.sweep import Sweep
from bitbell.reports import formats


def lead(folder: SweepFolder, sweep: Sweep, rows: Sequence[Row]) -> str:
    """How far the sweep is, the work of a run, full precision, the best of each width, and the caveat."""
    done = sum(folder.look(trial).is_done for trial in known_trials(sweep, folder.look))
    state = f"{done} of {count(sweep, folder.look)} runs are done."
    full = [row for row in rows if row.setting.bits is None and row.losses]
    best = [row for row in best_rows(rows) if row.setting.bits]
    kind = kind_of(sweep)
    sentences = [state, work(sweep), *(f"Full precision reached {_loss(row, kind)}." for row in full)]
    sentences += [_tell(row, rows, full, kind) for row in best]
    if not best:
        sentences.append("No width has two methods with all their learning rates tried yet, so nothing is ranked.")
    return " ".join([*sentences, _caveat(sweep)])


def work(sweep: Sweep) -> str:
    """What each run does."""
    config = base_config(sweep)
    batch = config.batch_size * config.accumulation
    length = f"{formats.count(config.steps)} steps of {batch}"
    if kind_of(sweep).is_of_images:
        length += f" images ({formats.count(config.steps * batch)})"
    else:
        tokens = formats.millions(config.steps * batch * config.sequence_length)
        length += f" x {config.sequence_length} tokens ({tokens} million)"
    return f"Each trains the preset {config.preset} on {Path(config.data).name} for {length}."


def _tell(best: Row, rows: Sequence[Row], full: Sequence[Row], kind: Kind) -> str:
    rivals = [row for row in rows if row.setting.bits == best.setting.bits and row.can_be_best and row is not best]
    parts = [f"With {best.bits}, {best.label} is lowest: {_loss(best, kind)}", _tell_rival(best, rivals[0])]
    if full:
        gap = (best.loss or 0.0) - (full[0].loss or 0.0)
        parts.append(f"{abs(gap):.3f} {'above' if gap >= 0 else 'below'} full precision")
    return ", ".join(parts) + "." + (_tell_accuracy(best, rivals) if kind.is_of_images else "")


def _tell_accuracy(best: Row, rivals: Sequence[Row]) -> str:
    """A sentence where the lowest loss has not the highest accuracy: which of the two counts is the reader's choice."""
    leader = max([best, *rivals], key=lambda row: row.numbers["accuracy"] or 0.0)
    if leader is best:
        return ""
    return f" The highest accuracy there has {leader.label}: {percent(leader.numbers['accuracy'])} %."


def _tell_rival(best: Row, rival: Row) -> str:
    gap = (rival.loss or 0.0) - (best.loss or 0.0)
    text = f"{gap:.3f} below {rival.label}"
    if best.deviation is None or rival.deviation is None:
        return text
    is_clear = gap > math.hypot(best.deviation, rival.deviation)
    return f"{text} ({'more than' if is_clear else 'within'} the scatter of the seeds)"


def _loss(row: Row, kind: Kind) -> str:
    spread = "" if row.deviation is None else f" \N{PLUS-MINUS SIGN} {row.deviation:.3f}"
    accuracy = f" (accuracy {percent(row.numbers['accuracy'])} %)" if kind.is_of_images else ""
    return f"{row.loss or 0.0:.3f}{spread} nats per {kind.sample}{accuracy}"


def _caveat(sweep: Sweep) -> str:
    chance = " With one seed, small differences may be chance." if len(sweep.seeds) == 1 else ""
    return f"These numbers hold for this model, this data and this length of training.{chance}"
