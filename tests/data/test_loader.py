"""Batches are a function of the step: every window once an epoch, any step at once, ranks side by side."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from bitbell.data import Batches, TokenDataset, windows
from bitbell.data.directory import Description, OutputFolder, SplitInfo
from bitbell.data.shards import ShardWriter, narrowest_dtype
from bitbell.data.tokenizers import load_tokenizer


def counting_dataset(folder: Path, tokens: int, shard_tokens: int = 10**9) -> TokenDataset:
    """A data set whose token at position p is p itself, so that a window shows where it is from."""
    tokenizer = load_tokenizer("bytes")
    dtype, splits = narrowest_dtype(10**6), {}
    with OutputFolder(folder) as out:
        tokenizer.save(out.partial)
        for split in ("train", "valid"):
            writer = ShardWriter(out.partial, split, dtype, shard_tokens)
            writer.append(range(tokens))
            splits[split] = SplitInfo(tokens, tokens, writer.finish())
        out.publish(Description(dtype, 10**6, "bytes", splits, {}))
    return TokenDataset.open(folder)


@given(
    tokens=st.integers(2, 400),
    sequence_length=st.integers(1, 30),
    batch_size=st.integers(1, 7),
    shard_tokens=st.integers(20, 100),
    seed=st.integers(0, 100),
)
@settings(max_examples=20, deadline=None, phases=[Phase.generate])  # files are too slow to shrink with
def test_every_epoch_has_every_window_exactly_once(
    tokens: int,
    sequence_length: int,
    batch_size: int,
    shard_tokens: int,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
):
    if tokens < sequence_length + 1:
        tokens = sequence_length + 1
    dataset = counting_dataset(tmp_path_factory.mktemp("data") / "out", tokens, shard_tokens)
    batches = Batches(dataset, batch_size=batch_size, sequence_length=sequence_length, seed=seed)
    epochs, count = 3, batches.num_windows
    rows = torch.cat([batches.batch(step) for step in range(-(-epochs * count // batch_size))])
    assert torch.equal(rows, rows[:, :1] + torch.arange(sequence_length + 1))  # consecutive, across shards too
    for epoch in range(epochs):
        starts = np.sort(rows[epoch * count : (epoch + 1) * count, 0].numpy())
        offset = starts[0]
        assert 0 <= offset < sequence_length
        assert np.array_equal(starts, offset + np.arange(count) * sequence_length)
    assert count * sequence_length > tokens - 2 * sequence_length - 1  # at most the two ends are left out


def test_batches_have_the_promised_shape_and_type(dataset: TokenDataset):
    batch = Batches(dataset, batch_size=4, sequence_length=32, seed=0).batch(0)
    assert (batch.shape, batch.dtype) == ((4, 33), torch.int64)


def test_epochs_differ_in_order_and_offset(tmp_path: Path):
    dataset = counting_dataset(tmp_path / "out", 10_000)
    batches = Batches(dataset, batch_size=1, sequence_length=50, seed=0)
    epochs = [
        [int(batches.batch(epoch * batches.num_windows + place)[0, 0]) for place in range(20)] for epoch in range(8)
    ]
    assert len({start % 50 for epoch in epochs for start in epoch}) > 4
    assert len({tuple(start // 50 for start in epoch) for epoch in epochs}) == 8


def test_seeds_differ_and_one_seed_repeats(dataset: TokenDataset):
    first, again, other = (Batches(dataset, batch_size=8, sequence_length=16, seed=seed).batch(5) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_any_step_can_be_asked_at_any_time(dataset: TokenDataset):
    batches = Batches(dataset, batch_size=8, sequence_length=16, seed=1)
    in_order = [batches.batch(step) for step in range(50)]
    fresh = Batches(TokenDataset.open(dataset.path), batch_size=8, sequence_length=16, seed=1)
    for step in (49, 3, 17, 3):
        assert torch.equal(fresh.batch(step), in_order[step])
    assert fresh.batch(10**12).shape == (8, 17)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_joined_are_the_batch_of_one_process(dataset: TokenDataset, world_size: int):
    alone = Batches(dataset, batch_size=3 * world_size, sequence_length=64, seed=5)
    ranks = [
        Batches(dataset, batch_size=3, sequence_length=64, seed=5, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for step in (0, 1, 77):
        assert torch.equal(torch.cat([rank.batch(step) for rank in ranks]), alone.batch(step))


def test_the_order_is_pinned(tmp_path: Path):
    dataset = counting_dataset(tmp_path / "out", 1000)
    batches = Batches(dataset, batch_size=6, sequence_length=100, seed=42)
    assert batches.batch(0)[:, 0].tolist() == [880, 80, 280, 180, 480, 780]


def test_steps_per_epoch_counts_all_ranks(tmp_path: Path):
    dataset = counting_dataset(tmp_path / "out", 1001)
    batches = Batches(dataset, batch_size=2, sequence_length=10, rank=1, world_size=3)
    assert batches.num_windows == 99
    assert batches.steps_per_epoch == 16.5


@given(tokens=st.integers(2, 300), sequence_length=st.integers(1, 40))
@settings(max_examples=15, deadline=None)
def test_evaluation_windows_cover_the_split_in_order(
    tokens: int, sequence_length: int, tmp_path_factory: pytest.TempPathFactory
):
    tokens = max(tokens, sequence_length + 1)
    dataset = counting_dataset(tmp_path_factory.mktemp("data") / "out", tokens, shard_tokens=37)
    found = windows(dataset, "valid", sequence_length=sequence_length)
    assert found.shape == ((tokens - 1) // sequence_length, sequence_length + 1)
    assert found.dtype == torch.int64
    targets = found[:, 1:].flatten()
    assert torch.equal(targets, torch.arange(1, len(targets) + 1))
    assert torch.equal(found[:, :-1].flatten(), targets - 1)
    assert torch.equal(windows(dataset, sequence_length=sequence_length, limit=1), found[:1])


def test_a_limit_above_what_is_there_changes_nothing(dataset: TokenDataset):
    everything = windows(dataset, sequence_length=64)
    assert torch.equal(windows(dataset, sequence_length=64, limit=10**9), everything)


def test_a_split_shorter_than_a_window_is_refused_with_both_lengths(tmp_path: Path):
    dataset = counting_dataset(tmp_path / "out", 100)
    message = r"split 'valid' of .* has 100 tokens, but a window of sequence_length=100 needs 101\. .* 99, or"
    with pytest.raises(ValueError, match=message):
        windows(dataset, sequence_length=100)
    with pytest.raises(ValueError, match=message.replace("valid", "train")):
        Batches(dataset, batch_size=1, sequence_length=100)
    assert Batches(dataset, batch_size=1, sequence_length=99).num_windows == 1


def test_numbers_out_of_range_are_refused(dataset: TokenDataset):
    with pytest.raises(ValueError, match=r"batch_size must be at least 1, got batch_size=0"):
        Batches(dataset, batch_size=0, sequence_length=8)
    with pytest.raises(ValueError, match=r"sequence_length must be at least 1, got sequence_length=-1"):
        Batches(dataset, batch_size=1, sequence_length=-1)
    with pytest.raises(ValueError, match=r"world_size must be at least 1, got world_size=0"):
        Batches(dataset, batch_size=1, sequence_length=8, world_size=0)
    with pytest.raises(ValueError, match=r"rank must be in 0 \.\. 1 for world_size=2, got rank=2"):
        Batches(dataset, batch_size=1, sequence_length=8, rank=2, world_size=2)
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        Batches(dataset, batch_size=1, sequence_length=8).batch(-1)
    with pytest.raises(ValueError, match=r"limit must be at least 1, got limit=0"):
        windows(dataset, sequence_length=8, limit=0)
    with pytest.raises(ValueError, match=r"unknown split 'test'\. A data set has 'train' and 'valid'"):
        Batches(dataset, "test", batch_size=1, sequence_length=8)
    with pytest.raises(IndexError, match="outside a split"):
        dataset.tokens("train", 0, 10**9)


def test_the_data_set_tells_its_sizes(dataset: TokenDataset):
    assert dataset.vocab_size == 257
    for split in ("train", "valid"):
        assert dataset.num_tokens(split) == dataset.num_bytes(split) + 1  # bytes, and one end of text
    assert dataset.tokenizer() is dataset.tokenizer()
    assert dataset.tokenizer().name == "bytes"
    assert "vocab_size=257, train=" in repr(dataset)


def test_the_package_is_imported_without_its_heavy_parts():
    script = """
import sys
from bitbell.data import Batches, TokenDataset, load_tokenizer, tokenize
heavy = ("torch", "transformers", "datasets", "pyarrow", "tokenizers")
print([name for name in heavy if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"


def test_every_public_name_of_the_room_exists():
    import bitbell.data

    for name in bitbell.data.__all__:
        assert getattr(bitbell.data, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        bitbell.data.nothing  # noqa: B018
