"""Pictures: labels that keep apart, curves that keep their spikes, histograms of every size."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitbell.reports import codes, curves, drawing
from bitbell.reports.runs import read_run, read_runs

PLACES = st.lists(st.floats(-50, 150), min_size=1, max_size=12)


@given(PLACES)
def test_labels_keep_their_gap_and_their_order_and_stay_inside(wanted):
    placed = drawing.spread(wanted, 8.0, 0.0, 100.0)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    gaps = np.diff([placed[i] for i in order])
    assert (gaps >= 8.0 - 1e-9).all()
    assert min(placed) >= -1e-9
    assert max(placed) <= 100 + 1e-9


def test_a_label_stands_at_the_height_of_its_point():
    with drawing.drawing_rules():
        figure, axes = drawing.new_chart(["a", "b"], "x", "y")
        axes.plot([0, 1], [50, 70])
        axes.plot([0, 1], [900, 300])
        drawing.label_at_right(axes, [drawing.Label("a", 1, 70, "red"), drawing.Label("b", 1, 300, "red")])
        figure.canvas.draw()
        heights = {text.get_text(): text.get_position()[1] * figure.bbox.height for text in figure.texts}
        for name, value in (("a", 70), ("b", 300)):
            assert heights[name] == pytest.approx(axes.transData.transform((1, value))[1])


def test_labels_with_room_stay_where_they_belong():
    assert drawing.spread([10.0, 90.0, 50.0], 8.0, 0.0, 100.0) == [10.0, 90.0, 50.0]


def test_runs_of_one_setting_share_a_hue_and_all_looks_differ(make_run):
    runs = [read_run(make_run(f"r{i}", method=None if i == 0 else "bbq", seed=i)) for i in range(12)]
    found = drawing.looks([runs[:1], runs[1:3], *([run] for run in runs[3:])])
    assert found["r1"].colour == found["r2"].colour
    assert found["r0"].colour == drawing.INK
    assert len(set(found.values())) == 12


def test_every_colour_has_its_variable_in_light_and_dark():
    from importlib import resources

    css = (resources.files("bitbell.reports") / "page.css").read_text()
    for colour, variable in drawing.VARIABLES.items():
        assert f"{variable}: {colour};" in css  # light is what the files on disk show
        assert css.count(f"{variable}: ") == 2


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_every_hue_stands_out_from_its_card_in_light_and_dark():
    import re
    from importlib import resources

    light, dark = (resources.files("bitbell.reports") / "page.css").read_text().split("@media (prefers", 1)
    for css in (light, dark):
        found = dict(re.findall(r"(--[a-z0-9-]+): (#[0-9a-f]{6})", css))
        for name in ["--ink", "--muted", *(f"--run-{i}" for i in range(6))]:
            bright, dim = sorted((luminance(found[name]), luminance(found["--card"])), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= (4.5 if name in ("--ink", "--muted") else 3.0), name


def test_inlining_changes_tags_but_not_what_names_say():
    svg = (
        '<?xml?><svg xmlns="http://a.b/c" viewBox="0 0 1 1"><metadata>http://x</metadata><!-- c --><defs>'
        '<path id="m1"/></defs><use xlink:href="#m1" style="fill: #0072b2"/><g id="axes_1" '
        'clip-path="url(#m1)"/><text> id="m1" #0072b2 url(#m1)</text></svg>'
    )
    inlined = drawing.inline(svg, "loss", 'a "b" <c>')
    assert 'aria-label="a &quot;b&quot; &lt;c&gt;"' in inlined
    assert '<use href="#loss-m1" style="fill: var(--run-0)"/>' in inlined
    assert 'id="loss-m1"' in inlined
    assert "axes_1" not in inlined
    assert '<text> id="m1" #0072b2 url(#m1)</text>' in inlined
    assert "http" not in inlined


def test_the_drawing_rules_leave_the_users_settings_as_they_were():
    import matplotlib

    matplotlib.rcParams["font.size"] = 31
    with drawing.drawing_rules():
        assert matplotlib.rcParams["font.size"] == 8
        assert not matplotlib.rcParams["text.parse_math"]
    assert matplotlib.rcParams["font.size"] == 31
    matplotlib.rcdefaults()


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=200))
def test_smoothing_keeps_length_and_range(values):
    smoothed = curves.smooth(np.array(values))
    assert smoothed.shape == (len(values),)
    assert smoothed.min() >= min(values) - 1e-9
    assert smoothed.max() <= max(values) + 1e-9


def test_smoothing_does_not_lag_behind_a_slope():
    line = np.linspace(5, 1, 400)
    np.testing.assert_allclose(curves.smooth(line)[20:-20], line[20:-20])


def test_a_long_curve_keeps_its_spike_and_its_ends():
    x, y = np.arange(100_000.0), np.zeros(100_000)
    y[54_321] = 7.0
    thin_x, thin_y = curves._thin(x, y)
    assert len(thin_x) <= curves.MOST_POINTS + 2
    assert (thin_x[0], thin_x[-1], thin_y.max()) == (0, 99_999, 7.0)
    band = curves._thin_band(x, y, y - 1, y + 1)
    assert (len(band[0]), band[2].min(), band[3].max()) == (curves.MOST_POINTS, -1, 8.0)


def test_bands_are_mean_lowest_and_highest_over_the_layers_that_know():
    layers = {"a": {"s": 1.0}, "b": {"s": 3.0}, "c": {"s": None}, "d": {}, "e": {"s": math.nan}}
    bands = curves.layer_bands([{"step": 5, "layers": layers}, {"step": 6, "layers": {}}], "s")
    assert [band.tolist() for band in bands] == [[5.0], [2.0], [1.0], [3.0]]


@pytest.mark.parametrize("draw", [curves.draw_loss, curves.draw_entropy, curves.draw_size])
def test_runs_with_nothing_to_show_give_no_picture(make_run, draw):
    runs = [read_run(make_run("a", steps=0, finished=False))]
    with drawing.drawing_rules():
        assert draw(runs, drawing.looks([runs])) is None
        assert curves.draw_scales(runs, drawing.looks([runs]), "weight") is None


def test_the_size_picture_says_which_runs_it_cannot_show(make_run):
    runs = read_runs([make_run("a"), make_run("b", summary={"packed_bytes": None})])
    with drawing.drawing_rules():
        picture = curves.draw_size(runs, drawing.looks([runs]))
    assert picture is not None
    assert "Not shown, since size or loss is not known: b." in picture.caption


def test_code_shares_sum_to_one_and_unevenness_is_in_multiples_of_the_equal_share():
    layer = codes.read_codes({"name": "x", "weight_histogram": [1, 1, 2, 4], "activation_histogram": []})
    assert layer is not None
    assert layer.shares["activation"] is None
    assert layer.shares["weight"].sum() == pytest.approx(1)
    assert codes.unevenness([layer], "weight") == (0.5, 2.0)
    assert codes.unevenness([layer], "activation") is None


@pytest.mark.parametrize("counts", [None, [], [0, 0, 0, 0]])
def test_layers_without_counts_have_no_codes(counts):
    assert codes.read_codes({"name": "x", "weight_histogram": counts}) is None


def test_an_equal_share_is_invisible_on_the_map_and_half_and_double_are_its_ends():
    colours = codes.diverging(np.array([0.0, 0.5, 1.0, 2.0, 9.0]))
    assert colours[:, 3].tolist() == [1, 1, 0, 1, 1]
    assert (colours[1, :3] == colours[0, :3]).all()
    assert (colours[3, :3] != colours[1, :3]).any()


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("model.layers.12.self_attn.q_proj", "12 q_proj"),
        ("layers.0.fc1", "0 fc1"),
        ("conv1", "conv1"),
        ("blocks.3", "blocks.3"),
    ],
)
def test_layer_names_lose_what_all_share(name, short):
    assert codes.short_layer(name) == short


@pytest.mark.parametrize(("depth", "bits"), [(1, 1), (4, 4), (28, 4), (100, 2)])
def test_histograms_of_few_and_of_many_layers_fit_on_a_screen_or_two(make_run, depth, bits):
    run = read_run(make_run("a", depth=depth, bits=bits, method="lsq"))
    with drawing.drawing_rules():
        picture = codes.draw_codes(run, drawing.looks([[run]])["a"])
    assert picture is not None
    assert picture.figure.get_figheight() * 72 < 900
    assert f"{7 * depth} layers" in picture.alt


def test_histograms_of_mixed_widths_and_names_without_kinds_are_drawn(make_run):
    layers = [{"name": f"conv{i}", "weight_histogram": [3] * 2 ** (1 + i % 4)} for i in range(60)]
    run = read_run(make_run("a", summary={"layers": layers}))
    with drawing.drawing_rules():
        picture = codes.draw_codes(run, drawing.looks([[run]])["a"])
    assert picture is not None
    assert "activation" not in picture.caption
