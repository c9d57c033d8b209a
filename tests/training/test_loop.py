"""Training runs: they learn, they record, they stop and continue to the same numbers, they fail with words."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitbell.layers import quantized_layers
from bitbell.training import CheckpointError, TrainConfig, TrainingDiverged, load_run, train
from bitbell.training.checkpoint import list_checkpoints
from bitbell.training.journal import Progress, read_metrics

Make = Callable[..., TrainConfig]


def weights_of(run: str | Path) -> dict[str, torch.Tensor]:
    return load_run(run)[0].state_dict()


def assert_same_weights(a: str | Path, b: str | Path) -> None:
    ours, theirs = weights_of(a), weights_of(b)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("recipe", ["none", "bbq-w2a2", "quest-w2a2", "lsq-w1a1", "bbq-tensor-w4a4", "bbq-w2a16"])
def test_a_short_run_learns_and_records_itself(make_config: Make, recipe: str) -> None:
    result = train(make_config(recipe=recipe, steps=30))
    assert result.status == "finished"
    events = read_metrics(result.run / "metrics.jsonl")
    losses = [e["loss"] for e in events if e["event"] == "train"]
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 0.5
    assert result.summary["loss"] < losses[0] - 0.5
    assert json.loads((result.run / "summary.json").read_text()) == json.loads(json.dumps(result.summary))
    measured = [e for e in events if e["event"] == "quantizers"]
    assert [e["step"] for e in measured] == ([] if recipe == "none" else [1, 10, 20, 30])
    if recipe == "bbq-w2a2":
        first = measured[0]["layers"]["model.layers.0.self_attn.q_proj"]
        assert first["weight_entropy"] > 1.99  # Gaussian rows at the start
        assert 1.9 < result.summary["weight_entropy"] <= 2.0
    assert {"train", "valid", "end"} <= {e["event"] for e in events}
    assert (result.run / "tokenizer.json").exists()


def test_rules_in_the_configuration_mix_recipes(make_config: Make) -> None:
    result = train(make_config(steps=2, rules={"*.mlp.*": "quest-w4a4", "*.o_proj": "none", "*": "bbq-w2a2"}))
    found = {name: layer.recipe.name for name, layer in quantized_layers(load_run(result.run)[0])}
    assert found["model.layers.1.mlp.up_proj"] == "quest-w4a4"
    assert found["model.layers.0.self_attn.q_proj"] == "bbq-w2a2"
    assert "model.layers.0.self_attn.o_proj" not in found
    assert result.summary["recipe"] == "mixed"


def test_twenty_steps_equal_ten_a_stop_and_ten_more(make_config: Make, tmp_path: Path) -> None:
    whole = train(make_config(out=str(tmp_path / "whole")))
    half = train(make_config(out=str(tmp_path / "halves"), stop_after=10))
    assert (half.status, half.step) == ("stopped", 10)
    assert not (half.run / "summary.json").exists()
    rest = train(make_config(out=str(tmp_path / "halves")))
    assert rest.status == "finished"
    assert rest.summary["loss"] == whole.summary["loss"]
    assert_same_weights(whole.run, rest.run)
    ours, theirs = (
        [e["loss"] for e in read_metrics(r.run / "metrics.jsonl") if e["event"] == "train"] for r in (whole, rest)
    )
    assert ours == theirs


def test_a_gpt_stops_continues_and_learns(make_config: Make, tmp_path: Path) -> None:
    whole, halves = (make_config(preset="micro-gpt", out=str(tmp_path / out)) for out in ("whole", "halves"))
    assert train(replace(halves, stop_after=3)).status == "stopped"
    first, rest = train(whole), train(halves)
    assert rest.summary["loss"] == first.summary["loss"]
    assert_same_weights(first.run, rest.run)
    losses = [e["loss"] for e in read_metrics(rest.run / "metrics.jsonl") if e["event"] == "train"]
    assert losses[-1] < losses[0] - 0.5
    assert [name for name, _ in quantized_layers(load_run(rest.run)[0])][1] == "transformer.h.0.attn.c_proj"


def test_a_finished_run_is_not_done_again(make_config: Make, capsys: pytest.CaptureFixture[str]) -> None:
    first = train(make_config(steps=3))
    before = (first.run / "metrics.jsonl").read_text()
    assert train(make_config(steps=3)).summary == json.loads(json.dumps(first.summary))
    assert (first.run / "metrics.jsonl").read_text() == before
    assert "is finished already" in capsys.readouterr().err


def test_accumulating_two_halves_of_a_batch_is_the_whole_batch(make_config: Make, tmp_path: Path) -> None:
    # In full precision, since BBQ's running statistics see micro-batches; in float32, since bfloat16 rounds sums.
    same = {"recipe": "none", "precision": "float32", "steps": 3}
    whole = train(make_config(out=str(tmp_path / "whole"), batch_size=8, **same))
    parts = train(make_config(out=str(tmp_path / "parts"), batch_size=4, accumulation=2, **same))
    assert parts.summary["loss"] == pytest.approx(whole.summary["loss"], abs=1e-5)


SCRIPT = """
import json, sys
from bitbell.models.presets import PRESETS, Preset
PRESETS["micro"] = Preset(2, 64, 2, 128, 4e-3, 1e4, 300)
from bitbell.training import TrainConfig, train
result = train(TrainConfig(**json.loads(sys.argv[1])))
print(result.status, result.step)
"""


def start(config: TrainConfig, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, json.dumps(config.to_dict())]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and any(e["step"] >= step for e in read_metrics(run / "metrics.jsonl")):
            return
        time.sleep(0.01)
    raise AssertionError(f"the run did not reach step {step}")


def test_a_run_killed_at_any_moment_continues_to_the_same_numbers(make_config: Make, tmp_path: Path) -> None:
    whole = train(make_config(out=str(tmp_path / "whole"), steps=60))
    killed = make_config(out=str(tmp_path / "killed"), steps=60, checkpoint_every=3)
    for after in (7, 23):
        process = start(killed)
        wait_for_step(Path(killed.out), after)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (Path(killed.out) / "summary.json").exists()
    rest = train(killed)
    assert rest.summary["loss"] == whole.summary["loss"]
    assert_same_weights(whole.run, rest.run)
    steps = [e["step"] for e in read_metrics(rest.run / "metrics.jsonl") if e["event"] == "train"]
    assert steps == list(range(1, 61))


def test_ctrl_c_stops_with_a_checkpoint_and_says_how_to_go_on(make_config: Make) -> None:
    config = make_config(steps=5000, checkpoint_every=5000)
    process = start(config)
    wait_for_step(Path(config.out), 3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    status, step = out.split()
    assert (process.returncode, status) == (0, "stopped")
    assert f"stopped after step {step} of 5000; the same command continues it" in err
    assert list_checkpoints(Path(config.out))[-1].step == int(step)


def test_nan_in_a_weight_stops_training_with_step_and_layer(make_config: Make) -> None:
    config = make_config(steps=20, stop_after=10)
    train(config)
    spoil(Path(config.out), "model.layers.1.mlp.down_proj.weight")
    message = r"the loss is nan at step 11, first in the parameter model\.layers\.1\.mlp\.down_proj\.weight; "
    with pytest.raises(TrainingDiverged, match=message + r"the last good checkpoint is .*step-00000010"):
        train(make_config(steps=20))
    assert list_checkpoints(Path(config.out))[-1].step == 10
    assert read_metrics(Path(config.out) / "metrics.jsonl")[-1]["event"] == "diverged"


def spoil(run: Path, name: str) -> None:
    """Put a NaN into a tensor of the newest checkpoint."""
    from safetensors.torch import load_file, save_file

    path = list_checkpoints(run)[-1].path / "model.safetensors"
    tensors = load_file(path)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path)


def test_a_diverging_layer_is_named_when_all_weights_are_finite(make_config: Make) -> None:
    train(make_config(steps=20, stop_after=2, recipe="none"))
    run = Path(make_config().out)
    from safetensors.torch import load_file, save_file

    path = list_checkpoints(run)[-1].path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"].fill_(3e38)
    save_file(tensors, path)
    with pytest.raises(TrainingDiverged, match=r"at step 3, first in the output of model\.layers\.1\.mlp\.up_proj"):
        train(make_config(steps=20, recipe="none"))


def test_a_full_disk_leaves_the_last_checkpoint_intact(make_config: Make) -> None:
    config = make_config(steps=20, stop_after=10)
    train(config)
    before = weights_of(config.out)
    limit = 200_000  # bytes a file; a checkpoint of this model has more

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start(make_config(steps=20), preexec_fn=small_files)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "could not write the checkpoint of step 15" in err
    assert "the last good checkpoint is" in err
    assert [c.step for c in list_checkpoints(Path(config.out))][-1] == 10
    assert not list((Path(config.out) / "checkpoints").glob("partial-*"))
    after = weights_of(config.out)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert train(make_config(steps=20)).status == "finished"


def test_a_run_of_another_configuration_is_refused_field_by_field(make_config: Make) -> None:
    train(make_config(steps=20, stop_after=1))
    with pytest.raises(ValueError, match=r"another configuration \(.*seed was 0, is 1.*\)\. Drop what changed"):
        train(make_config(steps=20, seed=1))
    with pytest.raises(ValueError, match=r"recipe was 'bbq-w2a2', is 'quest-w2a2'"):
        train(make_config(steps=20, recipe="quest-w2a2"))


def test_a_directory_where_nothing_was_trained_takes_another_configuration(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("bitbell.training.loop.make_optimizer", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(make_config(steps=20, recipe="quest-w2a2"))
    config = make_config(steps=20, stop_after=1)
    assert (Path(config.out) / "config.json").exists()
    assert train(config).step == 1
    assert json.loads((Path(config.out) / "config.json").read_text())["recipe"] == "bbq-w2a2"


def test_the_order_of_rules_counts(make_config: Make) -> None:
    rules = {"*.0.*": "bbq-w2a2", "*.mlp.*": "bbq-w4a4"}
    train(make_config(steps=20, stop_after=1, rules=rules))
    with pytest.raises(ValueError, match="rules was"):
        train(make_config(steps=20, rules=dict(reversed(rules.items()))))


def test_another_precision_is_refused(make_config: Make) -> None:
    train(make_config(steps=20, stop_after=1, precision="float32"))
    with pytest.raises(ValueError, match="precision was 'float32', is 'bfloat16'"):
        train(make_config(steps=20, precision="bfloat16"))


def test_two_processes_do_not_train_one_run(make_config: Make) -> None:
    config = make_config(steps=5000)
    process = start(config)
    wait_for_step(Path(config.out), 1)
    with pytest.raises(ValueError, match="another process is training"):
        train(config)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 0


def test_stopping_twice_at_one_step_keeps_that_checkpoint(make_config: Make) -> None:
    config = make_config(steps=20, stop_after=5, keep_checkpoints=1)
    train(config)
    before = list_checkpoints(Path(config.out))[-1].path.stat().st_mtime_ns
    assert train(config).step == 5
    assert list_checkpoints(Path(config.out))[-1].path.stat().st_mtime_ns == before


def test_other_data_of_the_same_name_is_refused(make_config: Make, small_text: Path, tmp_path: Path) -> None:
    from bitbell.data import tokenize

    train(make_config(steps=20, stop_after=1))
    other = tmp_path / "other"
    tokenize([str(small_text)], other, tokenizer="bytes", valid_fraction=0.3)
    with pytest.raises(ValueError, match="data was"):
        train(make_config(steps=20, data=str(other)))


def test_a_folder_that_is_no_run_is_refused(make_config: Make, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="exists and is not a run of bitbell"):
        train(make_config())
    assert (tmp_path / "run" / "letter.txt").read_text() == "dear"


def test_an_unwritable_output_folder_is_named(make_config: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write to the run directory .*file/run: (Not a directory|File exists)"):
        train(make_config(out=str(tmp_path / "file" / "run")))


def test_a_corpus_shorter_than_a_sequence_is_refused_before_a_run_is_made(make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1000000"):
        train(make_config(sequence_length=1_000_000))
    assert not (tmp_path / "run").exists()


def test_unknown_names_are_refused_before_a_run_is_made(make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown preset 'mikro'.*Did you mean 'micro'"):
        train(make_config(preset="mikro"))
    with pytest.raises(ValueError, match=r"unknown method 'bbk'.*Did you mean 'bbq'"):
        train(make_config(recipe="bbk-w2a2"))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_asking_for_a_gpu_that_is_not_there_is_refused(make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device=cuda but PyTorch sees no GPU here; use --device cpu"):
        train(make_config(device="cuda"))
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_named(make_config: Make) -> None:
    config = make_config(steps=20, stop_after=5)
    train(config)
    path = list_checkpoints(Path(config.out))[-1].path
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        train(make_config(steps=20))
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="format version 99; this bitbell reads 1"):
        train(make_config(steps=20))


def test_old_checkpoints_are_deleted_and_nothing_is_pickled(make_config: Make) -> None:
    result = train(make_config(steps=20, keep_checkpoints=2))
    assert [c.step for c in list_checkpoints(result.run)] == [15, 20]
    assert {p.suffix for p in (result.run / "checkpoints").rglob("*") if p.is_file()} == {".safetensors", ".json"}


def test_a_checkpoint_directory_without_its_state_does_not_count(make_config: Make) -> None:
    config = make_config(steps=20, stop_after=10)
    train(config)
    (Path(config.out) / "checkpoints" / "step-00000099").mkdir()
    assert list_checkpoints(Path(config.out))[-1].step == 10


def test_two_runs_of_one_seed_agree_and_of_two_seeds_do_not(make_config: Make, tmp_path: Path) -> None:
    a, b, c = (train(make_config(out=str(tmp_path / n), steps=5, seed=s)) for n, s in (("a", 3), ("b", 3), ("c", 4)))
    assert a.summary["loss"] == b.summary["loss"] != c.summary["loss"]


def test_tensorboard_gets_the_same_numbers(make_config: Make) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(make_config(steps=4, tensorboard=True))
    events = EventAccumulator(str(result.run / "tensorboard"))
    events.Reload()
    written = [s.value for s in events.Scalars("train/loss")]
    assert written == pytest.approx(
        [e["loss"] for e in read_metrics(result.run / "metrics.jsonl") if e["event"] == "train"]
    )
    assert any(tag.startswith("weight_entropy/") for tag in events.Tags()["scalars"])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_live_line_on_a_terminal_and_plain_lines_elsewhere() -> None:
    live, plain = Terminal(), io.StringIO()
    for out in (live, plain):
        progress = Progress(3, out, every=1000.0)
        for step in (1, 2, 3):
            progress.show(step, 4.2, 1e-3, 1234.0, 3725.0)
    assert live.getvalue().count("\r") == 3
    assert "\n" not in live.getvalue()
    assert "\r" not in plain.getvalue()
    lines = plain.getvalue().splitlines()
    assert lines[0] == "step 1/3  loss 4.2000  lr 1.00e-03  1,234 tokens/s  1:02:05 left"
    assert [line.split()[1] for line in lines] == ["1/3", "3/3"]


def test_a_torn_last_line_of_metrics_is_dropped_and_a_broken_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "train", "step": 1}\n{"event": "tra')
    assert read_metrics(path) == [{"event": "train", "step": 1}]
    path.write_text('{"event": "tra\n{"event": "train", "step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1 is no JSON"):
        read_metrics(path)


def test_bfloat16_and_compiled_configurations_are_accepted(make_config: Make) -> None:
    result = train(make_config(steps=4, precision="bfloat16"))
    assert result.summary["precision"] == "bfloat16"
    assert result.summary["loss"] < 7


@pytest.mark.slow
def test_a_compiled_run_ends_where_the_eager_one_does(make_config: Make, tmp_path: Path) -> None:
    eager = train(make_config(out=str(tmp_path / "eager"), steps=30))
    compiled = train(make_config(out=str(tmp_path / "compiled"), steps=30, compile=True))
    assert compiled.summary["loss"] == pytest.approx(eager.summary["loss"], abs=0.15)


def test_loading_something_that_is_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run directory"):
        load_run(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="is not a training configuration"):
        load_run(tmp_path)


def test_the_environment_is_not_changed_by_training(make_config: Make) -> None:
    before = (torch.random.initial_seed(), signal.getsignal(signal.SIGINT), os.getcwd())
    train(make_config(steps=2))
    assert (torch.random.initial_seed(), signal.getsignal(signal.SIGINT), os.getcwd()) == before
