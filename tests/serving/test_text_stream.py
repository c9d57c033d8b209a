"""Pieces of text add up to the whole, whatever tokens tear apart; a stop string ends it, and nothing of it gets out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bitbell.data import TextTokenizer, load_tokenizer
from bitbell.serving.text_stream import TextStream

BYTES = load_tokenizer("bytes")


def pieces(ids: list[int], stops: tuple[str, ...] = (), decoder: TextTokenizer = BYTES) -> list[str]:
    stream = TextStream(decoder, stops)
    out = []
    for token in ids:
        out.append(stream.add(token))
        if stream.stopped:
            return out
    return [*out, stream.end()]


@given(st.lists(st.integers(0, 255), max_size=40))
def test_pieces_add_up_to_the_whole_text_of_any_bytes(ids: list[int]) -> None:
    assert "".join(pieces(ids)) == BYTES.decode(ids)


def test_a_character_comes_out_whole() -> None:
    assert pieces(list("aé🙂b".encode())) == ["a", "", "é", "", "", "", "🙂", "b", ""]


def test_what_is_left_of_a_character_comes_at_the_end() -> None:
    assert pieces([97, 0xE2, 0x82]) == ["a", "", "", "\ufffd"]


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string_to_be_complete(text: str, stops: list[str]) -> None:
    complete = [text[:end] for end in range(len(text) + 1) if any(stop in text[:end] for stop in stops)]
    wanted = text
    if complete:
        wanted = text[: min(complete[0].find(stop) for stop in stops if stop in complete[0])]
    assert "".join(pieces(list(text.encode()), tuple(stops))) == wanted


def test_the_beginning_of_a_stop_string_is_held_back_and_given_out_when_it_is_none() -> None:
    assert pieces(list(b"one\n\ntwo"), ("\n\nthree",)) == ["o", "n", "e", "", "", "", "\n\ntw", "o", ""]


def test_tokens_of_several_characters() -> None:
    tokenizer = load_tokenizer("bpe:270", ["the king and the queen, and then the king again. " * 30])
    text = "and the king — the queen"
    assert "".join(pieces(tokenizer.encode(text), decoder=tokenizer)) == text
    assert "".join(pieces(tokenizer.encode(text), ("g —",), tokenizer)) == "and the kin"
