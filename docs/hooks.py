"""What the site has beside the files of docs/: the README as its front page, help of commands, the API, linked sources.

MkDocs calls the functions that begin with `on_` while it builds the site (`hooks` in mkdocs.yml).
"""

from __future__ import annotations

import ast
import io
import os
import posixpath
import re
from contextlib import redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

from griffe import Extension, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
FRONT = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}  # pages from outside docs/ -> their place on the site
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
FENCED = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
ELSEWHERE = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
LANGUAGES = {".py": "python", ".toml": "toml", ".cpp": "cpp", ".hpp": "cpp"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    pages = {place: (ROOT / source).read_text(encoding="utf-8") for source, place in FRONT.items()}
    pages |= {"commands.md": commands(), "api/index.md": names_of_the_package()}
    pages |= {f"api/{room}.md": api(room) for room in rooms()}
    for place, content in pages.items():
        files.append(File.generated(config, place, content=content))
    for source in linked_sources(files):
        files.append(File.generated(config, page_of(source), content=source_page(source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of the repository become links of the site."""
    here = origin(page.file.src_uri)

    def change(match: re.Match[str]) -> str:
        target = resolved(here, match[2])
        return match[0] if target is None else match[1] + relative(page_of(target), page.file.src_uri) + match[3]

    parts = FENCED.split(markdown)
    return "".join(part if index % 2 else LINK.sub(change, part) for index, part in enumerate(parts))


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """A page fetches nothing from elsewhere when it is read: no fonts, scripts or pictures."""
    if found := ELSEWHERE.search(output):
        raise PluginError(f"{page.file.src_uri} would fetch {found[0]}")
    return output


def origin(place: str) -> str:
    """Path in the repository of what a page of the site is made from."""
    if place.startswith("source/"):
        return place.removeprefix("source/")
    return next((source for source, made in FRONT.items() if made == place), f"docs/{place}")


def resolved(here: str, target: str) -> str | None:
    """Path in the repository that a link of the file `here` leads to; None for a web address."""
    if re.match(r"[a-z]+:", target):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
    if not (ROOT / path).exists():
        raise PluginError(f"{here} links to {target}, which is not there")
    return path


def page_of(path: str) -> str:
    """Where the site has a path of the repository: its own page, or one that shows the file."""
    if path in FRONT:
        return FRONT[path]
    if (ROOT / path).is_dir():
        path += "/README.md" if path.startswith("docs/") else "/index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path.removesuffix('.md')}.md"


def relative(place: str, page: str) -> str:
    """`place` as a link of the page `page` writes it."""
    return os.path.relpath(place, posixpath.dirname(page) or ".").replace(os.sep, "/")


def linked_sources(files: Files) -> list[str]:
    """Paths outside docs/ that pages link to, and, for a folder, the Python files in it."""
    found: set[str] = set()
    for file in files.documentation_pages():
        here = origin(file.src_uri)
        text = FENCED.sub("", file.content_string)
        targets = {resolved(here, match[2]) for match in LINK.finditer(text)}
        found |= {t for t in targets if t is not None and not t.startswith("docs/") and t not in FRONT}
    for folder in [path for path in found if (ROOT / path).is_dir()]:
        found |= {f"{folder}/{file.name}" for file in (ROOT / folder).glob("*.py")}
    return sorted(found)


def source_page(path: str) -> str:
    """A page that shows a file of the repository, or lists a folder."""
    file = ROOT / path
    if file.is_dir():
        lines = [f"- [{f.name}]({f.name}): {first_line(f)}" for f in sorted(file.glob("*.py"))]
        return "\n".join([f"# {path}", "", *lines, ""])
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return text
    return f"# {path}\n\n````{LANGUAGES.get(file.suffix, 'text')}\n{text.rstrip()}\n````\n"


def first_line(file: Path) -> str:
    """Of a module's docstring."""
    doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return doc.partition("\n")[0]


def commands() -> str:
    """The help of every command, as it prints it."""
    from bitbell.cli.main import VERBS

    parts = ["# Commands", "", "Every command's own help, `bitbell COMMAND --help`, as this version prints it.", ""]
    parts += [f"- [`bitbell {verb}`](#bitbell-{verb}): {what}" for verb, (_, what) in VERBS.items()]
    for verb in VERBS:
        parts += ["", f"## `bitbell {verb}`", "", "```text", help_of(verb), "```"]
    return "\n".join(parts) + "\n"


def help_of(verb: str) -> str:
    """What `bitbell VERB --help` prints to a terminal of 80 columns without colours."""
    from bitbell.cli.main import main

    said = io.StringIO()
    with patch.dict(os.environ, NO_COLOR="1", COLUMNS="80", TERM="dumb"), redirect_stdout(said), suppress(SystemExit):
        main([verb, "--help"])
    return "\n".join(line.rstrip() for line in said.getvalue().strip().splitlines())


def rooms() -> list[str]:
    """The packages of bitbell in the order of its road, as its docstring has them."""
    import bitbell

    names = re.findall(r"^    (\w+) {2,}\S", bitbell.__doc__ or "", re.MULTILINE)
    return [name for name in names if name != "cli"]


def names_of_the_package() -> str:
    import bitbell

    wanted = sorted(set(bitbell.__all__))
    return "# bitbell\n\n" + directive("bitbell", wanted)


def api(room: str) -> str:
    wanted = list(import_module(f"bitbell.{room}").__all__)
    return f"# bitbell.{room}\n\n" + directive(f"bitbell.{room}", wanted)


def directive(module: str, names: list[str]) -> str:
    """What mkdocstrings replaces by the documentation of `names`."""
    listed = "".join(f"        - {name}\n" for name in names)
    return f"::: {module}\n    options:\n      members:\n{listed}"


class Doctests(Extension):
    """Examples in docstrings, which are doctests, become code blocks: Markdown would take `>>>` for quotations."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"((?:^>>> .*\n?)(?:^(?!\s*$).*\n?)*)",
                lambda match: f"```pycon\n{match[0].rstrip()}\n```\n",
                obj.docstring.value,
                flags=re.MULTILINE,
            )
