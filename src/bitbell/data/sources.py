"""Sources to documents, streamed: nothing here holds more than one document, block or record batch.

    "kjv"                        the King James Bible that comes with bitbell
    FILE or FOLDER               text (any suffix), .jsonl .ndjson .json (one object a line), .parquet;
                                 text and JSON lines also as .gz and .xz; a folder stands for all its files,
                                 hidden ones left out
    hf:NAME[:CONFIG][:SPLIT]     a data set of the Hugging Face Hub, streamed (SPLIT is "train" if not given)

A document is a JSON line, a Parquet row or a row of a Hub data set. A text file is cut at line ends into
blocks, each of which is a document of its own; the blocks of a file, joined, are the file, byte for byte.
"""

import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

CORPUS = "kjv"
BLOCK_BYTES = 64 * 1024
_HUB = "hf:"
_JSON = {".jsonl", ".ndjson", ".json"}
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
_BAD_ARCHIVE = (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError)
_INSTALL = "Install it with: pip install 'bitbell[data]'"


@dataclass(frozen=True)
class Source:
    """One file (`path`), or one Hub data set (`path` is None); `name` is what records call it."""

    name: str
    path: Path | None


@dataclass(frozen=True, slots=True)
class Document:
    """Text that stays together in the split; `ends` says whether the text (all blocks of a file) is over."""

    text: str
    ends: bool = True


def corpus_path() -> Path:
    """Return the path of the shipped corpus: the King James Bible, one verse a line, xz-compressed ASCII."""
    return Path(__file__).parent / "corpus" / "king-james.txt.xz"


def open_corpus() -> TextIO:
    """Open the shipped corpus for reading as text."""
    return cast(TextIO, lzma.open(corpus_path(), "rt", encoding="ascii", newline=""))


def find_sources(specs: Sequence[str]) -> list[Source]:
    """Turn the names that a user gives into files and Hub data sets, in the given order, folders sorted.

    Raises ValueError when there is nothing to read, FileNotFoundError for a path that does not exist.
    """
    if isinstance(specs, str | Path):
        specs = [str(specs)]
    found = [source for spec in specs for source in _expand(str(spec))]
    if not found:
        raise ValueError('no source was given. Give files, folders, "kjv" or "hf:NAME".')
    return found


def _expand(spec: str) -> list[Source]:
    if spec == CORPUS:
        return [Source(CORPUS, corpus_path())]
    if spec.startswith(_HUB):
        return [Source(spec, None)]
    path = Path(spec)
    if not path.exists():
        raise FileNotFoundError(
            f'source {spec!r} does not exist. Give a file, a folder, "kjv" or "hf:NAME[:CONFIG][:SPLIT]".'
        )
    if not path.is_dir():
        if path.is_file() and path.stat().st_size == 0:
            raise ValueError(f"source {spec!r} is an empty file. Give a file with text in it.")
        return [Source(path.name, path)]
    return _files_in(path)


def _files_in(folder: Path) -> list[Source]:
    inside = [(file.relative_to(folder), file) for file in folder.rglob("*") if file.is_file()]
    visible = sorted(
        (name.as_posix(), file) for name, file in inside if not any(part.startswith(".") for part in name.parts)
    )
    if not visible:
        raise ValueError(f"no files found in folder {str(folder)!r} (hidden ones are left out). Put text files there.")
    return [Source(name, file) for name, file in visible]


def fingerprint(source: Source) -> dict[str, Any]:
    """Describe a source so that a change of it shows: its name, and for a file its size and SHA-256."""
    if source.path is None:
        return {"name": source.name}
    with source.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": source.name, "bytes": source.path.stat().st_size, "sha256": digest}


def read_documents(sources: Iterable[Source], text_field: str, block_lines: int) -> Iterator[Document]:
    """Stream the documents of all sources; empty or null texts are passed over.

    `block_lines` and 64 KiB, whichever comes first, bound a block of a text file. Raises ValueError that
    names the file and the place (byte offset, line or row) of anything that cannot be read as text.
    """
    for source in sources:
        if source.path is None:
            yield from _hub_documents(source, text_field)
        elif source.path.suffix == ".parquet":
            yield from _parquet_documents(source, text_field)
        elif _inner_suffix(source.path) in _JSON:
            yield from _json_documents(source, text_field)
        else:
            yield from _text_documents(source, block_lines)


def _inner_suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in _OPENERS else path.suffix


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, _OPENERS.get(path.suffix, open)(path, "rb"))


def _lines(path: Path, limit: int = -1) -> Iterator[bytes]:
    """The raw lines of a plain or compressed file, in pieces of at most `limit` bytes."""
    try:
        with _open(path) as file:
            while line := file.readline(limit):
                yield line
    except _BAD_ARCHIVE as error:
        raise ValueError(f"{path} is damaged or no {path.suffix} file: {error}. Make or fetch it again.") from error


