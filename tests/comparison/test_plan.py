"""Which run is next, and which learning rate wins."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitbell.comparison.outcomes import Outcome
from bitbell.comparison.plan import (
    Choice,
    choose,
    count,
    from_the_middle,
    known_trials,
    pending,
    tune_loss,
)
from bitbell.comparison.sweep import Sweep, Trial

WAITING = Outcome()
DIVERGED, FAILED = Outcome("diverged"), Outcome("failed")


def finished(loss: float) -> Outcome:
    return Outcome("finished", summary={"loss": loss})


def make_sweep(**changes: Any) -> Sweep:
    values = {
        "methods": ["none", "bbq", "quest"],
        "bits": [2, 1],
        "seeds": [0, 1, 2],
        "learning_rates": [1e-3, 2e-3, 4e-3],
        "train": {"data": "d"},
    }
    return Sweep.from_dict(values | changes)


class Ledger(dict[Trial, Outcome]):
    """Outcomes by trial; what is not there waits."""

    def look(self, trial: Trial) -> Outcome:
        return self.get(trial, WAITING)


def names(trials: list[Trial]) -> list[str]:
    return [trial.name for trial in trials]


def test_the_middle_rate_comes_first_for_every_method_and_width() -> None:
    sweep = make_sweep()
    first = names(pending(sweep, Ledger().look))
    assert first[:6] == [
        *("none-lr0.002-seed0", "bbq-w2a2-lr0.002-seed0", "quest-w2a2-lr0.002-seed0"),
        *("bbq-w1a1-lr0.002-seed0", "quest-w1a1-lr0.002-seed0", "none-lr0.004-seed0"),
    ]
    assert len(first) == 15
    assert all(name.endswith("seed0") for name in first)


def test_remaining_seeds_follow_at_the_chosen_rate_once_the_own_tune_runs_are_done() -> None:
    sweep, ledger = make_sweep(), Ledger()
    bbq = sweep.settings[1]
    for rate, loss in ((1e-3, 3.0), (2e-3, 2.5), (4e-3, 2.7)):
        ledger[Trial(bbq, 0, rate)] = finished(loss)
    todo = names(pending(sweep, ledger.look))
    assert todo[-2:] == ["bbq-w2a2-lr0.002-seed1", "bbq-w2a2-lr0.002-seed2"]
    assert len(todo) == 12 + 2


def test_the_best_rate_has_the_lowest_mean_and_says_where_it_lies() -> None:
    sweep = make_sweep(tune_seeds=2)
    setting = sweep.settings[0]
    losses = {1e-3: (3.0, 3.2), 2e-3: (2.9, 3.4), 4e-3: (3.5, 3.5)}
    ledger = Ledger({Trial(setting, s, rate): finished(pair[s]) for rate, pair in losses.items() for s in (0, 1)})
    assert choose(sweep, setting, ledger.look) == Choice(1e-3, True, "lowest")
    ledger[Trial(setting, 1, 2e-3)] = finished(3.2)
    assert choose(sweep, setting, ledger.look) == Choice(2e-3, True, None)
    ledger[Trial(setting, 0, 2e-3)] = DIVERGED
    ledger[Trial(setting, 0, 4e-3)] = finished(1.0)
    assert choose(sweep, setting, ledger.look) == Choice(4e-3, True, "highest")


def test_equal_losses_take_the_smaller_rate() -> None:
    sweep = make_sweep(seeds=[0])
    setting = sweep.settings[0]
    ledger = Ledger({Trial(setting, 0, rate): finished(3.0) for rate in sweep.learning_rates})
    assert choose(sweep, setting, ledger.look) == Choice(1e-3, True, "lowest")


def test_a_choice_is_open_while_rates_are_missing_or_failed() -> None:
    sweep, ledger = make_sweep(), Ledger()
    setting = sweep.settings[0]
    assert choose(sweep, setting, ledger.look) is None
    ledger[Trial(setting, 0, 2e-3)] = finished(3.0)
    assert choose(sweep, setting, ledger.look) == Choice(2e-3, False, None)
    ledger[Trial(setting, 0, 4e-3)] = finished(2.0)
    ledger[Trial(setting, 0, 1e-3)] = FAILED
    assert choose(sweep, setting, ledger.look) == Choice(4e-3, False, None)
    assert not [trial for trial in pending(sweep, ledger.look) if trial.setting == setting]


def test_a_single_rate_is_no_edge() -> None:
    sweep = make_sweep(learning_rates=[1e-3], seeds=[0])
    setting = sweep.settings[0]
    assert choose(sweep, setting, Ledger({Trial(setting, 0, 1e-3): finished(3.0)}).look) == Choice(1e-3, True, None)


def test_a_setting_that_diverges_everywhere_has_no_rate_and_no_more_runs() -> None:
    sweep = make_sweep(methods=["bbq"], bits=[2])
    setting = sweep.settings[0]
    ledger = Ledger({Trial(setting, 0, rate): DIVERGED for rate in sweep.learning_rates})
    assert choose(sweep, setting, ledger.look) is None
    assert tune_loss(sweep, setting, 1e-3, ledger.look) == math.inf
    assert pending(sweep, ledger.look) == []
    assert count(sweep, ledger.look) == len(known_trials(sweep, ledger.look)) == 3


@pytest.mark.parametrize(
    ("rates", "order"),
    [((1.0,), [1.0]), ((1.0, 2.0), [2.0, 1.0]), ((1.0, 2.0, 3.0, 4.0, 5.0), [3.0, 4.0, 2.0, 5.0, 1.0])],
)
def test_rates_go_from_the_middle_outwards(rates: tuple[float, ...], order: list[float]) -> None:
    assert from_the_middle(rates) == order


LOSSES = st.one_of(st.floats(0, 10), st.just(math.inf))


@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_every_sweep_ends_with_each_run_done_once(data: st.DataObject, seeds: int, tune: int, rates: int) -> None:
    sweep = make_sweep(
        seeds=list(range(seeds)), tune_seeds=min(tune, seeds), learning_rates=[1e-3 * 2**n for n in range(rates)]
    )
    ledger = Ledger()
    while todo := pending(sweep, ledger.look):
        trial = data.draw(st.sampled_from(todo))
        assert trial not in ledger
        loss = data.draw(LOSSES)
        ledger[trial] = finished(loss) if math.isfinite(loss) else DIVERGED
    assert sorted(names(known_trials(sweep, ledger.look))) == sorted(trial.name for trial in ledger)
    assert count(sweep, ledger.look) == len(ledger)
    for setting in sweep.settings:
        choice = choose(sweep, setting, ledger.look)
        losses = {rate: tune_loss(sweep, setting, rate, ledger.look) for rate in sweep.learning_rates}
        best = min(loss for loss in losses.values() if loss is not None)
        assert math.isinf(best) if choice is None else losses[choice.learning_rate] == best
