"""The part of a page about a classifier's mistakes: confused classes, and the images with the highest loss."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from bitbell.evaluation.predictions import Mistake, Predictions
from bitbell.reports import formats
from bitbell.reports.confusion import MOST_CLASSES, draw_confusion
from bitbell.reports.drawing import Look, Picture
from bitbell.reports.html import Drawn, key_of, picture_grid, section_start, table_card
from bitbell.reports.predictions import class_names, pixels_of, read_predictions, top_confusions
from bitbell.reports.runs import Run

OPEN_RUNS = 2  # the images of more runs than this start folded
SHOWN = 24  # mistakes of a run
LISTED = 15  # pairs of classes
LARGEST = 96  # pixels of a side; larger images are scaled down
SMALL = 64  # up to this they are shown pixel for pixel


def draw_confusions(runs: Sequence[Run]) -> list[Picture]:
    """A map of the confusions of each run that left any, of few enough classes."""
    drawn = [draw_confusion(run.name, found, class_names(run)) for run in runs if (found := read_predictions(run))]
    return [picture for picture in drawn if picture is not None]


def confusions_section(runs: Sequence[Run], drawn: Sequence[Drawn], look_of: Mapping[str, Look]) -> str:
    """The maps, and lists of the most frequent mistakes where there are too many classes for a map."""
    lists = [_list(run, found) for run in runs if (found := read_predictions(run)) and _is_listed(run)]
    if not drawn and not lists:
        return ""
    maps = [picture_grid(drawn, look_of)] if drawn else []
    return "\n".join([section_start("Which classes are taken for which"), *maps, *lists, "</section>"])


def mistakes_section(runs: Sequence[Run], look_of: Mapping[str, Look]) -> str:
    """The images with the highest loss of each run, what they are, and what the model takes them for."""
    cards = [_images(run, found, look_of[run.name]) for run in runs if (found := read_predictions(run))]
    if not cards:
        return ""
    rest = "".join(cards[OPEN_RUNS:])
    more = len(cards) - OPEN_RUNS
    folded = f"<details><summary>{more} more run{'s' * (more != 1)}</summary>{rest}</details>" if rest else ""
    return "\n".join([section_start("The worst mistakes"), *cards[:OPEN_RUNS], folded, "</section>"])


def _is_listed(run: Run) -> bool:
    return len(class_names(run)) > MOST_CLASSES


def _list(run: Run, predictions: Predictions) -> str:
    found = top_confusions(predictions, class_names(run), LISTED)
    head = '<tr><th scope="col" class="text">Class</th><th scope="col" class="text">Taken for</th>'
    head += '<th scope="col">Images</th><th scope="col">Of the class<span class="unit">%</span></th></tr>'
    rows = "\n".join(
        f'<tr><th scope="row">{escape(c.label)}</th><td class="text">{escape(c.guess)}</td>'
        f"<td>{c.count} of {c.images}</td><td>{100 * c.count / c.images:.1f}</td></tr>"
        for c in found
    )
    hint = f"The {len(found)} most frequent of the mistakes on the {predictions.images} images measured."
    return table_card(f"Confusions of {run.name}", "", head, rows, hint)


def _images(run: Run, predictions: Predictions, look: Look) -> str:
    title = f"<h3>{key_of(look)}{escape(run.name)}</h3>"
    shown = predictions.mistakes[:SHOWN]
    if not shown:
        nothing = f"It makes no mistake on the {predictions.images} images measured."
        return f'<div class="card mistaken">{title}<p class="hint">{nothing}</p></div>'
    pixels = pixels_of(run, predictions.split, [mistake.place for mistake in shown])
    if isinstance(pixels, str):
        return f'<div class="card mistaken">{title}<p class="hint">Not shown: {escape(pixels)}.</p></div>'
    names = class_names(run)
    figures = "\n".join(_figure(mistake, image, names) for mistake, image in zip(shown, pixels, strict=True))
    wrong = sum(count for (label, guess), count in predictions.confusion.items() if label != guess)
    hint = (
        f"{len(shown)} of {wrong} mistakes on the {predictions.images} images measured, the highest loss first: what "
        "an image is, what the model takes it for, and how probable it finds that."
    )
    return f'<div class="card mistaken">{title}\n<div class="mistakes">{figures}</div><p class="hint">{hint}</p></div>'


def _figure(mistake: Mistake, image: np.ndarray, names: list[str]) -> str:
    label, guess = (escape(names[index]) for index in (mistake.label, mistake.guess))
    sharp = ' class="sharp"' if max(image.shape[:2]) <= SMALL else ""
    caption = f"<b>{label}</b>, taken for <b>{guess}</b> ({100 * mistake.probability:.0f}{formats.THIN}%)"
    image_tag = f'<img{sharp} src="{_as_address(image)}" alt="An image of {label}, taken for {guess}">'
    return f"<figure>{image_tag}<figcaption>{caption}</figcaption></figure>"


def _as_address(image: np.ndarray) -> str:
    """uint8 (size, size, channels) as a `data:` address: exact where it is small, else scaled down."""
    from PIL import Image  # which matplotlib needs, too

    picture: Any = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    kind = "PNG" if max(picture.size) <= SMALL else "JPEG"
    picture.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **({"quality": 85} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
