"""Flat token files, and the data set directory that they make.

    DIR/dataset.json            what is in the directory (written last: without it the directory counts as unfinished)
    DIR/tokenizer.json          and tokenizer_config.json
    DIR/train-00000.tokens ...  the shards of each split; joined in order they are the split's one stream of tokens
    DIR/valid-00000.tokens ...

A shard is a header of 32 bytes and then its tokens, uint16 or uint32. Everything is little-endian.

    bytes  0 ..  7   magic: the ASCII characters BITBELLT
    bytes  8 .. 11   uint32  format version, 1
    bytes 12 .. 15   uint32  dtype code: the bytes of one token, 2 or 4
    bytes 16 .. 23   uint64  number of tokens
    bytes 24 .. 31   zero

The file is exactly 32 + tokens * bytes long, so a truncated, grown or foreign file is told from its first bytes and
its size. The checksum in dataset.json is the SHA-256 of the tokens, without the header.
"""

import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, cast, get_args

import numpy as np

from bitbell.data import tokenizers

Split = Literal["train", "valid"]
SPLITS: tuple[Split, ...] = get_args(Split)
DESCRIPTION = "dataset.json"
FORMAT = "bitbell-tokens"
VERSION = 1
_MAGIC = b"BITBELLT"
_HEADER = struct.Struct("<8sIIQQ")
_DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_SHARD_NAME = re.compile(r"(train|valid)-\d{5,}\.tokens", flags=re.ASCII)
_PARTIAL = ".partial-"
_TAKE_AGAIN = "Tokenize again, or copy the data set again."


def narrowest_dtype(vocab_size: int) -> str:
    """Return the name of the smallest token type for ids 0 .. vocab_size - 1."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


@dataclass(frozen=True)
class ShardInfo:
    """One shard as dataset.json lists it: `sha256` is that of its tokens without the header."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class SplitInfo:
    """One split: its tokens, the bytes of UTF-8 text that they stand for, and its shards in order."""

    tokens: int
    bytes: int
    shards: tuple[ShardInfo, ...]


@dataclass(frozen=True)
class Description:
    """The content of dataset.json; `made_from` is the record of sources and settings."""

    dtype: str
    vocab_size: int
    tokenizer: str
    splits: dict[str, SplitInfo]
    made_from: dict[str, Any]


def write_shard_header(dtype: str, tokens: int) -> bytes:
    """Return the 32 bytes that a shard of `tokens` tokens begins with."""
    return _HEADER.pack(_MAGIC, VERSION, _DTYPES[dtype].itemsize, tokens, 0)


