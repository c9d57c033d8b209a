"""The sweep file: what it expands to, and everything that can be wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitbell.comparison.sweep import Setting, Sweep, Trial, parse_width, read_sweep_file, slug


def test_methods_meet_widths_and_full_precision_has_none(values: dict[str, Any]) -> None:
    sweep = Sweep.from_dict(values | {"methods": ["none", "bbq:zero_point=-0.25"], "bits": [4, "w2a4", "w3a16"]})
    assert [(s.recipe, s.bits) for s in sweep.settings] == [
        ("none", None),
        ("bbq-w4a4:zero_point=-0.25", "w4a4"),
        ("bbq-w2a4:zero_point=-0.25", "w2a4"),
        ("bbq-w3a16:zero_point=-0.25", "w3a16"),
    ]
    assert sweep.gaps == []


def test_a_width_that_a_method_lacks_is_a_gap_with_its_reason(values: dict[str, Any]) -> None:
    sweep = Sweep.from_dict(values | {"methods": ["nf", "bbq"], "bits": [2, 1]})
    assert [s.name for s in sweep.settings] == ["nf-w2a2", "bbq-w2a2", "bbq-w1a1"]
    assert [(gap.label, gap.bits) for gap in sweep.gaps] == [("nf", "w1a1")]
    assert "weights=1" in sweep.gaps[0].reason


def test_full_precision_alone_needs_no_bits(values: dict[str, Any]) -> None:
    del values["bits"]
    assert [s.recipe for s in Sweep.from_dict(values | {"methods": ["none"]}).settings] == ["none"]


def test_a_trial_becomes_a_configuration(values: dict[str, Any]) -> None:
    methods = {"ours": "bbq:zero_point=-0.25", "bbq": "bbq"}
    sweep = Sweep.from_dict(values | {"methods": methods, "overrides": {"ours": {"weight-decay": 0}}})
    ours, plain = (sweep.config(Trial(s, 1, 4e-3), Path("runs")) for s in sweep.settings)
    assert ours.out == "runs/ours-w2a2-lr0.004-seed1"
    assert (ours.recipe, ours.seed, ours.learning_rate) == ("bbq-w2a2:zero_point=-0.25", 1, 4e-3)
    assert (ours.weight_decay, plain.weight_decay) == (0.0, 0.1)
    assert (ours.steps, ours.tensorboard, ours.keep_checkpoints) == (3, False, 1)


def test_a_sweep_survives_json(values: dict[str, Any]) -> None:
    sweep = Sweep.from_dict(values | {"methods": {"b": "bbq", "full": "full-precision"}, "tune_seeds": 2})
    assert Sweep.from_dict(json.loads(json.dumps(sweep.to_dict()))) == sweep
    assert sweep.learning_rates == (1e-3, 4e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": ["bbq"]}, "unknown key 'method'; there are methods, .* Did you mean 'methods'?"),
        ({"methods": ["bqb"]}, "methods: 'bqb' fits none of the widths in bits: unknown method 'bqb'.* 'bbq'"),
        ({"methods": ["bbq:zero_pont=1"]}, "'bbq:zero_pont=1' fits none of the widths.* 'zero_point'"),
        ({"methods": ["ternary:granularity=rwo"], "bits": [4, 2]}, "weights=4; .*'rwo'"),
        ({"methods": ["none", "bbq"], "bits": [2, 9]}, "bits: no method of the sweep has w9a9"),
        ({"methods": ["ternary"], "bits": [4]}, "methods: 'ternary' fits none of the widths in bits: .*weights=4"),
        ({"methods": ["bbq", "bbq"]}, "methods has 'bbq' more than once"),
        ({"methods": ["bbq-w2a2"]}, "methods: 'bbq-w2a2' has bits in its name"),
        ({"methods": []}, "methods must be a list of recipes or a table"),
        ({"methods": {}}, "methods must be a list of recipes or a table"),
        ({"methods": "bbq"}, "methods must be a list of recipes or a table"),
        ({"methods": [3]}, "methods: '3' must name a recipe such as 'bbq', got 3"),
        ({"methods": {"a:b": "bbq", "a=b": "quest", "a_b": "lsq"}}, "methods: 'a:b' and another method"),
        ({"methods": {"BBQ": "bbq", "bbq": "quest"}}, "methods: 'BBQ' and another method"),
        ({"methods": {"x" * 190: "bbq"}}, "is too long for the name of a folder"),
        ({"bits": []}, "bits must be a list that is not empty"),
        ({"bits": [2, "w2a2"]}, "bits has 'w2a2' more than once"),
        ({"bits": ["2a4"]}, "bits: a width is a number of bits, or like 'w2a4' or 'w4a16', got '2a4'"),
        ({"bits": [True]}, "bits: a width is a number of bits, .* got True"),
        ({"seeds": []}, "seeds must be a list that is not empty"),
        ({"seeds": [0, 0]}, "seeds has 0 more than once"),
        ({"seeds": [-1]}, "seeds: a seed is a whole number of at least 0, got -1"),
        ({"seeds": 3}, "seeds must be a list that is not empty, got 3"),
        ({"learning_rates": []}, "learning_rates must be a list that is not empty"),
        ({"learning_rates": [0]}, "learning_rates: a learning rate is a positive number, got 0"),
        ({"learning_rates": ["1e-3"]}, "learning_rates: a learning rate is a positive number, got '1e-3'"),
        ({"learning_rates": [1e-3, 1e-3]}, "learning_rates has 0.001 more than once"),
        ({"learning_rates": [1e-3, 1.0000001e-3]}, "two learning rates, give one run folder"),
        ({"tune_seeds": 3}, r"tune_seeds must be from 1 to the number of seeds \(2\), got 3"),
        ({"tune_seeds": 0}, "tune_seeds must be from 1"),
        ({"train": {"data": "d", "recipe": "bbq-w2a2"}}, "train may not hold recipe: the sweep sets it itself"),
        ({"train": {"data": "d", "seed": 1}}, "train may not hold seed"),
        ({"train": {"data": "d", "learning-rate": 1.0}}, "train may not hold learning_rate"),
        ({"train": {"data": "d", "stop_after": 1}}, "train may not hold stop_after"),
        ({"train": {"data": "d", "stepz": 1}}, "train: unknown field 'stepz'. Did you mean 'steps'?"),
        ({"train": {"data": "d", "steps": "many"}}, "train: steps must be int, got 'many'"),
        ({"train": {"data": "d", "steps": 0}}, "steps must be at least 1"),
        ({"train": {"steps": 1}}, "train needs data"),
        ({"train": 3}, "train must be a table of options, got 3"),
        ({"overrides": {"bqb": {}}}, "overrides.bqb: there is no method 'bqb'. Did you mean 'bbq'?"),
        (
            {"overrides": {"bbq": {"steps": 9}}},
            "overrides.bbq may not hold steps: it must be the same for every method",
        ),
        ({"overrides": {"bbq": {"seed": 9}}}, "overrides.bbq may not hold seed: the sweep sets it itself"),
        ({"overrides": {"bbq": {"clip": -1.0}}}, "overrides.bbq: clip must be positive"),
        ({"overrides": {"bbq": {"klip": 1.0}}}, "overrides.bbq: unknown field 'klip'. Did you mean 'clip'?"),
        ({"overrides": 3}, "overrides must be tables"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_key(values: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Sweep.from_dict(values | change, "sweep.toml")
    assert str(caught.value).startswith("sweep.toml: ")


@pytest.mark.parametrize("key", ["methods", "bits", "seeds", "learning_rates", "train"])
def test_a_missing_key_is_named(values: dict[str, Any], key: str) -> None:
    del values[key]
    with pytest.raises(ValueError, match=f"sweep: {key} is missing"):
        Sweep.from_dict(values)


def test_files_are_toml_or_json(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('methods = ["bbq"]\ntune-seeds = 1\n[train]\ndata = "d"\n')
    (tmp_path / "a.json").write_text('{"methods": ["bbq"], "tune-seeds": 1, "train": {"data": "d"}}')
    expected = {"methods": ["bbq"], "tune_seeds": 1, "train": {"data": "d"}}
    assert read_sweep_file(tmp_path / "a.toml") == read_sweep_file(tmp_path / "a.json") == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", b"methods = [", "a.toml is no valid TOML"),
        ("a.toml", b"seeds = [1]\nseeds = [2]\n", "a.toml is no valid TOML"),
        ("a.json", b"{", "a.json is no valid JSON"),
        ("a.json", b"[]", "a.json must hold fields with values, got a list"),
        ("a.toml", b"\xff\xfe", "cannot read the sweep .*a.toml: it is no text"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_sweep_file(tmp_path / name)
    with pytest.raises(ValueError, match=r"cannot read the sweep .*nowhere.toml: No such file"):
        read_sweep_file(tmp_path / "nowhere.toml")


@given(st.integers(0, 99), st.integers(0, 99))
def test_a_width_is_read_in_every_way_of_writing_it(weights: int, activations: int) -> None:
    assert parse_width(f"W{weights}a{activations}") == f"w{weights}a{activations}"
    assert parse_width(weights) == parse_width(str(weights)) == f"w{weights}a{weights}"


@given(st.text(min_size=1))
def test_a_label_makes_a_folder_name_of_its_own_length(label: str) -> None:
    name = Trial(Setting(label, "bbq-w2a2", "w2a2"), 0, 1e-3).name
    assert name == f"{slug(label)}-w2a2-lr0.001-seed0"
    assert len(slug(label)) == len(label)
    assert not set(name) & set('/\\:*?"<>| \n')
