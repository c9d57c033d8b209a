"""The model card says what the run's files say."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from torch import nn

import bitbell
from bitbell.cli.main import main
from bitbell.export import model_card


def parts(text: str) -> tuple[dict[str, object], str]:
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def test_the_command_writes_a_card_with_the_numbers_of_the_run(directory: Path, run: Path) -> None:
    header, body = parts((directory / "README.md").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert header["library_name"] == "transformers"
    assert header["license"] == "unknown"
    assert header["tags"] == ["bitbell", "quantization-aware-training", "2-bit"]
    assert "import bitbell" in body
    assert "| `bbq-w2a2` | 14 |" in body
    assert f"| validation loss, nats a token | {summary['loss']:.4f} |" in body
    assert f"| entropy of weight codes, bits | {summary['weight_entropy']:.3f} |" in body
    assert "| seed | 7 |" in body
    assert "| steps | 2 |" in body
    assert str(run.parent) not in body, "paths of the machine that trained it are nobody's business"
    assert "Nobody has said under which licence" in body


def test_the_lines_of_the_card_run(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = re.search(r"```python\n(.*?)```", (directory / "README.md").read_text(), re.DOTALL)
    assert found is not None
    monkeypatch.chdir(directory.parent)
    exec(compile(found[1], "card", "exec"), {})


def test_a_licence_is_named_where_one_is_given(run: Path, tmp_path: Path) -> None:
    assert main(["pack", str(run), str(tmp_path / "named"), "--license", "apache-2.0"]) == 0
    header, body = parts((tmp_path / "named" / "README.md").read_text())
    assert header["license"] == "apache-2.0"
    assert "The weights: apache-2.0." in body


def test_an_unfinished_run_has_no_results(directory: Path, run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (copy / "summary.json").unlink()
    card = model_card(bitbell.load(directory), name="half", run=copy)
    assert "## Results" not in card
    assert "## Training" in card


def test_a_module_of_your_own_has_a_card_too() -> None:
    model = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 4))
    bitbell.calibrate(bitbell.quantize(model, {"0": "bbq-w3a4", "1": None}), next(nn.Linear(32, 5).parameters()).data)
    header, body = parts(model_card(bitbell.pack(model), name="mine"))
    assert "pipeline_tag" not in header
    assert header["tags"] == ["bitbell", "quantization-aware-training", "3-bit"]
    assert "256 weights in one layer are" in body
    assert "## Training" not in body


def test_a_model_that_is_not_packed_has_none() -> None:
    with pytest.raises(ValueError, match="no packed layer"):
        model_card(nn.Linear(4, 4), name="plain")
