"""Low-bit all-gather on 2 and 4 processes: what it computes is what whole layers compute, and it moves codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("gather_ranks.py")
BLOCK_WEIGHTS = 4 * 64 * 64 + 3 * 64 * 192  # of the small LLaMA
BLOCK_ROWS = 4 * 64 + 2 * 192 + 64


def run(ranks: int, folder: Path) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT)]
    processes = [
        subprocess.Popen([*command, str(rank), str(ranks), str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    try:
        errors = [process.communicate(timeout=900)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0] * ranks, "\n".join(error[-2000:] for error in errors)
    return json.loads((folder / f"found-{ranks}.json").read_text())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(4, tmp_path_factory.mktemp("four"))


@pytest.fixture(params=[2, 4])
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.getfixturevalue({2: "two", 4: "four"}[request.param])


def test_every_method_by_row_gives_the_whole_layers_output_and_gradients(found: dict[str, Any]) -> None:
    assert len(found["whole"]) >= 6
    for name, result in found["whole"].items():
        assert result["equal"], name
        assert result["error"] < 1e-6, (name, result["error"])  # scales are float32
        assert result["gathered"] >= 6, name


def test_training_is_that_of_plain_fsdp(found: dict[str, Any]) -> None:
    plain = found["fsdp"]
    for name in ("gather", *(["gather once"] if "gather once" in found else [])):
        ours = found[name]
        assert ours["losses"] == pytest.approx(plain["losses"], rel=1e-6)
        assert ours["norms"] == pytest.approx(plain["norms"], rel=1e-5)


def test_state_has_the_names_and_whole_shapes_of_the_model(found: dict[str, Any]) -> None:
    plain, ours = found["fsdp"]["state"], found["gather"]["state"]
    assert list(ours) == list(plain)
    for name, (shape, total) in plain.items():
        assert ours[name][0] == shape
        assert ours[name][1] == pytest.approx(total, abs=2e-3), name


def test_two_bit_weights_move_an_eighth_of_bfloat16(two: dict[str, Any]) -> None:
    codes, steps = BLOCK_WEIGHTS * 2 // 8 // 2, BLOCK_ROWS * 4 // 2  # a rank's half of both
    assert 8 * codes == BLOCK_WEIGHTS * 2 // 2
    assert two["codes moved"] == 3 * 2 * (codes + steps)  # blocks, micro-batches
    assert two["codes moved regathering"] == 2 * two["codes moved"]
    float32 = two["fsdp"]["moved"]["all_gather_single"] - two["gather once"]["moved"]["all_gather_single"]
    # FSDP gathers in the backward pass too; its scales of weights travelled with it.
    assert float32 + two["codes moved"] >= 2 * 3 * 2 * BLOCK_WEIGHTS * 4 // 2


def test_a_block_is_one_message(two: dict[str, Any]) -> None:
    assert two["messages"] == 3 * 2


def test_codes_travel_while_other_blocks_compute(two: dict[str, Any]) -> None:
    forward, backward = (two["order"][:6], two["order"][7:])
    assert forward == ["send 0", "send 1", "read 0", "send 2", "read 1", "read 2"]
    for block in (1, 2):
        assert backward.index(f"send {block - 1}") < backward.index(f"reduce {block}")
        # A reduced gradient is awaited only after the block before has gone backwards.
        last = max(i for i, word in enumerate(backward) if word == f"reduce {block - 1}")
        assert backward.index(f"await {block}") > last


def test_codes_of_older_weights_are_not_used(two: dict[str, Any]) -> None:
    assert two["left over"] == [True, True]


def test_regathering_keeps_no_codes(two: dict[str, Any]) -> None:
    assert two["kept"] == [6, 0]


def test_what_cannot_be_gathered_is_said(two: dict[str, Any]) -> None:
    said = two["refusals"]
    assert list(said["kept"]) == ["0"]
    assert "one scale or statistic" in said["kept"]["0"]
    assert "no layer's weight can be gathered" in said["nothing"]
    assert "calibrate" in said["uncalibrated"]


def test_checkpointing_compiling_and_gpt(two: dict[str, Any]) -> None:
    assert max(two["recomputed"]) < 1e-6
    assert two["compiled"]
    assert two["conv1d"]["equal"]
    assert two["conv1d"]["error"] < 1e-6
    assert two["conv1d"]["gathered"] == 2 * 2 * 4
