"""How fast a model runs on this machine: tokens a second, time of each layer, and how close its weights' traffic comes
to what the memory can give, measured in the same run."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitbell.evaluation.loss import evaluation_mode
from bitbell.kernels import native
from bitbell.packing import PackedLinear
from bitbell.serving.generate import check_makes_text
from bitbell.serving.native_llama import NativeLlama, inner_model, why_not_native
from bitbell.serving.static import StaticDecoder, why_not_static

Clock = Callable[[], float]
GRAPH = "a step as a CUDA graph"
STREAM_LIMITS = 8, 512  # megabytes of the buffer that the stream rate is measured on


@dataclass(frozen=True)
class LayerSpeed:
    """One kind of layer (all q_proj, say): how many, shape, recipe, microseconds and bytes of one row's pass.

    weight_bytes: as the pass reads them: 5 to 7 bits take a byte in the C++ kernels.
    """

    name: str
    count: int
    shape: tuple[int, int]
    recipe: str
    microseconds: float
    weight_bytes: int

    @property
    def gigabytes_per_second(self) -> float:
        return self.weight_bytes / self.microseconds / 1e3


@dataclass(frozen=True)
class Bench:
    """Medians over rounds. Rates are tokens a second of one sequence; memory in bytes.

    engine: what ran, and why. clock: "thread CPU time" where one thread does all the work, which other processes' time
    slices do not lengthen; else "wall time". stream_bytes_per_second: what this machine reads from a buffer as large as
    the weights that a token reads (8 to 512 MB). weight_bytes: of those weights. cache_bytes_per_token: of keys and
    values.
    """

    engine: str
    threads: int
    clock: str
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    spread: float
    weight_bytes: int
    cache_bytes_per_token: int
    peak_bytes: int
    stream_bytes_per_second: float | None
    layers: list[LayerSpeed]

    @property
    def share_of_stream(self) -> float | None:
        """Of the rate at which this machine can read, what decoding reads of weights."""
        if self.stream_bytes_per_second is None:
            return None
        return self.weight_bytes * self.decode_tokens_per_second / self.stream_bytes_per_second

    def to_dict(self) -> dict[str, Any]:
        layers = [asdict(layer) | {"gigabytes_per_second": layer.gigabytes_per_second} for layer in self.layers]
        return asdict(self) | {"layers": layers, "share_of_stream": self.share_of_stream}


@torch.no_grad()
def bench(
    model: nn.Module,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    rounds: int = 5,
    threads: int | None = None,
    head_bits: int | None = None,
    native_step: bool | None = None,
) -> Bench:
    """Measure a causal language model, with random tokens. native_step: True or False forces the C++ step or the
    model's modules; None takes the C++ step where it can run the model, and on a GPU a CUDA graph. threads: of C++ and
    of torch; None leaves them as they are.

    Raises ValueError for a model that makes no text, for counts below 1, for more tokens than the model has positions,
    and where the C++ step is asked for and impossible.
    """
    check_makes_text(model)
    inner: Any = inner_model(model)
    limit = int(inner.config.max_position_embeddings)
    for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if prompt_tokens + new_tokens > limit:
        raise ValueError(
            f"prompt_tokens={prompt_tokens} and new_tokens={new_tokens} exceed the model's {limit} positions"
        )
    why_not = "native_step=False" if native_step is False else why_not_native(inner)
    if why_not is not None and (native_step or head_bits is not None):
        what = "the native step" if head_bits is None else f"head_bits={head_bits} needs the native step, which"
        raise ValueError(f"{what} is not possible here: {why_not}")
    with _using_threads(threads):
        if native_step is None and next(inner.parameters()).is_cuda and why_not_static(inner) is None:
            why_not = GRAPH
        return _measure(inner, why_not, prompt_tokens, new_tokens, rounds, head_bits)


def _measure(
    inner: Any, why_not: str | None, prompt_tokens: int, new_tokens: int, rounds: int, head_bits: int | None
) -> Bench:
    vocabulary = int(inner.config.vocab_size)
    prompt = torch.randint(0, vocabulary, (prompt_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    if why_not is None:
        engine = NativeLlama(inner, positions=prompt_tokens + new_tokens, head_bits=head_bits)
        name, weight_bytes = f"C++ step, {native.level()} kernels", engine.weight_bytes
        times = _time_native(engine, prompt, new_tokens, rounds, _clock_of(inner))
    elif why_not == GRAPH:
        name, weight_bytes = f"modules in PyTorch, {GRAPH}", _weight_bytes(inner)
        times = time_static(inner, prompt, new_tokens, rounds)
    else:
        name, weight_bytes = f"modules in PyTorch ({why_not})", _weight_bytes(inner)
        times = _time_modules(inner, prompt, new_tokens, rounds, _clock_of(inner))
    threads = native.threads()
    prefill, decode = zip(*times, strict=True)
    return Bench(
        engine=name,
        threads=threads,
        clock="thread CPU time" if _clock_of(inner) is time.thread_time else "wall time",
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        prefill_tokens_per_second=prompt_tokens / statistics.median(prefill),
        decode_tokens_per_second=new_tokens / statistics.median(decode),
        spread=(max(decode) - min(decode)) / statistics.median(decode),
        weight_bytes=weight_bytes,
        cache_bytes_per_token=_cache_bytes(inner.config, 4 if why_not is None else inner.dtype.itemsize),
        peak_bytes=_peak_bytes(next(inner.parameters()).device),
        stream_bytes_per_second=_stream_rate(weight_bytes, threads) if next(inner.parameters()).is_cpu else None,
        layers=layer_speeds(inner, rounds),
    )


@contextmanager
def _using_threads(count: int | None) -> Iterator[None]:
    """So many threads in C++ and in torch inside a `with`; None: as they are."""
    before, of_torch = native.threads(), torch.get_num_threads()
    if count is not None:
        native.set_threads(count)
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(of_torch)
            native.set_threads(None if before == of_torch else before)


def _clock_of(model: nn.Module) -> Clock:
    alone = native.threads() == torch.get_num_threads() == 1 and all(t.is_cpu for t in model.parameters())
    return time.thread_time if alone else time.perf_counter


def _time_native(
    engine: NativeLlama, prompt: list[int], new_tokens: int, rounds: int, clock: Clock
) -> list[tuple[float, float]]:
    """Seconds of the prompt and of the tokens that follow it, after one round that warms up."""
    times = []
    for _ in range(rounds + 1):
        seen: list[float] = []

        def note(_: int, seen: list[float] = seen) -> None:
            seen.append(clock())

        begun = clock()
        engine.generate(prompt, new_tokens + 1, on_token=note)
        times.append((seen[0] - begun, seen[-1] - seen[0]))
    return times[1:]


def _time_modules(
    model: Any, prompt: list[int], new_tokens: int, rounds: int, clock: Clock
) -> list[tuple[float, float]]:
    device = next(model.parameters()).device
    times = []
    with evaluation_mode(model):
        for _ in range(rounds + 1):
            begun = clock()
            out = model(torch.tensor([prompt], device=device), use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            token.cpu()  # waits for a GPU
            middle = clock()
            for _ in range(new_tokens):
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            token.cpu()  # waits for a GPU
            times.append((middle - begun, clock() - middle))
    return times[1:]


def time_static(model: Any, prompt: list[int], new_tokens: int, rounds: int) -> list[tuple[float, float]]:
    """Seconds of the prompt and of the tokens that follow it, over a cache of fixed size."""
    times = []
    with evaluation_mode(model):
        decoder = StaticDecoder(model, positions=len(prompt) + new_tokens)
        for _ in range(rounds + 1):
            begun = time.perf_counter()
            token = int(decoder.prefill(prompt).argmax())  # waits for a GPU
            middle = time.perf_counter()
            for _ in range(new_tokens):
                token = int(decoder.step(token).argmax())
            times.append((middle - begun, time.perf_counter() - middle))
    return times[1:]


def layer_speeds(model: nn.Module, rounds: int = 5) -> list[LayerSpeed]:
    """One row through each kind of packed layer: all of a kind in turn, so that caches see what decoding sees."""
    kinds: dict[tuple[str, tuple[int, int], str], list[PackedLinear]] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            shape = module.out_features, module.in_features
            kinds.setdefault((name.rsplit(".", 1)[-1], shape, module.recipe.name), []).append(module)
    speeds = []
    for (name, shape, recipe), layers in kinds.items():
        x = torch.randn(1, shape[1], generator=torch.Generator().manual_seed(0)).to(layers[0].weight_packed.device)
        seconds = statistics.median(_seconds(partial(_run_all, layers, x), rounds, _clock_of(model)))
        size = sum(map(_bytes_read, layers)) // len(layers)
        speeds.append(LayerSpeed(name, len(layers), shape, recipe, seconds / len(layers) * 1e6, size))
    return speeds


def _bytes_read(layer: PackedLinear) -> int:
    """Of a layer's weights in one pass: panels of the C++ kernels, or the packed words."""
    made = layer.native_layer() if native.available() and layer.weight_packed.is_cpu else None
    return layer.weight_packed.numel() * 4 if made is None else made.arranged.numel()


