"""Pictures of alignment: what is drawn is the data, and every name can be read."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread
from matplotlib.text import Text

from jaxrl_llm.training import frontier, plotting
from jaxrl_llm.training.frontier import Curve

FOOTER = "research only, not for clinical use"
KL = np.linspace(0, 9, 5)
CURVES = {
    "PPO": Curve(KL, 0.5 + 0.1 * np.sqrt(KL), 0.4 + 0.1 * np.sqrt(KL), 0.6 + 0.1 * np.sqrt(KL)),
    "RLOO": Curve(KL, 0.5 + 0.1001 * np.sqrt(KL)),
    "an ensemble of rather many reward models": Curve(KL, 0.5 + 0.1002 * np.sqrt(KL)),
    "SFT": Curve(0.0, 0.5, 0.48, 0.52),
}
OPTIMUM = Curve(np.linspace(0, 12, 50), 0.5 + 0.15 * np.sqrt(np.linspace(0, 12, 50)))
BEST_OF_N = {n: (np.log(n) - 1 + 1 / n, 0.5 + 0.02 * n) for n in (8, 1, 2, 4)}


def only_axes(figure) -> Any:
    (axes,) = figure.axes
    return axes


def drawn(axes) -> list[Any]:
    """Lines in the units of the data, without the marks beside the names."""
    return [line for line in axes.lines if line.get_transform() == axes.transData]


def names_of(axes) -> list[str]:
    return [text.get_text().replace("\n", " ") for text in axes.texts if text.get_text()]


def assert_readable(figure) -> None:
    """No text on another one or over the edge of the picture, all drawn as `save_figure` does."""
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    # Of the words alone: an annotation's own extent takes in the line that leads to it.
    extents = {text: Text.get_window_extent(text) for text in texts}
    ticks = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        for label in (tick.label1, tick.label2)
    }
    for text, extent in extents.items():
        if text not in ticks:
            assert 0 <= extent.x0 < extent.x1 <= figure.bbox.x1, text
            assert 0 <= extent.y0 < extent.y1 <= figure.bbox.y1, text
    words = [extent for text, extent in extents.items() if text not in ticks]
    for one, other in combinations(words, 2):
        assert not one.overlaps(other), (one, other)


@pytest.mark.parametrize("square_root", [False, True])
def test_kl_reward_frontier_draws_every_curve_and_names_it(square_root):
    figure = frontier.kl_reward_frontier(
        CURVES, optimum=OPTIMUM, best_of_n=BEST_OF_N, square_root=square_root, title="Frontier",
        footer=FOOTER,
    )  # fmt: skip
    axes = only_axes(figure)
    *lines, best_of_n, optimum = drawn(axes)
    for line, curve in zip(lines, CURVES.values(), strict=True):
        np.testing.assert_array_equal(line.get_xdata(), np.atleast_1d(curve.kl))
        np.testing.assert_array_equal(line.get_ydata(), np.atleast_1d(curve.reward))
    assert len({(to_hex(line.get_color()), line.get_marker()) for line in lines}) == len(CURVES)
    np.testing.assert_array_equal(best_of_n.get_xydata(), sorted(BEST_OF_N.values()))
    np.testing.assert_array_equal(optimum.get_xydata().T, OPTIMUM[:2])
    assert set(names_of(axes)) >= {*CURVES, "optimum", "best of n", "8"}
    assert "1" not in names_of(axes)
    left, right = axes.get_xlim()
    assert left < 0 < 12 < right
    assert (axes.get_xscale() == "function") == square_root
    assert (figure.get_suptitle(), figure.get_supxlabel()) == ("Frontier", FOOTER)
    assert_readable(figure)


def test_kl_reward_frontier_tells_many_curves_apart():
    curves = {f"curve {number}": Curve([0, 1], [0.5, 0.5 + number]) for number in range(12)}
    lines = drawn(only_axes(frontier.kl_reward_frontier(curves)))
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 12


def test_kl_reward_frontier_shows_intervals():
    axes = only_axes(frontier.kl_reward_frontier({name: CURVES[name] for name in ("PPO", "SFT")}))
    band, bar = axes.collections
    vertices = band.get_paths()[0].vertices
    _, _, lows, highs = CURVES["PPO"]
    for kl, low, high in zip(KL, np.asarray(lows), np.asarray(highs), strict=True):
        at_kl = vertices[vertices[:, 0] == kl, 1]
        np.testing.assert_allclose([at_kl.min(), at_kl.max()], [low, high])
    np.testing.assert_allclose(bar.get_segments()[0], [[0, 0.48], [0, 0.52]])


def test_kl_reward_frontier_shades_what_no_policy_reaches():
    figure = frontier.kl_reward_frontier({"SFT": CURVES["SFT"]}, optimum=OPTIMUM)
    axes = only_axes(figure)
    vertices = axes.collections[-1].get_paths()[0].vertices
    top = axes.get_ylim()[1]
    for kl, reward in zip(np.asarray(OPTIMUM.kl), np.asarray(OPTIMUM.reward), strict=True):
        at_kl = vertices[vertices[:, 0] == kl, 1]
        np.testing.assert_allclose([at_kl.min(), at_kl.max()], [reward, top])


def test_kl_reward_frontier_leaves_out_what_is_not_finite():
    curve = Curve([0.0, 1.0, np.nan, 3.0], [0.5, np.nan, 0.7, 0.8])
    (line,) = drawn(only_axes(frontier.kl_reward_frontier({"PPO": curve})))
    np.testing.assert_array_equal(line.get_xydata(), [[0, 0.5], [3, 0.8]])


def test_gold_against_proxy_rings_the_highest_gold_score():
    root = np.linspace(0, 4, 9)
    curves = {
        "small reward model": (root, root, root - 0.25 * root**2),
        "ensemble": (root, 0.5 * root, 0.4 * root),
    }
    figure = frontier.gold_against_proxy(curves, title="Over-optimisation", footer=FOOTER)
    axes = only_axes(figure)
    lines = [line for line in drawn(axes) if line.get_xydata().size]
    for index, (root, proxy, gold) in enumerate(curves.values()):
        dashed, solid, ring = lines[3 * index : 3 * index + 3]
        np.testing.assert_array_equal(dashed.get_xydata(), np.stack([root, proxy], 1))
        np.testing.assert_array_equal(solid.get_xydata(), np.stack([root, gold], 1))
        assert (dashed.get_linestyle(), solid.get_linestyle()) == ("--", "-")
        assert dashed.get_color() == solid.get_color() == ring.get_markeredgecolor()
        best = (2.0, 1.0) if index == 0 else (4.0, 1.6)
        np.testing.assert_allclose(ring.get_xydata(), [best])
    assert lines[0].get_color() != lines[3].get_color()
    assert lines[0].get_marker() != lines[3].get_marker()
    assert set(names_of(axes)) == set(curves)
    assert_readable(figure)


def test_before_after_bars_have_their_numbers_and_intervals():
    measures = {
        "clinical accuracy": ((0.62, 0.58, 0.66), (0.81, 0.78, 0.84)),
        "safety": ((0.7, 0.66, 0.74), (0.931, 0.9, 0.95)),
        "a name that is too long for one line beside the bars": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    }
    figure = frontier.before_after_bars(measures, names=("SFT", "PPO"), title="Gold", footer=FOOTER)
    axes = only_axes(figure)
    widths = [[bar.get_width() for bar in bars] for bars in axes.containers]
    expected = [[pair[which][0] for pair in measures.values()] for which in (0, 1)]
    np.testing.assert_allclose(widths, expected)
    for which, whiskers in enumerate(axes.collections):
        ends = [segment[:, 0] for segment in whiskers.get_segments()]
        np.testing.assert_allclose(ends, [pair[which][1:] for pair in measures.values()])
    assert names_of(axes) == [
        "SFT 0.62",
        "SFT 0.70",
        "SFT 0.00",
        "PPO 0.81",
        "PPO 0.93",
        "PPO 1.00",
    ]
    ticks = [label.get_text().replace("\n", " ") for label in axes.get_yticklabels()]
    assert ticks == list(measures)
    assert_readable(figure)


@pytest.mark.parametrize(
    ("pair", "texts"),
    [
        (((-0.2, -0.3, -0.1), (0.1, -0.05, 0.2)), ["before −0.20", "after 0.10"]),
        (((120, 90, 150), (250, 200, 300)), ["before 120", "after 250"]),
        (((0.001, 0.0, 0.002), (-0.00001, 0.0, 0.0)), ["before 0.0010", "after 0.0000"]),
    ],
)
def test_before_after_bars_take_any_unit(pair, texts):
    figure = frontier.before_after_bars({"gain": pair})
    assert names_of(only_axes(figure)) == texts
    assert_readable(figure)


def test_calibration_picture_draws_the_bins_that_hold_something():
    confidence = np.array([0.55, 0.65, 0.75, 0.85, 0.95])
    accuracy = np.array([0.52, 0.6, 0.7, 0.0, 0.9])
    weight = np.array([400, 200, 100, 0, 50])
    figure = frontier.calibration_picture(
        confidence, accuracy, weight, title="Reward model", footer=FOOTER
    )
    axes = only_axes(figure)
    gaps, points = axes.collections
    kept = weight > 0
    np.testing.assert_array_equal(
        points.get_offsets(), np.stack([confidence[kept], accuracy[kept]], 1)
    )
    areas = points.get_sizes()
    np.testing.assert_allclose(areas / areas[0], weight[kept] / 400)
    segments = [segment[:, 1].tolist() for segment in gaps.get_segments()]
    assert segments == np.stack([confidence[kept], accuracy[kept]], 1).tolist()
    (diagonal,) = drawn(axes)
    np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())
    assert axes.get_xlim() == axes.get_ylim()
    assert axes.get_xlim()[0] < 0.52 < 1 < axes.get_xlim()[1]
    assert "area: number of cases, at most 400" in names_of(axes)
    assert_readable(figure)


def test_pictures_are_saved(tmp_path):
    figure = frontier.kl_reward_frontier(CURVES, square_root=True, footer=FOOTER)
    pixels = imread(plotting.save_figure(figure, tmp_path / "frontier.png"))
    assert pixels.shape[:2] == (660, 1080)
    assert pixels[..., :3].std() > 0.05


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: frontier.kl_reward_frontier({}), "curves is empty; give at least one"),
        (lambda: frontier.gold_against_proxy({}), "curves is empty; give at least one"),
        (lambda: frontier.before_after_bars({}), "measures is empty; give at least one"),
        (
            lambda: frontier.kl_reward_frontier({"PPO": Curve([1.0, 2.0], [1.0])}),
            r"curves\['PPO'\] has the shapes kl \(2,\), reward \(1,\); all must be \[T\]",
        ),
        (
            lambda: frontier.kl_reward_frontier({"PPO": Curve(1.0, 2.0, low=1.0)}),
            r"curves\['PPO'\] has one end of its interval; give low and high, or neither",
        ),
        (
            lambda: frontier.gold_against_proxy({"small": ([np.nan], [1.0], [1.0])}),
            r"curves\['small'\] has no finite point; there is nothing to draw",
        ),
        (
            lambda: frontier.before_after_bars({"safety": ((1, 1, 1), (np.nan, 1, 1))}),
            r"measures\['safety'\] is .*nan.*; it must be finite",
        ),
        (
            lambda: frontier.calibration_picture([0.5], [0.5], [0.0]),
            "weight has no bin above 0; there is nothing to draw",
        ),
    ],
)
def test_pictures_refuse_what_cannot_be_drawn(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
