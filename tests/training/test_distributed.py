"""Training on 2 and 4 processes: the numbers of one process, one outcome on all, and checkpoints for any number."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitbell.data import prepare_images
from bitbell.kernels import native
from bitbell.training import TrainConfig, load_run, train
from bitbell.training.checkpoint import CheckpointError, list_checkpoints
from bitbell.training.distributed import join
from bitbell.training.journal import read_metrics

SCRIPT = Path(__file__).with_name("distributed_ranks.py")
HAS_DIGITS = find_spec("sklearn") is not None
ALL_WAYS = [("ddp", 1), ("ddp", 2), ("fsdp", 1), ("fsdp", 2)]
# Number of processes -> recipe -> how, and with how many micro-batches a step.
WORK = {
    2: {
        "bbq-w2a2": ALL_WAYS,
        "none": ALL_WAYS,
        "bbq-tensor-w2a2": [("ddp", 1)],
        "quest-w2a2": [("ddp", 2), ("fsdp", 1)],
        "lsq-w2a2": [("ddp", 1), ("fsdp", 2)],
    },
    4: {"bbq-w2a2": [("ddp", 2), ("fsdp", 1)]},
}
QUANTIZERS = 2 * 4  # of activations: two blocks, whose q/k/v and gate/up share one


@dataclass
class Family:
    """Runs of the same few steps on 1, 2 and 4 processes, made in an order in which each may continue the others'."""

    folder: Path
    data: str
    found: dict[int, list[dict[str, Any]]]

    def config(self, out: str, **fields: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "data": self.data,
            "out": str(self.folder / out),
            "preset": "micro",
            "steps": 4,
            "batch_size": 8,
            "sequence_length": 32,
            "evaluate_windows": 6,
            "final_windows": 13,
            "log_every": 1,
            "entropy_every": 4,
            "evaluate_every": 3,
            "checkpoint_every": 2,
            "tensorboard": False,
            "precision": "float32",
        }
        return TrainConfig(**values | fields)

    def train_together(self, size: int, jobs: list[dict[str, Any]]) -> None:
        """Train on `size` processes; a job is a run's name, fields of its configuration, and what to do to it."""
        for job in jobs:
            job["config"] = self.config(job.get("out", job["name"]), **job["config"]).to_dict()
        (self.folder / f"jobs-{size}.json").write_text(json.dumps(jobs))
        command = [sys.executable, str(SCRIPT)]
        processes = [
            subprocess.Popen([*command, str(rank), str(size), str(self.folder)], stderr=subprocess.PIPE, text=True)
            for rank in range(size)
        ]
        try:
            errors = [process.communicate(timeout=900)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [p.returncode for p in processes] == [0] * size, "\n".join(error[-3000:] for error in errors)
        files = [self.folder / f"found-{size}-{rank}.json" for rank in range(size)]
        self.found[size] = [json.loads(file.read_text()) for file in files]

    def losses(self, out: str) -> list[float]:
        return [e["loss"] for e in read_metrics(self.folder / out / "metrics.jsonl") if e["event"] == "train"]

    def summary(self, out: str) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.folder / out / "summary.json").read_text())
        return summary


def alone(family: Family, out: str, **fields: Any) -> None:
    with native.using(native.REFERENCE):
        train(family.config(out, **fields))


def spoil(family: Family, out: str) -> None:
    path = list_checkpoints(family.folder / out)[-1].path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][-1, -1] = float("nan")
    save_file(tensors, path)


