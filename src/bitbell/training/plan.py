"""What training a LLaMA of a size costs on so many GPUs: memory of each, bytes moved, time. Arithmetic, no measurement.

Bytes of a GPU, P parameters on N GPUs:

    weights      4 P, float32                          fsdp: / N, and two blocks' and the outermost ones gathered
    gradients    4 P                                   fsdp: / N, or whole between the micro-batches of a step (but for
                                                       weights that travel as codes)
    moments      8 P, AdamW                            fsdp: / N
    kept         a byte (BBQ) or two a weight: codes, or bfloat16 copies, that wait for the backward pass
    activations  tokens * layers * (a width + b feed_forward), and 12 bytes a logit

`KEPT` holds a, b and the bytes a weight; a test counts them on a small model. What moves goes around a ring, of which
a GPU sends (N - 1) / N of what is gathered or reduced, and twice that of what is all-reduced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True)
class Shape:
    """A LLaMA's shape; head and embedding are not tied. key_value_width: of keys and of values, all heads together."""

    layers: int
    width: int
    feed_forward: int
    key_value_width: int
    vocabulary: int

    @property
    def block_weights(self) -> int:
        """Weights of one block's linear layers, which are quantized."""
        return self.width * (2 * self.width + 2 * self.key_value_width + 3 * self.feed_forward)

    @property
    def block_rows(self) -> int:
        """Rows of these, each with a step."""
        return 3 * self.width + 2 * self.key_value_width + 2 * self.feed_forward

    @property
    def outer(self) -> int:
        """Parameters outside the blocks: embedding, head, last norm."""
        return (2 * self.vocabulary + 1) * self.width

    @property
    def block(self) -> int:
        """Parameters of one block, norms included."""
        return self.block_weights + 2 * self.width

    @property
    def parameters(self) -> int:
        """All of them, without the scales."""
        return self.layers * self.block + self.outer


# Public configurations of LLaMA 2 (7b, 13b, 70b) and 3.2 (1b, 3b), with untied heads.
SHAPES = {
    "1b": Shape(16, 2048, 8192, 512, 128_256),
    "3b": Shape(28, 3072, 8192, 1024, 128_256),
    "7b": Shape(32, 4096, 11008, 4096, 32_000),
    "13b": Shape(40, 5120, 13824, 5120, 32_000),
    "70b": Shape(80, 8192, 28672, 1024, 32_000),
}


@dataclass(frozen=True)
class Kept:
    """Bytes kept for the backward pass: per token times width and times feed_forward, and per weight of a block."""

    width: float
    feed_forward: float
    weight: float


