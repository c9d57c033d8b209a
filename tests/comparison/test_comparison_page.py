"""The page: complete, self-contained, escaped, and honest at every stage of a sweep."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bitbell.comparison.folder import SweepFolder
from bitbell.comparison.page import make_page
from bitbell.comparison.pictures import draw_all, mean_run, method_looks
from bitbell.comparison.plan import pending
from bitbell.comparison.rows import make_rows
from bitbell.comparison.sweep import Sweep
from bitbell.reports.drawing import INK, drawing_rules
from bitbell.reports.runs import read_run

Finish = Callable[..., None]
VOID = {"meta", "br", "link"}


class Balanced(HTMLParser):
    """Checks that every element is closed where it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def done(tmp_path: Path, values: dict[str, Any], finish: Finish) -> tuple[SweepFolder, Sweep]:
    """A sweep of three methods at two widths with all its runs, made up; a label like a tag among them."""
    methods = {"none": "none", "<b>bbq</b>": "bbq", "quest": "quest"}
    sweep = Sweep.from_dict(values | {"methods": methods, "bits": [2, 1]})
    folder = SweepFolder(tmp_path)
    losses = {"none": 3.0, "<b>bbq</b>": 3.1, "quest": 3.3}
    while todo := pending(sweep, folder.look):
        for trial in todo:
            finish(folder, sweep, trial, losses[trial.setting.label] + 0.01 * trial.seed + trial.learning_rate)
    return folder, sweep


def test_the_page_is_whole_and_needs_nothing_else(done: tuple[SweepFolder, Sweep]) -> None:
    page = make_page(*done)
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert "<b>bbq</b>" not in page
    assert "&lt;b&gt;bbq&lt;/b&gt;" in page
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    titles = re.findall(r"<h3>(?:<svg.*?</svg>)?([^<]*)</h3>", page)
    assert titles == [
        *("Quality against bits", "Entropy against loss", "Learning rates, W2A2", "Learning rates, W1A1"),
        *("Loss over training, W2A2", "Loss over training, W1A1"),
    ]
    assert page.count('<span class="badge">best ') == 2


def test_the_lead_says_what_the_rows_say(done: tuple[SweepFolder, Sweep]) -> None:
    lead = re.search(r'<p class="lead">(.*?)</p>', make_page(*done))
    assert lead is not None
    assert "15 of 15 runs are done." in lead[1]
    assert "3 steps of 2 x 16 tokens" in lead[1]
    assert "Full precision reached 3.006 ± 0.007 nats per token." in lead[1]
    expected = (
        "With W2A2, &lt;b&gt;bbq&lt;/b&gt; is lowest: 3.106 ± 0.007 nats per token, 0.200 below quest "
        "(more than the scatter of the seeds), 0.100 above full precision."
    )
    assert expected in lead[1]


def test_a_sweep_that_has_just_begun_has_a_page(tmp_path: Path, values: dict[str, Any], finish: Finish) -> None:
    folder, sweep = SweepFolder(tmp_path), Sweep.from_dict(values)
    page = make_page(folder, sweep)
    assert "0 of 6 runs are done" in page
    assert "nothing is ranked" in page
    assert "<figure" not in page
    finish(folder, sweep, pending(sweep, folder.look)[0], 3.0)
    finish(folder, sweep, pending(sweep, folder.look)[0], status="diverged")
    page = make_page(folder, sweep)
    assert "bbq-w2a2-lr0.004-seed0 diverged: at step 7" in page
    assert "<figure" not in page  # full precision alone at one rate is no picture yet


def test_full_precision_is_ink_and_every_method_looks_different(values: dict[str, Any]) -> None:
    methods = [f"bbq:zero_point={n / 64}" for n in range(16)]
    looks = method_looks(Sweep.from_dict(values | {"methods": ["none", *methods]}))
    assert looks["none"].colour == INK
    assert len({(look.colour, look.dash) for look in looks.values()}) == 17


def test_curves_are_means_over_the_seeds_at_the_steps_that_all_have(done: tuple[SweepFolder, Sweep]) -> None:
    folder, sweep = done
    row = make_rows(sweep, folder.look)[0]
    runs = [read_run(folder.run(trial)) for trial in row.trials]
    runs[1].train.pop()
    mean = mean_run("both", runs)
    assert [event["step"] for event in mean.train] == list(range(1, 8))
    first = [run.train[0]["loss"] for run in runs]
    assert mean.train[0]["loss"] == pytest.approx(sum(first) / 2)
    for run, shares in zip(runs, ((0.2, 0.4), (0.6, 0.8)), strict=True):
        run.valid[:] = [{"step": 5 * n, "loss": n, "accuracy": share} for n, share in enumerate(shares, 1)]
    assert mean_run("both", runs).valid == [
        {"step": 5, "loss": 1.0, "accuracy": pytest.approx(0.4)},
        {"step": 10, "loss": 2.0, "accuracy": pytest.approx(0.6)},
    ]


def test_pictures_say_their_numbers_in_words(done: tuple[SweepFolder, Sweep]) -> None:
    folder, sweep = done
    with drawing_rules():
        pictures = {p.name: p for p in draw_all(folder, sweep, make_rows(sweep, folder.look))}
    assert "quest W1A1 3.306" in pictures["quality"].alt
    assert "quest W2A2 0.900, 3.306" in pictures["entropy-loss"].alt
    assert "Chosen: full precision 0.001" in pictures["rates-w2a2"].alt
