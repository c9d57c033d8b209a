"""The page: complete, alone, escaped, and honest, from one run to twelve."""

import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bitbell.reports import write_report

VOID = {"meta", "br", "img", "link", "hr"}


class Page(HTMLParser):
    """Checks that tags close in order, and collects what the tests ask about."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


def report(runs, out) -> tuple[str, Page]:
    text = write_report(runs, out).read_text(encoding="utf-8")
    return text, Page(text)


def all_methods(make_run) -> list[Path]:
    return [make_run(method or "full", method=method) for method in ("bbq", "quest", "lsq", None)]


def test_the_page_its_numbers_and_its_plots_are_written(make_run, tmp_path):
    text, page = report(all_methods(make_run), tmp_path / "deep" / "out")
    out = tmp_path / "deep" / "out"
    assert sorted(path.name for path in out.iterdir()) == ["plots", "report.html", "report.json"]
    numbers = json.loads((out / "report.json").read_text())
    plots = {"loss", "size", "entropy", "weight-scale", "activation-scale"}
    assert plots < set(numbers["plots"])
    assert len(numbers["plots"]) == 5 + 3
    for name in numbers["plots"]:
        assert (out / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / "plots" / f"{name}.svg").read_text()
    losses = [f"{row['loss']:.3f}" for row in numbers["runs"]]
    assert set(losses) <= set(page.cells)
    assert 'class="badge">best W2A2' in text


def test_the_page_needs_nothing_outside_itself(make_run, tmp_path):
    text, page = report(all_methods(make_run), tmp_path / "out")
    assert "http" not in text
    assert "url(" not in re.sub(r"url\(#", "", text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for key in ("src", "href"):
            assert (attributes.get(key) or "#").startswith(("#", "data:image/png;base64,"))


def test_ids_are_unique_and_every_reference_is_there(make_run, tmp_path):
    text, page = report([*all_methods(make_run), make_run("deep", depth=10)], tmp_path / "out")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(ids)


def test_pictures_have_words_and_tables_have_headers(make_run, tmp_path):
    _, page = report(all_methods(make_run), tmp_path / "out")
    pictures = [a for tag, a in page.tags if tag == "svg" and a.get("class") != "key"]
    assert len(pictures) == 8
    assert all(len(a["aria-label"] or "") > 40 and a["role"] == "img" for a in pictures)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("figcaption") == tags.count("figure") == 8
    assert tags.count("caption") == tags.count("table")
    assert all("scope" in a for tag, a in page.tags if tag == "th")


def test_names_samples_and_settings_are_escaped(make_run, tmp_path):
    evil = "</style><script>alert(1)</script> $title & $\\frac{"
    folder = make_run(
        "a",
        name=evil,
        config={"data": evil, evil: evil, "preset": evil},
        summary={
            "samples": [{"prompt": evil, "text": evil + " went on"}],
            "layers": [{"name": evil, "weight_histogram": [1, 2, 3, 4]}],
        },
    )
    text, page = report([folder, make_run("b", method="quest")], tmp_path / "out")
    assert "<script" not in text
    assert "script" not in {tag for tag, _ in page.tags}
    assert "&lt;script&gt;alert(1)&lt;/script&gt; $title &amp; $\\frac{" in text
    assert all("<" not in path.name for path in (tmp_path / "out" / "plots").iterdir())


def test_a_sample_that_repeats_its_prompt_shows_it_once(make_run, tmp_path):
    text, _ = report([make_run("a")], tmp_path / "out")
    assert "<b>In the</b> beginning of the night" in text


def test_seeds_get_a_table_of_their_own(make_run, tmp_path):
    folders = [make_run(f"s{i}", seed=i, summary={"loss": loss}) for i, loss in enumerate((3.4, 3.5))]
    text, page = report(folders, tmp_path / "out")
    assert "sample standard deviation" in text
    assert "3.450 \N{PLUS-MINUS SIGN} 0.071" in page.cells
    assert "3.400" in page.cells


def test_the_same_runs_give_the_same_page(make_run, tmp_path):
    folders = all_methods(make_run)
    first = write_report(folders, tmp_path / "out").read_bytes()
    assert write_report(folders, tmp_path / "out").read_bytes() == first


def test_the_command_that_made_the_page_is_on_it(make_run, tmp_path):
    folder = make_run("a run")
    text, _ = report([folder], tmp_path / "out")
    assert f"bitbell report &#x27;{folder}&#x27; --out {tmp_path / 'out'}" in text


def test_twelve_runs_fit(make_run, tmp_path):
    folders = [
        make_run(f"{m or 'full'}-w{b}a{b}-{i}", method=m, bits=b, seed=i, depth=1, finished=i % 5 != 4)
        for i, (m, b) in enumerate([(m, b) for m in ("bbq", "quest", "lsq", None) for b in (1, 2, 4)])
    ]
    text, page = report(folders, tmp_path / "out")
    assert {folder.name for folder in folders} <= {cell.split(" ")[0] for cell in page.cells}
    assert "more runs</summary>" in text
    assert "unfinished" in text


def bare_run(folder: Path, metrics: str = "", config: str = "{}") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(config)
    (folder / "metrics.jsonl").write_text(metrics)
    return folder


@pytest.mark.parametrize(
    "metrics",
    [
        "",
        '{"event":"train","step":1,"loss":9.0}',
        '{"event":"train","step":1,"loss":NaN}\n',
        '{"event":"valid","step":0,"loss":0.0,"perplexity":Infinity}\n',
        '{"event":"train","step":5}\n{"event":"valid","step":5,"loss":null}\n',
        '{"event":"quantizers","step":1,"layers":{}}\n',
        '{"event":"quantizers","step":1,"layers":{"a":{"weight_entropy":0,"weight_scale":0}}}\n{"torn',
    ],
)
@pytest.mark.parametrize("config", ["{}", '{"recipe":"bbq-w2a2"}'])
def test_a_run_of_almost_nothing_still_gives_a_page(tmp_path, metrics, config):
    text, _ = report([bare_run(tmp_path / "run", metrics, config)], tmp_path / "out")
    assert "nothing to rank" in text
    assert "unfinished" in text


def test_an_empty_summary_gives_dashes(tmp_path):
    folder = bare_run(tmp_path / "run")
    (folder / "summary.json").write_text("{}")
    _, page = report([folder], tmp_path / "out")
    assert page.cells.count("\N{EN DASH}") >= 11


def test_a_diverged_run_is_told_and_not_ranked(make_run, tmp_path):
    folder = make_run("a", summary={"loss": math.nan, "perplexity": math.inf})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event":"train","step":305,"loss":NaN}\n')
    text, page = report([folder, make_run("b", method="lsq")], tmp_path / "out")
    assert {"NaN", "\N{INFINITY}"} <= set(page.cells)
    assert "the training loss was not finite at 1 of 61 logged steps, first at step 305" in text
    assert 'class="badge">best' not in text


def test_a_torn_line_is_told(make_run, tmp_path):
    folder = make_run("a", finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event":"tr')
    assert "the last line of its metrics was torn" in report([folder], tmp_path / "out")[0]


def test_names_in_other_scripts_and_equal_after_slugging_get_their_own_plots(make_run, tmp_path):
    folders = [make_run("1", name="\u96ea a"), make_run("2", name="\u96ea-a"), make_run("3", name="#0072b2")]
    write_report(folders, tmp_path / "out")
    assert len(list((tmp_path / "out" / "plots").glob("codes-*.svg"))) == 3


def test_out_that_is_a_file_is_refused_before_anything_is_written(make_run, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match=r"out='.*out' is a file, but the report needs a folder"):
        write_report([make_run("a")], tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_broken_run_leaves_the_old_report_alone(make_run, tmp_path):
    folder = make_run("a")
    page = write_report([folder], tmp_path / "out")
    before = page.read_bytes()
    (folder / "summary.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        write_report([folder], tmp_path / "out")
    assert page.read_bytes() == before


def test_reading_runs_imports_neither_torch_nor_matplotlib(make_run):
    folder = make_run("a")
    code = (
        "import sys; from bitbell.reports import read_run; read_run(sys.argv[1]); "
        "assert not {'torch', 'matplotlib'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, env=environment)


def test_an_unknown_name_of_the_room_is_refused_with_what_it_offers():
    import bitbell.reports

    with pytest.raises(AttributeError, match="It offers Run, read_run, write_report"):
        bitbell.reports.missing  # noqa: B018


def test_it_links_to_an_inspection_that_is_there(make_run, tmp_path):
    runs = all_methods(make_run)
    assert 'href="inspect.html"' not in report(runs, tmp_path / "out")[0]
    (tmp_path / "out" / "inspect.html").write_text("")
    assert 'href="inspect.html"' in report(runs, tmp_path / "out")[0]
