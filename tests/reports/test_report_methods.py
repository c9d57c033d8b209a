"""The pictures and numbers of the methods' cards: right for methods that are known by heart, and those of today."""

from pathlib import Path

import pytest

from bitbell.quantizers import METHODS
from bitbell.reports.methods import Portrait, measure, portray, read_picture, widths_shown, write_picture

PICTURES = Path(__file__).parents[2] / "docs" / "methods" / "pictures"


@pytest.mark.parametrize("method", METHODS)
def test_the_committed_picture_shows_the_quantizer_of_today(method: str) -> None:
    redraw = f"draw it with: python -m bitbell.reports.methods {PICTURES.relative_to(PICTURES.parents[2])}"
    shown = read_picture(PICTURES / f"{method}.svg")
    assert [portrait.bits for portrait in shown] == widths_shown(method), redraw
    for portrait in shown:
        now = portray(method, portrait.bits)
        for part in ("thresholds", "values", "shares"):
            assert getattr(portrait, part) == pytest.approx(getattr(now, part), abs=0.01), f"{part}: {redraw}"
        for axis in (0, 1):
            line, line_now = ([point[axis] for point in p.gradient] for p in (portrait, now))
            assert line == pytest.approx(line_now, abs=0.01), f"gradient: {redraw}"


def test_there_are_no_other_pictures_and_all_are_small() -> None:
    pictures = list(PICTURES.iterdir())
    assert {path.name for path in pictures} == {f"{method}.svg" for method in METHODS}
    assert all(path.stat().st_size < 60_000 for path in pictures)


def test_drawing_twice_gives_the_same_file_with_its_data_in_it(tmp_path: Path) -> None:
    first = write_picture("bbq", tmp_path).read_bytes()
    assert write_picture("bbq", tmp_path).read_bytes() == first
    (two, four) = read_picture(tmp_path / "bbq.svg")
    assert [tuple(point) for point in two.gradient] == portray("bbq", 2).gradient
    assert four.shares == portray("bbq", 4).shares


def test_a_picture_without_data_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "bare.svg").write_text("<svg/>")
    with pytest.raises(ValueError, match=r"bare\.svg holds no description: draw it with python -m bitbell\.reports"):
        read_picture(tmp_path / "bare.svg")


def slope(portrait: Portrait, x: float) -> float:
    """The gradient at the point nearest to `x`."""
    return min(portrait.gradient, key=lambda point: abs(point[0] - x))[1]


def test_bbq_at_two_bits_is_the_one_of_the_paper() -> None:
    portrait = portray("bbq", 2)
    assert portrait.thresholds == pytest.approx([-0.6745, 0, 0.6745], abs=1e-3)
    assert portrait.values == pytest.approx([1.694 * level / 2 for level in (-1.5, -0.5, 0.5, 1.5)], abs=1e-3)
    assert portrait.shares == pytest.approx([0.25] * 4, abs=5e-4)
    assert slope(portrait, 0) == pytest.approx(1.352, abs=1e-3)  # 2 * 1.694 * phi(0)
    assert slope(portrait, 2) == pytest.approx(0.183, abs=0.02)


def test_a_mask_shows_as_a_step_and_flat_stretches_have_no_inner_points() -> None:
    gradient = portray("quest", 2).gradient
    assert [height for _, height in gradient] == [0, 0, 1, 1, 0, 0]
    assert [abs(x) for x, _ in gradient[1:-1]] == pytest.approx([1.9914] * 4, abs=2e-3)


def test_codes_that_are_never_used_have_a_share_of_zero() -> None:
    portrait = portray("ternary", 2)
    assert portrait.shares[0] == 0
    assert len(portrait.thresholds) == 2


@pytest.mark.parametrize(
    ("method", "bits", "entropy", "error", "best_error", "cosine"),
    [
        ("quest", 4, 3.6025, 0.0115, 0.0115, 0.9942),
        ("nf", 4, 3.671, 0.0105, 0.0104, 0.9948),  # another sample of rows of 640
        ("n2uq", 2, 1.9837, 0.1375, 0.1280, 0.9338),
        ("n2uq-activations", 4, 3.8343, 0.0172, 0.0164, 0.9918),
    ],
)
def test_the_numbers_are_the_known_ones(
    method: str, bits: int, entropy: float, error: float, best_error: float, cosine: float
) -> None:
    found = measure(method, bits, rows=1024)
    assert found.entropy == pytest.approx(entropy, abs=0.01)
    assert (found.error, found.best_error) == pytest.approx((error, best_error), abs=1e-3)
    assert found.cosine == pytest.approx(cosine, abs=1e-3)
