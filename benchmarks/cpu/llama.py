"""Tokens a second of a LLaMA of 271 million parameters with random weights: packed, against transformers and llama.cpp.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/cpu/llama.py --json llama.json
    python benchmarks/cpu/llama.py --threads 1 2 --recipe bbq-w4a4 --head-bits 8
    python benchmarks/cpu/llama.py --llama-cpp BF16 Q4_0 TQ2_0        # opt-in: needs llama-cpp-python and gguf

Each round, each engine in turn: a prompt of 128 tokens at once (prefill), then 32 tokens one by one (decode). Logits of
the prompt's last token are checked before anything is timed: ours against those of the quantized model that was packed,
bfloat16 against float32. The model has 16 layers of width 1024, feed-forward 2816, 16 heads, and a vocabulary of
32,000, untied.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ggml import TYPES, ggml
from measure import Spread, clock_for, describe, machine, ratios, stream_rates, use_threads
from peers import missing_packages
from torch import Tensor, nn

import bitbell
from bitbell.models.presets import PRESETS, Preset
from bitbell.serving import NativeLlama

POSITIONS = 512


class Engine(ABC):
    """prefill(ids) forgets everything, takes the prompt and returns its last logits (vocabulary,), or None where the
    engine does not tell; decode(count) goes on by so many tokens.

    expected, tolerance: logits that prefill's are checked against, and their largest relative error (2-norms).
    """

    name: str
    tolerance: float = 0.0
    expected: Tensor | None = None
    executor: ThreadPoolExecutor | None = None

    @abstractmethod
    def prefill(self, ids: list[int]) -> Tensor | None: ...

    @abstractmethod
    def decode(self, count: int) -> None: ...

    def checked_logits(self, ids: list[int]) -> Tensor | None:
        """The logits that are compared with `expected`."""
        return self.prefill(ids)

    def release(self) -> None:  # noqa: B027 - most engines hold nothing of the kind
        """Give back memory that is not Python's."""


class Transformers(Engine):
    """A model of `transformers`, eager, with its own key-value cache; greedy."""

    def __init__(self, name: str, model: nn.Module, expected: Tensor | None = None, tolerance: float = 0.0) -> None:
        self.name, self.model, self.expected, self.tolerance = name, model.eval(), expected, tolerance

    @torch.no_grad()
    def prefill(self, ids: list[int]) -> Tensor:
        from transformers import DynamicCache

        self.cache = DynamicCache()
        return self._step(torch.tensor([ids]))

    @torch.no_grad()
    def decode(self, count: int) -> None:
        for _ in range(count):
            self._step(self.next.view(1, 1))

    def _step(self, ids: Tensor) -> Tensor:
        out = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        logits = out.logits[0, -1]
        self.next = logits.argmax()
        return logits.float()


class PackedModules(Transformers):
    """The packed model, driven by `transformers`; checked on its first block, as `Native` is."""

    def checked_logits(self, ids: list[int]) -> Tensor:
        return Transformers(self.name, first_block(self.model)).prefill(ids)


class Native(Engine):
    """bitbell's own decode step in C++."""

    # Floats between layers are added up in another order, so that now and then a code next to a threshold flips. Layers
    # with random weights blow that up to anything, so the check is made on the first block alone; wrong is about 1.
    tolerance = 0.05

    def __init__(self, packed: Any, threads: int, head_bits: int | None, expected: Tensor, ids: list[int]) -> None:
        self.name = "bitbell native" + (f", head {head_bits}-bit" if head_bits else "")
        self.model, self.expected = NativeLlama(packed, threads=threads, head_bits=head_bits), expected
        self.last = 0
        self.one_block = NativeLlama(first_block(packed), threads=threads, head_bits=head_bits)
        if head_bits == 16:
            self.expected = Transformers(self.name, rounded_ends(first_block(packed))).prefill(ids)
        elif head_bits:
            # Rows of small integers rotate to many exact zeros, thresholds of BBQ: chance decides their codes.
            self.expected = None

    def checked_logits(self, ids: list[int]) -> Tensor:
        return self.one_block.prefill(ids)

    def prefill(self, ids: list[int]) -> Tensor | None:
        logits = self.model.prefill(ids)
        self.last = int(logits.argmax())
        return logits

    def decode(self, count: int) -> None:
        self.last = self.model.generate([self.last], count, keep=True)[-1]


class LlamaCpp(Engine):
    """llama.cpp on a GGUF file of the same weights. It sets the state of AMX tiles once a thread, so it has its own."""

    executor = ThreadPoolExecutor(1, "llama.cpp")

    def __init__(self, kind: str, path: Path, threads: int, expected: Tensor) -> None:
        self.name = f"llama.cpp {kind}"
        if kind == "BF16":  # the others round weights further than any tolerance would catch
            self.expected, self.tolerance = expected, 0.05
        self.executor.submit(self._load, path, threads).result()

    def _load(self, path: Path, threads: int) -> None:
        import llama_cpp

        self.library = llama_cpp
        llama_cpp.llama_backend_init()
        self.log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.log, None)
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = POSITIONS
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def prefill(self, ids: list[int]) -> Tensor:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
        self._step(ids)
        return torch.tensor(self.library.llama_get_logits_ith(self.context, -1)[: self.vocabulary])

    def decode(self, count: int) -> None:
        for _ in range(count):
            self._step([5])  # which token does not matter; as in llama-bench, none is chosen from the logits

    def _step(self, ids: list[int]) -> None:
        tokens = (self.library.llama_token * len(ids))(*ids)
        status = self.library.llama_decode(self.context, self.library.llama_batch_get_one(tokens, len(ids)))
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")

    def release(self) -> None:
        self.library.llama_free(self.context)
        self.library.llama_model_free(self.model)


