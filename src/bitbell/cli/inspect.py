"""`bitbell inspect`: one page about the layers of a model."""

from __future__ import annotations

from pathlib import Path

import tyro


def inspect(
    model: tyro.conf.Positional[str],
    /,
    against: str | None = None,
    out: str = "inspect.html",
    overwrite: bool = False,
) -> int:
    """Write one self-contained HTML page about the codes, scales and weights of every layer.

    Args:
        model: A packed directory or a run.
        against: Another one, to compare with: share of the codes changed, ratios of the scales.
        out: File to write.
        overwrite: Replace a file of that name.
    """
    from bitbell.cli.commands import open_model
    from bitbell.reports.inspect_page import write_inspection

    if Path(out).exists() and not overwrite:
        raise ValueError(f"{out} exists already; choose another file, or overwrite it (--overwrite)")
    loaded, _ = open_model(model)
    other = None if against is None else open_model(against)[0]
    names = [Path(path).resolve().name for path in (model, against or "")]
    if against is not None and names[0] == names[1]:
        names = [model, against]
    print(write_inspection(loaded, out, name=names[0], other=other, other_name=names[1]))
    return 0
