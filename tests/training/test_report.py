"""Tables: every cell is there, every column lines up, and nothing is wider than the terminal."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from jaxrl_llm import make_mdp
from jaxrl_llm.training import evaluate, report
from jaxrl_llm.types import Solution

COLUMNS = ("policy", "survival", "note")
ROWS = [("random", "0.78", "none"), ("the optimum", "-10.5", "[bold]exact[/bold] :smile:")]


@pytest.fixture
def terminal(monkeypatch):
    """Makes stdout a colourless terminal of a given width."""

    def make(width: int) -> None:
        for name, value in {"FORCE_COLOR": "1", "TERM": "dumb", "COLUMNS": str(width)}.items():
            monkeypatch.setenv(name, value)

    return make


@pytest.fixture
def runs(x64):
    """Runs of every solver on a problem whose answer is known: stay for 1 a step, or leave."""
    return {name: evaluate.run_solver(s, mdp(), 1e-9) for name, s in evaluate.SOLVERS.items()}


def mdp(**changes):
    law = [[[0.0, 1.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]]
    settings = {"terminal": np.array([False, True]), **changes}
    return make_mdp(np.array(law), np.array([[7.5, 1.0], [0.0, 0.0]]), 0.9, **settings)


def solution(q: list[list[float]], policy: list[int]) -> Solution:
    value = [row[action] for row, action in zip(q, policy, strict=True)]
    leaves = Solution(
        value=jnp.array(value),
        q=jnp.array(q),
        policy=jnp.array(policy),
        iterations=jnp.int32(3),
        residual=jnp.float32(0),
        converged=jnp.bool_(True),
    )
    return jax.device_get(leaves)


def printed(capsys) -> list[str]:
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    return [line.rstrip() for line in text.splitlines()]


def test_print_table_aligns_numbers_right_and_text_left(capsys):
    report.print_table("Survival", COLUMNS, ROWS, footer=report.RESEARCH_ONLY)
    blank, title, header, rule, *rows, gap, footer = printed(capsys)
    assert (blank, title, gap, footer) == ("", "Survival", "", report.RESEARCH_ONLY)
    assert header == "policy       survival  note"
    assert set(rule) == {"─"}
    assert rows == [
        "random           0.78  none",
        "the optimum     -10.5  [bold]exact[/bold] :smile:",
    ]


def test_print_table_needs_neither_title_nor_footer_nor_rows(capsys):
    report.print_table("", ("policy", "survival"), [])
    blank, header, rule = printed(capsys)
    assert (blank, header, set(rule)) == ("", "policy  survival", {"─"})


def test_print_table_treats_a_missing_number_as_a_number(capsys):
    report.print_table("", ("a", "deviation"), [("x", ""), ("y", "0.1")])
    assert printed(capsys)[-1] == "y        0.1"


def test_print_table_on_a_pipe_cuts_nothing_off(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    long = ["word " * 50 + "end"] * 3
    report.print_table("title " * 30, ["c", "d", "e"], [long, long], footer="footer " * 30)
    lines = printed(capsys)
    assert sum(line.count("word") for line in lines) == 300
    assert [line.count("end") for line in lines if "end" in line] == [3, 3]
    assert [line.count("footer") for line in lines if "footer" in line] == [30]


@pytest.mark.parametrize("width", [80, 120])
def test_print_table_on_a_terminal_wraps(capsys, terminal, width):
    terminal(width)
    rows = [("a state with a long name " * 4, "an action with a long name " * 4, "1.5")]
    report.print_table("t", ("state", "action", "value"), rows, footer="many words " * 20)
    lines = printed(capsys)
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    assert text.count("many words") == 20
    assert (text.count("state"), text.count("action"), text.count("…")) == (5, 5, 0)


@pytest.mark.slow
@pytest.mark.parametrize("width", [80, 120])
def test_show_solvers_prints_a_row_a_solver(capsys, terminal, tmp_path, runs, width):
    terminal(width)
    report.show_solvers(tmp_path / "leave", "Leave or stay", mdp(), runs)
    lines = printed(capsys)
    assert lines[1] == "Leave or stay: what each solver found"
    assert lines[-1] == report.RESEARCH_ONLY
    assert max(map(len, lines)) <= width
    rows = [line for line in lines if "yes" in line]
    for row, (name, run) in zip(rows, runs.items(), strict=True):
        assert row.startswith(name.split("_")[0])
        # Staying is worth 1 / (1 - 0.9), and no episode begins in the terminal state.
        value, iterations, residual, converged, *_ = row.split()[-6:]
        assert (value, iterations, converged) == ("10.0000", f"{run.solution.iterations}", "yes")
        assert float(residual) <= 1e-9
    assert not any("…" in line for line in lines)
    assert "All 4 solvers choose the same action in every state" in " ".join(lines)
    assert imread(tmp_path / "leave_convergence.png").ndim == 3


def test_show_solvers_says_what_did_not_converge(capsys, tmp_path, runs):
    run = runs["value_iteration"]
    failed = run.replace(solution=run.solution.replace(converged=np.bool_(False)))
    report.show_solvers(tmp_path / "x", "X", mdp(), {**runs, "value_iteration": failed})
    (row,) = [line for line in printed(capsys) if line.startswith("value iteration")]
    assert " NO " in row


def test_agreement_says_by_how_much_solvers_differ(runs):
    run = runs["policy_iteration"]
    one = run.replace(solution=solution([[7.5, 10.0], [2.0, 2.0]], [1, 0]))
    far = run.replace(solution=solution([[7.5, 10.5], [2.0, 2.0]], [1, 0]))
    assert report.agreement({"a": one, "b": far}) == (
        "All 2 solvers choose the same action in every state; values differ by at most 5.0e-01."
    )
    other = run.replace(solution=solution([[7.5, 10.0], [2.0, 2.0]], [0, 1]))
    assert report.agreement({"a": one, "b": other}) == (
        "The solvers choose DIFFERENT actions in 2 of 2 states, which differ by at most 2.5e+00 in "
        "value; values differ by at most 2.5e+00."
    )


def test_show_plan_prints_the_best_action_and_its_margin(capsys, tmp_path):
    names = ("ill", "well"), ("operate", "wait")
    found = solution([[7.5, 10.25], [0.0, -1.0]], [1, 0])
    report.show_plan(tmp_path / "x", "Surgery", mdp(), found, *names)
    lines = printed(capsys)
    assert lines[1] == "Surgery: what to do"
    assert [line.split() for line in lines if line.startswith(("ill", "well"))] == [
        ["ill", "wait", "10.250", "2.750"],
        ["well", "operate", "0.000", "1.000"],
    ]
    assert lines[-1] == report.RESEARCH_ONLY
    assert imread(tmp_path / "x_policy.png").ndim == 3


def test_show_plan_measures_the_margin_among_allowed_actions(capsys, tmp_path):
    law = np.full((2, 3, 2), 0.5)
    mask = np.array([[True, False, True], [False, False, True]])
    masked = make_mdp(law, 0.0, 0.9, action_mask=mask)
    found = solution([[1.0, 9.0, 5.0], [7.0, 8.0, 6.0]], [2, 2])
    names = ("ill", "worse"), ("wait", "forbidden", "operate")
    report.show_plan(tmp_path / "x", "Surgery", masked, found, *names)
    rows = [line.split() for line in printed(capsys) if line.startswith(("ill", "worse"))]
    assert rows == [["ill", "operate", "5.000", "4.000"], ["worse", "operate", "6.000"]]


def test_show_plan_of_many_states_is_a_picture_only(capsys, tmp_path):
    size = 60
    law = np.ones((size, 2, size)) / size
    large = make_mdp(law, 0.0, 0.9)
    found = solution([[0.0, 0.0]] * size, [0] * size)
    names = [f"state {index}" for index in range(size)], ("wait", "operate")
    report.show_plan(tmp_path / "x", "Large", large, found, *names, value_name="survival")
    assert printed(capsys) == []
    assert imread(tmp_path / "x_policy.png").ndim == 3


def test_show_learning_prints_references_then_mean_deviation_and_worst(capsys, tmp_path):
    learned = {"PPO, greedy": np.array([0.8, 0.9, 0.85]), "PPO": np.array([0.7, 0.7, 0.7])}
    curve = np.array([100, 200]), np.array([[0.7, 0.8], [0.7, 0.9], [0.7, 0.85]])
    report.show_learning(
        tmp_path / "curve.png",
        "PPO on a problem",
        {"random": 0.25, "optimum": 0.875},
        learned,
        curve,
        value_name="survival",
    )
    lines = printed(capsys)
    assert (lines[1], lines[-1]) == ("PPO on a problem", report.RESEARCH_ONLY)
    rows = [re.split(r" {2,}", line) for line in lines[5:-2]]
    deviation = np.sqrt(0.05**2 * 2 / 3)
    assert rows == [
        ["random", "0.2500"],
        ["optimum", "0.8750"],
        ["PPO, greedy", "0.8500", f"{deviation:.4f}", "0.8000"],
        ["PPO", "0.7000", "0.0000", "0.7000"],
    ]
    assert imread(tmp_path / "curve.png").ndim == 3


def test_show_change_prints_intervals_where_there_are_any(capsys):
    before = {"perplexity": (1000.0, 1000.0, 1000.0), "gold_score": (0.25, 0.125, 0.5)}
    after = {"gold_score": (0.9375, 0.875, 1.0), "perplexity": (1.5, 1.5, 1.5)}
    report.show_change("Five cases", before, after, footer=report.RESEARCH_ONLY)
    lines = printed(capsys)
    assert (lines[1], lines[-1]) == ("Five cases", report.RESEARCH_ONLY)
    assert [re.split(r" {2,}", line) for line in lines[4:-2]] == [
        ["perplexity", "1000.000", "1.500"],
        ["gold score", "0.250 (0.125 to 0.500)", "0.938 (0.875 to 1.000)"],
    ]


def test_show_samples_wraps_each_text_under_its_label(capsys, terminal):
    terminal(80)
    texts = ["Patient, 52, with [bold]chest pain[/bold]. " * 3, "rest :smile:\n[0.50] no drug"]
    samples = [{"prompt": first, "before": last} for first, last in (texts, texts[::-1])]
    report.show_samples("Two cases", samples)
    lines = printed(capsys)
    assert lines[:3] == ["", "Two cases", ""]
    assert max(map(len, lines)) <= 80
    labels = [line for line in lines if line and not line.startswith(" ")]
    assert labels == ["Two cases", "prompt", "before", "prompt", "before"]
    # Nothing of a text is lost, read as markup, or run into the next line.
    words = " ".join(line for line in lines if line.startswith("  ")).split()
    assert words == " ".join((*texts, *texts[::-1])).split()
    assert {"  rest :smile:", "  [0.50] no drug"} <= set(lines)


def test_show_methods_prints_a_line_a_method(capsys):
    measures = {
        "sft": {"gold_score": (0.5, 0.4, 0.6), "kl": (0.0, 0.0, 0.0)},
        "ppo": {"gold_score": (0.75, 0.7, 0.8), "kl": (1.5, 1.25, 2.0)},
    }
    report.show_methods("Five cases", measures, report.RESEARCH_ONLY)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == ["Five", "cases"]
    assert lines[1] == ["method", "gold", "score", "kl"]
    assert lines[3] == "sft 0.500 (0.400 to 0.600) 0.000".split()
    assert lines[4] == "ppo 0.750 (0.700 to 0.800) 1.500 (1.250 to 2.000)".split()


def test_gap_to_second_best_counts_allowed_actions_alone():
    q = np.array([[3.0, 1.0, 2.5], [3.0, 1.0, 2.5], [1.0, 5.0, 4.0]])
    mask = np.array([[1, 1, 1], [1, 1, 0], [0, 1, 0]], bool)
    np.testing.assert_array_equal(report.gap_to_second_best(q, mask), [0.5, 2, np.inf])
    np.testing.assert_array_equal(report.gap_to_second_best(q[:2, :1], mask[:2, :1]), [np.inf] * 2)
