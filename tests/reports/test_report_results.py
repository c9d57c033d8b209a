"""Rows, groups, ranks, and the words made of them."""

import json
import math
import statistics

import pytest

from bitbell.reports import formats
from bitbell.reports.results import arrange, as_json, best_of_each_width, columns_of, group_seeds
from bitbell.reports.runs import read_runs
from bitbell.reports.words import notes, summarise, with_spread


def read(*folders):
    runs = arrange(read_runs(folders))
    return runs, group_seeds(runs)


def test_full_precision_comes_first_then_many_bits_to_few_best_first_unfinished_last(make_run):
    runs, _ = read(
        make_run("c", bits=2, summary={"loss": 3.6}),
        make_run("open", bits=2, finished=False),
        make_run("b", bits=2, summary={"loss": 3.5}),
        make_run("nan", bits=2, summary={"loss": math.nan}),
        make_run("a", bits=4),
        make_run("full", method=None),
    )
    assert [run.name for run in runs] == ["full", "a", "b", "c", "nan", "open"]


def test_runs_that_differ_only_in_seed_form_a_group_with_sample_deviation(make_run):
    losses = [3.4, 3.5, 3.75]
    folders = [make_run(f"s{i}", seed=i, summary={"loss": loss}) for i, loss in enumerate(losses)]
    folders.append(make_run("other", seed=3, config={"learning_rate": 0.01}))
    _, groups = read(*folders)
    assert sorted(len(group.runs) for group in groups) == [1, 3]
    group = max(groups, key=lambda group: len(group.runs))
    spread = group.spread("loss")
    assert spread is not None
    assert (spread.mean, spread.count) == (pytest.approx(3.55), 3)
    assert spread.deviation == pytest.approx(statistics.stdev(losses))
    assert {group.name for group in groups} == {
        "BBQ W2A2, learning_rate 0.001",
        "BBQ W2A2, learning_rate 0.01",
    }


def test_unfinished_seeds_are_left_out_of_the_mean_and_noted(make_run):
    runs, groups = read(make_run("a", seed=0, summary={"loss": 3.5}), make_run("b", seed=1, finished=False))
    spread = groups[0].spread("loss")
    assert spread is not None
    assert (spread.mean, spread.deviation, spread.count) == (3.5, None, 1)
    text = " ".join(notes(runs, groups))
    assert "1 of 2 seeds unfinished" in text
    assert "b is unfinished (180 of 300 steps)" in text


def test_the_best_is_found_by_mean_loss_and_only_among_equal_bits_and_equal_work(make_run):
    _, groups = read(
        make_run("bbq0", seed=0, summary={"loss": 3.2}),
        make_run("bbq1", seed=1, summary={"loss": 3.8}),
        make_run("quest", method="quest", summary={"loss": 3.4}),
        make_run("long", method="lsq", steps=600, summary={"loss": 1.0}),
        make_run("wide", method="lsq", bits=4, summary={"loss": 1.0}),
    )
    [(best, others)] = best_of_each_width(groups)
    assert best.name == "QuEST W2A2"  # BBQ has the best single seed but the worse mean
    assert [other.name for other in others] == ["BBQ W2A2"]


def test_a_setting_with_a_diverged_seed_is_not_ranked_and_this_is_said(make_run):
    runs, groups = read(
        make_run("bbq0", seed=0, summary={"loss": 1.0}),
        make_run("bbq1", seed=1, summary={"loss": math.nan}),
        make_run("quest", method="quest"),
        make_run("lsq", method="lsq"),
    )
    [(best, _)] = best_of_each_width(groups)
    assert best.name == "QuEST W2A2"
    assert "BBQ W2A2: 1 finished without a finite validation loss; it is not ranked." in notes(runs, groups)


def test_the_summary_says_what_was_measured(make_run):
    runs, groups = read(
        make_run("bbq", summary={"loss": 3.47, "perplexity": 32.1}),
        make_run("quest", method="quest", summary={"loss": 3.55}),
        make_run("full", method=None, summary={"loss": 3.3, "perplexity": 27.1}),
    )
    assert summarise(runs, groups) == (
        "3 runs of the preset tiny on book for 300 steps of 16 x 256 tokens (1.23 million tokens). "
        "Full precision reached a validation loss of 3.300 nats per token (perplexity 27.1) after 300 steps. "
        "With 2-bit weights and activations (W2A2), BBQ reached the lowest validation loss: 3.470 "
        "nats per token (perplexity 32.1) after 300 steps, 0.080 below QuEST and 0.170 above full precision "
        "after the same work. "
        "Packed, it takes 3.23 MB instead of 15.6 MB. "
        "Each setting ran with one seed, so small differences may be chance; these numbers hold for these "
        "runs only."
    )