def _text_documents(source: Source, block_lines: int) -> Iterator[Document]:
    assert source.path is not None
    last = None
    for text in _blocks(source.path, block_lines):
        if last is not None:
            yield Document(last, ends=False)
        last = text
    if last is not None:
        yield Document(last, ends=True)


def _blocks(path: Path, block_lines: int) -> Iterator[str]:
    """Whole lines up to the block's bounds; a line longer than a block is cut between two characters."""
    offset, lines, size = 0, [], 0
    for line in _lines(path, limit=BLOCK_BYTES):
        lines.append(line)
        size += len(line)
        if len(lines) >= block_lines or size >= BLOCK_BYTES:
            block = b"".join(lines)
            rest = b"" if block.endswith(b"\n") else _unfinished_character(block)
            block = block[: len(block) - len(rest)]
            if block:
                yield _decode(block, path, offset)
            offset, lines, size = offset + len(block), [rest] if rest else [], len(rest)
    if lines:
        yield _decode(b"".join(lines), path, offset)


def _unfinished_character(block: bytes) -> bytes:
    """The up to three bytes at the end that begin a UTF-8 character without completing it."""
    for length in range(1, min(3, len(block)) + 1):
        byte = block[-length]
        if byte >= 0xC0:  # a leading byte; it tells how long its character is
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return block[-length:] if length < needed else b""
        if byte < 0x80:
            break
    return b""


def _decode(block: bytes, path: Path, offset: int) -> str:
    """UTF-8 text of a block that starts `offset` bytes into the (decompressed) file."""
    advice = "Leave the file out, or convert it to UTF-8."
    if (zero := block.find(0)) >= 0:
        raise ValueError(f"{path} is a binary file, not text: NUL byte at byte offset {offset + zero}. {advice}")
    try:
        return block.decode("utf-8")
    except UnicodeDecodeError as error:
        where = offset + error.start
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte offset {where}. {advice}") from error


def _json_documents(source: Source, text_field: str) -> Iterator[Document]:
    assert source.path is not None
    offset = 0
    for number, raw in enumerate(_lines(source.path), start=1):
        place = f"{source.path}, line {number}"
        line = _decode(raw, source.path, offset)
        offset += len(raw)
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: broken JSON ({error}). Every line must be one whole JSON object.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{place}: a JSON object is needed, got {type(row).__name__}.")
        if text_field not in row:
            raise _no_field(place, text_field, row)
        yield from _document(row[text_field], place, text_field)


def _parquet_documents(source: Source, text_field: str) -> Iterator[Document]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError(f"{source.path} is a Parquet file, and pyarrow is not installed. {_INSTALL}") from error
    try:
        file = parquet.ParquetFile(source.path)
    except arrow.ArrowException as error:
        raise ValueError(f"{source.path} is damaged or no Parquet file: {error}") from error
    with file:
        if text_field not in file.schema_arrow.names:
            raise _no_field(str(source.path), text_field, file.schema_arrow.names)
        yield from _parquet_rows(file, source, text_field)


def _parquet_rows(file: Any, source: Source, text_field: str) -> Iterator[Document]:
    from pyarrow import ArrowException

    row = 0
    try:
        for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
            for value in batch.column(0).to_pylist():
                yield from _document(value, f"{source.path}, row {row}", text_field)
                row += 1
    except (ArrowException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{source.path} is damaged near row {row}: {error}. Make or fetch it again.") from error


def _hub_documents(source: Source, text_field: str) -> Iterator[Document]:
    for row, record in enumerate(_hub_records(source.name)):
        place = f"{source.name}, row {row}"
        if text_field not in record:
            raise _no_field(place, text_field, record)
        yield from _document(record[text_field], place, text_field)


def _hub_records(spec: str) -> Iterator[dict[str, Any]]:
    name, _, rest = spec.removeprefix(_HUB).partition(":")
    config, _, split = rest.partition(":")
    if not name or ":" in split:
        raise ValueError(f"source {spec!r} is not of the form hf:NAME[:CONFIG][:SPLIT].")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"{spec} is read by the package datasets, which is not installed. {_INSTALL}") from error
    try:
        yield from load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:  # network, a wrong name or split: many types, one answer
        raise ValueError(f"{spec} cannot be read: {error}. Check name, config, split and connection.") from error


def _document(value: object, place: str, text_field: str) -> Iterator[Document]:
    """The document of one record, or none where the text is empty or null."""
    if value is None or value == "":
        return
    if not isinstance(value, str):
        raise ValueError(f"{place}: field {text_field!r} must be text, got {type(value).__name__}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: field {text_field!r} is no valid Unicode ({error.reason}).") from error
    yield Document(value)


def _no_field(place: str, text_field: str, fields: Iterable[str]) -> ValueError:
    there = ", ".join(map(str, fields)) or "none"
    return ValueError(f"{place}: no field {text_field!r}. Fields there: {there}. Choose one with text_field.")
