"""Put the page together and write it: one HTML file that needs nothing else, pictures and numbers beside it.

    runs --arrange, group--> tables, words --draw--> pictures --fill in--> report.html, plots/, report.json

Everything that comes from a run folder (names, samples, settings) is escaped where it enters the HTML.
"""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from bitbell.reports import formats
from bitbell.reports.codes import draw_codes
from bitbell.reports.curves import Looks, draw_accuracy, draw_entropy, draw_loss, draw_scales, draw_size
from bitbell.reports.drawing import Look, Picture, drawing_rules, looks, save
from bitbell.reports.html import (
    Drawn,
    key_of,
    picture_grid,
    section_start,
    table_card,
    version_of,
    whole_page,
)
from bitbell.reports.mistakes import confusions_section, draw_confusions, mistakes_section
from bitbell.reports.results import (
    SPREADS,
    Column,
    Group,
    arrange,
    as_json,
    best_of_each_width,
    columns_of,
    group_seeds,
)
from bitbell.reports.runs import Run, read_runs
from bitbell.reports.words import notes, summarise, with_spread
from bitbell.training.run import write_at_once

INSPECTION = "inspect.html"  # written by `bitbell inspect --out OUT/inspect.html`, linked if it is there
OPEN_HISTOGRAMS = 4  # more pictures than this start folded