def test_a_quantized_run_below_full_precision_is_reported_without_overclaiming(make_run):
    runs, groups = read(make_run("bbq", summary={"loss": 3.2}), make_run("full", method=None, summary={"loss": 3.3}))
    text = summarise(runs, groups)
    assert "0.100 below full precision after the same work" in text
    assert "does not show that fewer bits are better in general" in text
    assert "beat" not in text


def test_full_precision_after_other_work_is_no_yardstick(make_run):
    runs, groups = read(make_run("bbq"), make_run("full", method=None, steps=600))
    assert "above full precision" not in summarise(runs, groups)
    assert "The runs differ in steps. Only runs of equal work are ranked against each other." in notes(runs, groups)


@pytest.mark.parametrize(("offset", "words"), [(0.5, "more than"), (0.05, "within")])
def test_the_gap_between_methods_is_held_against_the_scatter_of_the_seeds(make_run, offset, words):
    folders = [
        make_run(f"{method}{seed}", method=method, seed=seed, summary={"loss": 3.4 + 0.1 * seed + extra})
        for method, extra in (("bbq", 0.0), ("quest", offset))
        for seed in (0, 1)
    ]
    assert f"({words} the scatter of the seeds)" in summarise(*read(*folders))


def test_accumulated_batches_and_the_datas_fingerprint_count_as_work(make_run):
    same = {"data_fingerprint": "abc", "accumulation": 4}
    runs, groups = read(
        make_run("bbq", config=same | {"data": "here"}),
        make_run("lsq", method="lsq", config=same | {"data": "there"}),
    )
    assert len(best_of_each_width(groups)) == 1
    assert "300 steps of 64 x 256 tokens (4.92 million tokens)" in summarise(runs, groups)
    _, groups = read(
        make_run("bbq1", config={"data_fingerprint": "abc"}),
        make_run("lsq1", method="lsq", config={"data_fingerprint": "def"}),
        make_run("lsq2", method="lsq", config={"data_fingerprint": "ghi", "accumulation": 2}),
    )
    assert best_of_each_width(groups) == []


def test_nothing_finished_means_nothing_to_rank(make_run):
    text = summarise(*read(make_run("a", finished=False), make_run("b", method="lsq", finished=False)))
    assert text.startswith("2 runs (2 unfinished) of the preset tiny")
    assert text.endswith("there is nothing to rank.")


def test_the_json_holds_every_column_and_is_strict(make_run):
    runs, groups = read(make_run("a", summary={"perplexity": math.inf}), make_run("b", seed=1))
    text = json.dumps(as_json(runs, groups), allow_nan=False)
    numbers = json.loads(text)
    rows = {row["run"]: row for row in numbers["runs"]}
    assert set(rows["a"]) >= {column.key for column in columns_of(runs)} | {"weight_bits", "activation_bits", "folder"}
    assert (rows["a"]["perplexity"], rows["a"]["not_finite"]) == (None, ["perplexity"])
    assert rows["b"]["loss"] == next(run for run in runs if run.name == "b").number("loss")
    [group] = numbers["seed_groups"]
    assert (sorted(group["seeds"]), group["perplexity"]["count"]) == ([0, 1], 1)


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (formats.decimals(3), 3.46963, "3.470"),
        (formats.decimals(3), None, "\N{EN DASH}"),
        (formats.decimals(3), math.nan, "NaN"),
        (formats.decimals(3), -math.inf, "\N{MINUS SIGN}\N{INFINITY}"),
        (formats.decimals(3), 1234567.8, "1\u202f234\u202f568"),
        (formats.significant(3), 54.57, "54.6"),
        (formats.significant(3), 1234.5, "1234"),
        (formats.significant(3), 0, "0"),
        (formats.significant(3), 0.0000123, "1.23e\N{MINUS SIGN}05"),
        (formats.megabytes, 2_900_000, "2.90"),
        (formats.count, 20_000, "20\u202f000"),
        (formats.plain, {"a": None}, '{"a": null}'),
    ],
)
def test_numbers_are_written_one_way(write, value, text):
    assert write(value) == text


def test_a_deviation_is_written_to_the_decimals_of_its_mean(make_run):
    _, groups = read(
        make_run("a", seed=0, summary={"perplexity": 32.0}),
        make_run("b", seed=1, summary={"perplexity": 33.0}),
    )
    assert with_spread(groups[0].spread("perplexity"), formats.significant(3)) == "32.5 \N{PLUS-MINUS SIGN} 0.7"


def test_shortened_names_keep_both_ends():
    assert formats.shorten("bbq-w2a2-a-long-name-seed3", 16) == "bbq-w2a2\N{HORIZONTAL ELLIPSIS}e-seed3"
    assert formats.shorten("short", 16) == "short"


def test_methods_are_written_as_their_authors_do():
    names = {"bbq-vision": "BBQ-Vision", "lsq-plus": "LSQ+", "n2uq": "N2UQ", "nf": "NF", None: "full precision"}
    assert {name: formats.method(name) for name in names} == names
