"""Reading run folders: what they say, and what is said when they are broken."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitbell.reports import read_run
from bitbell.reports.runs import read_runs


def append(run: Path, text: str) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(text)


def test_a_finished_run_says_what_its_summary_says(make_run):
    run = read_run(make_run("a", method="quest", bits=3, seed=7))
    assert (run.name, run.method, run.bits, run.steps, run.is_finished) == ("a", "quest", "W3A3", 300, True)
    assert run.config["seed"] == 7
    assert run.number("packed_bytes") == 2_400_000 + 412_500 * 3
    assert len(run.train) == 60
    assert len(run.layers) == 28


def test_an_unfinished_run_says_what_its_metrics_say(make_run):
    run = read_run(make_run("a", finished=False))
    assert not run.is_finished
    assert (run.method, run.bits, run.steps) == ("bbq", "W2A2", 180)
    assert run.number("loss") == run.valid[-1]["loss"]
    assert run.number("seconds_per_step") == pytest.approx(0.6)
    layers = run.quantizers[-1]["layers"].values()
    assert run.number("weight_entropy") == pytest.approx(sum(x["weight_entropy"] for x in layers) / 28)
    assert run.number("packed_bytes") is None


def test_full_precision_has_no_method_and_no_bits(make_run):
    for finished in (True, False):
        run = read_run(make_run(f"full{finished}", method=None, finished=finished))
        assert (run.method, run.bits, run.is_quantized) == (None, "full", False)


def test_activations_left_alone_count_as_sixteen_bits(make_run):
    run = read_run(make_run("a", bits=4, summary={"activation_bits": None}))
    assert run.bits == "W4A16"


def test_a_recipe_called_none_is_full_precision_unless_rules_replace_it(make_run):
    plain = read_run(make_run("a", finished=False, config={"recipe": "none", "rules": {}}))
    assert (plain.method, plain.bits) == (None, "full")
    rules = read_run(make_run("b", finished=False, config={"recipe": "none", "rules": {"*": "bbq-w2a2"}}))
    assert (rules.method, rules.bits) == ("mixed", "mixed")


@pytest.mark.parametrize("recipe", [{"*": "bbq-w2a2", "lm_head": None}, "my own recipe"])
def test_a_recipe_that_names_no_bits_is_mixed(make_run, recipe):
    run = read_run(make_run("a", finished=False, config={"recipe": recipe}))
    assert (run.method, run.bits) == ("mixed", "mixed")


def test_unknown_keys_and_unknown_events_are_tolerated(make_run):
    folder = make_run("a", summary={"new": [1, {"deep": 2}]}, config={"new": {"x": [1]}})
    append(folder, '{"event":"checkpoint","path":"x"}\n{"event":"train","step":400,"loss":3.0,"new":"y"}\n')
    assert read_run(folder).train[-1]["loss"] == 3.0


def test_repeated_steps_of_a_resumed_run_count_once_and_the_later_line_wins(make_run):
    folder = make_run("a")
    append(folder, '{"event":"train","step":300,"loss":1.25}\n')
    run = read_run(folder)
    assert len(run.train) == 60
    assert run.train[-1]["loss"] == 1.25


@given(cut=st.integers(min_value=1, max_value=60))
def test_a_torn_last_line_is_skipped_wherever_it_tore(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("torn")
    (folder / "config.json").write_text("{}")
    whole = '{"event":"train","step":10,"loss":5.0}\n'
    torn = '{"event":"train","step":20,"loss":4.5,"note":"\u00e9\u00e9\u00e9\u00e9\u00e9"}'.encode()
    (folder / "metrics.jsonl").write_bytes(whole.encode() + torn[: min(cut, len(torn) - 1)])
    run = read_run(folder)
    assert [event["step"] for event in run.train] == [10]
    assert run.is_torn


def test_a_whole_last_line_without_newline_is_not_torn(make_run):
    folder = make_run("a")
    append(folder, '{"event":"train","step":305,"loss":1.0}')
    run = read_run(folder)
    assert not run.is_torn
    assert run.train[-1]["step"] == 305


@pytest.mark.parametrize("line", ['{"event":"train","st', "17", "[1, 2]", "\x00\x00"])
def test_a_broken_line_in_the_middle_names_file_and_line(make_run, line):
    folder = make_run("a")
    before = len((folder / "metrics.jsonl").read_text().splitlines())
    append(folder, line + '\n{"event":"train","step":305,"loss":1.0}\n')
    with pytest.raises(ValueError, match=rf"metrics\.jsonl, line {before + 1}: not a JSON object.*last line"):
        read_run(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"event":"train","loss":1}', r"step=None, but it must be an integer"),
        ('{"event":"train","step":-1}', r"step=-1"),
        ('{"event":"train","step":true}', r"step=True"),
        ('{"event":"valid","step":1.5}', r"step=1\.5"),
        ('{"event":"valid","step":1,"loss":"low"}', r"loss='low', but it must be a number or null"),
        ('{"event":"quantizers","step":1,"layers":[1]}', r"layers must be an object of objects"),
        (
            '{"event":"quantizers","step":1,"layers":{"q":{"weight_scale":"x"}}}',
            r"layer q: weight_scale='x', but it must be a number",
        ),
    ],
)
def test_a_wrong_value_in_the_metrics_names_line_key_and_value(make_run, line, message):
    folder = make_run("a", steps=10)
    append(folder, line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line \d+.*" + message):
        read_run(folder)


@pytest.mark.parametrize(
    ("summary", "message"),
    [
        ({"loss": "low"}, r"summary\.json: loss='low', but it must be a number or null"),
        ({"method": 3}, r"method=3, but it must be a string"),
        ({"steps": math.nan}, r"steps=nan, but it must be finite"),
        ({"layers": {"a": 1}}, r"layers must be a list of objects"),
        ({"samples": ["text"]}, r"samples must be a list of objects"),
        ({"layers": [{"bytes": "many"}]}, r"layers\[0\]: bytes='many'"),
        (
            {"layers": [{"weight_histogram": [1, -2]}]},
            r"layers\[0\]: weight_histogram must be a list of counts",
        ),
    ],
)
def test_a_wrong_value_in_the_summary_names_file_key_and_value(make_run, summary, message):
    with pytest.raises(ValueError, match=message):
        read_run(make_run("a", summary=summary))


@pytest.mark.parametrize("file", ["config.json", "summary.json"])
@pytest.mark.parametrize(
    ("text", "message"), [('{"torn', "is no JSON"), ("[1]", "holds a JSON list"), ("\udcff", "is no JSON")]
)
def test_a_broken_config_or_summary_is_named(make_run, file, text, message):
    folder = make_run("a")
    (folder / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=f"{file} {message}"):
        read_run(folder)


def test_what_is_no_run_folder_is_named_with_what_was_expected(tmp_path, make_run):
    with pytest.raises(ValueError, match=r"'.*nowhere' is no run folder: it is not there.*config\.json and metrics"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="no run folder: it is a file"):
        read_run(tmp_path / "file")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no run folder: metrics\.jsonl missing"):
        read_run(tmp_path / "packed")
    make_run("inner")
    with pytest.raises(ValueError, match=r"config\.json and metrics\.jsonl missing.*subfolders inner look like runs"):
        read_run(tmp_path)


def test_none_one_string_and_the_same_folder_twice_are_refused(make_run):
    folder = make_run("a")
    with pytest.raises(ValueError, match="no run folder given"):
        read_runs([])
    with pytest.raises(ValueError, match=r"is one path\. Give a list"):
        read_runs(str(folder))
    with pytest.raises(ValueError, match="given 2 times"):
        read_runs([folder, str(folder) + "/."])


def test_equal_names_are_told_apart_by_their_folders(make_run):
    folders = [make_run(path, name="bbq") for path in ("one", "two", "deep/one")] + [make_run("x", name="lsq")]
    names = [run.name for run in read_runs(folders)]
    assert names == [f"bbq ({folders[0]})", "bbq (two)", f"bbq ({folders[2]})", "lsq"]


def test_a_run_with_one_metrics_line_and_nothing_else_is_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"event": "train", "step": 1, "loss": 9.0}))
    run = read_run(tmp_path)
    assert (run.name, run.steps, run.number("loss"), run.bits) == (tmp_path.name, 1, None, "full")
    assert run.number("seconds_per_step") is None


def test_empty_metrics_are_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("")
    run = read_run(tmp_path)
    assert (run.train, run.steps, run.is_torn) == ([], None, False)
