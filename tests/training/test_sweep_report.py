"""What the table and the pictures of a sweep show."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxrl_llm.training import sweep, sweep_report
from jaxrl_llm.training.sweep import Ranking


def ranking(points: sweep.Points, score: np.ndarray) -> Ranking:
    return Ranking(points=points, score=score, steps=np.array([1]), curve=score[None])


def mapped() -> Ranking:
    """Best at rate 0.1 and goal 2; rate 1 and goal 3 diverged."""
    points = sweep.grid(learning_rate=[0.01, 0.1, 1.0], goal=[2.0, 3.0])
    mean = np.array([1.0, 2.0, 9.0, 4.0, 5.0, np.nan])
    return ranking(points, np.stack([mean - 1, mean + 1], axis=1))


def rows_of(output: str) -> list[list[str]]:
    return [line.split() for line in output.splitlines() if line.strip()[:1].isdigit()]


def test_print_ranking_has_the_best_first_and_as_flags(capsys):
    sweep_report.print_ranking(
        "Title", mapped(), references={"optimum": 10.0}, score_name="Value", prefix="ppo"
    )
    output = capsys.readouterr().out
    rows = rows_of(output)
    assert rows[0] == ["1", "0.1", "2", "9.0000", "1.0000", "8.0000"]
    assert [row[0] for row in rows] == list("123456")
    assert rows[-1] == ["6", "1", "3", "2"]
    assert "optimum" in output
    assert "10.0000" in output
    assert "Best: --ppo.learning-rate 0.1 --ppo.goal 2" in output
    assert "Research only, not for clinical use." in output


def test_print_ranking_of_many_points_shows_the_ten_best_and_the_worst(capsys):
    points = sweep.grid(rate=np.arange(1, 31))
    sweep_report.print_ranking("", ranking(points, np.arange(30.0)[:, None]))
    rows = rows_of(capsys.readouterr().out)
    assert [row[0] for row in rows] == [*map(str, range(1, 11)), "30"]
    assert rows[0][1] == "30"
    assert rows[-1][1] == "1"


def draw(*arguments: Any, **options: Any) -> Any:
    return sweep_report.draw(*arguments, **options)


def test_draw_maps_two_names_with_a_number_a_cell():
    figure = draw("Title", mapped(), references={"optimum": 10.0}, score_name="Value")
    axes, bar = figure.axes
    (image,) = axes.images
    np.testing.assert_array_equal(image.get_array(), [[1, 2], [9, 4], [5, np.nan]])
    cells = {tuple(map(int, text.get_position())): text.get_text() for text in axes.texts}
    assert cells[(0, 1)] == "\N{BLACK STAR}9.00"
    assert cells[(1, 2)] == "\N{MULTIPLICATION SIGN}"
    assert cells[(1, 0)] == "2.00"
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0.01", "0.1", "1"]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("Learning rate", "Goal")
    assert bar.get_ylabel() == "Value, mean over 2 seeds"
    assert "optimum 10, \N{BLACK STAR} best" in figure.get_supxlabel()
    assert "diverged" in figure.get_supxlabel()


def test_draw_maps_a_shuffled_grid_alike():
    found, order = mapped(), [5, 0, 3, 1, 4, 2]
    points = {name: column[order] for name, column in found.points.items()}
    (image,) = draw("", ranking(points, found.score[order])).axes[0].images
    np.testing.assert_array_equal(image.get_array(), [[1, 2], [9, 4], [5, np.nan]])


@pytest.mark.parametrize("num_names", [1, 3])
def test_draw_has_a_panel_a_name_and_a_star_at_the_best(num_names):
    values = {"rate": [0.001, 0.1, 1.0], "goal": [2.0, 3.0], "mass": [0.0, 1.0]}
    points = sweep.grid(**dict(list(values.items())[:num_names]))
    size = len(points["rate"])
    score = np.random.default_rng(0).normal(size=(size, 2))
    score[-1] = np.nan
    found = ranking(points, score)
    figure = draw("", found, references={"optimum": 3.0}, score_name="Value")
    assert [panel.get_xlabel() for panel in figure.axes] == ["Rate", "Goal", "Mass"][:num_names]
    for panel, name in zip(figure.axes, points, strict=True):
        stars = [line for line in panel.lines if line.get_marker() == "*"]
        assert stars[0].get_xdata()[0] == points[name][found.order[0]]
        assert stars[0].get_ydata()[0] == np.nanmax(found.mean)
        crosses = [line for line in panel.lines if line.get_marker() == "x"]
        assert crosses[0].get_xdata()[0] == points[name][-1]
    assert figure.axes[0].get_xscale() == "symlog"
    assert figure.axes[-1].get_xscale() == ("symlog" if num_names == 1 else "linear")
    assert [text.get_text() for text in figure.axes[-1].texts] == ["optimum 3"]


def test_show_writes_the_picture(tmp_path, capsys):
    sweep_report.show(tmp_path / "sweep.png", "Title", mapped())
    assert "Title" in capsys.readouterr().out
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
