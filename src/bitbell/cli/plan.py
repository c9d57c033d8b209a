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
        bits: Of the weights, 1 to 8.
        gather: How weights travel under fsdp: as float32, as bfloat16 (which rounds them first; not offered), as codes.
        sequences: Of a GPU, in a micro-batch.
        sequence_length: Tokens in a sequence.
        accumulation: Micro-batches in a step.
        reduce_every: Under fsdp, reduce gradients after every micro-batch.
        flops: Peak operations a second of a GPU.
        utilisation: Share of the peak that is reached.
        link: Bytes a second that a GPU sends.
        table: Every size, --distributed and gather as a Markdown table, whichever of them are given.
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
        "flops": flops,
        "utilisation": utilisation,
        "link": link,
    }
    if not table:
        job = Job(params=params, distributed=distributed, gather=gather, reduce_every=reduce_every, **rest)  # type: ignore[arg-type]
        print(describe(job))
        return 0
    ways = [("ddp", "float32")] + [("fsdp", way) for way in GATHERS if way != "low-bit" or method != "none"]
    jobs = [
        Job(params=p, distributed=d, gather=g, reduce_every=reduce_every and d == "fsdp", **rest)  # type: ignore[arg-type]
        for p in SHAPES
        for d, g in ways
    ]
    print(table_of(jobs))
    return 0