@pytest.fixture(scope="module")
def family(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    from distributed_ranks import MICRO

    from bitbell.models.presets import PRESETS

    family = Family(tmp_path_factory.mktemp("family"), str(small_data), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "micro", MICRO)
        for recipe in WORK[2]:
            for accumulation in (1, 2):
                alone(family, f"{recipe}-1-{accumulation}", recipe=recipe, accumulation=accumulation)
        alone(family, "fogzo-1", fogzo=True, fogzo_start=0.0)
        if HAS_DIGITS:
            prepare_images("digits", family.folder / "digits", size=8)
            alone(family, "images-1", **images(family))
        for out in ("from-1", "from-1-to-4", "spoilt-ddp", "spoilt-fsdp", "torn journal"):
            alone(family, out, stop_after=2)
        spoil(family, "spoilt-ddp")
        spoil(family, "spoilt-fsdp")
        (family.folder / "torn journal" / "metrics.jsonl").write_text("no JSON\n{}\n")
        family.train_together(2, [*same_work(2), *of_two(), *of_images(family)])
        family.train_together(4, [*same_work(4), *of_four()])
        alone(family, "2-4-1")
        alone(family, "low bits")
    return family


def same_work(size: int) -> list[dict[str, Any]]:
    return [
        {
            "name": f"{recipe}-{way}-{size}-{accumulation}",
            "config": {"recipe": recipe, "distributed": way, "accumulation": accumulation},
        }
        for recipe, ways in WORK[size].items()
        for way, accumulation in ways
    ]


LONG = {"distributed": "fsdp", "steps": 24, "checkpoint_every": 3, "entropy_every": 50, "evaluate_every": 50}


def of_two() -> list[dict[str, Any]]:
    fsdp = {"distributed": "fsdp"}
    return [
        {"name": "own statistics", "config": {"sync_statistics": False}},
        {"name": "fogzo-2", "config": {"fogzo": True, "fogzo_start": 0.0}},
        {"name": "from-1", "config": fsdp},
        {"name": "2-4-1", "config": fsdp | {"stop_after": 2}},
        {"name": "odd", "config": {"batch_size": 9}},
        {"name": "spoilt-ddp", "config": {}},
        {"name": "spoilt-fsdp", "config": fsdp},
        {"name": "asked to stop", "config": {"steps": 50}, "stop_at": 1},
        {"name": "head", "config": fsdp | {"rules": {"lm_head": "bbq-w4a4", "*": "bbq-w2a2"}, "steps": 2}},
        {"name": "gpt", "config": fsdp | {"preset": "micro-gpt", "steps": 1}},
        {"name": "low bits", "config": fsdp | {"low_bit_gather": True, "stop_after": 2}},
        {"name": "low bits gpt", "config": fsdp | {"low_bit_gather": True, "preset": "micro-gpt", "steps": 1}},
        {"name": "left alone", "config": LONG},
        {"name": "torn journal", "config": {}},
        {"name": "two disks", "config": fsdp | {"steps": 2}, "own_disk": True},
        {"name": "every", "config": fsdp | {"accumulation": 2, "reduce_every": True}},
    ]


def images(family: Family) -> dict[str, Any]:
    fields = {"preset": "vit-micro", "recipe": "bbq-vision-w2a2", "steps": 2, "batch_size": 16}
    fields["augment"] = "flip+trivialaugment+mixup+cutmix" if find_spec("kornia") else "flip"
    return fields | {"data": str(family.folder / "digits"), "evaluate_windows": 33, "final_windows": 33}


def of_images(family: Family) -> list[dict[str, Any]]:
    ways = ("ddp", "fsdp") if HAS_DIGITS else ()
    return [{"name": f"images-{way}", "config": images(family) | {"distributed": way}} for way in ways]


def of_four() -> list[dict[str, Any]]:
    return [
        {"name": "2-4-1", "config": {"distributed": "fsdp", "stop_after": 3}},
        {"name": "from-1-to-4", "config": {"distributed": "ddp"}},
        {"name": "low bits", "config": {"distributed": "fsdp", "low_bit_gather": True, "stop_after": 3}},
    ]


@pytest.mark.parametrize("size", [2, 4])
def test_quantizers_of_shares_work_as_one_of_the_whole_batch(family: Family, size: int) -> None:
    for found in family.found[size]:
        assert len(found["quantizers"]) == 13
        assert max(found["quantizers"].values()) < 1e-4, found["quantizers"]


@pytest.mark.parametrize("size", [2, 4])
def test_batch_norms_are_averaged(family: Family, size: int) -> None:
    found = [found["norms"] for found in family.found[size]]
    for own, averaged in ((0, 2), (1, 3)):
        mean = sum(norms[own] for norms in found) / size
        assert len({norms[own] for norms in found}) == size
        assert [norms[averaged] for norms in found] == pytest.approx([mean] * size, rel=1e-6)


@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_take_the_steps_of_one(family: Family, size: int) -> None:
    for job in same_work(size):
        name, recipe = job["name"], job["config"]["recipe"]
        assert [found[name].get("status") for found in family.found[size]] == ["finished"] * size, family.found[size][0]
        ours, theirs = family.losses(name), family.losses(f"{recipe}-1-{job['config']['accumulation']}")
        assert len(ours) == 4
        # An input within rounding of a threshold may get the neighbouring code; full precision has no thresholds.
        # A statistic of its own share changes the first loss by 5e-4 already ("own statistics").
        assert ours[0] == pytest.approx(theirs[0], abs=1e-5 if recipe == "none" else 1e-4), name
        assert ours == pytest.approx(theirs, abs=1e-5 if recipe == "none" else 5e-3), name


@pytest.mark.parametrize("size", [2, 4])
def test_the_summary_says_what_that_of_one_process_says(family: Family, size: int) -> None:
    for job in same_work(size):
        ours = family.summary(job["name"])
        theirs = family.summary(f"{job['config']['recipe']}-1-{job['config']['accumulation']}")
        assert ours.keys() == theirs.keys()
        for key in ("parameters", "packed_bytes", "tokens_seen", "weight_bits"):
            assert ours[key] == theirs[key]
        for key in ("loss", "weight_entropy", "activation_entropy"):
            assert ours[key] == (theirs[key] and pytest.approx(theirs[key], abs=5e-3))


def test_statistics_and_scales_are_equal_on_all_processes(family: Family) -> None:
    for size, ranks in family.found.items():
        names = [job["name"] for job in same_work(size)] + ["own statistics"] * (size == 2)
        assert {found[name]["apart"] for found in ranks for name in names} == {0.0}


def test_under_fsdp_a_process_holds_its_rows_only(family: Family) -> None:
    held = [found["none-fsdp-2-1"]["largest part"] for found in family.found[2]]
    assert max(held) < 0.51  # 257 tokens are no multiple of 2
    assert family.found[2][0]["none-ddp-2-1"]["largest part"] == 1.0


def messages(family: Family, name: str, kind: str) -> int:
    found: int = family.found[2][0][name]["messages"].get(kind, 0)
    return found


def test_accumulation_sends_gradients_once_a_step(family: Family) -> None:
    for accumulation in (1, 2):
        # One bucket of gradients (fsdp: two blocks and the rest), and one word about losses and stopping.
        assert messages(family, f"none-ddp-2-{accumulation}", "c10d::allreduce_") == 2
        assert messages(family, f"none-fsdp-2-{accumulation}", "c10d::_reduce_scatter_base_") == 3
        assert messages(family, f"none-fsdp-2-{accumulation}", "c10d::allreduce_") == 2  # losses; the gradient's norm
    assert messages(family, "every", "c10d::_reduce_scatter_base_") == 2 * 3


def test_a_running_statistic_costs_two_short_messages_a_quantizer(family: Family) -> None:
    for way in ("ddp", "fsdp"):
        for accumulation in (1, 2):
            sent = messages(family, f"bbq-w2a2-{way}-2-{accumulation}", "_c10d_functional::all_reduce")
            assert sent == 2 * QUANTIZERS * accumulation
    for recipe in ("lsq-w2a2", "none"):  # a statistic a token, a learned step: nothing to agree on
        assert messages(family, f"{recipe}-ddp-2-1", "_c10d_functional::all_reduce") == 0
    assert messages(family, "own statistics", "_c10d_functional::all_reduce") == 1


def test_own_statistics_learn_too(family: Family) -> None:
    ours, theirs = family.losses("own statistics"), family.losses("bbq-w2a2-1-1")
    assert ours == pytest.approx(theirs, abs=0.05)
    assert abs(ours[0] - theirs[0]) > 2e-4


def test_gradients_reduced_every_micro_batch_are_the_same(family: Family) -> None:
    assert family.losses("every") == pytest.approx(family.losses("bbq-w2a2-fsdp-2-2"), abs=1e-5)


def test_fogzo_probes_the_loss_of_the_whole_batch(family: Family) -> None:
    events = [read_metrics(family.folder / out / "metrics.jsonl") for out in ("fogzo-1", "fogzo-2")]
    ours, theirs = ([e["fogzo_agreement"] for e in found if e["event"] == "train"] for found in events)
    assert ours[0] == pytest.approx(theirs[0], abs=0.1)  # slopes across thresholds, which a code more or less changes
    assert family.losses("fogzo-2") == pytest.approx(family.losses("fogzo-1"), abs=5e-3)


def test_a_run_continues_on_another_number_of_processes(family: Family) -> None:
    whole = family.losses("bbq-w2a2-1-1")
    for out in ("2-4-1", "low bits", "from-1", "from-1-to-4"):
        assert family.losses(out) == pytest.approx(whole, abs=3e-3), out
        assert family.summary(out)["loss"] == pytest.approx(family.summary("bbq-w2a2-1-1")["loss"], abs=3e-3)


def test_a_sharded_checkpoint_is_a_model_and_holds_no_pickle(family: Family, micro_preset: None) -> None:
    path = list_checkpoints(family.folder / "bbq-w2a2-fsdp-4-1")[-1].path
    files = sorted(file.name for file in path.iterdir())
    assert len(files) == 5
    assert all(name.endswith((".safetensors", ".json")) for name in files)
    model, _, step = load_run(family.folder / "bbq-w2a2-fsdp-4-1")
    assert step == 4
    theirs = load_run(family.folder / "bbq-w2a2-1-1")[0].state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor.float(), theirs[name].float(), atol=2e-2), name
    (path / files[0]).rename(path / "elsewhere")
    assert list_checkpoints(family.folder / "bbq-w2a2-fsdp-4-1")[-1].step == 2


