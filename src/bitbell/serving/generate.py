"""Text from a packed (or trained) causal language model, one token at a time over a key-value cache."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bitbell.evaluation.loss import evaluation_mode
from bitbell.serving.native_llama import NativeLlama, inner_model, why_not_native
from bitbell.serving.static import StaticDecoder, why_not_static

if TYPE_CHECKING:
    from bitbell.data import TextTokenizer


@dataclass(frozen=True)
class Generation:
    """prompt and the text that follows it; how many tokens were made, and in how many seconds (the prompt's pass
    included)."""

    prompt: str
    text: str
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: TextTokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = None,
    seed: int = 0,
    native: bool | None = None,
    head_bits: int | None = None,
    threads: int | None = None,
) -> Generation:
    """Continue `prompt`. temperature 0 is greedy; top_k and top_p cut the choice (None: no cut); one seed gives one
    text.

    native: True runs the C++ step (`NativeLlama`; head_bits and threads are its), False the model's own modules; None
    takes the C++ step where it can run the model, and on a GPU the modules' step as a CUDA graph (`StaticDecoder`).
    Greedy text is the same either way, but for ties; a seed draws other text.
    The model runs in evaluation mode, whatever mode it is in. Raises ValueError for an empty prompt, for settings out
    of range, for more tokens than the model has positions, and for a vocabulary smaller than the tokenizer's.
    """
    _check_sampling(max_new_tokens, temperature, top_k, top_p)
    check_makes_text(model)
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("the prompt is empty; give at least one character")
    inner: Any = inner_model(model)
    _check_room(inner.config, tokenizer, len(ids), max_new_tokens)
    how: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    why_not = "native=False" if native is False else why_not_native(inner)
    if why_not is not None and (native or head_bits is not None):
        what = "native generation" if head_bits is None else f"head_bits={head_bits} needs the C++ step, which"
        raise ValueError(f"{what} is not possible here: {why_not}")
    if why_not is None:
        engine = NativeLlama(inner, positions=len(ids) + max_new_tokens, head_bits=head_bits, threads=threads)
        run = partial(engine.generate, ids, max_new_tokens, end_token=tokenizer.end_of_text, **how)
        begun = time.perf_counter()
        new = run(allowed=tokenizer.vocab_size)
    elif native is None and next(inner.parameters()).is_cuda and why_not_static(inner) is None:
        with evaluation_mode(inner):
            decoder = StaticDecoder(inner, positions=len(ids) + max_new_tokens)
            how |= {"end_token": tokenizer.end_of_text, "allowed": tokenizer.vocab_size}
            begun = time.perf_counter()
            new = decoder.generate(ids, max_new_tokens, **how)
    else:
        begun = time.perf_counter()
        new = _by_modules(inner, tokenizer, ids, max_new_tokens, **how)
    seconds = time.perf_counter() - begun
    text = tokenizer.decode([token for token in new if token != tokenizer.end_of_text])
    return Generation(prompt, text, len(new), seconds)


def _by_modules(
    model: Any,
    tokenizer: TextTokenizer,
    ids: list[int],
    max_new_tokens: int,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> list[int]:
    """New tokens by the `generate` of `transformers`."""
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0, "top_p": top_p or 1.0}
    # A vocabulary may be padded beyond the tokenizer's; those tokens have no text.
    unknown = list(range(tokenizer.vocab_size, model.config.vocab_size)) or None
    device = next(model.parameters()).device
    prompt_ids = torch.tensor([ids], device=device)
    with evaluation_mode(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            max_new_tokens=max_new_tokens,
            use_cache=True,
            eos_token_id=tokenizer.end_of_text,
            pad_token_id=tokenizer.end_of_text,
            suppress_tokens=unknown,
            **sampling,
        )
    new: list[int] = out[0, len(ids) :].tolist()
    return new


def _check_sampling(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1 or None, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, or None, got {top_p}")


def _check_room(config: Any, tokenizer: TextTokenizer, num_ids: int, max_new_tokens: int) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and num_ids + max_new_tokens > positions:
        raise ValueError(
            f"the prompt's {num_ids} tokens and max_new_tokens={max_new_tokens} exceed the model's "
            f"{positions} positions"
        )
    check_vocabulary(config, tokenizer)


def check_makes_text(model: nn.Module) -> None:
    """Raise ValueError for a model of transformers that makes no text, such as a classifier of images."""
    inner = inner_model(model)
    if hasattr(inner, "can_generate") and not inner.can_generate():
        raise ValueError(
            f"the model is a {type(inner).__name__}, which makes no text; bitbell classify asks a classifier"
        )


def check_vocabulary(config: Any, tokenizer: TextTokenizer) -> None:
    """Raise ValueError where a tokenizer has tokens that the model does not know."""
    if config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"the tokenizer's tokens go up to {tokenizer.vocab_size - 1}, the model's vocabulary has only "
            f"{config.vocab_size}; use the tokenizer that the model was trained with"
        )


def load_tokenizer_of(directory: str | Path) -> TextTokenizer:
    """The tokenizer that travels with a run or a packed model. Raises ValueError where there is none."""
    from bitbell.data import load_tokenizer

    if not Path(directory).is_dir():
        raise ValueError(f"{directory} is no directory; give a run, or a packed model")
    if not (Path(directory) / "tokenizer.json").is_file():
        raise ValueError(
            f"{directory} has no tokenizer.json, so text cannot be turned into its tokens; "
            "copy the tokenizer.json of the data that the model was trained on there"
        )
    return load_tokenizer(str(Path(directory).resolve()))
