"""Tokenizing loses nothing, holds out what was asked for, and leaves either a whole data set or none."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bitbell.data.tokenization as tokenization
from bitbell.data import TokenDataset, load_tokenizer, open_corpus, tokenize
from bitbell.data.tokenization import HeldOut

Write = Callable[[str, str | bytes], str]
Lines = Callable[[int], str]


def text_of(dataset: TokenDataset, split: str) -> str:
    return dataset.tokenizer().decode(dataset.tokens(split, 0, dataset.num_tokens(split)))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:1024"])
def test_the_corpus_comes_back_from_train_and_valid(tokenizer: str, tmp_path: Path):
    dataset = tokenize(["kjv"], tmp_path / "out", tokenizer=tokenizer, seed=3)
    dataset.verify()
    with open_corpus() as corpus:
        original = corpus.read()
    blocks = ["".join(f"{line}\n" for line in part) for part in parts(original.split("\n")[:-1], 200)]
    held_out = HeldOut(Fraction(1, 20), seed=3, first_group=20)
    for split in ("train", "valid"):
        wanted = "".join(block for index, block in enumerate(blocks) if held_out.split(index) == split)
        assert text_of(dataset, split) == wanted + "<|endoftext|>"
        assert dataset.num_bytes(split) == len(wanted.encode())
    assert 0.04 < dataset.num_bytes("valid") / len(original) < 0.06


def parts(items: list[str], size: int) -> list[list[str]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def test_no_line_of_a_small_file_is_lost_or_changed(write: Write, lines_of_text: Lines, tmp_path: Path):
    text = lines_of_text(333) + "the last line has no end"
    dataset = tokenize([write("a.txt", text)], tmp_path / "out", tokenizer="bytes", shard_tokens=1000)
    both = [text_of(dataset, split).removesuffix("<|endoftext|>") for split in ("train", "valid")]
    assert sorted(line for part in both for line in part.split("\n") if line) == sorted(text.split("\n"))
    assert dataset.num_bytes("train") + dataset.num_bytes("valid") == len(text.encode())
    assert len(dataset.description.splits["train"].shards) > 10


def test_every_json_document_ends_with_end_of_text(write_jsonl: Callable[..., str], tmp_path: Path):
    texts = [f"document {number}" for number in range(100)]
    dataset = tokenize([write_jsonl("a.jsonl", texts)], tmp_path / "out", tokenizer="bytes")
    train, valid = (text_of(dataset, split).split("<|endoftext|>") for split in ("train", "valid"))
    assert (train.pop(), valid.pop()) == ("", "")
    assert sorted(train + valid) == sorted(texts)
    assert len(valid) == 5
    assert train == [text for text in texts if text not in valid]


def test_text_files_end_in_each_split_and_blocks_do_not(write: Write, lines_of_text: Lines, tmp_path: Path):
    sources = [write(f"{name}.txt", lines_of_text(100)) for name in "ab"]
    dataset = tokenize(sources, tmp_path / "out", tokenizer="bytes", valid_fraction=0.2)
    for split in ("train", "valid"):
        assert text_of(dataset, split).count("<|endoftext|>") == 2
        assert text_of(dataset, split).endswith("\n<|endoftext|>")


def test_kinds_of_sources_can_be_mixed(write: Write, write_jsonl: Callable[..., str], tmp_path: Path):
    sources = [
        write("a.txt", "a line\n" * 40),
        write_jsonl("b.jsonl", [f"row {n}" for n in range(40)]),
        "kjv",
    ]
    dataset = tokenize(sources, tmp_path / "out", tokenizer="bytes")
    text = text_of(dataset, "train")
    assert text.startswith("a line\n")
    assert "<|endoftext|>row 3" in text
    assert "And God said, Let there be light" in text + text_of(dataset, "valid")
    assert [source["name"] for source in dataset.description.made_from["sources"]] == [
        "a.txt",
        "b.jsonl",
        "kjv",
    ]


@given(
    fraction=st.fractions(Fraction(1, 50), Fraction(1, 2), max_denominator=1000),
    seed=st.integers(0, 1000),
    count=st.integers(2, 300),
)
@settings(max_examples=100, deadline=None)
def test_about_the_fraction_is_held_out_and_never_none_or_all(fraction: Fraction, seed: int, count: int):
    first_group = min(count, -(-fraction.denominator // fraction.numerator))
    held_out = HeldOut(fraction, seed, first_group)
    splits = [held_out.split(index) for index in range(count)]
    assert set(splits) == {"train", "valid"}
    assert abs(splits.count("valid") - count * fraction) <= 1


def test_the_held_out_documents_depend_on_the_seed_and_are_spread():
    chosen = [
        [index for index in range(2000) if HeldOut(Fraction(1, 20), seed, 20).split(index) == "valid"]
        for seed in (1, 1, 2)
    ]
    assert chosen[0] == chosen[1] != chosen[2]
    assert [index // 20 for index in chosen[0]] == list(range(100))
    assert len({index % 20 for index in chosen[0]}) == 20


@pytest.mark.parametrize("count", [2, 3, 5, 19])
def test_few_documents_still_give_both_splits(count: int, write_jsonl: Callable[..., str], tmp_path: Path):
    texts = [f"document {number}" for number in range(count)]
    dataset = tokenize([write_jsonl("a.jsonl", texts)], tmp_path / "out", tokenizer="bytes")
    assert text_of(dataset, "valid").count("<|endoftext|>") == 1
    assert text_of(dataset, "train").count("<|endoftext|>") == count - 1


def test_a_text_of_two_lines_is_enough(write: Write, tmp_path: Path):
    dataset = tokenize([write("a.txt", "one\ntwo\n")], tmp_path / "out", tokenizer="bytes")
    assert {text_of(dataset, split) for split in ("train", "valid")} == {
        "one\n<|endoftext|>",
        "two\n<|endoftext|>",
    }


def test_two_runs_write_the_same_bytes(write: Write, lines_of_text: Lines, tmp_path: Path):
    source = write("a.txt", lines_of_text(500))
    for name in ("first", "second"):
        tokenize([source], tmp_path / name, tokenizer="bpe:280")
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    tokenize([source], tmp_path / "third", tokenizer="bpe:280", seed=1)
    assert contents(tmp_path / "third")["train-00000.tokens"] != contents(tmp_path / "first")["train-00000.tokens"]


def test_bpe_never_sees_the_held_out_text(write_jsonl: Callable[..., str], tmp_path: Path, monkeypatch: Any):
    seen: list[str] = []

    def spy(spec: str, texts: Any = None) -> Any:
        seen.extend(texts)
        return load_tokenizer("bytes")

    monkeypatch.setattr(tokenization, "load_tokenizer", spy)
    texts = [f"document {number}" for number in range(60)]
    dataset = tokenize([write_jsonl("a.jsonl", texts)], tmp_path / "out", tokenizer="bpe:280")
    assert seen == text_of(dataset, "train").split("<|endoftext|>")[:-1]
    monkeypatch.setattr(tokenization, "_BPE_SAMPLE_BYTES", 25)
    seen.clear()
    tokenize([write_jsonl("a.jsonl", texts)], tmp_path / "bounded", tokenizer="bpe:280")
    assert len(seen) == 3


def test_a_large_vocabulary_is_stored_in_32_bits(write: Write, lines_of_text: Lines, tmp_path: Path):
    load_tokenizer("bytes").save(tmp_path / "wide")
    fields = json.loads((tmp_path / "wide/tokenizer.json").read_text())
    fields["model"]["vocab"]["a far token"] = 100_000
    (tmp_path / "wide/tokenizer.json").write_text(json.dumps(fields))
    source = write("a.txt", lines_of_text(50))
    dataset = tokenize([source], tmp_path / "out", tokenizer=str(tmp_path / "wide"))
    assert (dataset.vocab_size, dataset.description.dtype) == (100_001, "uint32")
    assert text_of(dataset, "valid").count("naive".replace("i", "\u00ef")) >= 1
    dataset.verify()


def test_progress_counts_documents_and_bytes(write_jsonl: Callable[..., str], tmp_path: Path):
    calls: list[tuple[int, int]] = []
    texts = ["five\u00e9"] * 2500
    tokenize(
        [write_jsonl("a.jsonl", texts)],
        tmp_path / "out",
        tokenizer="bytes",
        progress=lambda documents, size: calls.append((documents, size)),
    )
    assert calls == [(1024, 6144), (2048, 12288), (2500, 15000)]


def test_the_same_data_set_is_returned_and_not_made_again(write: Write, lines_of_text: Lines, tmp_path: Path):
    source, out = write("a.txt", lines_of_text(100)), tmp_path / "out"
    tokenize([source], out, tokenizer="bytes")
    before = (out / "dataset.json").stat().st_mtime_ns
    assert tokenize([source], out, tokenizer="bytes").vocab_size == 257
    assert (out / "dataset.json").stat().st_mtime_ns == before


def test_another_data_set_replaces_it_only_when_told_to(write: Write, lines_of_text: Lines, tmp_path: Path):
    source, out = write("a.txt", lines_of_text(100)), tmp_path / "out"
    tokenize([source], out, tokenizer="bytes", shard_tokens=500)
    before = contents(out)
    with pytest.raises(ValueError, match=r"out already holds a data set with other seed, shard_tokens\. "):
        tokenize([source], out, tokenizer="bytes", seed=1)
    write("a.txt", lines_of_text(101))
    with pytest.raises(ValueError, match=r"with other sources\. .*overwrite=True"):
        tokenize([source], out, tokenizer="bytes", shard_tokens=500)
    assert contents(out) == before
    tokenize([source], out, tokenizer="bpe:280", overwrite=True).verify()
    assert sorted(contents(out)) == [
        "dataset.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "train-00000.tokens",
        "valid-00000.tokens",
    ]


def test_another_tokenizer_file_under_the_same_path_is_noticed(write: Write, lines_of_text: Lines, tmp_path: Path):
    source, out, path = write("a.txt", lines_of_text(100)), tmp_path / "out", tmp_path / "tokenizer"
    load_tokenizer("bytes").save(path)
    tokenize([source], out, tokenizer=str(path))
    tokenize([source], out, tokenizer=str(path / "tokenizer.json"))
    load_tokenizer("bpe:280", [lines_of_text(100)]).save(path)
    with pytest.raises(ValueError, match="with other tokenizer"):
        tokenize([source], out, tokenizer=str(path))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_other_files_is_never_written_to(write: Write, tmp_path: Path, overwrite: bool):
    source = write("a.txt", "one\ntwo\n")
    write("out/thesis.doc", "precious")
    with pytest.raises(ValueError, match=r"out holds other files \(thesis\.doc\)"):
        tokenize([source], tmp_path / "out", tokenizer="bytes", overwrite=overwrite)
    assert contents(tmp_path / "out") == {"thesis.doc": b"precious"}
    with pytest.raises(ValueError, match=r"a\.txt is a file, and a data set is a folder"):
        tokenize([source], source, tokenizer="bytes", overwrite=overwrite)


def test_an_unwritable_folder_is_refused(write: Write, tmp_path: Path):
    source = write("a.txt", "one\ntwo\n")
    with pytest.raises(OSError, match=r"cannot write .*a\.txt/out: Not a directory\. Choose a place"):
        tokenize([source], Path(source) / "out", tokenizer="bytes")
    with pytest.raises(OSError, match=r"cannot write /proc/out: No such file or directory"):
        tokenize([source], "/proc/out", tokenizer="bytes")


def test_an_error_on_the_way_leaves_nothing(write: Write, lines_of_text: Lines, tmp_path: Path):
    bad = [write("a.txt", lines_of_text(5000)), write("b.txt", b"text\n\xff")]
    with pytest.raises(ValueError, match=r"b\.txt is not UTF-8"):
        tokenize(bad, tmp_path / "out", tokenizer="bytes")
    assert not (tmp_path / "out").exists()


def test_an_error_on_the_way_leaves_an_older_data_set_whole(write: Write, lines_of_text: Lines, tmp_path: Path):
    good, out = write("a.txt", lines_of_text(5000)), tmp_path / "out"
    tokenize([good], out, tokenizer="bytes")
    before = contents(out)

    def stop(documents: int, size: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize([good], out, tokenizer="bytes", seed=9, overwrite=True, progress=stop)
    assert contents(out) == before


def test_a_killed_run_never_looks_complete_and_the_next_clears_up(write: Write, lines_of_text: Lines, tmp_path: Path):
    source, out = write("a.txt", lines_of_text(5000)), tmp_path / "out"
    script = (
        "import sys, time; from bitbell.data import tokenize\n"
        "def wait(*_): print('go', flush=True); time.sleep(60)\n"
        "tokenize([sys.argv[1]], sys.argv[2], tokenizer='bytes', progress=wait)"
    )
    run = subprocess.Popen([sys.executable, "-c", script, source, str(out)], stdout=subprocess.PIPE)
    assert run.stdout is not None
    assert run.stdout.readline() == b"go\n"
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    assert [name.name[:9] for name in out.iterdir()] == [".partial-"]
    with pytest.raises(FileNotFoundError, match=r"out is no data set: it has no dataset\.json"):
        TokenDataset.open(out)
    tokenize([source], out, tokenizer="bytes").verify()
    assert not list(out.glob(".partial-*"))


def test_a_stop_while_files_are_moved_leaves_no_data_set(write: Write, tmp_path: Path, monkeypatch: Any):
    source, out = write("a.txt", "one\ntwo\n" * 50), tmp_path / "out"
    tokenize([source], out, tokenizer="bytes")
    move, moved = os.replace, []

    def fail_at_the_third(old: Path, new: Path) -> None:
        moved.append(new)
        if len(moved) == 3:
            raise OSError(28, "No space left on device")
        move(old, new)

    monkeypatch.setattr(os, "replace", fail_at_the_third)
    with pytest.raises(OSError, match=r"cannot write .*out: No space left on device"):
        tokenize([source], out, tokenizer="bytes", seed=1, overwrite=True)
    assert not (out / "dataset.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"valid_fraction": 0}, r"valid_fraction must be in 0\.000001 \.\. 0\.5, got 0\."),
        ({"valid_fraction": 0.6}, r"valid_fraction must be in 0\.000001 \.\. 0\.5, got 0\.6"),
        ({"valid_fraction": float("nan")}, "valid_fraction must be in .* got nan"),
        ({"shard_tokens": 0}, "shard_tokens must be at least 1, got 0"),
        ({"tokenizer": "bpe"}, "unknown tokenizer 'bpe'"),
        ({"tokenizer": "bpe:10"}, "too small a vocabulary"),
    ],
)
def test_arguments_out_of_range_are_refused_before_any_work(arguments: dict, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        tokenize(["kjv"], tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_corpus_without_two_documents_is_refused(write: Write, write_jsonl: Callable[..., str], tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"\(a\.txt\) is too small: it holds one document, and at least two"):
        tokenize([write("a.txt", "one line\n")], out, tokenizer="bytes")
    with pytest.raises(ValueError, match=r"\(b\.jsonl\) is too small: it holds no text at all"):
        tokenize([write_jsonl("b.jsonl", ["", ""])], out, tokenizer="bytes")
    assert not out.exists()


def test_a_text_too_small_for_the_vocabulary_is_refused(write: Write, tmp_path: Path):
    with pytest.raises(ValueError, match=r'"bpe:1024": the training text is too small'):
        tokenize([write("a.txt", "one\ntwo\n")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_field_of_the_records_is_named(write_jsonl: Callable[..., str], tmp_path: Path):
    with pytest.raises(ValueError, match=r"line 1: no field 'text'\. Fields there: body\."):
        tokenize([write_jsonl("a.jsonl", ["x", "y"], field="body")], tmp_path / "out")


def test_memory_does_not_grow_with_the_corpus(write: Write, tmp_path: Path):
    source = write("big.txt", ("word " * 20 + "\n") * 200_000)  # 20 MB
    import tracemalloc

    started = time.monotonic()
    tracemalloc.start()
    documents = tokenization._plan(
        tokenization.find_sources([source]), tokenization.Settings("bytes", "text", 0.05, 10**8, 0)
    )
    assert sum(len(batch) for batch in tokenization._batches(documents)) == 1000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6_000_000
    assert time.monotonic() - started < 60
    assert tmp_path.exists()
