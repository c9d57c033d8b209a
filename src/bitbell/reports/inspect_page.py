"""The page about a model's layers: a table to sort and filter, and the pictures of the layer that is picked."""

from __future__ import annotations

import json
import math
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from torch import nn

from bitbell.reports.html import section_start, version_of, whole_page
from bitbell.reports.inspection import Difference, LayerView, as_data, compare_layers, inspect_model
from bitbell.training.run import write_at_once


def write_inspection(
    model: nn.Module, out: str | Path, *, name: str, other: nn.Module | None = None, other_name: str = "the other"
) -> Path:
    """Write one self-contained page about a quantized model, and how it differs from `other`; return its path.

    Raises ValueError for a model without quantized layers, for names of layers of which no two models share one, and
    for an `out` that is a folder; OSError if it cannot write.
    """
    out = Path(out)
    if out.is_dir():
        raise ValueError(f"out={str(out)!r} is a folder; give the file to write, such as {str(out / 'inspect.html')!r}")
    views = inspect_model(model)
    differences = [] if other is None else compare_layers(model, other)
    if other is not None and all(d.histogram is None for d in differences):
        raise ValueError(f"no layer of {name} has the name of one of {other_name}, so there is nothing to compare")
    data = as_data(views, differences) | {"name": name, "other": None if other is None else other_name}
    title = name if other is None else f"{name} and {other_name}"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_at_once(out, whole_page("bitbell inspect", title, _lead(views, differences, other_name), [_body(data)]))
    return out


def _lead(views: list[LayerView], differences: list[Difference], other_name: str) -> str:
    weights = sum(view.rows * view.columns for view in views)
    used = sum(view.entropy * view.rows * view.columns for view in views) / weights
    bits = sum(view.bits * view.rows * view.columns for view in views) / weights
    dead = sum(view.dead_rows for view in views)
    words = (
        f"{len(views)} quantized layers, {weights:,} weights of {bits:.4g} bits, of which their codes use {used:.3f}"
    )
    words += f"; {dead:,} rows use one code only." if dead else "; no row uses one code only."
    compared = [(d.changed, v) for d, v in zip(differences, views, strict=False) if d.changed is not None]
    if compared:
        size = sum(v.rows * v.columns for _, v in compared)
        changed = sum(share * v.rows * v.columns for share, v in compared) / size
        words += f" Against {other_name}, {changed:.2%} of the codes differ in the {len(compared)} layers that compare."
    elif differences:
        words += f" No layer has the shape and bits of its like in {other_name}, so that codes cannot be compared."
    return words


def _body(data: dict[str, Any]) -> str:
    files = resources.files("bitbell.reports")
    # "<" would let a layer's name end the script.
    values = json.dumps(_finite(data), allow_nan=False).replace("<", "\\u003c")
    made = f"bitbell {version_of('bitbell')}"
    return "\n".join(
        [
            section_start("Layers"),
            (files / "inspect.html")
            .read_text(encoding="utf-8")
            .replace("@DATA@", values)
            .replace("@MADE@", escape(made)),
            "</section>",
        ]
    )


def _finite(value: Any) -> Any:
    """JSON has no NaN: None instead."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
