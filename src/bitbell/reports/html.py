"""The pieces that pages are made of: tables, pictures side by side, and the frame around them.

Whatever is not a literal here is escaped here: names and settings may look like anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import metadata, resources
from string import Template

from bitbell.reports.drawing import Look, Picture


@dataclass(frozen=True)
class Drawn:
    """A picture and its SVG, ready for the page."""

    picture: Picture
    svg: str


def whole_page(brand: str, title: str, lead: str, sections: Sequence[str]) -> str:
    """A page that needs no other file. The sections are HTML, the rest is text."""
    files = resources.files("bitbell.reports")
    template = Template((files / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        brand=escape(brand),
        title=escape(title),
        css=(files / "page.css").read_text(encoding="utf-8"),
        summary=escape(lead),
        sections="\n".join(section for section in sections if section),
    )


def section_start(title: str) -> str:
    """The opening of a section; `</section>` closes it."""
    return f"<section>\n<h2>{escape(title)}</h2>"


def table_card(caption: str, classes: str, head: str, rows: str, hint: str) -> str:
    """A table on a card that scrolls sideways. `head` and `rows` are HTML."""
    foot = f'<p class="hint">{escape(hint)}</p>' if hint else ""
    return (
        f'<div class="card scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="{classes}"><caption>{escape(caption)}</caption><thead>{head}</thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>{foot}"
    )


def picture_grid(drawn: Sequence[Drawn], look_of: Mapping[str, Look]) -> str:
    """Pictures side by side; a title that is a run's name gets the run's key."""
    figures = []
    for title, picture, svg in ((d.picture.title, d.picture, d.svg) for d in drawn):
        key = key_of(look_of[title]) if title in look_of else ""
        figures.append(
            f'<figure class="card"><h3>{key}{escape(title)}</h3>\n{svg}\n'
            f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
        )
    return f'<div class="pictures">\n{"".join(figures)}</div>'


def key_of(look: Look) -> str:
    """The run's line and mark as they are in the pictures."""
    dash = "" if look.dash == "solid" else f' stroke-dasharray="{" ".join(f"{1.5 * x:g}" for x in look.dash[1])}"'
    shapes: dict[str, str] = {
        "o": '<circle cx="12" cy="6.5" r="4"/>',
        "s": '<path d="M8.5 3h7v7h-7z"/>',
        "^": '<path d="M12 2l4.5 8.5h-9z"/>',
        "D": '<path d="M12 1.5l5 5-5 5-5-5z"/>',
        "v": '<path d="M12 11l4.5-8.5h-9z"/>',
        "P": '<path d="M10.3 2h3.4v2.8h2.8v3.4h-2.8V11h-3.4V8.2H7.5V4.8h2.8z"/>',
        "X": '<path d="M9 1.5l3 3 3-3 2 2-3 3 3 3-2 2-3-3-3 3-2-2 3-3-3-3z"/>',
        "<": '<path d="M7 6.5l8.5-4.5v9z"/>',
        ">": '<path d="M17 6.5l-8.5-4.5v9z"/>',
    }
    colour = f"var({look.variable})"
    return (
        f'<svg class="key" viewBox="0 0 24 13" aria-hidden="true"><path d="M0 6.5h24" stroke="{colour}" '
        f'stroke-width="2"{dash}/><g fill="{colour}">{shapes[look.marker]}</g></svg>'
    )


def version_of(package: str) -> str:
    """The version of an installed package, for the end of a page."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed, run from its source)"