def open_shard(path: Path) -> np.ndarray:
    """Map a shard's tokens into memory, read-only, shape (tokens,), uint16 or uint32.

    Raises ValueError, naming the file and what is wrong, if it is not exactly what its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if header[: len(_MAGIC)] != _MAGIC:
        raise ValueError(f"{path} is no token shard of bitbell: it does not begin with {_MAGIC.decode()}.")
    if len(header) < _HEADER.size:
        raise ValueError(f"{path} is truncated: {size} bytes, and the header alone has {_HEADER.size}. {_TAKE_AGAIN}")
    _, version, code, tokens, reserved = _HEADER.unpack(header)
    if version != VERSION or reserved != 0:
        raise ValueError(f"{path} has shard format version {version}; this bitbell reads version {VERSION}.")
    dtype = next((dtype for dtype in _DTYPES.values() if dtype.itemsize == code), None)
    if dtype is None:
        raise ValueError(f"{path} has dtype code {code}; 2 (uint16) and 4 (uint32) are known. {_TAKE_AGAIN}")
    if size != (expected := _HEADER.size + tokens * code):
        problem = "truncated" if size < expected else "longer than its header says"
        raise ValueError(
            f"{path} is {problem}: {size} bytes, {tokens} tokens of {code} bytes need {expected}. {_TAKE_AGAIN}"
        )
    if tokens == 0:
        return np.zeros(0, dtype=dtype)  # an empty range cannot be mapped
    return np.memmap(path, dtype=dtype, mode="r", offset=_HEADER.size, shape=(tokens,))


def read_description(folder: Path) -> Description:
    """Read and check dataset.json. Raises FileNotFoundError if it is missing, ValueError if it is not usable."""
    file = folder / DESCRIPTION
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} is no data set: it has no {DESCRIPTION}. Make one with: bitbell tokenize SOURCE... --out {folder}"
        )
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is broken: {error}. {_TAKE_AGAIN}") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise ValueError(f'{file} does not describe a token data set: its "format" is not "{FORMAT}".')
    if fields.get("version") != VERSION:
        raise ValueError(f"{file} has format version {fields.get('version')}; this bitbell reads version {VERSION}.")
    try:
        return _parse_description(fields)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} is incomplete or wrong: {type(error).__name__}: {error}. {_TAKE_AGAIN}") from error


def _parse_description(fields: dict[str, Any]) -> Description:
    if fields["dtype"] not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {fields['dtype']!r}")
    vocab_size = _count(fields["vocab_size"], "vocab_size")
    splits = {name: _parse_split(name, fields["splits"][name]) for name in SPLITS}
    return Description(fields["dtype"], vocab_size, str(fields["tokenizer"]), splits, dict(fields["made_from"]))


def _parse_split(name: str, fields: dict[str, Any]) -> SplitInfo:
    shards = tuple(
        ShardInfo(str(shard["file"]), _count(shard["tokens"], "tokens"), str(shard["sha256"]))
        for shard in fields["shards"]
    )
    for shard in shards:
        if not _SHARD_NAME.fullmatch(shard.file):  # a name is not a path: nothing outside the directory is opened
            raise ValueError(f"{shard.file!r} is no shard name such as {name}-00000.tokens")
    tokens = _count(fields["tokens"], "tokens")
    if tokens != sum(shard.tokens for shard in shards):
        raise ValueError(f"split {name} has {tokens} tokens, but its shards have another sum")
    return SplitInfo(tokens, _count(fields["bytes"], "bytes"), shards)


def _count(value: Any, name: str) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
    return value


class TokenStream:
    """The shards of one split as one row of tokens, read in slices that may cross from shard to shard."""

    def __init__(self, folder: Path, split: SplitInfo, dtype: str) -> None:
        self._shards = [_open_listed_shard(folder / shard.file, shard, dtype) for shard in split.shards]
        self._ends = np.cumsum([len(shard) for shard in self._shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens start .. stop - 1 as int64, shape (stop - start,). Raises IndexError outside the split."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} .. {stop} lie outside a split of {len(self)} tokens.")
        tokens = np.empty(stop - start, dtype=np.int64)
        index = int(np.searchsorted(self._ends, start, side="right"))
        filled = 0
        while filled < len(tokens):
            shard = self._shards[index]
            inside = start + filled - (int(self._ends[index]) - len(shard))
            piece = shard[inside : inside + len(tokens) - filled]
            tokens[filled : filled + len(piece)] = piece
            filled += len(piece)
            index += 1
        return tokens


def _open_listed_shard(path: Path, listed: ShardInfo, dtype: str) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, but {DESCRIPTION} lists it. {_TAKE_AGAIN}")
    tokens = open_shard(path)
    if tokens.dtype != _DTYPES[dtype] or len(tokens) != listed.tokens:
        raise ValueError(
            f"{path} holds {len(tokens)} tokens of {tokens.dtype.name}, but {DESCRIPTION} lists "
            f"{listed.tokens} of {dtype}. {_TAKE_AGAIN}"
        )
    return tokens


def verify_shard(path: Path, listed: ShardInfo, vocab_size: int) -> None:
    """Read a whole shard. Raises ValueError if a token lies outside the vocabulary or the checksum differs."""
    tokens = open_shard(path)
    digest = hashlib.sha256()
    for start in range(0, len(tokens), 1 << 20):
        piece = tokens[start : start + (1 << 20)]
        if (largest := int(piece.max())) >= vocab_size:
            at = start + int(piece.argmax())
            raise ValueError(
                f"{path} holds token {largest} at position {at}, outside a vocabulary of {vocab_size}. {_TAKE_AGAIN}"
            )
        digest.update(piece.tobytes())
    if digest.hexdigest() != listed.sha256:
        raise ValueError(f"{path} has changed since it was written: its checksum differs. {_TAKE_AGAIN}")


class ShardWriter:
    """Write one split's tokens to shards of at most `shard_tokens` tokens in `folder`."""

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int) -> None:
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self._shards: list[ShardInfo] = []
        self._start_shard()

    def _start_shard(self) -> None:
        self._path = self._folder / f"{self._split}-{len(self._shards):05d}.tokens"
        self._file = self._path.open("xb")
        self._file.write(write_shard_header(self._dtype, 0))
        self._digest = hashlib.sha256()
        self._tokens = 0

    def append(self, ids: Sequence[int]) -> None:
        """Add tokens at the end, starting a new shard whenever one is full."""
        tokens = np.asarray(ids, dtype=_DTYPES[self._dtype])
        while len(tokens):
            if self._tokens == self._shard_tokens:
                self._end_shard()
                self._start_shard()
            piece, tokens = np.split(tokens, [self._shard_tokens - self._tokens])
            self._file.write(piece.tobytes())
            self._digest.update(piece.tobytes())
            self._tokens += len(piece)

    def _end_shard(self) -> None:
        self._file.seek(0)
        self._file.write(write_shard_header(self._dtype, self._tokens))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._shards.append(ShardInfo(self._path.name, self._tokens, self._digest.hexdigest()))

    def finish(self) -> tuple[ShardInfo, ...]:
        """Complete the last shard and return the list of all."""
        self._end_shard()
        return tuple(self._shards)

    def close(self) -> None:
        self._file.close()


