"""index.html of a sweep: what the numbers say in words, the table, the pictures, the rules; one file, nothing else."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from html import escape
from typing import Any

from bitbell.comparison.columns import LOSS, Column, cells, columns_of, gap_lines
from bitbell.comparison.folder import SweepFolder, base_config
from bitbell.comparison.kinds import kind_of
from bitbell.comparison.pictures import Looks, draw_all, method_looks
from bitbell.comparison.plan import known_trials
from bitbell.comparison.results import rates_table
from bitbell.comparison.rows import Row, best_rows, legend, make_rows, problems
from bitbell.comparison.sweep import Sweep
from bitbell.comparison.words import lead
from bitbell.reports.drawing import drawing_rules, inline, to_svg
from bitbell.reports.html import (
    Drawn,
    key_of,
    picture_grid,
    section_start,
    table_card,
    version_of,
    whole_page,
)

RULES = (
    "Every run has the same model, data, order of the data and steps. Each method's learning rate at each width is the "
    "one of the lowest mean validation loss over the tune seeds, from one grid for all, full precision included. Loss "
    "is the mean over all seeds at that rate, its spread the sample standard deviation; the tune seeds are among them. "
    "Lower is better. Entropy is that of the codes, at most the bit width."
)
OF_IMAGES = (
    " Accuracy is the share of the validation images whose class is the likeliest, top-5 of those whose class is among "
    "the five likeliest; it chooses nothing."
)


def make_page(folder: SweepFolder, sweep: Sweep) -> str:
    """The whole page, of whatever is known by now."""
    rows = make_rows(sweep, folder.look)
    with drawing_rules():
        drawn = [Drawn(p, inline(to_svg(p), p.name, p.alt)) for p in draw_all(folder, sweep, rows)]
    sections = [
        _results(folder, sweep, rows, method_looks(sweep)),
        _pictures(drawn),
        _rates(folder, sweep, rows),
        _sweep(sweep),
    ]
    preset = base_config(sweep).preset
    title = f"{len(sweep.methods)} method{'s' * (len(sweep.methods) != 1)} on the preset {preset}"
    return whole_page("bitbell compare", title, lead(folder, sweep, rows), sections)


def _results(folder: SweepFolder, sweep: Sweep, rows: Sequence[Row], looks: Looks) -> str:
    best, columns = best_rows(rows), columns_of(sweep, rows)
    lines = [_line(cells(row, columns), row in best, key_of(looks[row.setting.label])) for row in rows]
    lines += [_line(line, False, key_of(looks[line[0]])) for line in gap_lines(sweep, columns)]
    found = problems(sweep, folder.look, known_trials(sweep, folder.look))
    notes = "".join(f"<li>{escape(line)}</li>" for line in ([legend(rows)] if legend(rows) else []) + found)
    rules = RULES + OF_IMAGES * kind_of(sweep).is_of_images
    table = table_card("Every method at every width", "runs", _head(columns), "\n".join(lines), rules)
    return f'{section_start("Results")}\n{table}<ul class="notes">{notes}</ul></section>'


def _head(columns: Sequence[Column]) -> str:
    titles = [escape(c.title) + (f'<span class="unit">{escape(c.unit)}</span>' if c.unit else "") for c in columns]
    return (
        "<tr>" + "".join(f'<th scope="col"{" class=text" * (i < 2)}>{t}</th>' for i, t in enumerate(titles)) + "</tr>"
    )


def _line(row: Sequence[str], is_best: bool, key: str) -> str:
    badge = f' <span class="badge">best {escape(row[1])}</span>' if is_best else ""
    rest = "".join(
        f'<td class="{"text" if i == 1 else "loss" if i == LOSS else ""}">{escape(cell)}</td>'
        for i, cell in enumerate(row)
        if i
    )
    return f'<tr class="{"best" * is_best}"><th scope="row">{key}{escape(row[0])}{badge}</th>{rest}</tr>'


def _pictures(drawn: Sequence[Drawn]) -> str:
    return f"{section_start('Pictures')}\n{picture_grid(drawn, {})}\n</section>" if drawn else ""


def _rates(folder: SweepFolder, sweep: Sweep, rows: Sequence[Row]) -> str:
    if len(sweep.learning_rates) < 2:
        return ""
    head, lines = rates_table(sweep, rows, folder.look)
    cell = '<th scope="col">{}</th>'
    titles = "".join(cell.format(escape(title)) for title in head)
    body = "\n".join(f"<tr>{''.join(_rate_cell(text, i) for i, text in enumerate(line))}</tr>" for line in lines)
    card = table_card("Mean loss over the tune seeds at each learning rate", "runs", f"<tr>{titles}</tr>", body, "")
    return f"{section_start('Learning rates')}\n<details><summary>Every rate</summary>{card}</details></section>"


def _rate_cell(text: str, place: int) -> str:
    inside = f"<b>{escape(text.strip('*'))}</b>" if text.startswith("**") else escape(text)
    return f'<th scope="row">{inside}</th>' if place == 0 else f"<td>{inside}</td>"


def _sweep(sweep: Sweep) -> str:
    facts: dict[str, Any] = {
        "methods": ", ".join(f"{k} = {v}" if k != v else k for k, v in sweep.methods.items()),
        "bits": ", ".join(bits.upper() for bits in sweep.bits) or "-",
        "seeds": ", ".join(map(str, sweep.seeds)) + f" ({sweep.tune_seeds} for tuning)",
        "learning rates": ", ".join(f"{rate:g}" for rate in sweep.learning_rates),
        **{f"train.{key}": value for key, value in sweep.train.items()},
        **{f"overrides.{label}.{k}": v for label, fields in sweep.overrides.items() for k, v in fields.items()},
    }
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(str(value))}</td></tr>' for key, value in facts.items()
    )
    made = ", ".join(
        [*(f"{name} {version_of(name)}" for name in ("bitbell", "torch")), f"Python {platform.python_version()}"]
    )
    return (
        f'{section_start("The sweep")}\n<div class="card"><table class="config"><tbody>{rows}</tbody></table></div>'
        f'<p class="hint">Made by bitbell compare, with {escape(made)}. results.jsonl beside this page has every run, '
        "runs/ its folder.</p></section>"
    )
