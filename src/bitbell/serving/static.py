"""Decoding on a GPU without Python between the kernels: a key-value cache of fixed size, and one step as a CUDA graph.

A step of a small model is some hundreds of kernels of a few microseconds each, and Python takes longer to launch them.
Captured once, they are launched as one. That needs memory that stays where it is: the token, its position and the cache
are tensors that every step reads and writes in place. Without a GPU the same steps run uncaptured.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitbell.serving.native_llama import inner_model

ATTENTIONS = ("sdpa", "eager")  # that take a mask of our own
WARM_UP = 3  # steps before the capture: kernels are compiled and libraries take their workspaces then


def why_not_static(model: nn.Module) -> str | None:
    """Why `StaticDecoder` cannot run a model, in words; None if it can."""
    inner: Any = inner_model(model)
    config = getattr(inner, "config", None)
    if config is None or not hasattr(inner, "generate"):
        return f"a {type(inner).__name__} is no causal language model of transformers"
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ATTENTIONS:
        return f"its attention is {attention!r}, not one of {', '.join(ATTENTIONS)}"
    if "position_ids" not in inspect.signature(type(inner).forward).parameters:
        return f"{type(inner).__name__} takes no position_ids"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return "not all of its layers attend to the whole text"
    devices = {str(tensor.device) for tensors in (inner.parameters(), inner.buffers()) for tensor in tensors}
    if len(devices) > 1:
        return f"its tensors are on several devices: {', '.join(sorted(devices))}"
    return None


class StaticDecoder:
    """One sequence through a causal language model of transformers, token by token.

    positions: tokens it has room for (default: all that the model has). capture: make a step a CUDA graph; None does so
    on a GPU. Weights are read where they are, but what was made of them at the first step is captured: make a new
    decoder after a change. Logits are those of the model's own forward pass up to float rounding. Raises ValueError for
    a model that it cannot run, saying why, for one in training mode, and for capture=True without a GPU.
    """

    def __init__(self, model: nn.Module, *, positions: int | None = None, capture: bool | None = None) -> None:
        from transformers import StaticCache

        if (why := why_not_static(model)) is not None:
            raise ValueError(f"a static cache cannot run this model: {why}")
        self.model: Any = inner_model(model)
        if self.model.training:  # running statistics would move, and dropout be captured
            raise ValueError("the model is in training mode; call model.eval() first")
        config = self.model.config
        limit = int(config.max_position_embeddings)
        self.positions = limit if positions is None else positions
        if not 1 <= self.positions <= limit:
            raise ValueError(f"positions must be 1 to the model's {limit}, got {positions}")
        weight = next(self.model.parameters())
        self.device = weight.device
        if capture and self.device.type != "cuda":
            raise ValueError(f"capture needs a GPU, and the model is on {self.device}")
        self._cache = StaticCache(config=config, max_cache_len=self.positions)
        self._token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self._position = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self._places = torch.arange(self.positions, device=self.device)
        self._hidden = torch.finfo(weight.dtype).min
        self._takes_position = "cache_position" in inspect.signature(type(self.model).forward).parameters
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        self.length = 0
        if capture or (capture is None and self.device.type == "cuda"):
            self._capture()

    @torch.no_grad()
    def prefill(self, tokens: Sequence[int]) -> Tensor:
        """Start anew with a prompt; logits (vocabulary,) of what follows. Raises ValueError for none or too many."""
        if not 1 <= len(tokens) <= self.positions:
            raise ValueError(f"the prompt must have 1 to {self.positions} tokens, got {len(tokens)}")
        self._cache.reset()
        self.length = len(tokens)
        ids = torch.tensor([list(tokens)], dtype=torch.long, device=self.device)
        return self._forward(ids, self._places[None, : self.length])

    @torch.no_grad()
    def step(self, token: int) -> Tensor:
        """Logits (vocabulary,) of what follows one more token. Raises ValueError where there is no room for it."""
        if not 0 < self.length < self.positions:
            raise ValueError(f"a step needs a prompt and room: {self.length} of {self.positions} positions are taken")
        self._token.fill_(token)
        self._position.fill_(self.length)
        self.length += 1
        if self._graph is None:
            return self._forward(self._token, self._position)
        assert self._logits is not None
        self._graph.replay()
        return self._logits.clone()  # the next step writes over it

    @torch.no_grad()
    def generate(
        self,
        tokens: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        end_token: int | None = None,
        allowed: int | None = None,
    ) -> list[int]:
        """New tokens after a prompt, up to and including `end_token`. temperature 0 is greedy; allowed: only tokens
        below it. Raises ValueError where there is not one to make, or no room for all."""
        generator = torch.Generator(self.device).manual_seed(seed)
        logits, new = self.prefill(tokens), []
        room = self.positions - len(tokens) + 1  # the last token needs none
        if not 1 <= max_new_tokens <= room:
            raise ValueError(f"max_new_tokens must be 1 to {room} after {len(tokens)} tokens, got {max_new_tokens}")
        while True:
            new.append(int(choose_token(logits[:allowed].float(), temperature, top_k, top_p, generator)))
            if len(new) == max_new_tokens or new[-1] == end_token:
                return new
            logits = self.step(new[-1])

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits of the last token of `ids` (1, T) at `positions` (1, T), over everything in the cache up to it."""
        reaches = self._places <= positions[0, :, None]
        mask = torch.zeros(reaches.shape, dtype=self.model.dtype, device=self.device)
        mask = mask.masked_fill(~reaches, self._hidden)[None, None]
        more = {"cache_position": positions[0]} if self._takes_position else {}
        out = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            **more,
        )
        logits: Tensor = out.logits[0, -1]
        return logits

    @torch.no_grad()
    def _capture(self) -> None:
        """A few steps aside, so that everything is compiled and allocated, and then one that is recorded."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._forward(self._token, self._position)
                self._cache.reset()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # On a stream of the model's own device: the default one is of whichever device captured first.
        with torch.cuda.device(self.device), torch.cuda.graph(graph, stream=stream):
            self._logits = self._forward(self._token, self._position)
        self._graph = graph
        self._cache.reset()


def choose_token(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    """A token by logits (vocabulary,): the likeliest, or drawn from those that top_k and top_p leave."""
    if temperature == 0:
        return logits.argmax()
    ordered, tokens = (logits / temperature).sort(descending=True, stable=True)
    share = ordered.softmax(-1)
    if top_k is not None:
        share = share[:top_k]
    if top_p is not None:
        share = share / share.sum()
        share = share.masked_fill(share.cumsum(-1) - share >= top_p, 0.0)
    return tokens[torch.multinomial(share, 1, generator=generator)[0]]