class OutputFolder:
    """A data set directory in the making: files are written to a hidden folder inside, then moved into place.

    Until `publish` has moved dataset.json, the last file, the directory is not a data set; after an error nothing of
    ours is left. An existing data set stays whole until `publish`. One process writes a directory at a time.
    """

    def __init__(self, out: Path) -> None:
        self.out = out

    def __enter__(self) -> Self:
        self._is_new = not self.out.exists()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            for left in self.out.glob(_PARTIAL + "*"):  # of a run that was killed
                shutil.rmtree(left)
            self.partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self.out))
        except OSError as error:
            raise _cannot_write(self.out, error) from error
        return self

    def publish(self, description: Description) -> None:
        """Move everything into place, dataset.json last, and remove what belonged to an older data set."""
        fields = {"format": FORMAT, "version": VERSION, **asdict(description)}
        _write_synced(self.partial / DESCRIPTION, json.dumps(fields, indent=2) + "\n")
        (self.out / DESCRIPTION).unlink(missing_ok=True)
        _sync_folder(self.out)
        for file in self.out.glob("*.tokens"):
            if _SHARD_NAME.fullmatch(file.name):
                file.unlink()
        for file in sorted(self.partial.iterdir(), key=lambda file: file.name == DESCRIPTION):
            os.replace(file, self.out / file.name)
        _sync_folder(self.out)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        if kind is not None and self._is_new and not any(self.out.iterdir()):
            self.out.rmdir()
        if isinstance(error, OSError) and error.filename is None and error.errno is not None:
            raise _cannot_write(self.out, error) from error  # writing to an open file: the system names no file


def _cannot_write(out: Path, error: OSError) -> OSError:
    reason = error.strerror or str(error)
    return OSError(f"cannot write the data set to {out}: {reason}. Choose a folder with space that you may write to.")


def check_may_write(out: Path) -> None:
    """Raise ValueError if `out` holds anything that is not part of a data set: it would be mixed up or lost."""
    if out.is_dir():
        ours = {DESCRIPTION, tokenizers.FILE, tokenizers.CONFIG_FILE}
        names = sorted(entry.name for entry in out.iterdir())
        foreign = [
            name
            for name in names
            if name not in ours and not _SHARD_NAME.fullmatch(name) and not name.startswith(_PARTIAL)
        ]
        if foreign:
            raise ValueError(f"{out} holds other files ({', '.join(foreign[:3])}). Choose a new or empty folder.")


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut (where the system lets folders be synced)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def as_split(name: str) -> Split:
    """Check the name of a split. Raises ValueError for any but "train" and "valid"."""
    if name not in SPLITS:
        raise ValueError(f"unknown split {name!r}. A data set has {' and '.join(SPLITS)}.")
    return cast(Split, name)
