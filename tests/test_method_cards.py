"""Every method has a card that says what its quantizer does, a line in the index, and a test module."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from bitbell.layers.recipes import VARIANTS, Recipe
from bitbell.quantizers import METHODS, known_options, make_quantizer
from bitbell.reports.methods import measure

ROOT = Path(__file__).parent.parent
CARDS = ROOT / "docs" / "methods"
NUMBERS = ["bits", "entropy (bits)", "squared error", "after the best rescale", "cosine"]

every_method = pytest.mark.parametrize("method", METHODS)
every_card = pytest.mark.parametrize("card", sorted(CARDS.glob("*.md")), ids=lambda path: path.stem)


def card_of(method: str) -> Path:
    """A method of activations only is on the card of the weights that it goes with."""
    weights = [name for name, kind in METHODS.items() if kind.activation_method == method]
    return CARDS / f"{method if METHODS[method].for_weights else weights[0]}.md"


def text_of(method: str) -> str:
    card = card_of(method)
    assert card.exists(), f"{method} needs a card: {card.relative_to(ROOT)}, in the form of lsq.md"
    return card.read_text(encoding="utf-8")


def tables(text: str) -> list[list[list[str]]]:
    """The Markdown tables of a page: rows of cells, the header first."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if not line.startswith("|"):
            found.append([])
        elif not re.fullmatch(r"[|: -]+", line):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
    return [table for table in found if table]


def is_of(method: str, table: list[list[str]]) -> bool:
    """Whether a table of options is this method's: a card of two methods says which in the head."""
    return table[0][0] in ("option", f"option of `{METHODS[method].__name__}`")


@every_method
def test_a_method_has_a_card_with_everything_on_it(method: str) -> None:
    text = text_of(method)
    assert f"](pictures/{method}.svg)" in re.sub(r"\s+", " ", text), "show its picture"
    assert "Measured: [" in text
    assert "](../results/methods.md)" in text
    assert "```python" in text, "give an example that runs"
    assert re.search(r"^    \S.* = ", text, re.MULTILINE), "give the formula, indented"
    assert "arXiv" in text, "name the source"
    for section in ("Backward", "Cost"):
        assert re.search(rf"^(\*\*|## ){section}", text, re.MULTILINE), f"say something about: {section}"


@every_method
def test_the_options_on_the_card_are_those_of_the_quantizer(method: str) -> None:
    rows = [row for table in tables(text_of(method)) if is_of(method, table) for row in table[1:]]
    assert sorted(row[0].strip("`") for row in rows) == sorted(known_options(METHODS[method]))


@every_method
def test_the_numbers_on_the_card_are_those_of_the_quantizer(method: str) -> None:
    """Within what the smaller sample of the test may differ by."""
    found = [table for table in tables(text_of(method)) if table[0] == NUMBERS]
    table = found[[name for name in METHODS if card_of(name) == card_of(method)].index(method)]
    shown = {int(row[0]): row[1:] for row in table[1:] if row[0].isdecimal()}
    assert shown.keys() >= {bits for bits in METHODS[method].widths if bits <= 4}
    for bits, row in shown.items():
        entropy, error, best_error, cosine = map(float, row)
        now = measure(method, bits, rows=256)
        assert entropy == pytest.approx(now.entropy, abs=0.02)
        assert (error, best_error) == pytest.approx((now.error, now.best_error), abs=3e-3, rel=0.02)
        assert cosine == pytest.approx(now.cosine, abs=3e-3)


@every_method
def test_a_method_has_a_test_module(method: str) -> None:
    file = Path(inspect.getfile(METHODS[method]))
    module = ROOT / "tests" / "quantizers" / f"test_{file.stem}.py"
    assert module.exists(), f"{method} needs tests: {module.relative_to(ROOT)}"
    assert METHODS[method].__name__ in module.read_text(encoding="utf-8")


@every_method
def test_the_index_says_what_the_quantizer_is(method: str) -> None:
    kind = METHODS[method]
    head, *rows = next(t for t in tables((CARDS / "README.md").read_text(encoding="utf-8")) if t[0][0] == "method")
    row = dict(zip(head, next(r for r in rows if f"`{method}`" in r[0]), strict=True))
    low, high = min(kind.widths), max(kind.widths)
    assert row["method"] == f"[`{method}`]({card_of(method).name})"
    assert row["bits"] == (f"{low}-{high}" if low < high else f"{low}")
    assert (row["levels"] in ("even", "-1, 0, 1")) == (make_quantizer(method, bits=high).table is None)
    assert row["scale"].startswith("learned" if kind.scale_is_learned else "computed")
    assert row["rotates"] == ("yes" if kind.rotates else "no")
    if not kind.for_weights:
        assert (row["operands"], row["weights share a scale by"]) == ("activations", "")
    else:
        assert row["operands"] == ("weights" if kind.activation_method else "both")
        _, activations = Recipe(method, weights=high, activations=high).quantizers_for(rows=2, width=128)
        assert activations is not None
        group = activations.options().get(type(activations).granularity_option, "tensor")
        assert row["weights share a scale by"] == ("tensor" if kind.weights_share_scale else "row")
        assert row["activations share a scale by"].split()[0] == group


@every_card
def test_recipes_named_on_a_card_can_be_built(card: Path) -> None:
    for name in re.findall(r"`([a-z0-9-]+-w\d+a\d+(?::[^`\s]+)?)`", card.read_text(encoding="utf-8")):
        Recipe.parse(name).quantizers_for(rows=4, width=128)


def test_every_variant_is_named_on_a_card() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in CARDS.glob("*.md"))
    assert not [variant for variant in VARIANTS if not re.search(rf"`{variant}(-w\d|-\.\.\.|`)", pages)]


def test_the_guide_to_adding_a_method_shows_the_files_as_they_are() -> None:
    guide = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(python|diff)\n(.*?)^```", guide, re.DOTALL | re.MULTILINE)
    [whole_file] = [text for language, text in blocks if language == "python"]
    assert whole_file == Path(inspect.getfile(METHODS["absmax"])).read_text(encoding="utf-8")
    shown: set[Path] = set()
    for line in "".join(text for language, text in blocks if language == "diff").splitlines():
        if line.startswith("+++ "):
            path = ROOT / line[4:]
            shown.add(path)
        else:
            assert line[1:] in path.read_text(encoding="utf-8").splitlines(), f"{path.name} has no line {line[1:]!r}"
    assert len(shown) == 4
