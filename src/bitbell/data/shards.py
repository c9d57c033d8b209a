"""Flat token files: a fixed header, then the tokens.

A shard is a header of 32 bytes and then its tokens, uint16 or uint32. Everything is little-endian.

    bytes  0 ..  7   magic: the ASCII characters BITBELLT
    bytes  8 .. 11   uint32  format version, 1
    bytes 12 .. 15   uint32  dtype code: the bytes of one token, 2 or 4
    bytes 16 .. 23   uint64  number of tokens
    bytes 24 .. 31   zero

The file is exactly 32 + tokens * bytes long, so a truncated, grown or foreign file is told from its first
bytes and its size. The checksum of a shard is the SHA-256 of its tokens, without the header.
"""

import contextlib
import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
VERSION = 1
_MAGIC = b"BITBELLT"
_HEADER = struct.Struct("<8sIIQQ")
_TAKE_AGAIN = "Tokenize again with overwrite=True, or copy the data set again."


def narrowest_dtype(vocab_size: int) -> str:
    """Return the name of the smallest token type for ids 0 .. vocab_size - 1."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


@dataclass(frozen=True)
class ShardInfo:
    """One shard as dataset.json lists it: `sha256` is that of its tokens without the header."""

    file: str
    tokens: int
    sha256: str


def shard_header(dtype: str, tokens: int) -> bytes:
    """Return the 32 bytes that a shard of `tokens` tokens begins with."""
    return _HEADER.pack(_MAGIC, VERSION, DTYPES[dtype].itemsize, tokens, 0)


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
    dtype = next((dtype for dtype in DTYPES.values() if dtype.itemsize == code), None)
    if dtype is None:
        raise ValueError(f"{path} has dtype code {code}; 2 (uint16) and 4 (uint32) are known. {_TAKE_AGAIN}")
    if size != (expected := _HEADER.size + tokens * code):
        problem = "truncated" if size < expected else "longer than its header says"
        raise ValueError(
            f"{path} is {problem}: it has {size} bytes, and {tokens} tokens of {code} bytes need {expected}. "
            f"{_TAKE_AGAIN}"
        )
    if tokens == 0:
        return np.zeros(0, dtype=dtype)  # an empty range cannot be mapped
    return np.memmap(path, dtype=dtype, mode="r", offset=_HEADER.size, shape=(tokens,))


def verify_shard(path: Path, listed: ShardInfo, vocab_size: int) -> None:
    """Read a whole shard. Raises ValueError for a token outside the vocabulary or another checksum."""
    tokens = open_shard(path)
    digest = hashlib.sha256()
    for start in range(0, len(tokens), 1 << 20):
        piece = tokens[start : start + (1 << 20)]
        if (largest := int(piece.max())) >= vocab_size:
            at = start + int(piece.argmax())
            raise ValueError(
                f"{path} holds token {largest} at position {at}, outside the vocabulary of {vocab_size}. {_TAKE_AGAIN}"
            )
        digest.update(piece.tobytes())
    if digest.hexdigest() != listed.sha256:
        raise ValueError(f"{path} has changed since it was written: its checksum differs. {_TAKE_AGAIN}")


class ShardWriter:
    """Write one split's tokens to shards of at most `shard_tokens` tokens; close it in any case."""

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int) -> None:
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self._shards: list[ShardInfo] = []
        self._start_shard()

    def append(self, ids: Sequence[int]) -> None:
        """Add tokens at the end, starting a new shard whenever one is full."""
        tokens = np.asarray(ids, dtype=DTYPES[self._dtype])
        while len(tokens):
            if self._tokens == self._shard_tokens:
                self._end_shard()
                self._start_shard()
            piece, tokens = np.split(tokens, [self._shard_tokens - self._tokens])
            with naming_the_file(self._path):
                self._file.write(piece.tobytes())
            self._digest.update(piece.tobytes())
            self._tokens += len(piece)

    def finish(self) -> tuple[ShardInfo, ...]:
        """Complete the last shard and return the list of all."""
        self._end_shard()
        return tuple(self._shards)

    def close(self) -> None:
        """Let go of the file; what `finish` has not completed is lost."""
        with contextlib.suppress(OSError):  # a full disk, already reported when it was written to
            self._file.close()

    def _start_shard(self) -> None:
        self._path = self._folder / f"{self._split}-{len(self._shards):05d}.tokens"
        self._digest = hashlib.sha256()
        self._tokens = 0
        with naming_the_file(self._path):
            self._file = self._path.open("xb")
            self._file.write(shard_header(self._dtype, tokens=0))

    def _end_shard(self) -> None:
        with naming_the_file(self._path):
            self._file.seek(0)
            self._file.write(shard_header(self._dtype, self._tokens))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._shards.append(ShardInfo(self._path.name, self._tokens, self._digest.hexdigest()))


@contextlib.contextmanager
def naming_the_file(path: Path) -> Iterator[None]:
    """Give an error of writing the path and the remedy (the system names no file when a write fails)."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"cannot write {path}: {reason}. Choose a place with space that you may write to.") from error
