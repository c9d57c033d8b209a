"""Every example runs as it stands, in seconds, and its own assertions hold."""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {"accelerate_loop": "accelerate", "hugging_face_trainer": "accelerate", "torchtitan_converter": "torchtitan"}

# Example -> its arguments, and what it prints.
RUNS: dict[str, tuple[list[str], str]] = {
    "plain_loop": (["--steps", "4"], "logits 0.0e+00"),
    "hugging_face_trainer": (["--steps", "4"], "verified 14 layers"),
    "accelerate_loop": (["--steps", "4"], "verified 14 layers"),
    "gradient_checkpointing": (["--steps", "2"], "the same 73 tensors"),
    "compiled": (["--steps", "2", "--backend", "aot_eager"], "verified 7 layers"),
    "moving_average": (["--steps", "4"], "verified 14 layers"),
    "tied_weights": (["--steps", "4"], "verified 11 layers"),
    "adapters_on_packed": (["--steps", "8"], "10,240 trained numbers"),
    "torchtitan_converter": (["--steps", "2"], "logits 0.0e+00"),
    "fine_tune": (["--pretraining", "6", "--steps", "6"], "2 bits: "),
}


def test_every_example_is_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} - {"setting"} == RUNS.keys()


@pytest.mark.usefixtures("reference_kernels")
@pytest.mark.parametrize("name", RUNS)
def test_the_example_runs(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if name in NEEDS and find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    arguments, printed = RUNS[name]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert printed in capsys.readouterr().out
