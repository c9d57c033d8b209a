"""Every tokenizer gives the text back, saves to one format, and says why it cannot open something."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitbell.data import load_tokenizer, open_corpus
from bitbell.data.tokenizers import TextTokenizer

TEXTS = st.text(st.characters(codec="utf-8"))


@pytest.fixture(scope="module")
def bpe() -> TextTokenizer:
    with open_corpus() as corpus:
        return load_tokenizer("bpe:400", [corpus.read(100_000)])


@given(text=TEXTS)
@settings(max_examples=200, deadline=None)
def test_bytes_are_the_utf8_bytes_of_the_text(text: str):
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=TEXTS)
@settings(max_examples=200, deadline=None)
def test_bpe_gives_any_text_back(bpe: TextTokenizer, text: str):
    assert bpe.decode(bpe.encode(text)) == text


def test_bytes_has_257_tokens_and_the_last_ends_a_text():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)
    assert tokenizer.decode([104, 105, 256]) == "hi<|endoftext|>"


def test_bpe_has_the_size_asked_for_and_shortens_text(bpe: TextTokenizer):
    assert bpe.vocab_size == 400
    text = "And God said, Let there be light: and there was light.\n"
    assert len(bpe.encode(text)) < 0.7 * len(text)
    assert bpe.decode([bpe.end_of_text]) == "<|endoftext|>"


def test_training_twice_gives_the_same_tokenizer(tmp_path: Path):
    with open_corpus() as corpus:
        texts = [corpus.read(10_000) for _ in range(5)]
    for name in ("first", "second"):
        load_tokenizer("bpe:400", texts).save(tmp_path / name)
    assert (tmp_path / "first/tokenizer.json").read_bytes() == (tmp_path / "second/tokenizer.json").read_bytes()


@pytest.mark.parametrize("spec", ["bytes", "bpe:400"])
def test_a_batch_is_encoded_like_its_texts_one_by_one(spec: str, lines_of_text: Callable[[int], str]):
    tokenizer = load_tokenizer(spec, [lines_of_text(3), *open_corpus_lines()])
    texts = ["", "one", "two words", lines_of_text(3)]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def open_corpus_lines() -> list[str]:
    with open_corpus() as corpus:
        return corpus.readlines(50_000)


def test_text_cannot_forge_the_end_of_a_document(bpe: TextTokenizer):
    for tokenizer in (load_tokenizer("bytes"), bpe):
        ids = tokenizer.encode("a<|endoftext|>b")
        assert tokenizer.end_of_text not in ids
        assert tokenizer.decode(ids) == "a<|endoftext|>b"


@pytest.mark.parametrize("spec", ["bytes", "bpe:300"])
def test_a_saved_tokenizer_opens_from_the_folder_and_from_the_file(spec: str, tmp_path: Path):
    tokenizer = load_tokenizer(spec, open_corpus_lines())
    tokenizer.save(tmp_path / "saved")
    text = "In the beginning<|endoftext|> \u00e9\r\n\ttwo  spaces"
    for path in (tmp_path / "saved", tmp_path / "saved/tokenizer.json"):
        opened = load_tokenizer(str(path))
        assert opened.encode(text) == tokenizer.encode(text)
        assert (opened.vocab_size, opened.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)


@pytest.mark.parametrize("spec", ["bytes", "bpe:300"])
def test_transformers_opens_a_saved_tokenizer(spec: str, tmp_path: Path):
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(spec, open_corpus_lines())
    tokenizer.save(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    text = "In the beginning , \u00e9\n 's \ttwo  spaces"
    assert opened.encode(text) == tokenizer.encode(text)
    assert opened.decode(tokenizer.encode(text)) == text
    assert (opened.eos_token_id, len(opened)) == (tokenizer.end_of_text, tokenizer.vocab_size)


def test_truncation_and_padding_in_the_file_are_turned_off(tmp_path: Path):
    load_tokenizer("bytes").save(tmp_path)
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    fields["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    assert len(load_tokenizer(str(tmp_path)).encode("more than four")) == 14


def test_a_serialised_end_token_in_the_configuration_is_understood(tmp_path: Path):
    load_tokenizer("bytes").save(tmp_path)
    config = {"eos_token": {"content": "A", "__type": "AddedToken"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(str(tmp_path)).end_of_text == 65


@pytest.mark.parametrize("spec", ["", "bpe", "bpe:", "bpe:1k", "bpe:-5", "./nowhere", "/nowhere/tokenizer.json"])
def test_an_unknown_tokenizer_is_refused_with_the_list_of_kinds(spec: str):
    with pytest.raises(ValueError, match=r'unknown tokenizer .*"bytes", "bpe:1024"'):
        load_tokenizer(spec, ["text"])


def test_a_hub_name_without_a_network_is_a_clear_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"unknown tokenizer 'nobody/nothing'.*needs a network connection"):
        load_tokenizer("nobody/nothing")


def test_a_vocabulary_below_257_is_refused():
    with pytest.raises(ValueError, match=r"'bpe:256' has too small a vocabulary.*at least 257"):
        load_tokenizer("bpe:256", ["text"])


def test_a_text_too_small_for_the_vocabulary_is_refused_with_the_size_it_gives():
    with pytest.raises(ValueError, match=r'"bpe:1024": the training text is too small.*Use "bpe:\d+" or fewer'):
        load_tokenizer("bpe:1024", ["a few words, a few words"])


def test_bpe_needs_text():
    with pytest.raises(ValueError, match=r"'bpe:300' is trained on text, and none was given"):
        load_tokenizer("bpe:300")
    with pytest.raises(ValueError, match="the given texts are empty"):
        load_tokenizer("bpe:300", [])


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match=r"lie in 0 \.\. 256, got 1 \.\. 257"):
        load_tokenizer("bytes").decode([1, 257])
    with pytest.raises(ValueError, match=r"got -1 \.\. 5"):
        load_tokenizer("bytes").decode([-1, 5])


def test_files_that_are_no_tokenizer_are_refused(write: Callable[[str, str | bytes], str], tmp_path: Path):
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer that the tokenizers library can open"):
        load_tokenizer(write("broken/tokenizer.json", '{"model": 5}'))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no tokenizer\.json"):
        load_tokenizer(str(tmp_path / "empty"))


def test_a_broken_configuration_is_refused(tmp_path: Path):
    load_tokenizer("bytes").save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is no JSON"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"must hold a JSON object, got list"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<nothing>"}')
    with pytest.raises(ValueError, match=r"has no end-of-text token \(looked for <nothing>\)"):
        load_tokenizer(str(tmp_path))
