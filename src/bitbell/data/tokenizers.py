"""Text to token ids and back: one small interface over one file format, `tokenizer.json`.

    "bytes"      every byte is its own token (ids 0 .. 255), and 256 ends a text
    "bpe:1024"   byte-level byte-pair encoding with 1024 tokens, trained on the given texts
    a path       a `tokenizer.json`, or a folder that holds one
    a name       a tokenizer of the Hugging Face Hub, such as "gpt2"

Encoding adds nothing to the text (no begin-of-text, no template), and a marker such as `<|endoftext|>` that
stands in the text itself is encoded as the characters it is made of, so data cannot forge the end of a
document.
"""

import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
_SMALLEST_BPE = 256 + 1  # every byte, and the end of text
_KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
_ACCEPTED = '"bytes", "bpe:1024" (any size), a tokenizer.json or a folder with one, a Hugging Face name'


class TextTokenizer:
    """Encode text to ids in 0 .. vocab_size - 1, decode it, and save both ways as `tokenizer.json`."""

    def __init__(self, backend: "Tokenizer", name: str, config: dict[str, Any]) -> None:
        self.name = name
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.end_of_text_token, self.end_of_text = _end_of_text(backend, name, config)
        self._config = {**config, "eos_token": self.end_of_text_token}
        self._backend = backend
        backend.no_truncation()  # a tokenizer.json may ask for it, and it would lose text
        backend.no_padding()
        backend.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of several texts, encoded on all cores."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids, end-of-text written out. Raises ValueError for an unknown id."""
        ids = [int(token) for token in ids]
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            raise ValueError(
                f"token ids of {self.name} lie in 0 .. {self.vocab_size - 1}, got {min(ids)} .. {max(ids)}."
            )
        return self._backend.decode(ids, skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which AutoTokenizer.from_pretrained opens."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(self._backend.to_str(pretty=True) + "\n", encoding="utf-8")
        config = json.dumps(self._config, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")

    def __repr__(self) -> str:
        return f"TextTokenizer({self.name!r}, vocab_size={self.vocab_size}, end_of_text={self.end_of_text})"


def load_tokenizer(spec: str, texts: Iterable[str] | None = None) -> TextTokenizer:
    """Open or make the tokenizer that `spec` names; `texts` are what "bpe:SIZE" is trained on.

    Raises ValueError for a spec, a file or a vocabulary size that cannot be used, OSError for an unreadable
    file.
    """
    check_tokenizer_spec(spec)
    if spec == "bytes":
        return _byte_tokenizer()
    if size := _bpe_size(spec):
        if texts is None:
            raise ValueError(f"tokenizer {spec!r} is trained on text, and none was given. Pass texts=...")
        return _train_bpe(size, texts)
    if Path(spec).exists():
        return _open_tokenizer(Path(spec))
    return _download_tokenizer(spec)


def check_tokenizer_spec(spec: str) -> None:
    """Raise ValueError for a spec that can be told to be wrong without opening or training anything."""
    size = _bpe_size(spec)
    if size is not None and size < _SMALLEST_BPE:
        raise ValueError(
            f"tokenizer {spec!r} has too small a vocabulary: byte-level BPE needs at least {_SMALLEST_BPE} "
            f'(256 bytes and the end of text). Use "bpe:{_SMALLEST_BPE}" or more, or "bytes".'
        )
    looks_like_path = spec.endswith(".json") or spec.startswith((".", "/", "~"))
    is_malformed = not spec or (spec.startswith("bpe") and size is None and not Path(spec).exists())
    if is_malformed or (looks_like_path and not Path(spec).exists()):
        raise ValueError(f"unknown tokenizer {spec!r}. Give {_ACCEPTED}.")


def _bpe_size(spec: str) -> int | None:
    match = re.fullmatch(r"bpe:(\d+)", spec, flags=re.ASCII)
    return int(match[1]) if match else None


def _our_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,  # it would change the text
    }


def _byte_symbols() -> list[str]:
    """The printable stand-in of every byte in byte-level BPE: itself, or the next free one from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def _byte_tokenizer() -> TextTokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return TextTokenizer(backend, "bytes", _our_config())


def _train_bpe(size: int, texts: Iterable[str]) -> TextTokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    iterator = iter(texts)
    first = next(iterator, None)
    if first is None:
        raise ValueError(f'tokenizer "bpe:{size}" is trained on text, and the given texts are empty.')
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,  # a pair seen once is no pattern
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(chain([first], iterator), trainer)
    if (reached := backend.get_vocab_size()) < size:
        raise ValueError(
            f'tokenizer "bpe:{size}": the training text is too small for that vocabulary and yields '
            f'{reached} tokens only. Use "bpe:{reached}" or fewer, or "bytes", or give more text.'
        )
    return TextTokenizer(backend, f"bpe:{size}", _our_config())


def _open_tokenizer(path: Path) -> TextTokenizer:
    from tokenizers import Tokenizer

    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{path} holds no {FILE}. Give a folder that has one, or the file itself.")
    try:
        backend = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception for every kind of bad file
        raise ValueError(f"{file} is no tokenizer that the tokenizers library can open: {error}.") from error
    config_file = file.parent / CONFIG_FILE
    config = _read_config(config_file) if config_file.is_file() else {"clean_up_tokenization_spaces": False}
    return TextTokenizer(backend, path.resolve().name, {"tokenizer_class": "PreTrainedTokenizerFast", **config})


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}. Restore the file, or remove it.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(config).__name__}. Restore or remove it.")
    return config


def _download_tokenizer(name: str) -> TextTokenizer:
    """Open a Hub name through transformers, and then as the folder that transformers saves."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # network, permission, a missing package: many types, one answer
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"unknown tokenizer {name!r}: no such path exists here, and Hugging Face does not give it "
            f"({reason}). Give {_ACCEPTED}; the last needs a network connection or a filled cache."
        ) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(f"tokenizer {name!r} has no {FILE} (no fast tokenizer). Give {_ACCEPTED}.")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        opened = _open_tokenizer(Path(folder))
    opened.name = name
    return opened


def _end_of_text(backend: "Tokenizer", name: str, config: dict[str, Any]) -> tuple[str, int]:
    """The token that ends a text, and its id: what the configuration names, else the first well-known one."""
    named = config.get("eos_token")
    if isinstance(named, dict):  # a serialised AddedToken
        named = named.get("content")
    candidates = [named] if named is not None else list(_KNOWN_ENDS)
    for token in candidates:
        if isinstance(token, str) and (number := backend.token_to_id(token)) is not None:
            return token, number
    raise ValueError(
        f"tokenizer {name!r} has no end-of-text token (looked for {', '.join(map(str, candidates))}). "
        f'Name one that its vocabulary has as "eos_token" in {CONFIG_FILE}.'
    )