def test_missing_rows_are_not_read_as_whatever_is_in_memory(family: Family, micro_preset: None) -> None:
    run = family.folder / "bbq-w2a2-fsdp-2-1"
    path = list_checkpoints(run)[-1].path
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"shards": state["shards"][1:]}))
    with pytest.raises(CheckpointError, match=r"only \d+ of the \d+ elements of .* are there"):
        load_run(run)


def test_nan_stops_all_processes_at_one_step_and_place(family: Family) -> None:
    for name in ("spoilt-ddp", "spoilt-fsdp"):
        said = {found[name]["error"] for found in family.found[2]}
        assert len(said) == 1
        where = "first in the parameter model.layers.1.mlp.down_proj.weight"
        assert f"TrainingDiverged: the loss is nan at step 3, {where}; the last good" in said.pop()
        assert read_metrics(family.folder / name / "metrics.jsonl")[-1]["event"] == "diverged"


def test_a_disk_that_is_not_shared_fails_the_checkpoint(family: Family) -> None:
    for found in family.found[2]:
        assert "was not written whole: is " in found["two disks"]["error"]
        assert "on a disk that all processes share?" in found["two disks"]["error"]
    assert list_checkpoints(family.folder / "two disks") == []


def test_a_journal_that_one_process_cannot_read_stops_all(family: Family) -> None:
    assert "ValueError" in family.found[2][0]["torn journal"]["error"]
    assert "RankFailed: the first of 2 processes stopped: ValueError" in family.found[2][1]["torn journal"]["error"]


