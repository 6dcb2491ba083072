"""What the chart of an episode shows: which panels, which shades, which marks, and its errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from jaxrl_llm.training import episode_picture
from jaxrl_llm.training.episode_picture import Doses, Event, Series

TIME = np.array([0.0, 1.0, 2.0, 4.0])
GLUCOSE = Series("Glucose", "mg/dL", [60.0, 100.0, 200.0, 120.0], normal=(70, 180))
INSULIN = Doses("Insulin", "U/h", [0.0, 1.5, 0.0, 2.0])
MEALS = [Event(0.5, "Meal"), Event(2.5, "Meal"), Event(4.5, "Discharge")]


def draw(*arguments: Any, **options: Any) -> Any:
    return episode_picture.draw(*arguments, **options)


def text_of(panel: Any) -> str:
    return " ".join([panel.get_title(loc="left"), *(text.get_text() for text in panel.texts)])


def heights(fill: Any) -> np.ndarray:
    return np.concatenate([path.vertices[:, 1] for path in fill.get_paths()] or [np.zeros(0)])


def test_draw_stacks_events_vitals_and_doses_over_one_time_axis():
    pulse = Series("Pulse", "beats/min", [70.0, np.nan, 80.0, 75.0])
    figure = draw("Title", TIME, [GLUCOSE, pulse], [INSULIN], MEALS)
    events, glucose, heart, insulin = figure.axes
    tops = [panel.get_position().y0 for panel in figure.axes]
    assert tops == sorted(tops, reverse=True)
    assert [text.get_text() for text in events.get_yticklabels()] == ["Meal", "Discharge"]
    meal, discharge = (line for line in events.lines if line.get_marker() != "None")
    np.testing.assert_array_equal(meal.get_xdata(), [0.5, 2.5])
    np.testing.assert_array_equal(discharge.get_xdata(), [4.5])
    assert text_of(glucose) == "Glucose (mg/dL) normal 70\N{EN DASH}180\n50% of values"
    assert text_of(heart) == "Pulse (beats/min)"
    assert text_of(insulin) == "Insulin (U/h) given 50%\nof the time"
    assert all(panel.get_xlim() == insulin.get_xlim() for panel in figure.axes)
    # The discharge came after the last measurement, and is in sight.
    assert insulin.get_xlim()[1] > 4.5
    assert insulin.get_xlabel() == "Time (hours)"
    assert figure.get_suptitle() == "Title"
    assert figure.get_supxlabel() == "Research only, not for clinical use. SYNTHETIC."


def test_draw_marks_every_event_across_every_panel():
    figure = draw("", TIME, [GLUCOSE], [INSULIN], MEALS)
    for panel in figure.axes:
        across = [line.get_xdata()[0] for line in panel.lines if line.get_linestyle() == "--"]
        assert across == [0.5, 2.5, 4.5]


def test_draw_connects_measurements_and_leaves_out_what_is_missing():
    series = Series("Pulse", "", [70.0, np.nan, 80.0, 75.0])
    line = draw("", TIME, [series]).axes[0].lines[0]
    np.testing.assert_array_equal(line.get_xdata(), [0, 2, 4])
    np.testing.assert_array_equal(line.get_ydata(), [70, 80, 75])
    assert line.get_marker() == "o"
    long = np.arange(100.0)
    (line,) = draw("", long, [Series("x", "", long)]).axes[0].lines
    assert line.get_marker() == "None"


def test_draw_fills_exactly_what_lies_outside_of_the_normal_range():
    below, above = draw("", TIME, [GLUCOSE]).axes[0].collections
    assert heights(below).min() == 60
    assert heights(below).max() == 70
    # The line from (0, 60) to (1, 100) enters the range at 70, a quarter of the way.
    np.testing.assert_allclose(below.get_paths()[0].vertices[:, 0].max(), 0.25)
    assert heights(above).max() == 200
    assert heights(above).min() == 180
    healthy = Series("Glucose", "mg/dL", [100.0, 110, 120, 90], normal=(70, 180))
    fills = draw("", TIME, [healthy]).axes[0].collections
    assert not any(heights(fill).size for fill in fills)


@pytest.mark.parametrize(
    ("normal", "named"),
    [((-np.inf, 100.0), "up to 100"), ((70.0, np.inf), "from 70"), ((70, 180), "70\N{EN DASH}180")],
)
def test_draw_keeps_the_nearest_end_of_the_range_in_sight(normal, named):
    values = np.full(4, 300.0) if np.isfinite(normal[1]) else np.full(4, 10.0)
    panel = draw("", TIME, [Series("x", "", values, normal=normal)]).axes[0]
    assert f"normal {named}\n0% of values" in text_of(panel)
    low, high = panel.get_ylim()
    nearest = normal[1] if np.isfinite(normal[1]) else normal[0]
    assert low < nearest < high
    assert np.isfinite([low, high]).all()


def test_draw_shows_doses_as_steps_that_last_until_the_next_time():
    steps = draw("", TIME, [GLUCOSE], [INSULIN]).axes[1].patches[0]
    values, edges, _ = steps.get_data()
    np.testing.assert_array_equal(values, [0, 1.5, 0, 2])
    np.testing.assert_array_equal(edges, [0, 1, 2, 4, 6])
    drug = Doses("Drug", "", [0.0, 1, 1, 0])
    panel = draw("", TIME, [GLUCOSE], [drug]).axes[1]
    assert [text.get_text() for text in panel.get_yticklabels()] == ["no", "yes"]


def test_draw_has_the_ticks_of_a_clock():
    time = np.arange(0, 48.5, 0.5)
    panel = draw("", time, [Series("x", "", time)]).axes[-1]
    inside = [tick for tick in panel.get_xticks() if 0 <= tick <= 48]
    np.testing.assert_array_equal(np.diff(inside), np.full(len(inside) - 1, 6))
    weeks = np.arange(30.0)
    panel = draw("", weeks, [Series("x", "", weeks)], time_unit="weeks").axes[-1]
    assert panel.get_xlabel() == "Time (weeks)"


def test_draw_takes_a_logarithmic_series():
    virus = Series("Virus", "copies/mL", [1e5, 1e3, 10.0, 50.0], (-np.inf, 50), is_logarithmic=True)
    panel = draw("", TIME, [virus]).axes[0]
    assert panel.get_yscale() == "log"
    assert "50% of values" in text_of(panel)


def test_save_writes_pictures_large_and_small(tmp_path):
    path = episode_picture.save(tmp_path / "new" / "a.png", "T", TIME, [GLUCOSE], [INSULIN], MEALS)
    picture = imread(path)
    assert picture.shape[1] > 1000
    assert np.ptp(picture[..., :3]) == 1
    path = episode_picture.save(tmp_path / "b.png", "", [0.0], [Series("x", "", [5.0], (6, 7))])
    assert imread(path).shape[0] < picture.shape[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time": [[0.0]]}, r"time has shape \(1, 1\)"),
        ({"time": []}, r"time has shape \(0,\); it must be \[T\], with at least one"),
        ({"time": [0, 1, 1, 2]}, r"time\[2\] is 1, after 1; times must increase"),
        ({"time": [0, 1, np.nan, 2]}, r"time\[2\] is not finite"),
        ({"series": []}, "series is empty"),
        ({"series": [Series("x", "", [1.0])]}, r"series\['x'\].values has shape \(1,\)"),
        ({"series": [Series("x", "", [1, 2, np.inf, 3])]}, r"series\['x'\].values\[2\] is inf"),
        ({"series": [Series("x", "", np.ones(4), (3, 3))]}, r"normal is \(3, 3\); low must be"),
        (
            {"series": [Series("x", "", np.zeros(4), is_logarithmic=True)]},
            r"series\['x'\].values has 0; a logarithmic axis",
        ),
        ({"doses": [Doses("d", "", [0, np.nan, 0, 0])]}, r"doses\['d'\].values\[1\] is nan"),
        ({"events": [Event(np.nan, "Meal")]}, r"events\['Meal'\] is at nan"),
    ],
)
def test_draw_refuses_in_one_line(change, message):
    arguments = {"time": TIME, "series": [GLUCOSE], "doses": [], "events": []} | change
    with pytest.raises(ValueError, match=message) as error:
        draw("", **arguments)
    assert "\n" not in str(error.value)
