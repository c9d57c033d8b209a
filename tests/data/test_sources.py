"""Sources become documents without losing a byte, and whatever cannot be read is named with its place."""

import gzip
import json
import lzma
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bitbell.data.sources as sources
from bitbell.data import corpus_path, open_corpus
from bitbell.data.sources import Document, find_sources, fingerprint, read_documents

Write = Callable[[str, str | bytes], str]


def read(*specs: str, text_field: str = "text", block_lines: int = 200) -> list[Document]:
    return list(read_documents(find_sources(specs), text_field, block_lines))


def texts(*specs: str, text_field: str = "text") -> list[str]:
    return [document.text for document in read(*specs, text_field=text_field)]


def test_the_shipped_corpus_is_the_whole_bible():
    with open_corpus() as corpus:
        verses = corpus.read().split("\n")
    assert verses.pop() == ""
    assert len(verses) == 31102
    assert verses[0] == "In the beginning God created the heaven and the earth."
    assert verses[-1] == "The grace of our Lord Jesus Christ be with you all. Amen."
    assert all(verse == verse.strip() and verse.isascii() for verse in verses)
    assert corpus_path().stat().st_size < 1_000_000


def test_kjv_names_the_shipped_corpus():
    with open_corpus() as corpus:
        assert "".join(texts("kjv")) == corpus.read()


@given(
    lines=st.lists(st.binary(max_size=40), max_size=30),
    block_lines=st.integers(1, 8),
    block_bytes=st.integers(4, 64),
)
@settings(max_examples=200, deadline=None)
def test_blocks_joined_are_the_file_byte_for_byte(
    lines: list[bytes], block_lines: int, block_bytes: int, tmp_path_factory: pytest.TempPathFactory
):
    content = b"\n".join(lines).replace(b"\0", b"\r").decode("latin-1").encode("utf-8")
    path = tmp_path_factory.mktemp("blocks") / "file"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK_BYTES", block_bytes)
        blocks = [block.encode() for block in sources._blocks(path, block_lines)]
    assert b"".join(blocks) == content
    assert all(blocks)
    assert all(len(block) < 2 * block_bytes and block.count(b"\n") <= block_lines for block in blocks)


@pytest.mark.parametrize("character", ["a", "\u00e9", "\u6f22", "\U0001f600"])
@pytest.mark.parametrize("shift", range(4))
def test_a_long_line_is_cut_between_characters(write: Write, character: str, shift: int):
    line = "x" * shift + character * 100_000
    path = write("long.txt", line)
    found = texts(path)
    assert "".join(found) == line
    assert max(len(text.encode()) for text in found) <= 64 * 1024 + 3


def test_blocks_are_whole_lines_and_only_the_last_ends_the_text(write: Write):
    path = write("a.txt", "".join(f"{number}\n" for number in range(450)))
    documents = read(path)
    assert [document.text.count("\n") for document in documents] == [200, 200, 50]
    assert [document.ends for document in documents] == [False, False, True]


def test_line_ends_marks_and_spaces_are_kept(write: Write):
    content = b"\xef\xbb\xbfone\r\n\r\n  two \rthree\x0c\x1c\xe2\x80\xa8four"
    assert "".join(texts(write("a.txt", content))).encode() == content


