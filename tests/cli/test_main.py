"""The command: its verbs on a small run, its exit status, and its words when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitbell.cli.configuration import take_config_file
from bitbell.cli.main import main
from bitbell.kernels import native
from bitbell.models.presets import PRESETS, Preset

MICRO = Preset(layers=1, width=64, heads=2, feed_forward=128, learning_rate=4e-3, tokens=1e4, vocabulary=300)


@pytest.fixture(autouse=True)
def micro_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "micro", MICRO)


@pytest.fixture(scope="module")
def run(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished 2-bit run made by the command."""
    out = tmp_path_factory.mktemp("runs") / "bbq"
    sizes = ["--steps", "6", "--batch-size", "2", "--sequence-length", "32", "--evaluate-windows", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "micro", MICRO)
        assert main(["train", "--preset", "micro", "--data", str(small_data), "--out", str(out), *sizes]) == 0
    return out


def test_help_and_version_and_unknown_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in ("tokenize", "train", "evaluate", "pack", "verify", "generate", "report"))
    assert len(shown.splitlines()) < 50
    assert main(["--version"]) == 0
    assert main(["trian"]) == 2
    assert "unknown command 'trian'. Did you mean 'train'?" in capsys.readouterr().err


def test_every_verb_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    from bitbell.cli.main import VERBS

    for verb in VERBS:
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        assert f"bitbell {verb}" in shown
        assert "Args:" not in shown  # the docstring was understood, so every flag has its own help


