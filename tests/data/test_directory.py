"""A data set directory that is not what dataset.json says is refused, naming the file."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bitbell.data import TokenDataset


@pytest.fixture
def copy(dataset: TokenDataset, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset.path, tmp_path / "copy"))


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_moved_data_set_opens(copy: Path, dataset: TokenDataset):
    opened = TokenDataset.open(copy, verify=True)
    assert opened.description == dataset.description
    assert TokenDataset.open(str(copy)).num_tokens("train") == dataset.num_tokens("train")


def test_a_folder_without_description_is_refused_with_the_command(tmp_path: Path):
    with pytest.raises(
        FileNotFoundError, match=r"is no data set: .*Make one with: bitbell tokenize SOURCE\.\.\. --out"
    ):
        TokenDataset.open(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere is no data set"):
        TokenDataset.open(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["", "{", "\u00e9{"])
def test_a_broken_description_is_refused(copy: Path, content: str):
    (copy / "dataset.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"dataset\.json is broken"):
        TokenDataset.open(copy)


def test_a_foreign_or_newer_description_is_refused(copy: Path):
    (copy / "dataset.json").write_text("[]")
    with pytest.raises(ValueError, match='its "format" is not "bitbell-tokens"'):
        TokenDataset.open(copy)
    (copy / "dataset.json").write_text('{"format": "bitbell-tokens", "version": 2}')
    with pytest.raises(ValueError, match="format version 2; this bitbell reads version 1"):
        TokenDataset.open(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "dtype must be one of uint16, uint32, got 'float16'"),
        ({"vocab_size": -1}, "vocab_size must be an integer of at least 0, got -1"),
        ({"vocab_size": "many"}, "vocab_size must be an integer"),
        ({"splits": {}}, "KeyError: 'train'"),
        ({"splits": None}, "TypeError"),
        ({"made_from": 5}, "TypeError"),
    ],
)
def test_wrong_fields_of_the_description_are_refused(copy: Path, changes: dict[str, Any], message: str):
    edit(copy, **changes)
    with pytest.raises(ValueError, match=rf"dataset\.json is incomplete or wrong: .*{message}"):
        TokenDataset.open(copy)


def test_shards_outside_the_directory_are_never_opened(copy: Path):
    splits = json.loads((copy / "dataset.json").read_text())["splits"]
    splits["train"]["shards"][0]["file"] = "../train-00000.tokens"
    edit(copy, splits=splits)
    with pytest.raises(ValueError, match=r"'\.\./train-00000\.tokens' is no shard name"):
        TokenDataset.open(copy)


def test_a_wrong_sum_of_tokens_is_refused(copy: Path):
    splits = json.loads((copy / "dataset.json").read_text())["splits"]
    splits["valid"]["tokens"] += 1
    edit(copy, splits=splits)
    with pytest.raises(ValueError, match=r"split valid has .* tokens, but its shards have another sum"):
        TokenDataset.open(copy)


def test_a_missing_shard_is_refused(copy: Path):
    (copy / "train-00002.tokens").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00002\.tokens is missing, but dataset\.json lists it"):
        TokenDataset.open(copy)


def test_a_shard_of_another_data_set_is_refused(copy: Path):
    shutil.copy(copy / "valid-00000.tokens", copy / "train-00001.tokens")
    with pytest.raises(
        ValueError, match=r"train-00001\.tokens holds \d+ tokens of uint16, but dataset\.json lists 7000"
    ):
        TokenDataset.open(copy)


def test_a_truncated_shard_is_refused_at_opening(copy: Path):
    path = copy / "train-00001.tokens"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"train-00001\.tokens is truncated"):
        TokenDataset.open(copy)


def test_verifying_finds_a_changed_token(copy: Path):
    path = copy / "train-00001.tokens"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    TokenDataset.open(copy)
    with pytest.raises(ValueError, match=r"train-00001\.tokens has changed since it was written"):
        TokenDataset.open(copy, verify=True)


def test_tokens_outside_the_vocabulary_are_found_when_read(copy: Path):
    edit(copy, vocab_size=100)
    dataset = TokenDataset.open(copy)
    with pytest.raises(ValueError, match=r"split 'train' holds token \d+ .*outside its vocabulary of 100"):
        dataset.tokens("train", 0, 1000)
    with pytest.raises(ValueError, match=r"outside the vocabulary of 100"):
        dataset.verify()


def test_a_tokenizer_of_another_size_is_refused(copy: Path):
    edit(copy, vocab_size=300)
    with pytest.raises(ValueError, match=r"its tokenizer has 257 tokens, its dataset\.json says 300"):
        TokenDataset.open(copy).tokenizer()