def test_json_lines_are_documents(write: Write):
    rows = [{"text": "one\ntwo"}, {"text": ""}, {"text": None}, {"text": "th\u00e9ee", "id": 3}]
    path = write("a.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert read(path) == [Document("one\ntwo", ends=True), Document("th\u00e9ee", ends=True)]


def test_parquet_rows_are_documents(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [f"row {number}" for number in range(3000)]
    table = pyarrow.table({"id": range(3002), "body": [*rows, None, ""]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    assert texts(str(tmp_path / "a.parquet"), text_field="body") == rows


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_compressed_files_are_read_as_what_they_hold(write: Write, suffix: str, compress: Callable):
    assert texts(write("a.txt" + suffix, compress(b"one\ntwo\n"))) == ["one\ntwo\n"]
    assert texts(write("b.jsonl" + suffix, compress(b'{"text": "one"}\n{"text": "two"}'))) == ["one", "two"]


def test_a_folder_is_its_visible_files_sorted_by_path(write: Write, tmp_path: Path):
    for name in ("b.txt", "a/z.md", "a/b/c.rst", "Z.py", ".hidden", ".git/config", "empty.txt"):
        write(f"corpus/{name}", "" if name == "empty.txt" else name)
    assert texts(str(tmp_path / "corpus")) == ["Z.py", "a/b/c.rst", "a/z.md", "b.txt"]


def test_sources_keep_the_given_order(write: Write):
    first, second = write("z.txt", "first"), write("a.txt", "second")
    assert texts(first, second, first) == ["first", "second", "first"]


def test_one_name_is_not_read_as_letters(write: Write):
    path = write("a.txt", "text")
    assert [source.name for source in find_sources(path)] == ["a.txt"]


def test_a_fingerprint_shows_changes_and_no_folders(write: Write):
    before = fingerprint(find_sources([write("a.txt", "one")])[0])
    assert before == fingerprint(find_sources([write("elsewhere/a.txt", "one")])[0])
    assert before != fingerprint(find_sources([write("a.txt", "two")])[0])


def test_a_hub_data_set_is_streamed(write_jsonl: Callable[..., str], tmp_path: Path):
    pytest.importorskip("datasets")
    write_jsonl("hub/data/train.jsonl", ["one", "two"], "body")
    write_jsonl("hub/data/test.jsonl", ["three"], "body")
    assert texts(f"hf:{tmp_path}/hub", text_field="body") == ["one", "two"]
    assert texts(f"hf:{tmp_path}/hub::test", text_field="body") == ["three"]
    with pytest.raises(ValueError, match=r"no field 'text'\. Fields there: body"):
        texts(f"hf:{tmp_path}/hub")
    with pytest.raises(ValueError, match=r"hf:.*cannot be read: .*Check name, config, split and connection"):
        texts(f"hf:{tmp_path}/hub::nosuchsplit", text_field="body")


def test_nothing_to_read_is_refused(write: Write, tmp_path: Path):
    with pytest.raises(ValueError, match="no source was given"):
        find_sources([])
    with pytest.raises(FileNotFoundError, match=r"source '.*nowhere' does not exist"):
        find_sources([str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match=r"empty\.txt' is an empty file"):
        find_sources([write("empty.txt", "")])
    (tmp_path / "folder").mkdir()
    write("folder/.hidden", "text")
    with pytest.raises(ValueError, match=r"no files found in folder '.*folder'"):
        find_sources([str(tmp_path / "folder")])


@pytest.mark.parametrize("before", [0, 5, 70_000])
def test_a_binary_file_is_refused_with_the_byte_offset(write: Write, before: int):
    good = ("x" * 9 + "\n") * (before // 10) + "x" * (before % 10)
    with pytest.raises(ValueError, match=rf"a\.bin is a binary file, not text: NUL byte at byte offset {before}\."):
        read(write("a.bin", good.encode() + b"\0rest"))
    with pytest.raises(ValueError, match=rf"a\.txt is not UTF-8 text: .* at byte offset {before}\."):
        read(write("a.txt", good.encode() + b"\xff\nrest"))
    with pytest.raises(ValueError, match=rf"b\.txt is not UTF-8 text: unexpected end.* at byte offset {before}\."):
        read(write("b.txt", good.encode() + "\u6f22".encode()[:2]))


def test_bad_bytes_in_one_long_line_have_the_right_offset(write: Write):
    content = "\u6f22".encode() * 50_000
    with pytest.raises(ValueError, match="at byte offset 150000"):
        read(write("a.txt", content + b"\x80\x80"))


def test_bytes_that_only_continue_are_refused(write: Write):
    with pytest.raises(ValueError, match="at byte offset 0"):
        read(write("a.txt", b"\x80" * 200_000))


@pytest.mark.parametrize("line", ["{", "not json", '{"text": "a"} {"text": "b"}', "[" * 100_000])
def test_a_broken_json_line_is_refused_with_file_and_line(write: Write, line: str):
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: broken JSON"):
        read(write("a.jsonl", f'{{"text": "one"}}\n\n{line}\n'))


def test_json_that_is_no_record_of_text_is_refused(write: Write):
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: a JSON object is needed, got list"):
        read(write("a.jsonl", '["text"]'))
    with pytest.raises(ValueError, match=r"line 1: no field 'text'\. Fields there: body, id\."):
        read(write("a.jsonl", '{"body": "x", "id": 1}'))
    with pytest.raises(ValueError, match=r"line 1: field 'text' must be text, got int"):
        read(write("a.jsonl", '{"text": 5}'))
    with pytest.raises(ValueError, match=r"line 1: field 'text' is no valid Unicode \(surrogates not allowed\)"):
        read(write("a.jsonl", '{"text": "\\ud800"}'))
    with pytest.raises(ValueError, match=r"a\.jsonl is not UTF-8 text: .* at byte offset 16"):
        read(write("a.jsonl", b'{"text": "one"}\n\xff'))


def test_bad_parquet_files_are_refused(write: Write, tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    with pytest.raises(ValueError, match=r"a\.parquet is damaged or no Parquet file"):
        read(write("a.parquet", "no parquet"))
    parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet: no field 'text'\. Fields there: body, id\."):
        read(str(tmp_path / "b.parquet"))
    with pytest.raises(ValueError, match=r"b\.parquet, row 0: field 'id' must be text, got int"):
        read(str(tmp_path / "b.parquet"), text_field="id")
    content = bytearray((tmp_path / "b.parquet").read_bytes())
    content[4:40] = b"\xff" * 36
    with pytest.raises(ValueError, match=r"c\.parquet is damaged near row 0"):
        read(write("c.parquet", bytes(content)), text_field="body")


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_damaged_archives_are_refused(write: Write, suffix: str, compress: Callable):
    whole = compress(bytes(range(1, 128)) * 100)
    for content in (b"no archive", whole[: len(whole) // 2], whole[:30] + b"\xff\xff\xff" + whole[33:]):
        with pytest.raises(ValueError, match=rf"a\.txt\{suffix} is damaged or no {suffix} file"):
            read(write("a.txt" + suffix, content))


def test_missing_packages_are_named_with_the_command(write: Write, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pyarrow is not installed\. Install it with: pip install 'bitbell\[data\]'"):
        read(write("a.parquet", "x"))
    with pytest.raises(ValueError, match=r"datasets, which is not installed\. .*pip install 'bitbell\[data\]'"):
        read("hf:anything")


@pytest.mark.parametrize("spec", ["hf:", "hf::config", "hf:a:b:c:d"])
def test_a_malformed_hub_source_is_refused(spec: str):
    with pytest.raises(ValueError, match=r"not of the form hf:NAME\[:CONFIG\]\[:SPLIT\]"):
        read(spec)


def test_reading_holds_one_block_at_a_time(write: Write):
    path = write("big.txt", ("word " * 20 + "\n") * 100_000)  # 10 MB
    import tracemalloc

    tracemalloc.start()
    count = sum(1 for _ in read_documents(find_sources([path]), "text", 200))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 500
    assert peak < 1_000_000


def test_documents_of_the_corpus_are_neighbours(write: Write):
    documents = read("kjv")
    assert all(before.text.endswith("\n") for before, _ in pairwise(documents))
