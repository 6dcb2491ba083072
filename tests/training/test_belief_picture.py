"""Thresholds of the belief by hand, and what the tables and the picture say."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.kernels.alpha_vectors import AlphaVectors
from jaxrl_llm.training import belief_picture, plotting, report
from jaxrl_llm.training.evaluate import Estimate

# -10 x (wait), -2 - x / 2 (test), -6 + 5 x (treat), and one that is never best.
PLANS = AlphaVectors(
    np.array([[0.0, -10.0], [-2.0, -2.5], [-6.0, -1.0], [-9.0, -9.0]]),
    np.array([0, 1, 2, 1], np.int32),
)
NAMES = ("Wait", "Test", "Treat")
ENDS = np.eye(2)


def test_action_regions_are_where_lines_cross():
    regions = belief_picture.action_regions(PLANS, *ENDS)
    assert [region.action for region in regions] == [0, 1, 2]
    # -10 x = -2 - x / 2, and -2 - x / 2 = -6 + 5 x.
    np.testing.assert_allclose([r.high for r in regions], [2 / 9.5, 4 / 5.5, 1])
    np.testing.assert_allclose([r.low for r in regions], [0, 2 / 9.5, 4 / 5.5])


def test_action_regions_merge_plans_with_one_first_action():
    plans = PLANS._replace(actions=np.array([0, 0, 2, 1], np.int32))
    regions = belief_picture.action_regions(plans, *ENDS)
    assert [region.action for region in regions] == [0, 2]
    single = AlphaVectors(np.zeros((2, 2)), np.array([1, 2], np.int32))
    assert belief_picture.action_regions(single, *ENDS) == [(0.0, 1.0, 1)]


def test_show_bounds_puts_the_exact_value_among_its_bounds(capsys):
    numbers = {"mean": 1.5, "low": 1.0, "high": 2.0, "standard_error": 0.25, "unfinished": 0.0}
    tried = Estimate(**{name: jnp.float32(value) for name, value in numbers.items()})
    bounds = {"below": 1.0, "above": 3.0, "plans": 2.0}
    belief_picture.show_bounds("Problem", bounds, (2.0, 1e-6), {"plans": tried})
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [line[0] for line in lines[3:8]] == ["above", "V*", "plans", "below", "tried:"]
    assert lines[3][1:] == ["3.000000", "+1.000000"]
    assert lines[4][1:] == ["2.000000", "+1.0e-06"]
    assert lines[7][1:] == ["plans", "1.500000", "-0.500000", "1.000", "to", "2.000"]
    assert " ".join(lines[-1]) == report.RESEARCH_ONLY


def test_show_plans_writes_thresholds_and_a_picture(tmp_path, capsys):
    path = tmp_path / "plans.png"
    bounds = {"above": np.array([1.0, 0.5])}
    belief_picture.show_plans(path, PLANS, ENDS, bounds, NAMES, "Problem", "Probability of it")
    output = capsys.readouterr().out
    assert "what to do, by probability of it" in output
    rows = [line.split() for line in output.splitlines() if line.startswith(NAMES)]
    assert rows == [
        ["Wait", "0.0000", "0.2105"],
        ["Test", "0.2105", "0.7273"],
        ["Treat", "0.7273", "1.0000"],
    ]
    assert path.stat().st_size > 10_000


def test_value_over_belief_draws_the_maximum(tmp_path):
    bounds = {"above": np.array([1.0, 0.5, 1.0])}
    figure = belief_picture.value_over_belief(
        PLANS, *ENDS, bounds=bounds, action_names=NAMES, title="T", xlabel="x"
    )
    left, right = figure.axes
    widest = max(left.lines, key=lambda line: line.get_linewidth())
    share = np.asarray(widest.get_xdata(), float)
    vectors = np.asarray(PLANS.vectors)
    expected = np.max(np.stack([1 - share, share], axis=1) @ vectors.T, axis=1)
    np.testing.assert_allclose(np.asarray(widest.get_ydata(), float), expected)
    texts = {text.get_text() for axes in (left, right) for text in axes.texts}
    assert texts >= {*NAMES, "0.21", "0.73", "above", "value"}
    plotting.save_figure(figure, tmp_path / "value.png")


def test_value_over_belief_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"start has shape \(3,\); it must be \[2\]"):
        belief_picture.value_over_belief(
            PLANS, np.eye(3)[0], np.eye(3)[1], bounds={}, action_names=NAMES
        )
    with pytest.raises(ValueError, match=r"bounds\['b'\] has shape \(1,\); it must be \[beliefs\]"):
        belief_picture.value_over_belief(
            PLANS, *ENDS, bounds={"b": np.zeros(1)}, action_names=NAMES
        )
