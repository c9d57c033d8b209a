"""`bitbell export`: a packed model as a file that another runtime runs."""

from __future__ import annotations

from typing import Literal

import tyro


def export(
    format: tyro.conf.Positional[Literal["onnx"]],
    model: tyro.conf.Positional[str],
    /,
    out: str,
    cache: bool = False,
    check: bool = True,
    overwrite: bool = False,
) -> int:
    """Write a model for another runtime, and compare the two; refuses what that runtime would compute differently.

    Args:
        format: onnx, for onnxruntime (docs/onnx.md).
        model: A packed directory or a run.
        out: File to write.
        cache: Take and give keys and values, for decoding token by token.
        check: Run the file and compare codes, layers and logits.
        overwrite: Replace a file of that name.
    """
    from bitbell.cli.commands import open_model
    from bitbell.export import onnx

    loaded, _ = open_model(model, "cpu")
    print(onnx(loaded, out, cache=cache, check=check, overwrite=overwrite))
    return 0
