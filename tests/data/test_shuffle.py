"""The permutation is one, for every size; the hash never changes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitbell.data.shuffle import Permutation, draw


def test_the_hash_of_some_numbers_is_pinned():
    assert draw(0) == 8493733112532773764
    assert draw(1, 2, 3) != draw(1, 23)


@given(size=st.integers(1, 3000), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_every_number_comes_exactly_once(size: int, seed: int, epoch: int):
    order = Permutation(size, seed, epoch)(np.arange(size))
    assert np.array_equal(np.sort(order), np.arange(size))


def test_places_can_be_asked_one_by_one_and_in_any_order():
    permutation = Permutation(1000, 7)
    whole = permutation(np.arange(1000))
    assert [int(permutation([place])[0]) for place in (999, 0, 17)] == whole[[999, 0, 17]].tolist()


def test_a_range_of_2_to_the_40_needs_no_memory():
    size = 2**40 + 1
    order = Permutation(size, 3)(np.array([0, 1, size - 1]))
    assert len(set(order.tolist())) == 3
    assert all(0 <= value < size for value in order.tolist())


def test_seeds_and_epochs_give_different_orders():
    orders = {tuple(Permutation(100, seed, epoch)(np.arange(100))) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@pytest.mark.parametrize("size", [2, 3, 5, 16, 40])
def test_every_place_gets_every_number_about_equally_often(size: int):
    rounds = 40 * size
    counts = np.zeros((size, size))
    for seed in range(rounds):
        counts[np.arange(size), Permutation(size, seed)(np.arange(size))] += 1
    chi_square = ((counts - rounds / size) ** 2 / (rounds / size)).sum()
    freedom = (size - 1) ** 2
    assert chi_square < freedom + 6 * np.sqrt(2 * freedom) + 6


def test_neighbours_do_not_stay_neighbours():
    order = Permutation(10_000, 1)(np.arange(10_000))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert (np.abs(np.diff(order)) == 1).sum() < 20


def test_sizes_and_positions_outside_the_range_are_refused():
    with pytest.raises(ValueError, match="size of at least 1, got 0"):
        Permutation(0)
    with pytest.raises(ValueError, match=r"positions must lie in 0 \.\. 9, got 10 \.\. 10"):
        Permutation(10, 0)([10])
    with pytest.raises(ValueError, match=r"got -1 \.\. -1"):
        Permutation(10, 0)([-1])
