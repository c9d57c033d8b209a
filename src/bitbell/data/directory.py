"""The data set directory: token shards, the tokenizer, and `dataset.json`, which says what is there.

DIR/dataset.json            written last: without it the directory counts as unfinished
DIR/tokenizer.json          and tokenizer_config.json
DIR/train-00000.tokens ...  the shards of a split: joined in order, its one stream of tokens
DIR/valid-00000.tokens ...
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np

from bitbell.data import tokenizers
from bitbell.data.shards import DTYPES, ShardInfo, naming_the_file, open_shard

SPLITS = ("train", "valid")
DESCRIPTION = "dataset.json"
FORMAT = "bitbell-tokens"
VERSION = 1
_SHARD_NAME = re.compile(r"(train|valid)-\d{5,}\.tokens", flags=re.ASCII)
_PARTIAL = ".partial-"
T = TypeVar("T")
_TAKE_AGAIN = "Tokenize again with overwrite=True, or copy the data set again."


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


class Kind(NamedTuple):
    """What tells one kind of data set from another: `name` in words, "format" and "version" in its dataset.json, the
    `command` that makes one, and what to do (`again`) about a broken one."""

    name: str
    format: str
    version: int
    command: str
    again: str


_TOKENS = Kind("a token data set", FORMAT, VERSION, "bitbell tokenize SOURCE...", _TAKE_AGAIN)


def read_description(folder: Path) -> Description:
    """Read and check dataset.json. Raises FileNotFoundError if it is missing, ValueError if it is wrong."""
    return read_as(_TOKENS, folder, _parse_description)


def read_as(kind: Kind, folder: Path, parse: Callable[[dict[str, Any]], T]) -> T:
    """What `parse` makes of the dataset.json of a `kind`.

    Raises FileNotFoundError if the file is missing, ValueError if it is wrong.
    """
    file = folder / DESCRIPTION
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} is no data set: it has no {DESCRIPTION} (missing, or unfinished). "
            f"Make one with: {kind.command} --out {folder}"
        )
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is broken: {error}. {kind.again}") from error
    if not isinstance(fields, dict) or fields.get("format") != kind.format:
        raise ValueError(f'{file} does not describe {kind.name}: its "format" is not "{kind.format}".')
    if fields.get("version") != kind.version:
        found = fields.get("version")
        raise ValueError(f"{file} has format version {found}; this bitbell reads version {kind.version}.")
    try:
        return parse(fields)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} is incomplete or wrong: {type(error).__name__}: {error}. {kind.again}") from error


def _parse_description(fields: dict[str, Any]) -> Description:
    if fields["dtype"] not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {fields['dtype']!r}")
    vocab_size = _count(fields["vocab_size"], "vocab_size")
    splits = {name: _parse_split(name, fields["splits"][name]) for name in SPLITS}
    return Description(fields["dtype"], vocab_size, str(fields["tokenizer"]), splits, dict(fields["made_from"]))


def _parse_split(name: str, fields: dict[str, Any]) -> SplitInfo:
    shards = tuple(
        ShardInfo(str(shard["file"]), _count(shard["tokens"], "tokens"), str(shard["sha256"]))
        for shard in fields["shards"]
    )
    for shard in shards:
        # A name is not a path: nothing outside the directory is opened.
        if not _SHARD_NAME.fullmatch(shard.file):
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
        """Return tokens start .. stop - 1 as int64. Raises IndexError outside the split."""
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
    if tokens.dtype != DTYPES[dtype] or len(tokens) != listed.tokens:
        raise ValueError(
            f"{path} holds {len(tokens)} tokens of {tokens.dtype.name}, but {DESCRIPTION} lists "
            f"{listed.tokens} of {dtype}. {_TAKE_AGAIN}"
        )
    return tokens


class OutputFolder:
    """A data set directory in the making: files are written to a hidden folder inside, then moved into place.

    Until `publish` has moved dataset.json, the last file, the directory is not a data set; after an error
    nothing of ours is left. An existing data set stays whole until `publish`. One process writes a directory
    at a time.
    """

    def __init__(self, out: Path) -> None:
        self.out = out

    def __enter__(self) -> Self:
        self._is_new = not self.out.exists()
        with naming_the_file(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            for left in self.out.glob(_PARTIAL + "*"):  # of a run that was killed
                shutil.rmtree(left)
            self.partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self.out))
        return self

    def publish(self, description: Description) -> None:
        """Move everything into place, dataset.json last, and remove what belonged to an older data set."""
        self.publish_fields({"format": FORMAT, "version": VERSION, **asdict(description)}, older=("*.tokens",))

    def publish_fields(self, fields: dict[str, Any], older: tuple[str, ...]) -> None:
        """`publish` a description of any format; older: patterns of the files of a data set that was there before."""
        with naming_the_file(self.out):
            _write_synced(self.partial / DESCRIPTION, json.dumps(fields, indent=2) + "\n")
            (self.out / DESCRIPTION).unlink(missing_ok=True)
            _sync_folder(self.out)
            for file in (file for pattern in older for file in self.out.glob(pattern)):
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


def check_may_write(out: Path) -> None:
    """Raise ValueError if `out` is a file, or holds anything that is not part of a data set."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file, and a data set is a folder. Choose a new or empty folder.")
    ours = {DESCRIPTION, tokenizers.FILE, tokenizers.CONFIG_FILE}
    names = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith(_PARTIAL))
    if foreign := [name for name in names if name not in ours and not _SHARD_NAME.fullmatch(name)]:
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
