"""The C++ extension: addresses of tensors in, nothing checked. `bitbell.kernels.native` is its only caller."""

from typing import Any

def levels() -> list[tuple[str, bool, str]]: ...
def best_level() -> str: ...
def arranged_bytes(rows: int, k: int, bits: int) -> int: ...
def padded_k(k: int) -> int: ...
def arrange(words: int, rows: int, k: int, bits: int, out: int, sums: int, threads: int) -> None: ...
def quantize(
    level: str,
    plan: dict[str, Any],
    x: int,
    rows: int,
    k: int,
    codes: int,
    stride: int,
    step: int,
    sum: int,
    threads: int,
) -> None: ...
def product(
    level: str,
    arranged: int,
    bits: int,
    outputs: int,
    k: int,
    codes: int,
    stride: int,
    x_bits: int,
    rows: int,
    acc: int,
    threads: int,
) -> None: ...
def rotate(level: str, x: int, y: int, n: int, block: int) -> None: ...
def training_quantize(
    level: str,
    plan: dict[str, Any],
    x: int,
    type: int,
    rows: int,
    k: int,
    by_row: bool,
    given: bool,
    size: int,
    codes: int,
    bits: int,
    kept: int,
    kept_type: int,
    threads: int,
) -> None: ...
def training_gradient(level: str, tensors: dict[str, Any], rows: int, k: int, threads: int) -> None: ...
def training_sums(level: str, codes: int, rows: int, k: int, sums: int, threads: int) -> None: ...
def training_outputs(
    level: str,
    row: dict[str, Any],
    acc: int,
    x: int,
    rows: int,
    x_step: int,
    step_by_row: bool,
    y: int,
    threads: int,
) -> None: ...
def stream_rate(bytes: int, passes: int, threads: int) -> float: ...

class Layer:
    def __init__(self, weights: dict[str, Any], plan: dict[str, Any] | None) -> None: ...
    def forward(self, level: str, x: int, rows: int, y: int, threads: int) -> None: ...

def max_pool(
    level: str,
    x: int,
    images: int,
    height: int,
    width: int,
    channels: int,
    pooling: tuple[int, ...],
    y: int,
    threads: int,
) -> None: ...
def pixel_means(level: str, x: int, images: int, pixels: int, channels: int, y: int) -> None: ...
def float_linear(
    level: str, matrix: int, bias: int, rows: int, k: int, x: int, m: int, y: int, threads: int
) -> None: ...

class FloatConvolution:
    def __init__(self, window: dict[str, Any], weight: int, bias: int) -> None: ...
    def forward(
        self,
        level: str,
        x: int,
        channels_last: bool,
        images: int,
        height: int,
        width: int,
        pooling: tuple[int, ...],
        clip: bool,
        y: int,
        threads: int,
    ) -> None: ...

def sample(
    logits: Any, temperature: float = ..., top_k: int = ..., top_p: float = ..., allowed: int = ..., state: int = ...
) -> tuple[int, int]: ...

class Llama:
    slots: int
    positions: int
    vocabulary: int
    level: str
    def __init__(
        self, config: dict[str, Any], blocks: list[dict[str, Any]], slots: int, positions: int, level: str = ...
    ) -> None: ...
    def forward(
        self,
        tokens: list[int],
        slots: list[int],
        positions: list[int],
        logits: Any,
        want: list[bool] | None = ...,
        threads: int = ...,
    ) -> None: ...
    def generate(
        self,
        prompt: list[int],
        max_new_tokens: int,
        end_tokens: list[int] = ...,
        slot: int = ...,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        allowed: int = ...,
        state: int = ...,
        on_token: Any = ...,
        threads: int = ...,
    ) -> tuple[list[int], int]: ...
    def cancel(self) -> None: ...
    def reset(self, slot: int) -> None: ...
    def rewind(self, slot: int, length: int) -> None: ...
    def length(self, slot: int) -> int: ...
