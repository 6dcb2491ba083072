"""What the table says, and what the picture refuses."""

import numpy as np
import pytest

from jaxrl_llm.envs import bandits
from jaxrl_llm.training import plotting, regret_report

RUNS = np.cumsum(np.random.default_rng(0).random((6, 9)), axis=1)


def test_show_puts_the_exact_regret_beside_the_simulated_one(capsys):
    problem = bandits.bernoulli((0.8, 0.5), 9)
    result = regret_report.show("Title", problem, {"UCB1": RUNS}, {"UCB1": np.arange(9.0)})
    final = RUNS[:, -1]
    error = final.std(ddof=1) / np.sqrt(6)
    assert result["Title/UCB1/mean"] == pytest.approx(final.mean())
    assert result["Title/UCB1/standard_error"] == pytest.approx(error)
    assert result["Title/UCB1/exact"] == 8
    assert result["Title/random arms/exact"] == pytest.approx(9 * 0.15, rel=1e-5)
    output = capsys.readouterr().out
    line = next(line.split() for line in output.splitlines() if line.startswith("UCB1"))
    z = f"{(final.mean() - 8) / error:+.1f}"
    assert line == ["UCB1", f"{final.mean():.2f}", f"{error:.2f}", "8.00", z]
    assert "Lai and Robbins" in output
    assert "not for clinical use" in output


def test_show_claims_no_bound_where_arms_change(capsys):
    regret_report.show("Title", bandits.swapping((0.8, 0.5), 9), {"UCB1": RUNS})
    assert "Guaranteed" not in capsys.readouterr().out


def test_regret_curves_draws_a_panel_a_problem_and_a_line_a_strategy(tmp_path):
    regret = {"one": {"a": RUNS, "b": RUNS + 1}, "two": {"b": RUNS}}
    figure = regret_report.regret_curves(regret, {"two": {"b": RUNS.mean(axis=0)}})
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["one", "two"]
    first, second = figure.axes
    np.testing.assert_allclose(np.asarray(first.lines[0].get_ydata()), RUNS.mean(axis=0))
    assert [line.get_label() for line in second.lines if line.get_marker() != "None"] == ["b"]
    assert second.lines[0].get_color() == first.lines[1].get_color()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "exact expectation"]
    assert plotting.save_figure(figure, tmp_path / "regret.png").stat().st_size > 0


def test_regret_curves_refuses_what_is_not_runs_by_rounds():
    with pytest.raises(ValueError, match=r"regret\['one'\]\['a'\] has shape \(9,\)"):
        regret_report.regret_curves({"one": {"a": RUNS[0]}})