def test_the_whole_road_by_commands(
    run: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "packed"
    assert main(["pack", str(run), str(packed)]) == 0
    assert "MB trained in float32" in capsys.readouterr().out
    assert main(["verify", str(run), str(packed)]) == 0
    shown = capsys.readouterr().out
    assert "weight codes equal" in shown
    assert "perplexity" in shown
    assert main(["evaluate", str(run), "--json"]) == 0
    trained = json.loads(capsys.readouterr().out)
    assert main(["evaluate", str(packed), "--data", str(small_data), "--sequence-length", "32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(trained["loss"], abs=1e-6)
    assert main(["evaluate", str(run)]) == 0
    assert "bits per byte" in capsys.readouterr().out
    assert main(["generate", str(packed), "--prompt", "In the", "--max-new-tokens", "5"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("In the")
    assert "tokens/s" in captured.err
    assert main(["report", str(run), "--out", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "report.html").exists()


def test_verify_fails_with_status_one_and_names_the_layer(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    packed = tmp_path / "packed"
    assert main(["pack", str(run), str(packed)]) == 0
    tensors = load_file(packed / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_packed"][0, 0] ^= 1
    save_file(tensors, packed / "model.safetensors")
    assert main(["verify", str(run), str(packed)]) == 1
    assert "model.layers.0.mlp.up_proj: 1 of 8192 weight codes differ" in capsys.readouterr().err


def test_train_takes_a_file_and_flags_win(small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f'data = "{small_data}"\npreset = "micro"\nsteps = 9\nrecipe = "quest-w4a4"\n')
    config = take_config_file(["--config", str(file), "--out", str(tmp_path / "out"), "--steps", "3"])
    assert (config.steps, config.recipe, config.preset) == (3, "quest-w4a4", "micro")
    with pytest.raises(SystemExit):
        take_config_file(["--config", str(file)])
    assert "--out" in capsys.readouterr().err
    file.write_text("stepz = 9\n")
    assert main(["train", "--config", str(file), "--out", "o"]) == 1
    assert "unknown field 'stepz'. Did you mean 'steps'?" in capsys.readouterr().err
    assert main(["train", "--config"]) == 1
    assert "--config needs a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "nowhere"], "nowhere is neither a run nor a packed model"),
        (["pack", "nowhere", "out"], "nowhere is not a run directory"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere is neither a run nor a packed model"),
        (["report", "nowhere"], "nowhere"),
        (["tokenize", "nowhere.txt", "--out", "out"], "nowhere.txt"),
        (["train", "--data", "nowhere", "--out", "out"], "nowhere"),
    ],
)
def test_a_wrong_path_is_named_without_a_traceback(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_full_precision_runs_evaluate_but_do_not_pack(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "fp"
    sizes = ["--steps", "2", "--batch-size", "2", "--sequence-length", "32", "--evaluate-windows", "2"]
    assert (
        main(["train", "--preset", "micro", "--recipe", "none", "--data", str(small_data), "--out", str(run), *sizes])
        == 0
    )
    assert main(["evaluate", str(run)]) == 0
    assert main(["pack", str(run), str(tmp_path / "packed")]) == 1
    assert "no quantized layer" in capsys.readouterr().err


def test_a_packed_model_needs_to_be_told_its_data(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pack", str(run), str(tmp_path / "packed")]) == 0
    assert main(["evaluate", str(tmp_path / "packed")]) == 1
    assert "give --data DIR" in capsys.readouterr().err


def test_info_says_which_path_each_kernel_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "integer_product" in shown
    assert "torch" in shown
    assert "packed layers" in shown
    assert native.reason() in shown


def test_the_installed_command_starts() -> None:
    out = subprocess.run([sys.executable, "-m", "bitbell", "--version"], capture_output=True, text=True, check=True)
    assert out.stdout.startswith("bitbell ")


def test_data_of_another_tokenizer_is_refused(
    run: Path, small_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "bpe"
    assert main(["tokenize", str(small_text), "--out", str(other), "--tokenizer", "bpe:260"]) == 0
    assert main(["evaluate", str(run), "--data", str(other)]) == 1
    assert "was made with another tokenizer" in capsys.readouterr().err


def test_inspect_overwrites_only_on_request(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    page.write_text("mine")
    assert main(["inspect", str(run), "--out", str(page)]) == 1
    assert f"{page} exists already" in capsys.readouterr().err
    assert page.read_text() == "mine"
    assert main(["inspect", str(run), "--out", str(page), "--overwrite"]) == 0
    assert "</html>" in page.read_text()


@pytest.mark.parametrize(("words", "unbuffered"), [(["info"], ""), (["info"], "1"), (["--help"], "1")])
def test_who_stops_reading_is_no_error(words: list[str], unbuffered: str) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    line = [sys.executable, "-m", "bitbell", *words]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()  # before the first word
    assert process.stderr.read() == ""
    assert process.wait() == 141


@pytest.mark.parametrize(
    ("package", "extra", "words"),
    [
        ("fastapi", "serve", ["serve", "RUN"]),
        ("lm_eval", "eval", ["evaluate", "RUN", "--tasks", "piqa"]),
        ("onnx", "onnx", ["export", "onnx", "RUN", "--out", "OUT"]),
        ("gguf", "gguf", ["export", "gguf", "RUN", "--out", "OUT"]),
        ("datasets", "data", ["tokenize", "hf:name", "--out", "OUT"]),
        ("sklearn.datasets", "vision", ["images", "digits", "--size", "8", "--out", "OUT"]),
        ("PIL", "vision", ["images", "PICTURES", "--size", "8", "--out", "OUT"]),
    ],
)
def test_a_missing_extra_is_named(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    extra: str,
    words: list[str],
) -> None:
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        (tmp_path / "pictures" / name / "1.png").write_bytes(b"x")
    places = {"RUN": str(run), "OUT": str(tmp_path / "out"), "PICTURES": str(tmp_path / "pictures")}
    monkeypatch.setitem(sys.modules, package, None)  # which Python takes for a package that is not there
    monkeypatch.delitem(sys.modules, "bitbell.serving.server", raising=False)  # imported with it before, maybe
    assert main([places.get(word, word) for word in words]) == 1
    assert f"pip install 'bitbell[{extra}]'" in capsys.readouterr().err