def test_runs_leave_no_process_groups_behind(family: Family) -> None:
    assert {found["groups"] for ranks in family.found.values() for found in ranks} == {1}


def test_a_gpu_of_ones_own_needs_a_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="LOCAL_RANK"), join("cuda"):
        pass


def test_a_wish_of_one_process_stops_all(family: Family) -> None:
    for found in family.found[2]:
        assert (found["asked to stop"]["status"], found["asked to stop"]["step"]) == ("stopped", 2)


def test_a_batch_that_cannot_be_shared_is_refused(family: Family) -> None:
    for found in family.found[2]:
        assert "a multiple of their number, 2; got batch_size=9" in found["odd"]["error"]
    assert not (family.folder / "odd").exists()


def test_a_quantized_head_and_gpt_train_in_parts(family: Family) -> None:
    for name in ("head", "gpt", "low bits gpt"):
        assert {found[name].get("status") for found in family.found[2]} == {"finished"}, family.found[2][0][name]


@pytest.mark.skipif(not HAS_DIGITS, reason="the digits are in scikit-learn")
def test_image_runs_say_what_one_process_says(family: Family) -> None:
    whole = family.summary("images-1")
    for name in ("images-ddp", "images-fsdp"):
        assert family.losses(name) == pytest.approx(family.losses("images-1"), abs=5e-3), name
        ours = family.summary(name)
        assert ours["images_seen"] == whole["images_seen"] == 2 * 16
        assert ours["loss"] == pytest.approx(whole["loss"], abs=0.05)
        assert ours["activation_entropy"] == pytest.approx(whole["activation_entropy"], abs=5e-4)


def test_fogzo_does_not_work_on_parts(family: Family) -> None:
    with pytest.raises(ValueError, match=r"distributed must be ddp with fogzo, .*got distributed='fsdp'"):
        family.config("x", fogzo=True, distributed="fsdp")


COMMAND = """
import sys
import torch
from bitbell.kernels import native
torch.set_num_threads(1)
native.set_level(native.REFERENCE)
from bitbell.models.presets import PRESETS, Preset
PRESETS["micro"] = Preset(2, 64, 2, 128, 4e-3, 1e4, 300)
from bitbell.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def torchrun(config: TrainConfig, script: Path) -> subprocess.Popen[str]:
    script.write_text(COMMAND)
    flags = ["--config", str(script.with_suffix(".json"))]
    script.with_suffix(".json").write_text(json.dumps(config.to_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, "train", *flags], **pipes)  # type: ignore[call-overload]


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and any(e["step"] >= step for e in read_metrics(run / "metrics.jsonl")):
            return
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"the run did not reach step {step}: {process.communicate()[1][-3000:]}")


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are found in /proc")
def test_torchrun_with_a_killed_process_and_a_stop(family: Family, tmp_path: Path) -> None:
    """Killed without warning, then asked to stop, then left alone: the numbers of a run that was left alone."""
    config = family.config("killed", **LONG)
    process = torchrun(config, tmp_path / "main.py")
    wait_for_step(process, Path(config.out), 5)
    os.kill(children_of(process.pid)[-1], signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode != 0
    first = list_checkpoints(Path(config.out))[-1].step
    assert first >= 3

    process = torchrun(config, tmp_path / "main.py")
    wait_for_step(process, Path(config.out), first + 5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert "the same command continues it" in err
    assert not (Path(config.out) / "summary.json").exists()

    process = torchrun(config, tmp_path / "main.py")
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out.split()) == (0, [config.out]), err
    assert family.losses("killed") == family.losses("left alone")
    assert family.summary("killed")["loss"] == family.summary("left alone")["loss"]
