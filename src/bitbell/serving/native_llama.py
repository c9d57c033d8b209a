"""LLaMA-family models on the C++ kernels: from tokens to logits, or to text, in one call without Python in between.

The same layers, in the same order, as the module path of `transformers`; numbers agree up to float rounding, and greedy
text is equal unless two logits tie to that rounding. Keys and values are float32.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitbell.kernels import native
from bitbell.packing import PackedLinear, PackedModel
from bitbell.packing.plans import input_plan
from bitbell.quantizers import AbsMax

DENSE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BYTES = 3  # the kind of an embedding of int8 rows with a scale each
ROWS = ("tokens", "slots", "positions")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on the length of the text
PARTS = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
PARTS |= {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}


def why_not_native(model: nn.Module) -> str | None:
    """Why `NativeLlama` cannot run a model, in words; None if it can."""
    inner = inner_model(model)
    if not native.available():
        return f"no C++ kernels are in use ({native.reason()})"
    if type(inner).__name__ != "LlamaForCausalLM":
        return f"it runs LlamaForCausalLM, and this is a {type(inner).__name__}"
    if any(p.device.type != "cpu" for p in inner.parameters()):
        return "the model is not on the CPU"
    config = inner.config
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}, not silu"
    rope = getattr(inner.model.rotary_emb, "rope_type", "default")
    if rope not in ROPE_TYPES:
        return f"its rotary embedding is {rope!r}, not one of {', '.join(ROPE_TYPES)}"
    for name, module in inner.named_modules():
        if isinstance(module, PackedLinear) and module.native_layer() is None:
            return f"{name} is {module.recipe.name}, which the kernels have no way for"
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            return f"{name} is a {type(module).__name__}; pack the model first"
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.dtype not in DENSE_TYPES:
            return f"{name} is in {module.weight.dtype}, not one of {', '.join(map(str, DENSE_TYPES))}"
    return None


class NativeLlama:
    """A LLaMA-family model (packed, or in full precision) behind one C++ call a step.

    slots: how many sequences it holds at a time; positions: tokens a slot has room for (default: all that the model
    has; memory is taken as they are used). head_bits keeps the output head and the embedding in 8 bits, or in bfloat16
    (16); by default they stay as they are, since it changes the numbers (8 bits also round what the head is fed; a
    packed head stays packed). threads: of every call; None as `bitbell.kernels.native.threads()`. Weights are partly
    copied and partly read where the model keeps them: do not change them meanwhile. Raises ValueError for a model that
    it cannot run, saying why.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        slots: int = 1,
        positions: int | None = None,
        head_bits: int | None = None,
        threads: int | None = None,
    ) -> None:
        why = why_not_native(model)
        if why is not None:
            raise ValueError(f"the native LLaMA cannot run this model: {why}")
        if head_bits not in (None, 8, 16):
            raise ValueError(f"head_bits must be 8, 16, or None for the head as it is, got {head_bits}")
        inner = inner_model(model)
        limit = int(inner.config.max_position_embeddings)
        positions = limit if positions is None else positions
        if not 1 <= positions <= limit:
            raise ValueError(f"positions must be 1 to the model's {limit}, got {positions}")
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        if threads is not None and not 1 <= threads <= native.MOST_THREADS:
            raise ValueError(f"threads must be 1 to {native.MOST_THREADS}, or None, got {threads}")
        self.threads, self.slots, self.positions = threads, slots, positions
        self.vocabulary = int(inner.config.vocab_size)
        parts = _Parts(inner, head_bits)
        self._kept = parts.kept  # every tensor whose address C++ holds
        self.weight_bytes = parts.weight_bytes  # read for every token, the embedding's row aside
        self._llama = native.extension.Llama(parts.config, parts.blocks, slots, positions, native.level())

    @torch.no_grad()
    def forward(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        want: Sequence[bool] | None = None,
    ) -> Tensor:
        """Logits (wanted rows, vocabulary) of rows of tokens, each at its slot and position.

        Rows of a slot go on from at most its length. want: which rows' logits; None: the last row of each slot.
        """
        tokens, slots, positions = (
            _integers(name, x) for name, x in zip(ROWS, (tokens, slots, positions), strict=True)
        )
        count = len(set(slots)) if want is None else sum(map(bool, want))
        logits = torch.empty(count, self.vocabulary, **native.FLOATS)
        rows = tokens, slots, positions, logits.numpy()
        self._llama.forward(*rows, None if want is None else list(want), self._threads())
        return logits

    def prefill(self, tokens: Sequence[int], slot: int = 0) -> Tensor:
        """Start a slot anew with a prompt; logits (vocabulary,) of what follows. Raises ValueError for no tokens."""
        if not len(tokens):
            raise ValueError("the prompt must have at least 1 token, got 0")
        return self.forward(tokens, [slot] * len(tokens), range(len(tokens)))[0]

    def decode(self, token: int, slot: int = 0) -> Tensor:
        """Append one token to a slot; logits (vocabulary,) of what follows."""
        return self.forward([token], [slot], [self.length(slot)])[0]

    def length(self, slot: int = 0) -> int:
        """How many tokens a slot holds."""
        return int(self._llama.length(slot))

    def generate(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        end_token: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        allowed: int | None = None,
        seed: int = 0,
        slot: int = 0,
        keep: bool = False,
        on_token: Callable[[int], Any] | None = None,
    ) -> list[int]:
        """Tokens that follow a prompt, until `end_token` (returned too) or `max_new_tokens`; temperature 0 is greedy.

        allowed: choose among the first so many tokens. keep: the prompt goes on from what the slot holds, instead of
        anew; the last token returned is not there yet. on_token sees each new token; returning False stops; it must
        not call this model. Raises RuntimeError where logits hold NaN, and ValueError for settings out of range.
        """
        prompt = _integers("prompt", prompt)
        held = self.length(slot) if keep else 0
        if max_new_tokens >= 1 and len(prompt) >= 1 and held + len(prompt) + max_new_tokens - 1 > self.positions:
            before = f"{held} tokens in the slot, " if held else ""
            asked = f"{before}a prompt of {len(prompt)} and max_new_tokens={max_new_tokens}"
            raise ValueError(f"{asked} exceed the {self.positions} positions")
        if not keep:
            self._llama.reset(slot)
        ends = [] if end_token is None else [end_token]
        sampling = temperature, top_k or 0, 1.0 if top_p is None else top_p, allowed or 0, seed % 2**64
        run: tuple[Any, ...] = prompt, max_new_tokens, ends, slot, *sampling, on_token, self._threads()
        tokens, _ = self._llama.generate(*run)
        return list(tokens)

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        end_token: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        allowed: int | None = None,
        seed: int = 0,
    ) -> list[list[int]]:
        """`generate` for several prompts with all slots busy: whenever a sequence ends, the next prompt takes its slot.

        Each sequence's text depends on its own prompt and place in the list only, not on who shares its steps; that at
        place n is `generate`'s with seed + n. Raises as `generate` does.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        room = self.positions - max_new_tokens + 1  # the last new token is not fed back
        for prompt in prompts:
            if not 1 <= len(prompt) <= room:
                raise ValueError(
                    f"every prompt must have 1 to {room} tokens for max_new_tokens={max_new_tokens} in "
                    f"{self.positions} positions, got one of {len(prompt)}"
                )
        sampling = temperature, top_k or 0, 1.0 if top_p is None else top_p, allowed or 0
        results: list[list[int]] = [[] for _ in prompts]
        states = [(seed + place) % 2**64 for place in range(len(prompts))]
        waiting, running = list(range(len(prompts)))[::-1], dict[int, int]()
        while waiting or running:
            rows: list[tuple[int, int, int]] = []
            for slot in range(self.slots):
                if slot in running:
                    at = running[slot]
                    rows.append((results[at][-1], slot, len(prompts[at]) + len(results[at]) - 1))
                elif waiting:
                    at = running[slot] = waiting.pop()
                    rows += [(token, slot, position) for position, token in enumerate(prompts[at])]
            logits = self.forward(*zip(*rows, strict=True)).numpy()
            for row, slot in enumerate(sorted(running)):
                at = running[slot]
                token, states[at] = native.extension.sample(logits[row], *sampling, states[at])
                if token < 0:
                    raise RuntimeError(f"logits hold NaN or infinity after {self.length(slot)} tokens of prompt {at}")
                results[at].append(token)
                if token == end_token or len(results[at]) == max_new_tokens:
                    del running[slot]
        return results

    def _threads(self) -> int:
        return native.threads() if self.threads is None else self.threads


class _Parts:
    """A model taken apart into addresses, and the tensors that they belong to."""

    def __init__(self, model: Any, head_bits: int | None) -> None:
        self.kept: list[Any] = [model]
        self.plans: dict[int, dict[str, Any]] = {}
        self.weight_bytes = 0
        self.blocks = [self._block(layer) for layer in model.model.layers]
        self.config = self._config(model, head_bits)

    def _block(self, layer: Any) -> dict[str, Any]:
        block: dict[str, Any] = {name: self._linear(layer.get_submodule(path)) for name, path in PARTS.items()}
        block["attention_norm"] = self._floats(layer.input_layernorm.weight)
        block["feed_forward_norm"] = self._floats(layer.post_attention_layernorm.weight)
        return block

    def _config(self, model: Any, head_bits: int | None) -> dict[str, Any]:
        config, attention = model.config, model.model.layers[0].self_attn
        positions = torch.arange(config.max_position_embeddings, device="cpu")[None]
        cosines, sines = model.model.rotary_emb(torch.zeros(1, **native.FLOATS), positions)  # both halves are the same
        half = attention.head_dim // 2
        return {
            "width": config.hidden_size,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": attention.head_dim,
            "feed_forward": config.intermediate_size,
            "vocabulary": config.vocab_size,
            "epsilon": config.rms_norm_eps,
            "attention_scale": attention.scaling,
            "max_positions": config.max_position_embeddings,
            "cosines": self._floats(cosines[0, :, :half]),
            "sines": self._floats(sines[0, :, :half]),
            "final_norm": self._floats(model.model.norm.weight),
            "head": self._head(model.lm_head, head_bits),
            **self._embedding(model.model.embed_tokens.weight, head_bits),
        }

    def _head(self, head: nn.Linear, bits: int | None) -> dict[str, Any]:
        if bits == 8 and not isinstance(head, PackedLinear):
            return self._eight_bit_head(head)
        return self._linear(head, torch.bfloat16 if bits == 16 else None)

    def _linear(self, layer: Any, dtype: torch.dtype | None = None) -> dict[str, Any]:
        if isinstance(layer, PackedLinear):
            return self._packed(layer.native_layer(), id(layer.activation_quantizer))
        weight = layer.weight.detach().to(dtype or layer.weight.dtype).contiguous()
        self.kept.append(weight)
        self.weight_bytes += weight.numel() * weight.element_size()
        dense = {"dense": weight.data_ptr(), "dense_type": DENSE_TYPES[weight.dtype]}
        return dense | {"rows": weight.shape[0], "k": weight.shape[1], "bias": self._floats(layer.bias)}

    def _packed(self, layer: native.NativeLayer | None, quantizer: int) -> dict[str, Any]:
        assert layer is not None
        self.kept.append(layer)
        self.weight_bytes += layer.arranged.numel()
        plan = None
        if layer.plan is not None:  # layers of one quantizer name one plan, and share the codes of their input
            plan = self.plans.setdefault(quantizer, layer.plan.fields())
        return {"weights": layer.fields(), "plan": plan, "rotation": layer.rotation or 1}

    def _eight_bit_head(self, head: nn.Linear) -> dict[str, Any]:
        quantizer = AbsMax(8, rows=head.out_features)
        quantized = quantizer.quantize(head.weight.detach().float())
        codes = (quantized.codes.to(torch.int16) + 128).to(torch.uint8)
        words = nn.functional.pad(codes, (0, -head.in_features % 4)).view(torch.int32)
        plan = input_plan(AbsMax(8))
        zero_point = quantizer.zero_point
        layer = native.NativeLayer(words, 8, head.in_features, quantized.step, zero_point, plan=plan, bias=head.bias)
        return self._packed(layer, id(layer))

    def _embedding(self, weight: Tensor, bits: int | None) -> dict[str, Any]:
        weight = weight.detach().to(torch.bfloat16 if bits == 16 else weight.dtype).contiguous()
        if bits != 8:
            self.kept.append(weight)
            return {"embedding": weight.data_ptr(), "embedding_type": DENSE_TYPES[weight.dtype], "embedding_scale": 0}
        scale = weight.float().abs().amax(1).clamp_min(1e-12) / 127
        rows = (weight.float() / scale[:, None]).round().to(torch.int8)
        self.kept.append(rows)
        return {"embedding": rows.data_ptr(), "embedding_type": BYTES, "embedding_scale": self._floats(scale)}

    def _floats(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        kept = tensor.detach().float().contiguous()
        self.kept.append(kept)
        return kept.data_ptr()


def inner_model(model: nn.Module) -> Any:
    """The Hugging Face model itself, of a packed model or of one that is it already.

    Raises TypeError for anything but a module.
    """
    if not isinstance(model, nn.Module):
        more = "; bitbell.load(directory) makes one of a packed directory" if isinstance(model, str | Path) else ""
        raise TypeError(f"model must be a module, got {model!r:.100}{more}")
    return model.model if isinstance(model, PackedModel) else model


def _integers(name: str, values: Any) -> list[int]:
    """A list of a sequence or one-dimensional tensor of integers. Raises TypeError, naming it, for anything else."""
    values = values.tolist() if isinstance(values, Tensor) else values
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        raise TypeError(f"{name} must be a sequence of integers, got {type(values).__name__}: {values!r:.60}") from None
