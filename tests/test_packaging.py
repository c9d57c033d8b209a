"""What is shipped: the extras and where they are told, and (slow) the source archive and the wheel themselves."""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
NOT_CODE = {
    "bitbell/data/corpus/README.md",
    "bitbell/data/corpus/king-james.txt.xz",
    "bitbell/kernels/_native.pyi",
    "bitbell/py.typed",
    "bitbell/reports/inspect.html",
    "bitbell/reports/page.css",
    "bitbell/reports/page.html",
    "bitbell/serving/chat.html",
}


def test_every_extra_is_in_the_table_of_the_documentation() -> None:
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w-]+)` \| (.*?) \|", text, re.MULTILINE))
    assert rows.keys() == EXTRAS.keys()
    for extra in EXTRAS.keys() - {"dev", "docs"}:
        packages = {re.split(r"[\[>=;]", requirement)[0] for requirement in EXTRAS[extra]}
        assert packages == set(rows[extra].split(", ")), extra


def pages_and_sources() -> Iterator[Path]:
    yield ROOT / "README.md"
    for folder, pattern in (("docs", "*.md"), ("benchmarks", "*.md"), ("src", "*.py")):
        yield from (ROOT / folder).rglob(pattern)


def test_no_text_names_an_extra_that_is_none() -> None:
    told = {
        name: file.name
        for file in pages_and_sources()
        for names in re.findall(r"pip install[^\n`]*?(?:bitbell|\.)\[([\w,-]+)\]", file.read_text(encoding="utf-8"))
        for name in names.split(",")
    }
    assert len(told) > 5
    assert told.keys() <= EXTRAS.keys(), told


def builds(folder: Path, *words: str, **environment: str) -> None:
    """Run `python -m build`, with the tools that are here, or else those that pip brings."""
    here = ["--no-isolation"] if find_spec("scikit_build_core") and find_spec("nanobind") else []
    line = [sys.executable, "-m", "build", *here, "--outdir", str(folder), *words]
    done = subprocess.run(line, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.fixture(scope="module")
def source_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    builds(folder, "--sdist", str(ROOT))
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def unpacked(source_archive: Path) -> Path:
    with tarfile.open(source_archive) as archive:
        archive.extractall(source_archive.parent, filter="data")
    return source_archive.parent / source_archive.name.removesuffix(".tar.gz")


def names_in(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def git_files(*words: str) -> set[str]:
    done = subprocess.run(["git", "ls-files", *words], cwd=ROOT, capture_output=True, text=True)
    return {name for name in done.stdout.splitlines() if (ROOT / name).exists()}


@pytest.mark.slow
def test_the_source_archive_is_the_repository(unpacked: Path) -> None:
    names = names_in(unpacked)
    assert {"LICENSE", "NOTICE", "README.md", "pyproject.toml", "csrc/CMakeLists.txt", "csrc/linear.cpp"} <= names
    assert not [name for name in names if re.search(r"\.(so|pyc|o|a)$|__pycache__|egg-info|(^|/)\.(git/|venv)", name)]
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout to compare with")
    assert names <= git_files("--cached", "--others", "--exclude-standard") | {"PKG-INFO"}
    assert git_files() <= names


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [True, False])
def test_the_wheel_has_the_package_and_nothing_else(unpacked: Path, tmp_path: Path, compiled: bool) -> None:
    if compiled and sys.platform != "linux":
        pytest.skip("the kernels are for Linux")
    if compiled:
        builds(tmp_path, "--wheel", str(unpacked))
    else:  # as on a machine without a compiler
        builds(tmp_path, "--wheel", str(unpacked), CXX="/nonexistent/c++", CC="/nonexistent/cc")
    wheel = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = email.message_from_bytes(archive.read(next(n for n in names if n.endswith("/METADATA"))))
    extensions = {name for name in names if name.endswith(".so")}
    assert len(extensions) == compiled
    assert wheel.name.endswith("-py3-none-any.whl") != compiled
    inside = {name for name in names if ".dist-info/" not in name} - extensions
    assert {name for name in inside if not name.endswith(".py")} == NOT_CODE
    assert inside == {name.removeprefix("src/") for name in names_in(unpacked) if name.startswith("src/bitbell/")}
    assert {n.rpartition("/")[2] for n in names if "/licenses/" in n} == {"LICENSE", "NOTICE"}
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra")) == EXTRAS.keys()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert (
        metadata.get_payload(decode=True).decode().strip()
        == (unpacked / "README.md").read_text(encoding="utf-8").strip()
    )
