"""Code in the README, the documentation and the docstrings runs as it stands there."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

import bitbell
from bitbell.cli.main import VERBS, main

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
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
        words = shlex.split(line, comments=True)[1:]
        if words[0] == "train":  # as written but for the number of steps and the data seen at the end
            words += ["--steps", "2", "--batch-size", "2"]
        if words[0] == "compare":
            words += ["--steps", "2", "--set", "batch_size=2", "final_windows=2"]
        assert main(words) == 0, line


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def modules() -> list[str]:
    found = pkgutil.walk_packages(bitbell.__path__, "bitbell.")
    return [m.name for m in found]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples_run(name: str) -> None:
    if name == "bitbell.training.torchtitan":
        pytest.importorskip("torchtitan")
    module = importlib.import_module(name)
    namespace = {"torch": importlib.import_module("torch"), **vars(module)}
    assert doctest.testmod(module, extraglobs=namespace).failed == 0
