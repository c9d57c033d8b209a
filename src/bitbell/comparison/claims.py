"""Who does which run: exclusive claims in a folder that processes and machines share.

    claims/RUN.1, claims/RUN.2, ...    {"host", "pid", "born", "started"}; the highest number is the owner

A claim is taken by creating the next number exclusively, which the file system grants to one process only. It is free
again when it is marked as released, when its process is dead (seen on the same host), or when it has not been renewed
for STALE seconds. Two processes that see the same stale number N both try to create N + 1, and one fails. A number is
never used twice, so a process that judged long ago cannot take what another holds since; and an owner that slept too
long finds a number above its own. Training's own lock (one machine, one run) stands beside this and is never held
while a claim is judged.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from bitbell.comparison.outcomes import read_note
from bitbell.training.run import write_json

STALE = 600.0  # seconds without renewal
RENEW = 30.0  # seconds between renewals


class Claim:
    """A run that belongs to this process until `release`. `is_lost` once another process has taken it over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_lost = False
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"claim of {path.name}", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the run back; another process may claim it."""
        self._released.set()
        self._thread.join()
        _mark_released(self.path)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _renew(self) -> None:
        while not self._released.wait(RENEW):
            self.check()

    def check(self) -> None:
        """Renew the claim, and see whether it is still ours."""
        name, _, number = self.path.name.rpartition(".")
        try:
            os.utime(self.path)
            self.is_lost = self.is_lost or highest(self.path.parent, name) > int(number)
        except FileNotFoundError:
            self.is_lost = True
        except OSError:
            pass  # a shared folder that is away for a moment; ten minutes of that lose the claim


def take(folder: Path, name: str) -> Claim | None:
    """Claim the run called `name`, or None if another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    number = highest(folder, name)
    if number and not is_free(folder / f"{name}.{number}"):
        return None
    path = folder / f"{name}.{number + 1}"
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return None
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(identity() | {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}, file)
    return Claim(path)


def highest(folder: Path, name: str) -> int:
    """The highest number of a claim on `name`; 0 if there is none."""
    numbers = (file.rpartition(".") for file in os.listdir(folder))
    return max((int(number) for run, _, number in numbers if run == name and number.isdigit()), default=0)


def is_free(path: Path) -> bool:
    """Whether the owner of a claim has released it, is dead, or has not renewed it for STALE seconds."""
    owner = read_note(path)  # empty while it is being written, or torn by a crash: its age decides
    if owner.get("released"):
        return True
    me = identity()
    if owner.get("host") == me["host"] and owner.get("born") != _born(owner.get("pid")):
        return True
    try:
        return clock(path.parent) - path.stat().st_mtime > STALE
    except OSError:
        return False


def clock(folder: Path) -> float:
    """The time as the file system of a folder tells it, which is what claims are dated by."""
    file = folder / ".clock"
    file.touch()
    return file.stat().st_mtime


def identity() -> dict[str, Any]:
    """What tells this process from all others: host (with its boot and process namespace), pid, and when it began."""
    return {"host": _host(), "pid": os.getpid(), "born": _born(os.getpid())}


def _host() -> str:
    boot = _text(Path("/proc/sys/kernel/random/boot_id"))[:8]
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return "/".join(part for part in (socket.gethostname(), boot, namespace) if part)


def _born(pid: Any) -> str | None:
    """When a process of this host began, in ticks; None if it is dead. Tells it from a later process of its number."""
    if not isinstance(pid, int):
        return None
    stat = _text(Path(f"/proc/{pid}/stat"))
    if stat:
        state, *fields = stat.rpartition(")")[2].split()
        return None if state == "Z" else fields[18]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "alive"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _mark_released(path: Path) -> None:
    with contextlib.suppress(OSError):  # it will be stale in time
        write_json(path, identity() | {"released": True})
