"""What a served directory may be made of: files of its own."""

from __future__ import annotations

import os
from pathlib import Path


def check_links(directory: str | Path) -> None:
    """Raise ValueError for a symbolic link that leads out of a model's directory.

    A snapshot in a cache of the Hugging Face Hub is the exception: it is made of links to files beside it, in the
    folder `models--...` that holds both.
    """
    folder = Path(directory).resolve()
    root = folder
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        root = folder.parents[1]
    for place, folders, files in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *files)):
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise ValueError(
                    f"{path} is a link to {path.resolve()}, outside of {root}; put a copy of the file in its place"
                )
