"""The configuration: its checks, its file form, and which differences matter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitbell.training.config import TrainConfig, read_config_file


def config(**fields: object) -> TrainConfig:
    return TrainConfig(**{"data": "d", "out": "o", **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "steps must be at least 1, got steps=0"),
        ("batch_size", -1, "batch_size must be at least 1"),
        ("learning_rate", 0.0, "learning_rate must be positive"),
        ("learning_rate", float("inf"), "learning_rate must be positive"),
        ("weight_decay", -0.1, "weight_decay must be 0 or more"),
        ("clip", 0.0, "clip must be positive"),
        ("beta2", 1.0, "beta2 must be from 0 up to but without 1"),
        ("warmup", 1.5, "warmup must be from 0 to 1"),
        ("precision", "fp8", "precision must be auto, float32 or bfloat16, got precision='fp8'"),
        ("stop_after", 0, "stop_after must be at least 1"),
        ("threads", 0, "threads must be at least 1"),
        ("reduce_every", True, "reduce_every must be left out without fsdp, got reduce_every=True"),
        ("low_bit_gather", True, "low_bit_gather must be left out without fsdp"),
        ("device", "auto:7", "device must be auto, cpu, cuda or cuda:N"),
        ("device", "tpu", "device must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**{field: value})


def test_a_configuration_survives_its_dictionary() -> None:
    made = config(recipe="quest-w4a4", rules={"*.mlp.*": "bbq-w2a2", "*": "none"}, learning_rate=1e-3)
    assert TrainConfig.from_dict(made.to_dict()) == made


def test_an_unknown_field_gets_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"unknown field 'stepz'. Did you mean 'steps'\?"):
        TrainConfig.from_dict({"data": "d", "out": "o", "stepz": 3})


@pytest.mark.parametrize(
    ("field", "value"), [("steps", "many"), ("steps", True), ("recipe", 3), ("compile", 1), ("rules", [])]
)
def test_a_wrong_type_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} must be "):
        TrainConfig.from_dict({"data": "d", "out": "o", field: value})


def test_an_integer_is_taken_where_a_float_is_meant() -> None:
    assert TrainConfig.from_dict({"data": "d", "out": "o", "clip": 2}).clip == 2.0


def test_files_give_fields(tmp_path: Path) -> None:
    toml, plain = tmp_path / "a.toml", tmp_path / "a.json"
    toml.write_text('data = "d"\nsteps = 7\n[rules]\n"*" = "bbq-w2a2"\n')
    plain.write_text('{"data": "d", "steps": 7, "rules": {"*": "bbq-w2a2"}}')
    assert read_config_file(toml) == read_config_file(plain) == {"data": "d", "steps": 7, "rules": {"*": "bbq-w2a2"}}


def test_the_configuration_of_a_run_is_a_configuration_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    recorded = {"versions": {}, "data_fingerprint": "x", "vocab_size": 257, "computed_in": "float32"}
    path.write_text(json.dumps(config(steps=7).to_dict() | recorded))
    assert TrainConfig(**read_config_file(path)) == config(steps=7)


def test_rules_in_a_file_take_null_for_none_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"rules": {"lm_head": null, "*": "bbq-w2a2"}}')
    assert read_config_file(path)["rules"] == {"lm_head": "none", "*": "bbq-w2a2"}
    path.write_text('{"rules": {"*": 2}}')
    with pytest.raises(ValueError, match="rule '\\*' must give a recipe's name"):
        read_config_file(path)


def test_broken_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    with pytest.raises(ValueError, match=r"cannot read the configuration .*a\.toml"):
        read_config_file(path)
    path.write_text("steps = ")
    with pytest.raises(ValueError, match=r"a\.toml is no valid TOML"):
        read_config_file(path)
    (tmp_path / "b.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold fields with values, got a list"):
        read_config_file(tmp_path / "b.json")


def test_only_fields_that_touch_numbers_count_as_differences() -> None:
    assert config().differences(config(log_every=3, out="elsewhere", threads=1)) == {}
    assert config().differences(config(seed=1, steps=5)) == {"seed": (0, 1), "steps": (300, 5)}
