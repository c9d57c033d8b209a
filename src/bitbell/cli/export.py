"""`bitbell export`: a packed model as a file that another runtime runs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro


def export(
    format: tyro.conf.Positional[Literal["onnx", "gguf"]],
    model: tyro.conf.Positional[str],
    /,
    out: str,
    cache: bool = False,
    check: bool = True,
    overwrite: bool = False,
) -> int:
    """Write a model for another runtime, and compare the two; refuses what that runtime would compute differently.

    Args:
        format: onnx, for onnxruntime (docs/onnx.md), or gguf, for llama.cpp (docs/gguf.md).
        model: A packed directory or a run.
        out: File to write.
        cache: Take and give keys and values, for decoding token by token (onnx; llama.cpp always does).
        check: Run the file and compare codes, layers and logits (onnx; gguf is always read back).
        overwrite: Replace a file of that name.
    """
    from bitbell.cli.commands import open_model
    from bitbell.export import gguf, onnx

    if format == "gguf" and (cache or not check):
        raise ValueError("--cache and --no-check are for onnx: llama.cpp always keeps a cache, and gguf is read back")
    loaded, _ = open_model(model, "cpu")
    if format == "onnx":
        print(onnx(loaded, out, cache=cache, check=check, overwrite=overwrite))
    else:
        tokenizer = model if (Path(model) / "tokenizer.json").is_file() else None
        print(gguf(loaded, out, tokenizer=tokenizer, overwrite=overwrite))
    return 0
