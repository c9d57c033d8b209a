"""Tokens to batches: every batch is a pure function of the step, so a run can stop and go on anywhere.

    step, rank --> sample --> (epoch, place) --shuffle--> (offset, window) --> tokens (batch, length + 1)

A split of T tokens is cut into windows of length + 1 tokens, one every `length` tokens: the last token of a
window is the first of the next, because it is a target here and an input there. Each epoch begins at another
random offset and visits its windows in another random order, every window once. No state is kept, so none has
to be saved.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitbell.data.directory import SPLITS, TokenStream, read_description
from bitbell.data.shards import verify_shard
from bitbell.data.shuffle import Permutation, draw
from bitbell.data.tokenizers import TextTokenizer, load_tokenizer

if TYPE_CHECKING:
    from torch import LongTensor


class TokenDataset:
    """A tokenized data set on disk with the splits "train" and "valid"; get one from `TokenDataset.open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.description = read_description(path)
        self._streams = {
            name: TokenStream(path, split, self.description.dtype) for name, split in self.description.splits.items()
        }
        self._tokenizer: TextTokenizer | None = None

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> "TokenDataset":
        """Open a directory made by `tokenize`; headers and sizes are checked, and with `verify` every token.

        Raises FileNotFoundError if a file is missing, ValueError, naming file and problem, if one is wrong.
        """
        dataset = cls(Path(path))
        if verify:
            dataset.verify()
        return dataset

    @property
    def vocab_size(self) -> int:
        """Every token id is below this."""
        return self.description.vocab_size

    def num_tokens(self, split: str = "train") -> int:
        """Return how many tokens a split has."""
        return self.description.splits[_known(split)].tokens

    def num_bytes(self, split: str = "train") -> int:
        """Return how many bytes of UTF-8 text a split stands for (end-of-text tokens count 0)."""
        return self.description.splits[_known(split)].bytes

    def tokens(self, split: str, start: int, stop: int) -> np.ndarray:
        """Return the tokens start .. stop - 1 of a split as int64. Raises IndexError outside the split."""
        tokens = self._streams[_known(split)].read(start, stop)
        if len(tokens) and (largest := int(tokens.max())) >= self.vocab_size:
            raise ValueError(
                f"{self.path}: split {split!r} holds token {largest} between {start} and {stop}, outside its "
                f"vocabulary of {self.vocab_size}. Tokenize again with overwrite=True, or copy it again."
            )
        return tokens

    def tokenizer(self) -> TextTokenizer:
        """Return the tokenizer that the data set was made with (opened once)."""
        if self._tokenizer is None:
            tokenizer = load_tokenizer(str(self.path.absolute()))
            if tokenizer.vocab_size != self.vocab_size:
                raise ValueError(
                    f"{self.path}: its tokenizer has {tokenizer.vocab_size} tokens, its dataset.json says "
                    f"{self.vocab_size}. Tokenize again, or copy the data set again."
                )
            tokenizer.name = self.description.tokenizer
            self._tokenizer = tokenizer
        return self._tokenizer

    def verify(self) -> None:
        """Read everything. Raises ValueError if a checksum, a token or the tokenizer is not right."""
        for split in self.description.splits.values():
            for shard in split.shards:
                verify_shard(self.path / shard.file, shard, self.vocab_size)
        self.tokenizer()

    def __repr__(self) -> str:
        counts = ", ".join(f"{split}={self.num_tokens(split):,} tokens" for split in SPLITS)
        return f"TokenDataset({str(self.path)!r}, vocab_size={self.vocab_size}, {counts})"


class Batches:
    """Shuffled training batches by step number, without state.

    `batch_size` is what one rank gets at a step. All ranks follow one global order: the batches of the ranks
    of a step, joined, are the batch that a single rank with batch_size * world_size would get.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        split: str = "train",
        *,
        batch_size: int,
        sequence_length: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check_positive(batch_size=batch_size, sequence_length=sequence_length, world_size=world_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0 .. {world_size - 1} for world_size={world_size}, got rank={rank}.")
        tokens = _check_long_enough(dataset, split, sequence_length)
        self._dataset, self._split, self._length, self._seed = dataset, split, sequence_length, seed
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        # Room is left for every offset below the length; a split too short for that keeps one window.
        self.num_windows = max(1, (tokens - sequence_length) // sequence_length)
        self._num_offsets = min(sequence_length, tokens - self.num_windows * sequence_length)

    @property
    def steps_per_epoch(self) -> float:
        """Steps after which every window has been seen once; an epoch may end inside a batch."""
        return self.num_windows / (self._batch_size * self._world_size)

    def batch(self, step: int) -> "LongTensor":
        """Return the token ids of a step, shape (batch_size, sequence_length + 1).

        Inputs are [:, :-1] and targets [:, 1:]. Raises ValueError for a negative step.
        """
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}.")
        first = (step * self._world_size + self._rank) * self._batch_size
        starts = self._window_starts(first + np.arange(self._batch_size))
        return _stack(self._dataset, self._split, starts, self._length)

    def _window_starts(self, samples: np.ndarray) -> np.ndarray:
        """Where in the split the windows at these places of the endless global order begin."""
        epochs, places = np.divmod(samples, self.num_windows)
        starts = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():  # one, or more where an epoch ends inside the batch
            here = epochs == epoch
            order = Permutation(self.num_windows, self._seed, epoch)
            offset = draw(self._seed, epoch) % self._num_offsets
            starts[here] = offset + order(places[here]) * self._length
        return starts


def windows(
    dataset: TokenDataset, split: str = "valid", *, sequence_length: int, limit: int | None = None
) -> "LongTensor":
    """Return consecutive windows from the start of a split for evaluation, shape (n, sequence_length + 1).

    Every token but the first is a target exactly once, up to the last whole window; `limit` bounds n. Raises
    ValueError if the split is shorter than one window.
    """
    _check_positive(sequence_length=sequence_length, **({} if limit is None else {"limit": limit}))
    tokens = _check_long_enough(dataset, split, sequence_length)
    count = (tokens - 1) // sequence_length
    count = count if limit is None else min(count, limit)
    return _stack(dataset, split, np.arange(count) * sequence_length, sequence_length)


def _stack(dataset: TokenDataset, split: str, starts: np.ndarray, length: int) -> "LongTensor":
    import torch

    rows = np.stack([dataset.tokens(split, start, start + length + 1) for start in starts.tolist()])
    tensor: Any = torch.from_numpy(rows)
    return tensor


def _known(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}. A data set has {' and '.join(map(repr, SPLITS))}.")
    return split


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {name}={number}.")


def _check_long_enough(dataset: TokenDataset, split: str, sequence_length: int) -> int:
    """The tokens of the split, if they make at least one window."""
    tokens = dataset.num_tokens(split)
    if tokens < sequence_length + 1:
        raise ValueError(
            f"split {split!r} of {dataset.path} has {tokens} tokens, but a window of "
            f"sequence_length={sequence_length} needs {sequence_length + 1}. "
            f"Use a sequence_length of at most {max(tokens - 1, 0)}, or tokenize more text."
        )
    return tokens