def _run_all(layers: list[PackedLinear], x: Tensor) -> None:
    for layer in layers:
        layer(x)


def _seconds(run: Callable[[], Any], rounds: int, clock: Clock) -> list[float]:
    for _ in range(3):
        run()
    times = []
    for _ in range(3 * rounds):
        begun = clock()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(clock() - begun)
    return times


def _stream_rate(weight_bytes: int, threads: int) -> float | None:
    if native.extension is None:
        return None
    smallest, largest = STREAM_LIMITS
    return native.stream_rate(min(max(weight_bytes // 10**6, smallest), largest), threads)


def _weight_bytes(model: Any) -> int:
    """Of the weights that each token reads: all but those of embeddings, of which it reads a row."""
    embedding = {id(t) for m in model.modules() if isinstance(m, nn.Embedding) for t in m.parameters()}
    head = model.get_output_embeddings()
    tensors = [*model.parameters(), *model.buffers()]
    total = sum(t.numel() * t.element_size() for t in tensors if id(t) not in embedding)
    tied = head is not None and id(head.weight) in embedding
    return total + (head.weight.numel() * head.weight.element_size() if tied else 0)


def _cache_bytes(config: Any, itemsize: int) -> int:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * itemsize)


def _peak_bytes(device: torch.device) -> int:
    """Of the process, or of a GPU's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
