"""What a scheduler runs: a model that takes rows of tokens and gives logits, in C++ or by its own modules."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bitbell.kernels import native
from bitbell.serving.native_llama import NativeLlama, inner_model, why_not_native
from bitbell.serving.static import choose_token


class Row(NamedTuple):
    """A token at its slot and position; want: whether the logits after it are asked for."""

    token: int
    slot: int
    position: int
    want: bool


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: temperature 0 is greedy; top_k and top_p cut the choice; one seed gives one text."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


class Sampler(Protocol):
    """Chooses the tokens of one text, one after the other."""

    def choose(self, logits: Tensor) -> int:
        """A token by logits (vocabulary,) float32; -1 where they hold NaN."""
        ...


class Engine(Protocol):
    """slots: sequences held at a time. chunks: whether a prompt may come in parts. name: what runs, for people."""

    name: str
    slots: int
    positions: int
    chunks: bool

    def run(self, rows: list[Row]) -> Tensor:
        """Logits (wanted rows, vocabulary) float32. Rows of a slot follow each other; position 0 starts it anew."""
        ...

    def sampler(self, sampling: Sampling, allowed: int) -> Sampler:
        """A chooser among the first `allowed` tokens."""
        ...


class NativeEngine:
    """`NativeLlama`: all slots in one C++ call. Raises ValueError for a model that it cannot run, saying why."""

    chunks = True

    def __init__(
        self, model: nn.Module, *, slots: int, threads: int | None = None, head_bits: int | None = None
    ) -> None:
        self._llama = NativeLlama(model, slots=slots, threads=threads, head_bits=head_bits)
        self.slots, self.positions = slots, self._llama.positions
        self.name = f"C++ step, {native.level()} kernels"

    def run(self, rows: list[Row]) -> Tensor:
        tokens, slots, positions, want = zip(*rows, strict=True)
        return self._llama.forward(tokens, slots, positions, want)

    def sampler(self, sampling: Sampling, allowed: int) -> Sampler:
        return _NativeSampler(sampling, allowed)


class _NativeSampler:
    """The draws of `NativeLlama.generate`, one at a time."""

    def __init__(self, sampling: Sampling, allowed: int) -> None:
        top_p = 1.0 if sampling.top_p is None else sampling.top_p
        self._how = sampling.temperature, sampling.top_k or 0, top_p, allowed
        self._state = sampling.seed % 2**64

    def choose(self, logits: Tensor) -> int:
        token, self._state = native.extension.sample(logits.numpy(), *self._how, self._state)
        return int(token)


class ModuleEngine:
    """One sequence at a time through a model's own modules, over a key-value cache; the prompt in one pass, since a
    statistic of the whole tensor (bbq-tensor) would see its parts. Puts the model in evaluation mode."""

    slots, chunks = 1, False

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = inner_model(model)
        if not hasattr(self._model, "generate"):
            raise ValueError(f"model must be a causal language model of transformers, got {type(self._model).__name__}")
        self._model.eval()
        self.positions = int(self._model.config.max_position_embeddings)
        self.name = "modules in PyTorch, one sequence at a time"
        self._device = next(self._model.parameters()).device
        takes = inspect.signature(type(self._model).forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._cache: Any = None

    @torch.no_grad()
    def run(self, rows: list[Row]) -> Tensor:
        ids = torch.tensor([[row.token for row in rows]], device=self._device)
        past = None if rows[0].position == 0 else self._cache
        out = self._model(ids, past_key_values=past, use_cache=True, **self._last_only)
        self._cache = out.past_key_values
        logits: Tensor = out.logits[0, -1:].float().cpu()
        return logits if rows[-1].want else logits[:0]

    def sampler(self, sampling: Sampling, allowed: int) -> Sampler:
        return _TorchSampler(sampling, allowed)


class _TorchSampler:
    def __init__(self, sampling: Sampling, allowed: int) -> None:
        self._sampling, self._allowed = sampling, allowed
        self._generator = torch.Generator().manual_seed(sampling.seed % 2**63)

    def choose(self, logits: Tensor) -> int:
        if not logits.isfinite().all():
            return -1
        s = self._sampling
        return int(choose_token(logits[: self._allowed], s.temperature, s.top_k, s.top_p, self._generator))


def engine_for(
    model: nn.Module,
    *,
    slots: int = 8,
    native_step: bool | None = None,
    threads: int | None = None,
    head_bits: int | None = None,
) -> Engine:
    """The C++ step where it can run the model, else its modules; native_step forces one of them (False: modules).

    threads and head_bits are those of `NativeLlama`. Raises ValueError where what is asked for is impossible.
    """
    why_not = "native_step=False" if native_step is False else why_not_native(model)
    if why_not is None:
        return NativeEngine(model, slots=slots, threads=threads, head_bits=head_bits)
    if native_step or head_bits is not None:
        what = "the C++ step" if head_bits is None else f"head_bits={head_bits} needs the C++ step, which"
        raise ValueError(f"{what} is not possible here: {why_not}")
    return ModuleEngine(model)