# Under bfloat16 autocast, without integer_forward. Keys and values count as wide as queries.
KEPT = {"none": Kept(34, 8, 2), "bbq": Kept(33, 9, 1), "quest": Kept(30, 8, 2)}
GATHERS = ("float32", "bfloat16", "low-bit")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be trained, and on what.

    params: a size of SHAPES. distributed: ddp or fsdp; one GPU holds the whole model in either case. method: none, bbq
    or quest. bits: 1 to 8. gather, reduce_every: how weights travel and gradients are reduced under fsdp. sequences: a
    GPU's, in a micro-batch. flops: a GPU's peak, of which `utilisation` (0 to 1) is reached. link: bytes a second that
    a GPU sends and, at the same time, receives. Raises ValueError for what does not exist.
    """

    params: str
    gpus: int = 8
    distributed: str = "fsdp"
    method: str = "bbq"
    bits: int = 2
    gather: str = "float32"
    sequences: int = 4
    sequence_length: int = 2048
    accumulation: int = 1
    reduce_every: bool = False
    flops: float = 989e12
    utilisation: float = 0.4
    link: float = 50e9

    def __post_init__(self) -> None:
        choices: dict[str, Sequence[str]] = {
            "params": tuple(SHAPES),
            "distributed": ("ddp", "fsdp"),
            "method": tuple(KEPT),
            "gather": GATHERS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {name}={getattr(self, name)!r}")
        for name in ("gpus", "bits", "sequences", "sequence_length", "accumulation", "flops", "utilisation", "link"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {name}={getattr(self, name)!r}")
        if self.bits > 8:
            raise ValueError(f"bits must be at most 8, got bits={self.bits}")
        if self.utilisation > 1:
            raise ValueError(f"utilisation must be at most 1, got utilisation={self.utilisation}")
        if self.gather == "low-bit" and self.method == "none":
            raise ValueError("gather=low-bit moves codes of quantized weights, and method=none has none")
        if self.distributed == "ddp" and (self.gather != "float32" or self.reduce_every):
            raise ValueError("gather and reduce_every are for distributed=fsdp: under ddp no weights are gathered")

    @property
    def holds_rows(self) -> bool:
        """Whether a GPU holds rows of every parameter, not all of the model."""
        return self.distributed == "fsdp" and self.gpus > 1

    @property
    def gathers_codes(self) -> bool:
        """Whether weights travel as codes; their gradients are then reduced after every micro-batch."""
        return self.holds_rows and self.gather == "low-bit"


@dataclass(frozen=True)
class Plan:
    """Bytes of one GPU, bytes that it sends in a step, messages of statistics, and seconds of a step.

    seconds_hidden: if communication hides behind computation wherever it can; seconds_apart: if nothing does.
    """

    weights: float
    gradients: float
    moments: float
    kept: float
    activations: float
    moved: float
    statistics: int
    compute_seconds: float
    moving_seconds: float
    tokens: int

    @property
    def memory(self) -> float:
        return self.weights + self.gradients + self.moments + self.kept + self.activations

    @property
    def seconds_hidden(self) -> float:
        return max(self.compute_seconds, self.moving_seconds)

    @property
    def seconds_apart(self) -> float:
        return self.compute_seconds + self.moving_seconds


def plan(job: Job) -> Plan:
    """The plan of a job."""
    shape, tokens = SHAPES[job.params], job.sequences * job.sequence_length
    weights, gradients = _held(job, shape)
    kept = KEPT[job.method]
    moved = _moved(job, shape)
    # Two a weight and token forward, four backward; causal attention reads half of what is before it.
    a_token = 6 * (shape.layers * shape.block_weights + shape.vocabulary * shape.width)
    a_token += 6 * shape.layers * shape.width * job.sequence_length
    layer = kept.width * shape.width + kept.feed_forward * shape.feed_forward
    return Plan(
        weights=weights,
        gradients=gradients,
        moments=8 * shape.parameters / (job.gpus if job.holds_rows else 1),
        # A low-bit gather gathers codes again.
        kept=0 if job.gathers_codes else kept.weight * shape.layers * shape.block_weights,
        activations=tokens * (shape.layers * layer + 12 * shape.vocabulary),
        moved=moved,
        # q/k/v and gate/up share an input: four quantizers a block, each a sum forward and one backward.
        statistics=2 * 4 * shape.layers * job.accumulation if job.method == "bbq" and job.gpus > 1 else 0,
        compute_seconds=job.accumulation * tokens * a_token / (job.flops * job.utilisation),
        moving_seconds=moved / job.link,
        tokens=job.gpus * job.accumulation * tokens,
    )


def _held(job: Job, shape: Shape) -> tuple[float, float]:
    """Bytes of weights and of gradients in a GPU, when they are most."""
    if not job.holds_rows:
        return 4 * shape.parameters, 4 * shape.parameters
    # The block that computes and the next; codes of weights that travelled in low bits have a byte each.
    weight_bytes = {"float32": 4.0, "bfloat16": 2.0, "low-bit": 1 + job.bits / 8}[job.gather]
    outer_bytes = 2 if job.gather == "bfloat16" else 4
    gathered = 2 * weight_bytes * shape.block_weights + outer_bytes * shape.outer
    at_once = _reduced_at_once(job, shape)
    blocks = 2 * shape.block_weights if at_once else 0
    on_their_way = 2 * shape.block + shape.outer if at_once == shape.parameters else blocks
    gradients = shape.parameters - at_once + at_once / job.gpus + on_their_way
    return 4 * shape.parameters / job.gpus + gathered, 4 * gradients


def _reduced_at_once(job: Job, shape: Shape) -> int:
    """Parameters whose gradients are reduced after every micro-batch; those of the others wait, whole, for the last."""
    if job.accumulation == 1 or job.reduce_every:
        return shape.parameters
    return shape.layers * shape.block_weights if job.gathers_codes else 0


def _moved(job: Job, shape: Shape) -> float:
    """Bytes that a GPU sends in a step."""
    share = (job.gpus - 1) / job.gpus
    if not job.holds_rows:
        return 2 * share * 4 * shape.parameters
    blocks = (
        shape.layers
        * {
            "float32": 4 * shape.block_weights,
            "bfloat16": 2 * shape.block_weights,
            "low-bit": job.bits / 8 * shape.block_weights + 4 * shape.block_rows,
        }[job.gather]
    )
    outer = (2 if job.gather == "bfloat16" else 4) * shape.outer
    gathered = job.accumulation * (2 * blocks + outer)  # blocks once more in the backward pass
    at_once = _reduced_at_once(job, shape)
    reduced = 4 * (job.accumulation * at_once + shape.parameters - at_once)
    return share * (gathered + reduced)


def describe(job: Job) -> str:
    """The plan in words and numbers, a line each."""
    found, shape = plan(job), SHAPES[job.params]
    quantized = shape.layers * shape.block_weights
    rows = [
        (
            "parameters",
            f"{shape.parameters / 1e9:.2f} billion, {quantized / 1e9:.2f} in layers that are quantized",
        ),
        ("weights", f"{found.weights / GB:.1f} GB a GPU"),
        ("gradients", f"{found.gradients / GB:.1f} GB"),
        ("moments", f"{found.moments / GB:.1f} GB"),
        ("kept weights", f"{found.kept / GB:.1f} GB until the backward pass"),
        ("activations", f"{found.activations / GB:.1f} GB for {job.sequences} x {job.sequence_length} tokens"),
        ("memory", f"{found.memory / GB:.1f} GB a GPU"),
        ("moved", f"{found.moved / GB:.2f} GB sent by a GPU in a step"),
        ("statistics", f"{found.statistics} messages of one number a step"),
        ("computing", f"{found.compute_seconds:.2f} s"),
        ("moving", f"{found.moving_seconds:.2f} s"),
        ("step", f"{found.seconds_hidden:.2f} s hidden, {found.seconds_apart:.2f} s one after the other"),
        ("tokens", f"{found.tokens:,} a step, {found.tokens / found.seconds_hidden:,.0f} a second at best"),
    ]
    return "\n".join(f"{name:<13} {value}" for name, value in rows)


def table(jobs: Sequence[Job]) -> str:
    """Plans as a Markdown table."""
    lines = [
        "| parameters | GPUs | distributed | gather | weights | gradients | moments | kept | activations | memory, GB "
        "| moved, GB | computing, s | moving, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for job in jobs:
        p = plan(job)
        sizes = (p.weights, p.gradients, p.moments, p.kept, p.activations, p.memory)
        numbers = [f"{size / GB:.1f}" for size in sizes] + [f"{p.moved / GB:.2f}"]
        numbers += [f"{p.compute_seconds:.2f}", f"{p.moving_seconds:.2f}"]
        gather = job.gather if job.distributed == "fsdp" else "-"
        lines.append("| " + " | ".join([job.params, str(job.gpus), job.distributed, gather, *numbers]) + " |")
    return "\n".join(lines)
