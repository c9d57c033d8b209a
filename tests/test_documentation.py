"""Code in the README, the documentation and the docstrings runs as it stands there.

Commands that take long get the options of SHORTER behind those that are written. `make test-slow` runs the tutorial as
it is written, and holds what it prints against what the page says.
"""

from __future__ import annotations

import doctest
import importlib
import math
import pkgutil
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import bitbell
from bitbell.cli.main import VERBS, main

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
TUTORIAL = ROOT / "docs" / "tutorial.md"
SHORTER = {
    "train": ["--steps", "2", "--batch-size", "2", "--final-windows", "2"],
    "evaluate": ["--limit", "2"],
    "verify": ["--limit", "2"],
    "compare": ["--steps", "2", "--set", "batch_size=2", "final_windows=2"],
}
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:e[+-]?\d+)?")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run_command(line: str, *, short: bool) -> None:
    words = shlex.split(line, comments=True)[1:]
    assert main(words + (SHORTER.get(words[0], []) if short else [])) == 0, line


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python") and p != TUTORIAL], ids=lambda p: p.name)
def test_python_on_the_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)


def test_the_commands_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    session = next(block for block in blocks(ROOT / "README.md", "bash") if "bitbell tokenize" in block)
    lines = [line for line in session.replace("\\\n", " ").splitlines() if line.startswith("bitbell ")]
    assert {shlex.split(line)[1] for line in lines} == VERBS.keys() - {"classify", "demo", "info", "serve"}
    for line in lines:
        run_command(line, short=True)


def pieces(page: Path) -> Iterator[tuple[str, str, str]]:
    """Language and text of the blocks of a page that run, each with the `text` block right behind it, or ""."""
    block = r"^```(python|bash)\n(.*?)^```\n(?:\n^```text\n(.*?)^```\n)?"
    for match in re.finditer(block, page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        yield match[1], match[2], match[3] or ""


def alike(told: str, shown: str) -> bool:
    """Whether two lines say the same, up to spaces and 2 % of every number."""
    numbers = [[float(n.replace(",", "")) for n in NUMBER.findall(line)] for line in (told, shown)]
    words = [NUMBER.sub("#", line).split() for line in (told, shown)]
    close = (math.isclose(a, b, rel_tol=0.02, abs_tol=0.02) for a, b in zip(*numbers, strict=False))
    return words[0] == words[1] and len(numbers[0]) == len(numbers[1]) and all(close)


@pytest.mark.parametrize("short", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_tutorial_runs_and_says_what_it_shows(
    short: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for language, text, told in pieces(TUTORIAL):
        if language == "python":
            exec(compile(text, str(TUTORIAL), "exec"), namespace)
        else:
            for line in text.splitlines():
                run_command(line, short=short)
        shown = capsys.readouterr().out.splitlines()
        if short and re.search(r"runs/|packed", text):
            continue  # about a model that has had two steps only
        rest = iter(shown)
        for line in told.splitlines():
            assert any(alike(line, other) for other in rest), f"{line!r} is not in what was shown:\n" + "\n".join(shown)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_has_a_place_on_the_site() -> None:
    places = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2].split()
    for page in (ROOT / "docs").rglob("*.md"):
        assert str(page.relative_to(ROOT / "docs")) in places, f"add {page.name} to nav in mkdocs.yml"


def modules() -> list[str]:
    found = pkgutil.walk_packages(bitbell.__path__, "bitbell.")
    return [m.name for m in found]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples_run(name: str) -> None:
    if guest := {"bitbell.training.torchtitan": "torchtitan", "bitbell.export.vllm_plugin": "vllm"}.get(name):
        pytest.importorskip(guest)
    module = importlib.import_module(name)
    namespace = {"torch": importlib.import_module("torch"), **vars(module)}
    assert doctest.testmod(module, extraglobs=namespace).failed == 0