def write_gguf(model: Any, kind: str, path: Path, quantized: Callable[[str, Tensor], Any]) -> None:
    """The model's weights in a ggml type; embedding and head in Q6_K, as llama.cpp's own tool would, or in BF16.

    quantized: (type, float32 matrix) -> rows of bytes.
    """
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in gguf_tensors(model):
        if tensor.dim() == 1:
            writer.add_tensor(name, tensor.numpy())
            continue
        inner = name.startswith("blk.")
        chosen = kind if inner or kind == "BF16" else "Q6_K"
        raw_type = gguf.GGMLQuantizationType(TYPES[chosen])
        writer.add_tensor(name, quantized(chosen, tensor), raw_dtype=raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(model: Any) -> list[tuple[str, Tensor]]:
    """(name in llama.cpp, float32 tensor) of a LlamaForCausalLM."""
    found = [
        ("token_embd.weight", model.model.embed_tokens.weight),
        ("output_norm.weight", model.model.norm.weight),
        ("output.weight", model.lm_head.weight),
    ]
    for i, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        found += [
            (f"blk.{i}.attn_norm.weight", layer.input_layernorm.weight),
            (f"blk.{i}.attn_q.weight", interleaved(attention.q_proj.weight, model.config.num_attention_heads)),
            (f"blk.{i}.attn_k.weight", interleaved(attention.k_proj.weight, model.config.num_key_value_heads)),
            (f"blk.{i}.attn_v.weight", attention.v_proj.weight),
            (f"blk.{i}.attn_output.weight", attention.o_proj.weight),
            (f"blk.{i}.ffn_norm.weight", layer.post_attention_layernorm.weight),
            (f"blk.{i}.ffn_gate.weight", mlp.gate_proj.weight),
            (f"blk.{i}.ffn_up.weight", mlp.up_proj.weight),
            (f"blk.{i}.ffn_down.weight", mlp.down_proj.weight),
        ]
    return [(name, tensor.detach().float().contiguous()) for name, tensor in found]


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows from transformers' order (the halves of a head rotate together) to llama.cpp's (neighbours do)."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


@dataclass
class Times:
    """Seconds of the prompt and of the tokens after it, one of each round."""

    engine: Engine
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def check(engine: Engine, ids: list[int]) -> str:
    """ "right ...", "WRONG ..." or "not checked", by the logits of the prompt."""
    logits = engine.checked_logits(ids)
    if logits is None or engine.expected is None:
        return "not checked"
    error = float((logits - engine.expected).norm() / engine.expected.norm())
    verdict = "right" if error <= engine.tolerance else "WRONG"
    return f"{verdict}: logits differ by {error:.1e}, at most {engine.tolerance:g}"


def one_round(times: Times, ids: list[int], count: int, clock: Callable[[], float]) -> None:
    begun = clock()
    times.engine.prefill(ids)
    between = clock()
    times.engine.decode(count)
    times.prefill.append(between - begun)
    times.decode.append(clock() - between)


def on_its_thread(engine: Engine, function: Callable[..., Any], *args: Any) -> Any:
    return function(*args) if engine.executor is None else engine.executor.submit(function, *args).result()


def build_models(args: argparse.Namespace, ids: list[int]) -> tuple[Any, Any, Tensor]:
    """The model in float32, its packed twin, and the logits of the quantized model before it was packed."""
    PRESETS["benchmark"] = Preset(
        layers=args.layers,
        width=args.width,
        heads=args.heads,
        feed_forward=args.feed_forward,
        learning_rate=1e-3,
        tokens=0,
        vocabulary=args.vocabulary,
    )
    model: Any = bitbell.build_model("benchmark", sequence_length=POSITIONS).eval()
    trained = bitbell.quantize(copy.deepcopy(model), args.recipe)
    bitbell.calibrate(trained, torch.tensor([ids]))
    packed = bitbell.pack(trained.eval())
    return model, packed, Transformers("trained", first_block(trained)).prefill(ids)


def first_block(model: Any) -> Any:
    """The model (packed or not) with only its first block; weights are shared."""
    inner = getattr(model, "model", model) if not hasattr(model, "generation_config") else model
    shallow = copy.copy(inner)
    shallow._modules = dict(inner._modules)
    shallow.model = copy.copy(inner.model)
    shallow.model._modules = dict(inner.model._modules)
    shallow.model.layers = nn.ModuleList(inner.model.layers[:1])
    shallow.config = shallow.model.config = copy.copy(inner.config)
    shallow.config.num_hidden_layers = 1
    return shallow


def rounded_ends(model: Any) -> Any:
    """The model with its embedding and head rounded to bfloat16; the rest is shared."""
    for parent, name in ((model.model, "embed_tokens"), (model, "lm_head")):
        parent._modules[name] = copy.deepcopy(getattr(parent, name)).bfloat16().float()
    return model


def engines_for(
    args: argparse.Namespace, threads: int, model: Any, packed: Any, expected: Tensor, ids: list[int]
) -> list[Engine]:
    """Ours first; says what is left out."""
    exact = Transformers("float32", model).prefill(ids)
    engines: list[Engine] = []
    for head_bits in [None, *args.head_bits]:
        try:
            engines.append(Native(packed, threads, head_bits, expected, ids))
        except ValueError as error:
            print(f"bitbell native: not timed: {error}")
            break
    engines += [
        PackedModules(f"packed {args.recipe} in transformers", packed.model, expected, Native.tolerance),
        Transformers("transformers float32", model),
        Transformers("transformers bfloat16", copy.deepcopy(model).bfloat16(), exact, 0.05),
    ]
    problem = missing_packages("llama_cpp", "gguf") if args.llama_cpp else None
    if problem:
        print(f"llama.cpp: not timed: {problem}")
        return engines
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.llama_cpp:
            path = Path(folder) / f"{kind}.gguf"
            write_gguf(model, kind, path, ggml().quantized)
            engines.append(LlamaCpp(kind, path, threads, exact))
    return engines


def measure(engines: Sequence[Engine], ids: list[int], args: argparse.Namespace, threads: int) -> list[Times]:
    """Check all, then time those that are right."""
    clock, times = clock_for(threads), []
    for engine in engines:
        verdict = on_its_thread(engine, check, engine, ids)
        print(f"{engine.name}: {verdict}", flush=True)
        if not verdict.startswith("WRONG"):
            on_its_thread(engine, engine.prefill, ids)
            on_its_thread(engine, engine.decode, 2)
            times.append(Times(engine))
    for _ in range(args.rounds):
        for each in times:
            on_its_thread(each.engine, one_round, each, ids, args.tokens, clock)
    return times


def records_of(times: Sequence[Times], args: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    """Print a table, and return its rows. Ratios: how many times the tokens a second of ours, the first engine, are
    those of the others."""
    ours, records = times[0], []
    print(f"\n{threads} thread{'s' * (threads > 1)}; ratios are of {ours.engine.name} over the row\n")
    print(f"| engine | decode tokens/s | ratio | prefill-{args.prompt} tokens/s | ratio |\n|---|---|---|---|---|")
    for each in times:
        row: dict[str, Any] = {"engine": each.engine.name, "threads": threads, "ours": ours.engine.name}
        for what, tokens in (("decode", args.tokens), ("prefill", args.prompt)):
            rate = Spread.of([tokens / s for s in getattr(each, what)])
            ratio = ratios(getattr(each, what), getattr(ours, what))
            row |= {f"{what}_tokens_per_second": rate.json(), f"{what}_ratio": ratio.json()}
            row[f"{what}_cells"] = f"{rate.median:.1f} | {ratio}"
        print(f"| {row['engine']} | {row.pop('decode_cells')} | {row.pop('prefill_cells')} |", flush=True)
        records.append(row)
    return records


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="bbq-w2a2")
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--head-bits", nargs="+", type=int, default=[], help="also time ours with a head of these bits")
    parser.add_argument("--llama-cpp", nargs="+", default=[], choices=sorted(TYPES), metavar="TYPE")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens after it")
    parser.add_argument("--json", type=Path, default=None)
    for name, default in (
        ("layers", 16),
        ("width", 1024),
        ("feed-forward", 2816),
        ("heads", 16),
        ("vocabulary", 32000),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help="of the model")
    args = parser.parse_args()
    if args.prompt < 1 or args.tokens < 1 or args.prompt + args.tokens > POSITIONS or args.rounds < 1:
        parser.error(
            f"--prompt, --tokens and --rounds must be at least 1, and the first two at most {POSITIONS} together"
        )
    return args


def main() -> None:
    args = parse_arguments()
    ids = torch.randint(0, args.vocabulary, (args.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    use_threads(args.threads[0])
    model, packed, expected = build_models(args, ids)
    parameters = sum(p.numel() for p in model.parameters())
    result: dict[str, Any] = {"recipe": args.recipe, "parameters": parameters, "machines": [], "engines": []}
    for threads in args.threads:
        use_threads(threads)
        about = machine(threads) | {"stream": stream_rates(threads)}
        print(f"{describe(about)}\n{parameters / 1e6:.0f} million parameters, {args.recipe}", flush=True)
        result["machines"].append(about)
        engines = engines_for(args, threads, model, packed, expected, ids)
        times = measure(engines, ids, args, threads)
        result["engines"] += records_of(times, args, threads)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1))
        for engine in engines:
            on_its_thread(engine, engine.release)


if __name__ == "__main__":
    main()
