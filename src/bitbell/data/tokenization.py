"""Text to shards, once: documents are read, split, encoded in batches and written, none of them kept.

    sources --> documents --split--> train | valid --encode--> tokens --> shards --> dataset.json

The split is decided by the number of a document. Documents are taken in consecutive groups of 1 /
valid_fraction, and a hash of the seed and the group chooses the one document of each group that is held out:
the held-out text is spread evenly over the corpus, its share is what was asked for, and no document depends
on what comes after it.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

from bitbell.data import tokenizers
from bitbell.data.directory import (
    DESCRIPTION,
    SPLITS,
    Description,
    OutputFolder,
    SplitInfo,
    check_may_write,
    read_description,
)
from bitbell.data.loader import TokenDataset
from bitbell.data.shards import ShardWriter, narrowest_dtype
from bitbell.data.shuffle import draw
from bitbell.data.sources import Document, Source, find_sources, fingerprint, read_documents
from bitbell.data.tokenizers import TextTokenizer, check_tokenizer_spec, load_tokenizer

_BLOCK_LINES = (200, 50, 10, 1)  # the first that cuts the corpus into enough blocks for an even split
_BPE_SAMPLE_BYTES = 50_000_000
_BATCH_BYTES = 1_000_000
_BATCH_DOCUMENTS = 1024

Progress = Callable[[int, int], None]


def tokenize(
    sources: Sequence[str],
    out: str | Path,
    *,
    tokenizer: str = "bpe:1024",
    text_field: str = "text",
    valid_fraction: float = 0.05,
    shard_tokens: int = 100_000_000,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> TokenDataset:
    """Tokenize sources into the data set directory `out`, and open it.

    `sources` are described in `bitbell.data.sources`, `tokenizer` in `bitbell.data.tokenizers`. `progress` is
    called with the documents and the bytes of text done so far. A data set that is already there is returned
    as it is if it was made from the same files with the same settings, and else replaced only with
    `overwrite`.

    Raises ValueError, or an OSError, that names the argument, source or file and what is wrong with it.
    """
    settings = Settings(tokenizer, text_field, valid_fraction, shard_tokens, seed)
    found, out = find_sources(sources), Path(out)
    check_may_write(out)
    made_from = _record(found, settings)
    if (existing := _existing(out, made_from, overwrite)) is not None:
        return existing
    with OutputFolder(out) as folder:
        corpus = _plan(found, settings)
        opened = load_tokenizer(tokenizer, texts=corpus.sample_of_training_text())
        opened.save(folder.partial)
        splits = _write_splits(corpus, opened, folder.partial, settings, progress)
        dtype = narrowest_dtype(opened.vocab_size)
        folder.publish(Description(dtype, opened.vocab_size, opened.name, splits, made_from))
    return TokenDataset.open(out)


@dataclass(frozen=True)
class Settings:
    """The arguments that decide what the data set holds."""

    tokenizer: str
    text_field: str
    valid_fraction: float
    shard_tokens: int
    seed: int

    def __post_init__(self) -> None:
        check_tokenizer_spec(self.tokenizer)
        if not 1e-6 <= self.valid_fraction <= 0.5:
            raise ValueError(
                f"valid_fraction must be in 0.000001 .. 0.5, got {self.valid_fraction}. 0.05 holds out one twentieth."
            )
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens must be at least 1, got {self.shard_tokens}.")


def _record(found: list[Source], settings: Settings) -> dict[str, Any]:
    """What dataset.json remembers of its making: no paths, so that a moved corpus is still the same."""
    record = {**asdict(settings), "sources": [fingerprint(source) for source in found]}
    path = Path(settings.tokenizer)
    file = path / tokenizers.FILE if path.is_dir() else path
    if settings.tokenizer != "bytes" and file.is_file():
        record["tokenizer"] = fingerprint(Source(tokenizers.FILE, file))
    return record


def _existing(out: Path, made_from: dict[str, Any], overwrite: bool) -> TokenDataset | None:
    """The data set in `out` if it is the wanted one; None if `out` is free or may be overwritten."""
    if overwrite or not (out / DESCRIPTION).is_file():
        return None
    there = read_description(out).made_from
    if different := sorted(key for key in made_from if there.get(key) != made_from[key]):
        raise ValueError(
            f"{out} already holds a data set with other {', '.join(different)}. "
            "Choose another folder, or replace it with overwrite=True."
        )
    return TokenDataset.open(out)


@dataclass(frozen=True)
class HeldOut:
    """Says which documents are held out, by number; the first group has `first_group` documents."""

    fraction: Fraction
    seed: int
    first_group: int

    def split(self, index: int) -> str:
        """Return "valid" for one document of each group and "train" for the others."""
        group = index * self.fraction.numerator // self.fraction.denominator
        start, end = self._start(group), self._start(group + 1)
        size = self.first_group if group == 0 else end - start
        return "valid" if index - start == draw(self.seed, group) % size else "train"

    def _start(self, group: int) -> int:
        """The first index whose group is `group`: group / fraction, rounded up."""
        return -(-group * self.fraction.denominator // self.fraction.numerator)


@dataclass(frozen=True)
class _Corpus:
    """Documents with their split, which can be streamed as often as needed."""

    sources: list[Source]
    text_field: str
    block_lines: int
    held_out: HeldOut

    def __iter__(self) -> Iterator[tuple[str, Document]]:
        for index, document in enumerate(read_documents(self.sources, self.text_field, self.block_lines)):
            yield self.held_out.split(index), document

    def sample_of_training_text(self) -> Iterator[str]:
        """The training documents from the start of the corpus up to the size that BPE is trained on."""
        size = 0
        for split, document in self:
            if split == "train":
                size += len(document.text.encode())
                yield document.text
            if size >= _BPE_SAMPLE_BYTES:
                return


def _plan(found: list[Source], settings: Settings) -> _Corpus:
    """Choose how finely text files are cut, by counting documents until there are enough for one group."""
    fraction = Fraction(settings.valid_fraction).limit_denominator(1_000_000)
    enough = -(-fraction.denominator // fraction.numerator)
    for block_lines in _BLOCK_LINES:
        documents = read_documents(found, settings.text_field, block_lines)
        count = sum(1 for _ in islice(documents, enough))
        if count == enough:
            break
    if count < 2:
        amount = "one document" if count else "no text at all"
        raise ValueError(
            f"the corpus ({', '.join(source.name for source in found[:3])}) is too small: it holds {amount}, "
            "and at least two documents (lines of a text file) are needed, to train on and to hold out. "
            "Give more text."
        )
    return _Corpus(found, settings.text_field, block_lines, HeldOut(fraction, settings.seed, count))


class _SplitWriter:
    """Writes one split; `is_open` says whether a text has begun that has no end-of-text token yet."""

    def __init__(self, folder: Path, split: str, tokenizer: TextTokenizer, shard_tokens: int) -> None:
        self._shards = ShardWriter(folder, split, narrowest_dtype(tokenizer.vocab_size), shard_tokens)
        self._end_of_text = tokenizer.end_of_text
        self._tokens = self._bytes = 0
        self._is_open = False

    def append(self, text: str, ids: list[int]) -> int:
        """Write one document and return its size in bytes of UTF-8."""
        size = len(text.encode())
        self._write(ids)
        self._bytes += size
        self._is_open = True
        return size

    def end_text(self) -> None:
        if self._is_open:
            self._write([self._end_of_text])
            self._is_open = False

    def _write(self, ids: list[int]) -> None:
        self._shards.append(ids)
        self._tokens += len(ids)

    def finish(self) -> SplitInfo:
        return SplitInfo(self._tokens, self._bytes, self._shards.finish())

    def close(self) -> None:
        self._shards.close()


def _write_splits(
    corpus: _Corpus, tokenizer: TextTokenizer, folder: Path, settings: Settings, progress: Progress | None
) -> dict[str, SplitInfo]:
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                contextlib.closing(_SplitWriter(folder, split, tokenizer, settings.shard_tokens))
            )
            for split in SPLITS
        }
        documents = size = 0
        for batch in _batches(corpus):
            encoded = tokenizer.encode_batch([document.text for _, document in batch])
            for (split, document), ids in zip(batch, encoded, strict=True):
                size += writers[split].append(document.text, ids)
                if document.ends:  # a text file may have blocks in both splits, and ends in both
                    for writer in writers.values():
                        writer.end_text()
            documents += len(batch)
            if progress is not None:
                progress(documents, size)
        return {split: writer.finish() for split, writer in writers.items()}


def _batches(corpus: _Corpus) -> Iterator[list[tuple[str, Document]]]:
    """Group documents for the tokenizer, which encodes a batch on all cores."""
    batch: list[tuple[str, Document]] = []
    characters = 0
    for item in corpus:
        batch.append(item)
        characters += len(item[1].text)
        if characters >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
