"""Pictures of off-policy evaluation: what is drawn where, and what is refused."""

import numpy as np
import pytest

from jaxrl_llm.training import evaluation_picture, plotting

FOUND = {
    "clinicians": {"WIS": (0.78, 0.74, 0.82), "DR": (0.79, 0.77, 0.81)},
    "optimal": {"WIS": (0.7, 0.4, 0.95), "DR": (0.8, 0.7, 0.9), "IS": (90.0, -5.0, 400.0)},
}


def test_forest_draws_each_estimate_beside_the_exact_value(tmp_path):
    figure = evaluation_picture.forest(FOUND, exact={"clinicians": 0.7818}, title="t", footer="f")
    first, second = figure.axes
    assert [text.get_text() for text in first.get_yticklabels()] == ["WIS", "DR"]
    points = [line.get_xydata() for line in first.lines if line.get_marker() == "o"]
    np.testing.assert_array_equal(np.concatenate(points), [(0.78, 0), (0.79, 1)])
    assert [text.get_text() for text in first.texts] == ["exact 0.7818"]
    # What lies outside is written out, and its interval ends in arrows.
    assert [text.get_text() for text in second.texts] == ["90"]
    assert {str(line.get_marker()) for line in second.lines} >= {"<", ">"}
    assert first.get_xlim() == second.get_xlim()
    assert plotting.save_figure(figure, tmp_path / "forest.png").stat().st_size > 10_000


def test_forest_refuses_nothing_and_infinity():
    with pytest.raises(ValueError, match="estimates is empty; give at least one policy"):
        evaluation_picture.forest({})
    with pytest.raises(ValueError, match=r"estimates\['a'\]\['IS'\] is \(inf, 0, 1\); it must"):
        evaluation_picture.forest({"a": {"IS": (np.inf, 0, 1)}})


def test_effective_sample_sizes_draws_a_line_a_policy(tmp_path):
    sizes = {"near": [900.0, 800, 700], "far": [100.0, 10, 0]}
    figure = evaluation_picture.effective_sample_sizes(sizes, num_trajectories=1000, threshold=50)
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    near, far, *_ = axes.lines
    np.testing.assert_array_equal(near.get_ydata(), sizes["near"])
    np.testing.assert_array_equal(far.get_ydata(), [100, 10, np.nan])
    assert plotting.save_figure(figure, tmp_path / "size.png").stat().st_size > 10_000
