"""`bitbell export`: a packed model as files that another runtime runs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

# Options of one format alone, and the values that say nothing.
ONLY: dict[str, tuple[str, bool | None]] = {"cache": ("onnx", False), "check": ("onnx", True)}
ONLY |= {"code_bits": ("compressed-tensors", None), "transforms": ("compressed-tensors", False)}


def export(
    format: tyro.conf.Positional[Literal["onnx", "gguf", "compressed-tensors"]],
    model: tyro.conf.Positional[str],
    /,
    out: str,
    cache: bool = False,
    check: bool = True,
    code_bits: int | None = None,
    transforms: bool = False,
    overwrite: bool = False,
) -> int:
    """Write a model for another runtime, and compare the two; refuses what that runtime would compute differently.

    Args:
        format: onnx, for onnxruntime (docs/onnx.md), gguf, for llama.cpp (docs/gguf.md), or compressed-tensors, for
            transformers with that library (docs/compressed-tensors.md).
        model: A packed directory or a run.
        out: File to write; of compressed-tensors, a directory.
        cache: Take and give keys and values, for decoding token by token (onnx; llama.cpp always does).
        check: Run the file and compare codes, layers and logits (onnx; others are always read back).
        code_bits: Bits of the codes that are written (compressed-tensors); by default 2, 4 or 8, as the levels need.
        transforms: Describe rotations of inputs by a transform_config, which transformers ignores (compressed-tensors).
        overwrite: Replace what is there.
    """
    from bitbell.cli.commands import open_model
    from bitbell.export import compressed_tensors, gguf, onnx

    given = {"cache": cache, "check": check, "code_bits": code_bits, "transforms": transforms}
    for name, (only, default) in ONLY.items():
        if given[name] != default and format != only:
            flag = "no-check" if name == "check" else name.replace("_", "-")
            raise ValueError(f"--{flag} is for {only}, not for {format}")
    loaded, _ = open_model(model, "cpu")
    tokenizer = model if (Path(model) / "tokenizer.json").is_file() else None
    if format == "onnx":
        print(onnx(loaded, out, cache=cache, check=check, overwrite=overwrite))
    elif format == "gguf":
        print(gguf(loaded, out, tokenizer=tokenizer, overwrite=overwrite))
    else:
        options = {"code_bits": code_bits, "transforms": transforms, "tokenizer": tokenizer, "overwrite": overwrite}
        print(compressed_tensors(loaded, out, **options))  # type: ignore[arg-type]
    return 0