def write_report(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write one page about `runs` into the folder `out`; return the path of `out`/report.html.

    Beside it: report.json with every number of the tables, and plots/ with each picture as PNG and SVG. The
    page is written last and at once: whoever finds it finds all of it.

    Raises ValueError for folders that are no runs, broken files and an `out` that is a file; OSError if it
    cannot write.
    """
    read = arrange(read_runs(runs))
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={str(out)!r} is a file, but the report needs a folder. Give another path.")
    (out / "plots").mkdir(parents=True, exist_ok=True)
    groups = group_seeds(read)
    look_of = looks([group.runs for group in groups])
    with drawing_rules():
        charts = _save(_charts(read, look_of), out / "plots")
        confusions = _save(_numbered(draw_confusions(read)), out / "plots")
        codes = _save(_numbered(_histograms(read, look_of)), out / "plots")
    numbers = as_json(read, groups) | {"plots": [drawn.picture.name for drawn in charts + confusions + codes]}
    write_at_once(out / "report.json", json.dumps(numbers, indent=1, allow_nan=False) + "\n")
    sections = [
        _results(read, groups, look_of),
        _pictures("Training and size", charts),
        confusions_section(read, confusions, look_of),
        mistakes_section(read, look_of),
        _codes_section(codes, look_of),
        _samples(read),
        _configurations(read),
        _layers(read),
        _link_to_inspection(out),
        _how_made([str(folder) for folder in runs], out),
    ]
    write_at_once(out / "report.html", _fill_in(read, groups, sections))
    return out / "report.html"


def _charts(runs: Sequence[Run], look_of: Looks) -> list[Picture]:
    drawn = [
        draw_loss(runs, look_of),
        draw_accuracy(runs, look_of, "accuracy"),
        draw_accuracy(runs, look_of, "accuracy_top5"),
        draw_size(runs, look_of),
        draw_entropy(runs, look_of),
        draw_scales(runs, look_of, "weight"),
        draw_scales(runs, look_of, "activation"),
    ]
    return [picture for picture in drawn if picture is not None]


def _histograms(runs: Sequence[Run], look_of: Looks) -> list[Picture]:
    drawn = [draw_codes(run, look_of[run.name]) for run in runs if run.is_quantized]
    return [picture for picture in drawn if picture is not None]


def _numbered(pictures: Sequence[Picture]) -> list[Picture]:
    """With a number that keeps apart names that differ only in what a file name cannot hold."""
    return [replace(p, name=p.name.replace("-", f"-{i}-", 1)) for i, p in enumerate(pictures)]


def _save(pictures: Sequence[Picture], folder: Path) -> list[Drawn]:
    return [Drawn(picture, save(picture, folder)) for picture in pictures]


def _fill_in(runs: Sequence[Run], groups: Sequence[Group], sections: Sequence[str]) -> str:
    presets = list(dict.fromkeys(formats.plain(run.config["preset"]) for run in runs if run.config.get("preset")))
    what = f"{len(runs)} training runs" if len(runs) > 1 else runs[0].name
    title = f"{what} of {' and '.join(presets[:3])}" if presets and len(runs) > 1 else what
    return whole_page("bitbell report", title, summarise(runs, groups), sections)


def _results(runs: Sequence[Run], groups: Sequence[Group], look_of: Looks) -> str:
    winners, columns = {run.name for best, _ in best_of_each_width(groups) for run in best.runs}, columns_of(runs)
    rows = "\n".join(_row(run, look_of[run.name], run.name in winners, columns) for run in runs)
    parts = [
        section_start("Results"),
        table_card(
            "Every run",
            "runs",
            _head(columns),
            rows,
            f"{_measured(runs)} Entropy is that of the codes, at most the bit width. 1 MB is a million bytes.",
        ),
        _seeds([group for group in groups if len(group.runs) > 1], columns),
    ]
    found = notes(runs, groups)
    if found:
        parts.append(f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in found)}</ul>')
    return "\n".join([*parts, "</section>"])


def _measured(runs: Sequence[Run]) -> str:
    """What the columns of quality are."""
    found = {run.is_of_images for run in runs}
    of_text = "Loss, perplexity and bits per byte are measured on the validation data; lower is better."
    of_images = "Loss and accuracy are measured on the validation images; loss ranks, lower is better."
    return " ".join([of_text] * (False in found) + [of_images] * (True in found))


def _head(columns: Sequence[Column]) -> str:
    def cell(column: Column) -> str:
        unit = f'<span class="unit">{escape(column.unit)}</span>' if column.unit else ""
        return f'<th scope="col"{_text_class(column)}>{escape(column.title)}{unit}</th>'

    return f"<tr>{''.join(cell(column) for column in columns)}</tr>"


def _row(run: Run, look: Look, is_best: bool, columns: Sequence[Column]) -> str:
    badges = f' <span class="badge">best {escape(run.bits)}</span>' if is_best else ""
    if not run.is_finished:
        badges += ' <span class="badge quiet">unfinished</span>'
    name = f'<th scope="row">{key_of(look)}{escape(run.name)}{badges}</th>'
    cells = [
        f'<td class="{column.key}{" text" * column.is_text}">{escape(column.write(column.get(run)))}</td>'
        for column in columns[1:]
    ]
    classes = " ".join(["best"] * is_best + ["unfinished"] * (not run.is_finished))
    return f'<tr class="{classes}">{name}{"".join(cells)}</tr>'


def _seeds(groups: Sequence[Group], columns: Sequence[Column]) -> str:
    if not groups:
        return ""
    shown = [column for column in columns if column.key in SPREADS]
    head = [
        Column("name", "Setting", "", str, str, True),
        *shown,
        Column("seeds", "Seeds", "", str, str),
    ]
    rows = []
    for group in groups:
        cells = [with_spread(group.spread(column.key), column.write, column.factor) for column in shown]
        seeds = ", ".join(formats.plain(run.config.get("seed")) for run in group.runs)
        if len(group.finished) < len(group.runs):
            seeds += f" ({len(group.finished)} finished)"
        tds = "".join(f"<td>{escape(cell)}</td>" for cell in [*cells, seeds])
        rows.append(f'<tr><th scope="row">{escape(group.name)}</th>{tds}</tr>')
    hint = "Runs that differ only in their seed: mean and sample standard deviation over the finished ones."
    return "<br>" + table_card("Repeated with other seeds", "runs", _head(head), "\n".join(rows), hint)


def _pictures(title: str, drawn: Sequence[Drawn]) -> str:
    if not drawn:
        nothing = '<p class="hint">The runs have logged nothing that could be drawn yet.</p>'
        return f"{section_start(title)}\n{nothing}</section>"
    return f"{section_start(title)}\n{picture_grid(drawn, {})}\n</section>"


def _codes_section(drawn: Sequence[Drawn], look_of: Looks) -> str:
    if not drawn:
        return ""
    parts = [section_start("How often each code is used"), picture_grid(drawn[:OPEN_HISTOGRAMS], look_of)]
    rest = drawn[OPEN_HISTOGRAMS:]
    if rest:
        parts.append(f"<details><summary>{len(rest)} more runs</summary>{picture_grid(rest, look_of)}</details>")
    return "\n".join([*parts, "</section>"])


def _samples(runs: Sequence[Run]) -> str:
    cards = []
    for run in runs:
        for sample in run.samples:
            prompt, text = str(sample.get("prompt") or ""), str(sample.get("text") or "")
            rest = text.removeprefix(prompt)  # some writers repeat the prompt, some do not
            cards.append(
                f'<div class="card"><h3>{escape(run.name)}</h3>'
                f"<blockquote><b>{escape(prompt)}</b>{escape(rest)}</blockquote></div>"
            )
    if not cards:
        return ""
    hint = '<p class="hint">The prompt is bold; the rest is what the model wrote, as it came.</p>'
    return f'{section_start("Generated text")}\n<div class="samples">{"".join(cards)}</div>{hint}</section>'


def _configurations(runs: Sequence[Run]) -> str:
    parts = [section_start("Configuration of each run")]
    for run in runs:
        rows = "".join(
            f'<tr><th scope="row">{escape(key)}</th><td>{escape(formats.plain(value))}</td></tr>'
            for key, value in _flatten(run.config)
        )
        caption = f"<caption>config.json of {escape(run.name)}</caption>"
        table = f'<table class="config">{caption}<tbody>{rows}</tbody></table>'
        parts.append(f"<details><summary>{escape(run.name)}</summary><div class='card'>{table}</div></details>")
    return "\n".join([*parts, "</section>"])


LAYER_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    (
        "shape",
        "Shape",
        lambda shape: " x ".join(map(str, shape)) if isinstance(shape, list) else formats.DASH,
    ),
    ("weight_bits", "Weight bits", formats.significant(1)),
    ("activation_bits", "Activation bits", formats.significant(1)),
    ("weight_entropy", "Weight entropy (bits)", formats.decimals(3)),
    ("activation_entropy", "Activation entropy (bits)", formats.decimals(3)),
    ("bytes", "Trained (MB)", formats.megabytes),
    ("packed_bytes", "Packed (MB)", formats.megabytes),
)


def _layers(runs: Sequence[Run]) -> str:
    shown = [run for run in runs if run.layers]
    if not shown:
        return ""
    titles = "".join(f'<th scope="col">{title}</th>' for _, title, _ in LAYER_COLUMNS)
    head = f'<tr><th scope="col" class="text">Layer</th>{titles}</tr>'
    parts = [section_start("Layers of each run")]
    for run in shown:
        rows = "\n".join(_layer_row(layer) for layer in run.layers)
        table = table_card(f"Layers of {run.name}", "", head, rows, "")
        parts.append(f"<details><summary>{escape(run.name)}, {len(run.layers)} layers</summary>{table}</details>")
    return "\n".join([*parts, "</section>"])


def _layer_row(layer: dict[str, Any]) -> str:
    cells = "".join(f"<td>{escape(write(layer.get(key)))}</td>" for key, _, write in LAYER_COLUMNS)
    return f'<tr><th scope="row">{escape(str(layer.get("name", formats.DASH)))}</th>{cells}</tr>'


def _link_to_inspection(out: Path) -> str:
    if not (out / INSPECTION).is_file():
        return ""
    return (
        f"{section_start('Inside the layers')}\n"
        f'<p><a href="{INSPECTION}">Codes, scales and weights of every layer</a>, '
        "as bitbell inspect shows them.</p></section>"
    )


def _how_made(folders: Sequence[str], out: Path) -> str:
    command = shlex.join(["bitbell", "report", *folders, "--out", str(out)])
    versions = [f"{name} {version_of(name)}" for name in ("bitbell", "matplotlib", "numpy")]
    made = ", ".join([*versions, f"Python {platform.python_version()}"])
    return (
        f"{section_start('How this page was made')}\n"
        f'<div class="card"><code>{escape(command)}</code></div>\n'
        f'<p class="hint">With {escape(made)}. The numbers of the tables are in report.json beside this '
        "page, every picture in plots/ as PNG and SVG.</p></section>"
    )


def _text_class(column: Column) -> str:
    return ' class="text"' if column.is_text else ""


def _flatten(config: dict[str, Any], above: str = "") -> list[tuple[str, Any]]:
    """Nested objects as dotted keys, in the order of the file."""
    rows: list[tuple[str, Any]] = []
    for key, value in config.items():
        rows += _flatten(value, f"{above}{key}.") if isinstance(value, dict) and value else [(above + key, value)]
    return rows
