"""The import graph: a room knows the rooms before it on the road, never those after it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import bitbell

ROOT = Path(bitbell.__file__).parent
ROAD = ["kernels", "data", "models", "quantizers", "layers", "evaluation", "training", "packing", "export"]
ROAD += ["reports", "comparison", "serving", "cli"]


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a file imports anywhere, inside functions too."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        rooms |= {name.split(".")[1] for name in names if name.startswith("bitbell.")}
    return rooms


def test_imports_point_back_along_the_road() -> None:
    wrong = []
    for place, room in enumerate(ROAD):
        for path in (ROOT / room).rglob("*.py"):
            ahead = imported_rooms(path) - set(ROAD[: place + 1])
            wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in sorted(ahead)]
    assert not wrong


def test_every_room_is_on_the_road() -> None:
    assert {p.parent.name for p in ROOT.glob("*/__init__.py")} == set(ROAD)


def test_kernels_import_nothing_of_ours() -> None:
    assert all(imported_rooms(p) <= {"kernels"} for p in (ROOT / "kernels").rglob("*.py"))


def test_importing_bitbell_and_asking_for_help_loads_nothing_heavy() -> None:
    script = (
        "import sys, bitbell; from bitbell.cli.main import main; main(['--help']);"
        "print(sorted({'torch', 'transformers', 'matplotlib', 'tokenizers', 'numpy', 'tyro'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "[]"


def test_the_public_names_are_all_there() -> None:
    assert len(bitbell.__all__) <= 14
    assert all(callable(getattr(bitbell, name)) for name in bitbell.__all__)


def test_report_stays_the_function_when_the_report_room_is_imported() -> None:
    import bitbell.reports

    assert callable(bitbell.report)
    assert callable(bitbell.reports.write_report)


def test_no_module_is_called_by_a_word_that_says_nothing() -> None:
    vague = {"utils", "common", "core", "helpers", "misc"}
    assert not [p for p in ROOT.rglob("*.py") if p.stem in vague or p.parent.name in vague]
