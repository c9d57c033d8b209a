"""Which run comes next, and which learning rate a setting gets: the rules of fairness, as functions of the outcomes.

Breadth first: the tune seeds of all settings, rates from the middle of the grid outwards; then the remaining seeds,
each setting at its chosen rate, once its own tune runs are done.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from bitbell.comparison.outcomes import Outcome
from bitbell.comparison.sweep import Setting, Sweep, Trial

Look = Callable[[Trial], Outcome]


@dataclass(frozen=True)
class Choice:
    """The learning rate of a setting; whether all rates were tried; whether it is the "highest" or "lowest" of them."""

    learning_rate: float
    is_settled: bool
    edge: str | None


def tune_trials(sweep: Sweep, setting: Setting) -> list[Trial]:
    """The runs that decide on a setting's learning rate."""
    return [
        Trial(setting, seed, rate)
        for seed in sweep.seeds[: sweep.tune_seeds]
        for rate in from_the_middle(sweep.learning_rates)
    ]


def chosen_trials(sweep: Sweep, setting: Setting, choice: Choice) -> list[Trial]:
    """The runs of every seed at the chosen rate."""
    return [Trial(setting, seed, choice.learning_rate) for seed in sweep.seeds]


def choose(sweep: Sweep, setting: Setting, look: Look) -> Choice | None:
    """The rate with the lowest mean loss over the tune seeds, among those that all tune seeds have tried.

    It is settled when those are all rates. None where there is no such rate yet, or all of them diverged.
    """
    rates = sweep.learning_rates
    losses = {rate: loss for rate in rates if (loss := tune_loss(sweep, setting, rate, look)) is not None}
    best = min(losses, key=lambda rate: (losses[rate], rate), default=None)
    if best is None or math.isinf(losses[best]):
        return None
    is_settled = len(losses) == len(rates)
    edge = {rates[0]: "lowest", rates[-1]: "highest"}.get(best) if is_settled and len(rates) > 1 else None
    return Choice(best, is_settled, edge)


def tune_loss(sweep: Sweep, setting: Setting, rate: float, look: Look) -> float | None:
    """Mean loss over the tune seeds at a rate: infinite if one diverged, None while one is missing."""
    outcomes = [look(Trial(setting, seed, rate)) for seed in sweep.seeds[: sweep.tune_seeds]]
    is_known = all(outcome.status in ("finished", "diverged") for outcome in outcomes)
    return statistics.fmean(outcome.loss for outcome in outcomes) if is_known else None


def pending(sweep: Sweep, look: Look) -> list[Trial]:
    """The runs that can be started now and are not done, in the order of work."""
    tuning = [tune_trials(sweep, setting) for setting in _by_width(sweep)]
    trials = [trial for turn in zip(*tuning, strict=True) for trial in turn]
    rest = [_remaining(sweep, setting, look) for setting in _by_width(sweep)]
    rest = [remaining for remaining in rest if remaining]
    trials += [trial for turn in zip(*rest, strict=True) for trial in turn]
    return [trial for trial in trials if not look(trial).is_done]


def count(sweep: Sweep, look: Look) -> int:
    """How many runs the sweep has in all, if every setting that may still find a rate does."""
    tune, rest = sweep.tune_seeds * len(sweep.learning_rates), len(sweep.seeds) - sweep.tune_seeds
    return sum(tune if _is_hopeless(sweep, setting, look) else tune + rest for setting in sweep.settings)


def _is_hopeless(sweep: Sweep, setting: Setting, look: Look) -> bool:
    """Whether a run diverged at every rate."""
    return all(tune_loss(sweep, setting, rate, look) == math.inf for rate in sweep.learning_rates)


def known_trials(sweep: Sweep, look: Look) -> list[Trial]:
    """Every run of the sweep that is decided on: those of the tune seeds, and those at chosen rates."""
    found = []
    for setting in sweep.settings:
        found += tune_trials(sweep, setting)
        found += _remaining(sweep, setting, look)
    return found


def _remaining(sweep: Sweep, setting: Setting, look: Look) -> list[Trial]:
    """The runs at the chosen rate that are not tune runs; none while the choice is open."""
    choice = choose(sweep, setting, look)
    return chosen_trials(sweep, setting, choice)[sweep.tune_seeds :] if choice and choice.is_settled else []


def from_the_middle(rates: tuple[float, ...]) -> list[float]:
    """Rates from the middle of the grid outwards, the higher of two first.

    >>> from_the_middle((1.0, 2.0, 3.0, 4.0))
    [3.0, 2.0, 4.0, 1.0]
    """
    middle = (len(rates) - 1) / 2
    return [rates[i] for i in sorted(range(len(rates)), key=lambda i: (abs(i - middle), -i))]


def _by_width(sweep: Sweep) -> list[Setting]:
    """Full precision, then width by width, the methods of each together."""
    order = {bits: place for place, bits in enumerate((None, *sweep.bits))}
    return sorted(sweep.settings, key=lambda setting: order[setting.bits])
