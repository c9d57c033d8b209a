"""`bitbell plan`: memory, bytes moved and time of a training on many GPUs, before one has them."""

from __future__ import annotations

from typing import Literal


def plan(
    params: Literal["1b", "3b", "7b", "13b", "70b"] = "7b",
    gpus: int = 8,
    distributed: Literal["ddp", "fsdp"] = "fsdp",
    method: Literal["none", "bbq", "quest"] = "bbq",
    bits: int = 2,
    gather: Literal["float32", "bfloat16", "low-bit"] = "float32",
    sequences: int = 4,
    sequence_length: int = 2048,
    accumulation: int = 1,
    reduce_every: bool = False,
    flops: float = 989e12,
    utilisation: float = 0.4,
    link: float = 50e9,
    table: bool = False,
) -> int:
    """Say what training a LLaMA costs: arithmetic from the shapes, not a measurement.

    Args:
        params: Size of the model.
        gpus: How many.
        distributed: What each holds: the whole model (ddp), or rows of every parameter (fsdp).
        method: Of the quantized layers.
        bits: Of the weights.
        gather: How weights travel under fsdp: as float32, as bfloat16 (which rounds them first; not offered), as codes.
        sequences: Of a GPU, in a micro-batch.
        sequence_length: Tokens in a sequence.
        accumulation: Micro-batches in a step.
        reduce_every: Reduce gradients after every micro-batch.
        flops: Peak operations a second of a GPU.
        utilisation: Share of the peak that is reached.
        link: Bytes a second that a GPU sends.
        table: Every size, spread and gather as a Markdown table.
    """
    from bitbell.training.plan import GATHERS, SHAPES, Job, describe
    from bitbell.training.plan import table as table_of

    rest = {
        "gpus": gpus,
        "method": method,
        "bits": bits,
        "sequences": sequences,
        "sequence_length": sequence_length,
        "accumulation": accumulation,
        "reduce_every": reduce_every,
        "flops": flops,
        "utilisation": utilisation,
        "link": link,
    }
    if not table:
        print(describe(Job(params=params, distributed=distributed, gather=gather, **rest)))  # type: ignore[arg-type]
        return 0
    ways = [("ddp", "float32")] + [("fsdp", way) for way in GATHERS if way != "low-bit" or method != "none"]
    print(table_of([Job(params=p, distributed=d, gather=g, **rest) for p in SHAPES for d, g in ways]))  # type: ignore[arg-type]
    return 0
