"""Small data sets made by the real functions, shared by the tests of the data room."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bitbell.data import TokenDataset, tokenize


def lines_of_text(count: int) -> str:
    """Different lines, some of them with characters of two to four bytes."""
    return "".join(f"line {number:05d} na\u00efve \u6f22\u5b57 \U0001f600 text\n" for number in range(count))


@pytest.fixture(name="lines_of_text", scope="session")
def the_function_itself() -> Callable[[int], str]:
    return lines_of_text


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], str]:
    """Write a file below a fresh folder and return its path as users would type it."""

    def write_file(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write_file


@pytest.fixture
def write_jsonl(write: Callable[[str, str | bytes], str]) -> Callable[..., str]:
    def write_rows(name: str, texts: list[str], field: str = "text") -> str:
        return write(name, "".join(json.dumps({field: text}) + "\n" for text in texts))

    return write_rows


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    """About 40,000 byte tokens in many shards of 7,000. Read only."""
    folder = tmp_path_factory.mktemp("dataset")
    source = folder / "source.txt"
    source.write_text(lines_of_text(1000), encoding="utf-8")
    return tokenize([str(source)], folder / "tokens", tokenizer="bytes", shard_tokens=7000)
