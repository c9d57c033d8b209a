"""`bitbell bench`: speed and memory of a model on this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from bitbell.serving import Bench


def bench(
    model: tyro.conf.Positional[str],
    /,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    rounds: int = 5,
    threads: int | None = None,
    head_bits: Literal[8, 16] | None = None,
    device: str = "auto",
    native: Literal["auto", "always", "never"] = "auto",
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Tokens a second, time of each layer, share of the memory's speed, and memory.

    Args:
        model: A packed directory or a run.
        prompt_tokens: Length of the prompt (prefill).
        new_tokens: Tokens made after it (decode).
        rounds: Repetitions; medians are shown.
        threads: Threads of the C++ kernels and of torch; by default as many as torch takes.
        head_bits: Keep the output head and the embedding in 8 bits, or bfloat16 (16); native only.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
        native: Run the C++ step (always), the model's modules (never), or C++ where it can run the model (auto).
        as_json: Print every number as JSON.
    """
    from bitbell.cli.commands import NATIVE_STEP, open_model
    from bitbell.serving import bench as run

    loaded, _ = open_model(model, device)
    sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "rounds": rounds}
    result = run(loaded, **sizes, threads=threads, head_bits=head_bits, native_step=NATIVE_STEP[native])
    print(json.dumps(result.to_dict(), indent=2) if as_json else describe(result))
    return 0


def describe(result: Bench) -> str:
    """The measurements as a page of text."""
    threads = f"{result.threads} thread{'s' * (result.threads > 1)}"
    lines = [
        f"{result.engine}, {threads}, medians of {result.clock} (spread {result.spread:.0%})",
        f"prefill    {result.prefill_tokens_per_second:10.1f} tokens/s   {result.prompt_tokens} tokens at a time",
        f"decode     {result.decode_tokens_per_second:10.1f} tokens/s   one sequence, {result.new_tokens} tokens",
        f"weights    {result.weight_bytes / 1e6:10.1f} MB         read for every token",
    ]
    if result.stream_bytes_per_second is not None:
        rate = result.weight_bytes * result.decode_tokens_per_second / 1e9
        stream = f"{result.stream_bytes_per_second / 1e9:.1f} GB/s, this machine's in this run"
        of = f"{result.share_of_stream:.0%} of {stream}"
        lines.append(f"traffic    {rate:10.1f} GB/s       {of}")
    lines.append(f"cache      {result.cache_bytes_per_token / 1e3:10.1f} kB         for every token of text")
    lines.append(f"memory     {result.peak_bytes / 1e6:10.1f} MB         largest so far, Python and torch included")
    if result.spread > 0.3:
        lines.append("the rounds differ much: other work runs on this machine, and these numbers are too low")
    if result.layers:
        lines.append("\none row through each kind of packed layer, called from Python, which costs some microseconds:")
        lines.append(f"{'layer':<12} {'number':>6} {'shape':>14} {'recipe':<14} {'us':>8} {'GB/s':>7}")
    for layer in result.layers:
        shape = "x".join(map(str, layer.shape))
        speed = f"{layer.microseconds:8.1f} {layer.gigabytes_per_second:7.1f}"
        lines.append(f"{layer.name:<12} {layer.count:>6} {shape:>14} {layer.recipe:<14} {speed}")
    return "\n".join(lines)
