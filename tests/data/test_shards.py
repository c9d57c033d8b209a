"""A shard is exactly its header and its tokens; anything else is refused by name."""

import hashlib
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitbell.data.shards import ShardInfo, ShardWriter, narrowest_dtype, open_shard, verify_shard


def write_shard(folder: Path, tokens: list[int], dtype: str = "uint16") -> Path:
    writer = ShardWriter(folder, "train", dtype, shard_tokens=10**9)
    writer.append(tokens)
    return folder / writer.finish()[0].file


def test_the_format_is_what_the_manual_says(tmp_path: Path):
    path = write_shard(tmp_path, [1, 2, 65535])
    header = b"BITBELLT" + struct.pack("<IIQQ", 1, 2, 3, 0)
    assert path.read_bytes() == header + struct.pack("<3H", 1, 2, 65535)
    path = write_shard(tmp_path / "wide", [70000], "uint32") if (tmp_path / "wide").mkdir() is None else path
    assert path.read_bytes() == b"BITBELLT" + struct.pack("<IIQQI", 1, 4, 1, 0, 70000)


def test_the_narrowest_type_that_holds_the_vocabulary_is_taken():
    assert [narrowest_dtype(size) for size in (257, 65536, 65537)] == ["uint16", "uint16", "uint32"]


@given(
    pieces=st.lists(st.lists(st.integers(0, 65535), max_size=20), max_size=10),
    shard_tokens=st.integers(1, 30),
)
@settings(max_examples=50, deadline=None)
def test_what_is_appended_is_what_the_shards_hold(
    pieces: list[list[int]], shard_tokens: int, tmp_path_factory: pytest.TempPathFactory
):
    folder = tmp_path_factory.mktemp("shards")
    writer = ShardWriter(folder, "valid", "uint16", shard_tokens)
    for piece in pieces:
        writer.append(piece)
    shards = writer.finish()
    tokens = [int(token) for shard in shards for token in open_shard(folder / shard.file)]
    assert tokens == [token for piece in pieces for token in piece]
    assert [shard.file for shard in shards] == [f"valid-{index:05d}.tokens" for index in range(len(shards))]
    assert all(shard.tokens == shard_tokens for shard in shards[:-1])
    for shard in shards:
        verify_shard(folder / shard.file, shard, vocab_size=65536)


def test_the_checksum_is_that_of_the_tokens(tmp_path: Path):
    writer = ShardWriter(tmp_path, "train", "uint16", 100)
    writer.append([1, 2])
    writer.append([3])
    assert writer.finish()[0].sha256 == hashlib.sha256(struct.pack("<3H", 1, 2, 3)).hexdigest()


@pytest.mark.parametrize("kept", [8, 31, 32, 33, 37])
def test_a_truncated_shard_is_refused(tmp_path: Path, kept: int):
    path = write_shard(tmp_path, [1, 2, 3])
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"train-00000\.tokens is truncated: .*{kept} bytes"):
        open_shard(path)


def test_a_grown_shard_is_refused(tmp_path: Path):
    path = write_shard(tmp_path, [1, 2, 3])
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match="is longer than its header says: it has 39 bytes, and 3 tokens"):
        open_shard(path)


@pytest.mark.parametrize("content", [b"", b"BITBELL", b"something else, which is longer than a header"])
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "train-00000.tokens"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00000\.tokens is no token shard of bitbell"):
        open_shard(path)


def test_other_versions_and_types_are_refused(tmp_path: Path):
    path = tmp_path / "train-00000.tokens"
    path.write_bytes(b"BITBELLT" + struct.pack("<IIQQ", 2, 2, 0, 0))
    with pytest.raises(ValueError, match="format version 2; this bitbell reads version 1"):
        open_shard(path)
    path.write_bytes(b"BITBELLT" + struct.pack("<IIQQ", 1, 3, 0, 0))
    with pytest.raises(ValueError, match="dtype code 3; 2"):
        open_shard(path)
    path.write_bytes(b"BITBELLT" + struct.pack("<IIQQ", 1, 2, 2**63, 0))
    with pytest.raises(ValueError, match="truncated"):
        open_shard(path)


def test_a_token_outside_the_vocabulary_is_found_with_its_position(tmp_path: Path):
    path = write_shard(tmp_path, [1, 2, 300, 4])
    with pytest.raises(ValueError, match="holds token 300 at position 2, outside the vocabulary of 257"):
        verify_shard(path, ShardInfo(path.name, 4, ""), vocab_size=257)


def test_a_changed_token_is_found_by_the_checksum(tmp_path: Path):
    writer = ShardWriter(tmp_path, "train", "uint16", 100)
    writer.append([1, 2, 3])
    (listed,) = writer.finish()
    path = tmp_path / listed.file
    path.write_bytes(path.read_bytes()[:-2] + b"\x07\x00")
    with pytest.raises(ValueError, match="its checksum differs"):
        verify_shard(path, listed, vocab_size=257)


def test_a_write_that_fails_names_the_file(tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as a full disk: the system refuses to grow the file
    writer = ShardWriter(tmp_path, "train", "uint16", 10**9)
    try:
        with pytest.raises(OSError, match=r"cannot write .*train-00000\.tokens: File too large"):
            writer.append(list(np.zeros(200_000, dtype=int)))
    finally:
        writer.close()
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
