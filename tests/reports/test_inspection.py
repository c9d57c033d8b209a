"""What the inspection says of a layer is counted by hand here; the page holds all of it, alone and escaped."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bitbell
from bitbell.kernels import rotate
from bitbell.reports.inspect_page import write_inspection
from bitbell.reports.inspection import compare_layers, inspect_model, spread_of

ROTATED = ("bbq-w2a2", "quest-w4a4")


def model_of(recipe: str, name: str = "up", seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential()
        model.add_module(name, nn.Linear(32, 20))
        model.add_module("down", nn.Linear(20, 48))
        bitbell.quantize(model, {name: recipe, "*": None})
        bitbell.calibrate(model, torch.randn(16, 32))
    return model.eval()


@pytest.fixture
def model() -> Any:
    return model_of("bbq-w2a2")


@pytest.mark.parametrize("recipe", [*ROTATED, "lsq-w3a3", "nf-w4a4", "bbq-w2a2:rotation=none"])
def test_numbers_are_those_of_the_layer_trained_and_packed(recipe: str) -> None:
    trained = model_of(recipe)
    for model in (trained, bitbell.pack(trained)):
        layer: Any = dict(model.named_modules())["up"]
        (view,) = inspect_model(model)
        codes = layer.weight_codes()
        assert view.histogram == [int((codes == code).sum()) for code in range(2**view.bits)]
        assert (view.rows, view.columns, sum(view.histogram)) == (20, 32, 640)
        assert 0 < view.entropy <= view.bits
        assert sum(view.scales.counts) == 20
        assert sum(view.before.counts) == 640
        assert (view.after is None) == (view.rotation is None) == (recipe not in ROTATED)
    weight = trained.up.weight.detach().double()
    view = inspect_model(trained)[0]
    for spread, w in ((view.before, weight), (view.after, rotate(weight, view.rotation))):
        if spread is not None:
            z = (w - w.mean()) / w.std(correction=0)
            assert spread.kurtosis == pytest.approx(float(z.pow(4).mean() - 3), abs=1e-4)


def test_packed_scales_are_those_of_training(model: Any) -> None:
    assert inspect_model(model)[0].scales == inspect_model(bitbell.pack(model))[0].scales


def test_dead_rows_and_negative_scales_are_found(model: Any) -> None:
    with torch.no_grad():
        model.up.weight[3] = 0
        model.up.weight[7] = 0
        model.up.weight_quantizer.scale[5] *= -1
    view = inspect_model(model)[0]
    codes = model.up.weight_codes()
    dead = [row for row in range(20) if len(codes[row].unique()) == 1]
    assert {3, 7} <= set(dead)
    assert (view.dead_rows, view.dead_listed) == (len(dead), dead)
    assert view.negative_scales == 1


def test_a_model_does_not_differ_from_itself_packed(model: Any) -> None:
    (difference,) = compare_layers(model, bitbell.pack(model))
    assert difference.changed == 0
    assert difference.ratios is not None
    assert (difference.ratios.low, difference.ratios.high) == (1, 1)


def test_changed_codes_and_scales_are_counted(model: Any) -> None:
    other = copy.deepcopy(bitbell.pack(model))
    layer: Any = dict(other.named_modules())["up"]
    layer.weight_packed[:5] = ~layer.weight_packed[:5]  # every code of 5 of 20 rows
    layer.weight_scale *= 2
    (difference,) = compare_layers(model, other)
    assert difference.changed == 0.25
    assert difference.ratios is not None
    assert difference.ratios.median == pytest.approx(2)


def test_layers_that_cannot_be_compared_say_why(model: Any) -> None:
    (bits,) = compare_layers(model, model_of("bbq-w3a3"))
    assert (bits.changed, bits.why_not) == (None, "20 x 32 in 2 bits here, 20 x 32 in 3 bits there")
    assert bits.ratios is not None
    here, there = compare_layers(model, model_of("bbq-w2a2", name="gate"))
    assert (here.name, here.why_not) == ("up", "not in the other model")
    assert (there.name, there.why_not) == ("gate", "only in the other model")


def test_spreads_of_odd_numbers() -> None:
    assert spread_of(torch.ones(5)).counts == [5]
    assert spread_of(torch.tensor([1.0, float("nan"), 3.0])).counts[0] == 1
    assert spread_of(torch.tensor([float("nan")])).counts == []


def data_of(page: str) -> Any:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]


def test_the_page_holds_everything_and_needs_nothing(model: Any, tmp_path: Path) -> None:
    hostile = "</script><b>$x"
    with torch.no_grad():
        model.up.weight.zero_()  # no deviation: NaN, which JSON does not have
    path = write_inspection(
        model, tmp_path / "new" / "page.html", name=hostile, other=bitbell.pack(model), other_name="b"
    )
    text = path.read_text(encoding="utf-8")
    data = data_of(text)
    assert (data["name"], data["other"]) == (hostile, "b")
    assert data["layers"][0]["before"]["kurtosis"] is None
    assert data["differences"]["up"]["changed"] == 0
    assert hostile not in text
    assert not re.findall(r'(?:src|href)="(?!#)', text)
    assert "0.00% of the codes differ in the 1 layers" in text


def test_what_cannot_be_shown_is_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no quantized layers"):
        write_inspection(nn.Linear(2, 2), tmp_path / "a.html", name="a")
    with pytest.raises(ValueError, match="is a folder"):
        write_inspection(model, tmp_path, name="a")
    other = model_of("bbq-w2a2", name="gate")
    with pytest.raises(ValueError, match="no layer of a has the name of one of b"):
        write_inspection(model, tmp_path / "a.html", name="a", other=other, other_name="b")


BROWSER = Path(__file__).parents[1] / "browser.py"
spec = importlib.util.spec_from_file_location("browser", BROWSER)
assert spec is not None
assert spec.loader is not None
browser: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(browser)


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (420, True)])
def test_it_sorts_filters_and_shows_in_a_browser(width: int, dark: bool, tmp_path: Path) -> None:
    model = bitbell.build_model("tiny", vocab_size=300)
    bitbell.quantize(model, {"*.mlp.*": "bbq-w3a3", "*": "bbq-w2a2"})
    bitbell.calibrate(model, torch.randint(0, 300, (2, 32)))
    path = write_inspection(model.eval(), tmp_path / "page.html", name="a", other=bitbell.pack(model), other_name="b")
    names = "[...document.querySelectorAll('#layers tbody tr')].map(row => row.dataset.name)"
    with browser.Page(tmp_path / "profile", width=width, dark=dark) as page:
        page.open(path.as_uri())
        page.wait("document.querySelectorAll('#pictures figure').length === 5")  # equal scales: no picture of ratios
        assert page.run(names) == [view.name for view in inspect_model(model)]
        page.run("document.querySelectorAll('#layers thead button')[4].click()")
        wanted = sorted(inspect_model(model), key=lambda view: -view.entropy)
        assert page.run(names) == [view.name for view in wanted]
        page.run("const f = document.getElementById('filter'); f.value = 'Q_proj'; f.dispatchEvent(new Event('input'))")
        assert all("q_proj" in name for name in page.run(names))
        page.run(
            "const r = document.getElementById('recipe'); r.value = 'bbq-w3a3'; r.dispatchEvent(new Event('change'))"
        )
        assert page.run(names) == []
        page.run("f.value = ''; f.dispatchEvent(new Event('input'))")
        assert page.run(names)
        page.run("document.querySelectorAll('#layers tbody button')[1].click()")
        assert page.run("document.getElementById('picked').textContent") == page.run(names)[1]
        assert not page.overflows()
        assert not page.problems
