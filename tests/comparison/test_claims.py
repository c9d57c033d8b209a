"""Claims: one owner at a time, whoever dies, sleeps or races."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bitbell.comparison import claims
from bitbell.comparison.claims import STALE, Claim, highest, identity, is_free, take


def write_claim(path: Path, age: float = 0.0, **owner: object) -> None:
    """A claim of somebody else, last renewed `age` seconds ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "born": "1"} | owner))
    os.utime(path, (time.time() - age, time.time() - age))


def test_a_claim_is_exclusive_until_it_is_released(tmp_path: Path) -> None:
    first = take(tmp_path / "claims", "run")
    assert first is not None
    assert take(tmp_path / "claims", "run") is None
    other = take(tmp_path / "claims", "another")
    assert other is not None
    first.release()
    second = take(tmp_path / "claims", "run")
    assert second is not None
    assert second.path.name == "run.2"
    for claim in (second, other):
        claim.release()


def test_names_with_dots_do_not_mix(tmp_path: Path) -> None:
    write_claim(tmp_path / "bbq-lr0.1.7")
    assert highest(tmp_path, "bbq-lr0.1") == 7
    assert highest(tmp_path, "bbq-lr0") == 0


def test_a_claim_of_another_machine_is_stale_after_ten_minutes_without_renewal(tmp_path: Path) -> None:
    write_claim(tmp_path / "run.1", age=STALE - 60)
    assert take(tmp_path, "run") is None
    write_claim(tmp_path / "run.1", age=STALE + 60)
    with take(tmp_path, "run") as claim:  # type: ignore[union-attr]
        assert claim.path.name == "run.2"


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_torn_claim_is_judged_by_its_age(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.1"
    path.write_text(text)
    assert not is_free(path)
    os.utime(path, (0, 0))
    assert is_free(path)


def test_a_dead_process_of_this_host_frees_its_claim_at_once(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from bitbell.comparison.claims import take; import os\n"
    code += "take(Path(sys.argv[1]), 'run'); print('taken', flush=True); os.kill(os.getpid(), 9)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    deadline = time.monotonic() + 20
    while not is_free(tmp_path / "run.1") and time.monotonic() < deadline:  # a zombie is dead, too
        time.sleep(0.01)
    with take(tmp_path, "run") as claim:  # type: ignore[union-attr]
        assert claim.path.name == "run.2"
    process.stdout.close()
    process.wait()


def test_a_later_process_of_the_same_number_does_not_keep_a_claim_alive(tmp_path: Path) -> None:
    me = identity()
    write_claim(tmp_path / "run.1", **me)
    assert not is_free(tmp_path / "run.1")
    write_claim(tmp_path / "run.1", **me | {"born": "before"})
    assert is_free(tmp_path / "run.1")
    assert socket.gethostname() in me["host"]


def test_of_many_that_see_one_stale_claim_one_wins(tmp_path: Path) -> None:
    for number in range(30):
        name = f"run{number}"
        write_claim(tmp_path / f"{name}.1", age=STALE * 2)
        barrier, won = threading.Barrier(8), []

        def compete(name: str = name, barrier: threading.Barrier = barrier, won: list[Claim] = won) -> None:
            barrier.wait()
            if claim := take(tmp_path, name):
                won.append(claim)

        threads = [threading.Thread(target=compete) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [claim.path.name for claim in won] == [f"{name}.2"]
        won[0].release()


def test_a_judgement_from_before_cannot_take_what_has_changed_hands_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_claim(tmp_path / "run.1", age=STALE * 2)
    owner = take(tmp_path, "run")
    assert owner is not None
    with monkeypatch.context() as patch:
        patch.setattr(claims, "highest", lambda folder, name: 1)  # what the slow process saw before run.2
        assert take(tmp_path, "run") is None
        owner.release()
        assert take(tmp_path, "run") is None
    with take(tmp_path, "run") as claim:  # type: ignore[union-attr]
        assert claim.path.name == "run.3"


def test_an_owner_that_slept_too_long_finds_out(tmp_path: Path) -> None:
    with take(tmp_path, "run") as claim:  # type: ignore[union-attr]
        claim.check()
        assert not claim.is_lost
        write_claim(tmp_path / "run.2")
        claim.check()
        assert claim.is_lost


def test_a_claim_is_renewed_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "RENEW", 0.01)
    with take(tmp_path, "run") as claim:  # type: ignore[union-attr]
        os.utime(claim.path, (0, 0))
        deadline = time.monotonic() + 10
        while claim.path.stat().st_mtime < 1e9 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not is_free(claim.path)
        assert claim.path.stat().st_mtime > 1e9
