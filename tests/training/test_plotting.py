"""Pictures: what is drawn is the data, and every name can be read."""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from jaxrl_llm.training import plotting

FOOTER = "research only, not for clinical use"


def boxes(figure: Figure, artists: list[Any]) -> list[Any]:
    """Where artists are once the figure is laid out, in dots."""
    figure.draw_without_rendering()
    return [artist.get_window_extent() for artist in artists]


def only_axes(figure: Figure) -> Any:
    (axes,) = figure.axes
    return axes


def legend_texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def cell_texts(axes: Axes, shape: tuple[int, int]) -> list[list[str]]:
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    return [[texts[column, row] for column in range(shape[1])] for row in range(shape[0])]


def tick_names(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def test_learning_curve_draws_median_quartiles_and_each_seed():
    steps = np.array([1000, 2000, 3000, 4000])
    values = np.random.default_rng(0).normal(size=(5, 4))
    figure = plotting.learning_curve(steps, values, title="PPO", ylabel="Survival", footer=FOOTER)
    axes = only_axes(figure)
    *seeds, median = axes.lines
    assert len(seeds) == 5
    for line, curve in zip(seeds, values, strict=True):
        np.testing.assert_array_equal(line.get_xydata(), np.stack([steps, curve], 1))
    ordered = np.sort(values, axis=0)
    np.testing.assert_array_equal(median.get_ydata(), ordered[2])
    # Of five values the quartiles are the second and the fourth.
    (band,) = axes.collections
    vertices = band.get_paths()[0].vertices
    for index, step in enumerate(steps):
        at_step = vertices[vertices[:, 0] == step, 1]
        np.testing.assert_allclose([at_step.min(), at_step.max()], ordered[[1, 3], index])
    assert set(legend_texts(axes)) == {"median of 5 seeds", "25–75 %"}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Environment steps", "Survival")
    assert (figure.get_suptitle(), figure.get_supxlabel()) == ("PPO", FOOTER)


def test_learning_curve_of_one_seed_has_no_band():
    axes = only_axes(plotting.learning_curve([1, 2], [[3.0, 4.0]]))
    assert len(axes.lines) == 1
    assert not axes.collections
    assert legend_texts(axes) == ["one seed"]


def test_learning_curve_of_one_step_shows_a_marker(tmp_path):
    figure = plotting.learning_curve([5], [[3.0], [5.0]])
    median = only_axes(figure).lines[-1]
    assert (median.get_marker(), *median.get_ydata()) == ("o", 4.0)
    plotting.save_figure(figure, tmp_path / "one.png")


def test_learning_curve_ignores_missing_values():
    values = np.array([[np.nan, 1.0, np.nan], [2.0, 3.0, np.nan], [4.0, np.nan, np.nan]])
    axes = only_axes(plotting.learning_curve([1, 2, 3], values))
    np.testing.assert_array_equal(axes.lines[-1].get_ydata(), [3.0, 2.0, np.nan])


def test_learning_curve_names_references_without_overlap():
    references = {
        "random": 0.782,
        "clinician": 0.783,
        "cloned": 0.784,
        "optimum": 0.88,
        "best": 0.88,
    }
    values = np.linspace(0.78, 0.87, 20)[None]
    figure = plotting.learning_curve(np.arange(20), values, references=references)
    axes = only_axes(figure)
    levels = {line.get_label()[1:]: line for line in axes.lines[1:]}
    assert {name: line.get_ydata()[0] for name, line in levels.items()} == references
    assert len({(line.get_color(), line.get_linestyle()) for line in levels.values()}) == 5
    texts = [text.get_text() for text in axes.texts]
    assert texts == [f"{name} {level:.3g}" for name, level in references.items()]
    figure.draw_without_rendering()
    # Of the words alone: an annotation's own extent takes in the line that leads to it.
    extents = sorted(map(Text.get_window_extent, axes.texts), key=lambda box: box.y0)
    for lower, upper in pairwise(extents):
        assert lower.y1 <= upper.y0
    frame = axes.get_window_extent()
    for extent in extents:
        assert frame.x1 < extent.x0 < extent.x1 <= figure.bbox.x1
        assert 0 <= extent.y0 < extent.y1 <= figure.bbox.y1
    low, high = axes.get_ylim()
    assert low < min(references.values()) < max(references.values()) < high


@pytest.mark.parametrize(
    ("values", "references", "message"),
    [
        ([1.0, 2.0], {}, r"values has shape \(2,\); it must be \[seeds, 2\]"),
        ([[1.0, 2.0, 3.0]], {}, r"values has shape \(1, 3\); it must be \[seeds, 2\]"),
        (np.zeros((0, 2)), {}, r"values has shape \(0, 2\)"),
        ([[1.0, 2.0]], {"x": float("nan")}, r"references\['x'\] is nan; it must be finite"),
    ],
)
def test_learning_curve_refuses(values, references, message):
    with pytest.raises(ValueError, match=message):
        plotting.learning_curve([1, 2], values, references=references)


def test_spread_equals_projected_least_squares():
    """The oracle projects onto `x[i + 1] - x[i] >= gap` by Dykstra's cyclic projections."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        positions = np.sort(generator.uniform(0.3, 0.7, size=5))
        gap = 0.07
        expected, corrections = positions.copy(), np.zeros((4, 5))
        for _ in range(3_000):
            for index in range(4):
                before = expected + corrections[index]
                expected = before.copy()
                lacking = max(0.0, gap - (before[index + 1] - before[index]))
                expected[index] -= lacking / 2
                expected[index + 1] += lacking / 2
                corrections[index] = before - expected
        np.testing.assert_allclose(plotting.spread(positions.tolist(), gap), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("positions", "gap", "expected"),
    [
        ([], 0.1, []),
        ([0.5], 0.1, [0.5]),
        ([0.1, 0.9], 0.1, [0.1, 0.9]),
        ([0.0, 0.0], 0.2, [0.0, 0.2]),
        ([1.0, 1.0, 1.0], 0.2, [0.6, 0.8, 1.0]),
        ([0.5, 0.5, 0.5], 0.6, [0.0, 0.6, 1.2]),
    ],
)
def test_spread_at_the_edges(positions, gap, expected):
    np.testing.assert_allclose(plotting.spread(positions, gap), expected)


def test_policy_heatmap_of_actions_colours_them_and_shows_q():
    policy = np.array([1, 0, 2, 2, 2])
    q = np.array([[1.0, 2, 0], [0.5, 0, 0], [0, 0, 1], [-3, -4, -1.234], [0, -0.001, 9]])
    states, actions = ["healthy", "mild", "moderate", "severe", "dead"], ["wait", "drug", "surgery"]
    figure = plotting.policy_heatmap(policy, states, actions, value=q, footer=FOOTER)
    axes = only_axes(figure)
    np.testing.assert_array_equal(axes.images[0].get_array(), np.eye(3)[policy])
    texts = cell_texts(axes, q.shape)
    assert texts[0] == ["1.00", "2.00", "0.00"]
    assert texts[3] == ["−3.00", "−4.00", "−1.23"]
    assert texts[4] == ["0.00", "0.00", "9.00"]
    bold = {text.get_position() for text in axes.texts if text.get_fontweight() == "bold"}
    assert bold == {(action, state) for state, action in enumerate(policy)}
    assert tick_names(axes.yaxis) == states
    assert tick_names(axes.xaxis) == actions
    assert figure.get_supxlabel() == FOOTER


def test_policy_heatmap_of_probabilities_shows_them_and_values_beside():
    policy = np.array([[0.25, 0.75], [1.0, 0.0], [0.5, 0.5]])
    figure = plotting.policy_heatmap(
        policy, list("abc"), ["x", "y"], value=[10.0, -20, 30], value_name="days"
    )
    left, right = figure.axes
    assert cell_texts(left, (3, 2)) == [["0.25", "0.75"], ["1.00", "0.00"], ["0.50", "0.50"]]
    assert cell_texts(right, (3, 1)) == [["10.0"], ["−20.0"], ["30.0"]]
    np.testing.assert_array_equal(right.images[0].get_array(), [[10.0], [-20], [30]])
    assert tick_names(right.xaxis) == ["days"]


def test_policy_heatmap_numbers_contrast_with_their_cells():
    policy = np.stack([np.linspace(0, 1, 21), 1 - np.linspace(0, 1, 21)], 1)
    names = [str(index) for index in range(21)]
    for axes in plotting.policy_heatmap(policy, names, ["x", "y"], value=np.arange(21)).axes:
        (image,) = axes.images
        colours = image.to_rgba(np.asarray(image.get_array()))
        for text in axes.texts:
            column, row = map(int, text.get_position())
            ratio = contrast(to_hex(text.get_color()), to_hex(colours[row, column]))
            assert ratio >= 4.4, (row, column)


def contrast(first: str, second: str) -> float:
    """As WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(
            channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted([luminance(first), luminance(second)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("num_states", [5, 9, 40, 716, 1500])
@pytest.mark.parametrize("num_actions", [3, 25])
def test_policy_heatmap_names_never_overlap(num_states, num_actions):
    states = [f"state {index}" for index in range(num_states)]
    actions = [f"fluids {index // 5}, vasopressor {index % 5}" for index in range(num_actions)]
    policy = np.arange(num_states) % num_actions
    figure = plotting.policy_heatmap(policy, states, actions, value=np.arange(num_states) / 7.0)
    axes = figure.axes[0]
    shown_states, shown_actions = tick_names(axes.yaxis), tick_names(axes.xaxis)
    assert shown_states == states[:: states.index(shown_states[1])]
    assert len(shown_states) >= min(num_states, 5)
    assert len(shown_actions) == num_actions
    for axis, low, high in ((axes.yaxis, "y0", "y1"), (axes.xaxis, "x0", "x1")):
        extents = boxes(figure, axis.get_ticklabels())
        extents.sort(key=lambda box: getattr(box, low))
        for before, after in pairwise(extents):
            assert getattr(before, high) <= getattr(after, low)
        for box in extents:
            assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1


@pytest.mark.slow
def test_policy_heatmap_of_716_by_25_has_a_pixel_a_row_and_its_scales():
    policy = np.random.default_rng(0).dirichlet(np.ones(25), size=716)
    figure = plotting.policy_heatmap(
        policy,
        [f"state {index}" for index in range(716)],
        [str(index) for index in range(25)],
        value=policy,
        value_name="survival",
    )
    left, right = figure.axes
    assert not left.texts
    assert [panel.child_axes[0].get_ylabel() for panel in (left, right)] == [
        "probability",
        "survival",
    ]
    np.testing.assert_allclose(left.child_axes[0].get_ylim(), (0, 1))
    figure.set_dpi(150)
    (box,) = boxes(figure, [left])
    assert box.height >= 716


@pytest.mark.parametrize(
    ("policy", "value", "message"),
    [
        (
            [0, 1],
            None,
            r"policy is int64\[2\]; it must be probabilities \[3, 2\] or integers \[3\]",
        ),
        ([0.0, 1.0, 0.0], None, r"policy is float64\[3\]; it must be"),
        ([0, 2, 1], None, r"policy\[1\] is 2; it must be in \[0, 1\]"),
        ([0, -1, 1], None, r"policy\[1\] is -1; it must be in"),
        ([0, 1, 1], [1.0, 2.0], r"value has shape \(2,\); it must be \(3, 2\) or \(3,\)"),
    ],
)
def test_policy_heatmap_refuses(policy, value, message):
    with pytest.raises(ValueError, match=message):
        plotting.policy_heatmap(policy, list("abc"), ["x", "y"], value=value)


def test_convergence_draws_each_residual_and_the_predicted_rate():
    curves = {
        "value iteration": 2 * 0.9 ** np.arange(10.0),
        "policy iteration": np.array([1.0, 1e-3, 0.0]),
    }
    axes = only_axes(plotting.convergence(curves, rate=0.9, title="Chain"))
    assert axes.get_yscale() == "log"
    value, policy, predicted = axes.lines
    np.testing.assert_array_equal(value.get_xdata(), np.arange(1, 11))
    np.testing.assert_array_equal(value.get_ydata(), curves["value iteration"])
    np.testing.assert_array_equal(policy.get_ydata(), [1.0, 1e-3, np.nan])
    np.testing.assert_allclose(predicted.get_ydata(), curves["value iteration"])
    predicted_name = r"$\gamma^k$, $\gamma$ = 0.9"
    assert legend_texts(axes) == ["value iteration", "policy iteration", predicted_name]
    assert value.get_linestyle() != policy.get_linestyle()
    low, high = axes.get_ylim()
    assert low < 1e-3 < 2 < high


def test_convergence_of_one_residual_shows_a_marker():
    axes = only_axes(plotting.convergence({"policy iteration": [1e-3, 0.0]}))
    assert axes.lines[0].get_marker() == "o"


@pytest.mark.parametrize("curves", [{}, {"a": [0.0, np.nan]}, {"a": []}])
def test_convergence_refuses_nothing_to_draw(curves):
    with pytest.raises(ValueError, match="curves has no positive residual"):
        plotting.convergence(curves)
    with pytest.raises(ValueError, match=r"curves\['a'\] has shape \(1, 1\)"):
        plotting.convergence({"a": [[1.0]]})


def test_save_figure_writes_a_whole_png_at_150_dpi(tmp_path):
    figure = plotting.learning_curve([1, 2], [[3.0, 4.0]], title="x")
    path = plotting.save_figure(figure, tmp_path / "pictures" / "curve.png")
    pixels = imread(path)
    assert pixels.shape[:2] == (4.0 * 150, 6.8 * 150)
    assert pixels.std() > 0.05
    assert [file.name for file in path.parent.iterdir()] == ["curve.png"]


def test_figures_leave_global_state_alone(tmp_path):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    figure = plotting.policy_heatmap([0, 1], ["a", "b"], ["x", "y"])
    plotting.save_figure(figure, tmp_path / "picture.png")
    assert dict(mpl.rcParams) == before
    assert (
        "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    )
