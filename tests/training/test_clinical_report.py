"""The table a clinician reads: every number by hand, and the log beside it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data import trajectories
from jaxrl_llm.envs import treatment
from jaxrl_llm.kernels import bellman
from jaxrl_llm.training import clinical_report, report
from jaxrl_llm.types import MDP, Solution
from tests import oracles

LOG = trajectories.from_arrays(
    patient=[0, 0, 0, 1, 1],
    time=[0, 1, 2, 0, 1],
    state=[0, 0, 1, 0, 3],
    action=[2, 1, 2, 2, 0],
    reward=np.zeros(5),
)


@pytest.fixture(scope="module")
def solved() -> tuple[MDP, Solution]:
    mdp = treatment.mdp()
    return mdp, jax.jit(bellman.policy_iteration)(mdp)


def show(solved: tuple[MDP, Solution], **options):
    mdp, solution = solved
    clinical_report.show_recommendations(
        "Treatment", mdp, solution, treatment.state_names, treatment.action_names, **options
    )


def test_recommendations_are_the_oracles_beside_the_log(solved):
    mdp, solution = solved
    rows = clinical_report.recommendations(mdp, solution, LOG)
    np.testing.assert_array_equal([row.action for row in rows], oracles.TREATMENT_POLICY)
    np.testing.assert_allclose([row.value for row in rows], oracles.TREATMENT_VALUE, rtol=1e-4)
    ordered = np.sort(np.asarray(solution.q), axis=1)
    np.testing.assert_allclose(
        np.array([row.gap for row in rows], float), ordered[:, -1] - ordered[:, -2]
    )
    assert [row.visits for row in rows] == [3, 1, 0, 1, 0]
    assert [row.usual for row in rows] == [2, 2, None, 0, None]
    # Surgery twice in three in Critical; never what was recommended elsewhere.
    assert rows[0].agreement == pytest.approx(2 / 3)
    assert [row.agreement for row in rows[1:]] == [0, None, 0, None]


def test_show_recommendations_prints_the_table_and_the_caution(solved, capsys):
    show(solved, trajectories=LOG)
    output = capsys.readouterr().out
    (critical,) = [line.split() for line in output.splitlines() if line.startswith("Critical")]
    assert critical[:2] + critical[4:] == ["Critical", "Surgery", "Surgery", "67%", "3"]
    np.testing.assert_allclose(float(critical[2]), oracles.TREATMENT_VALUE[0], atol=2e-3)
    assert "Clinicians did what is recommended in 40% of all decisions." in output
    assert report.RESEARCH_ONLY in output


def test_show_recommendations_shows_the_states_met_most_often(solved, capsys):
    show(solved, trajectories=LOG, max_rows=1)
    output = capsys.readouterr().out
    assert "Critical" in output
    assert "Serious" not in output
    assert "The 1 states most often met, of 5." in output
    show(solved, max_rows=2)
    output = capsys.readouterr().out
    assert "clinicians" not in output
    assert "The 2 states first, of 5." in output


@pytest.mark.slow
def test_recommendations_leave_out_terminal_states_and_gaps_of_one_action():
    mdp = oracles.terminal_mdp(0, 4, 2)
    mask = np.array([[True, False], [True, True], [True, True], [True, True]])
    mdp = replace(mdp, action_mask=jnp.asarray(mask))
    rows = clinical_report.recommendations(mdp, bellman.policy_iteration(mdp))
    assert [row.state for row in rows] == [0, 1, 2]
    assert [row.gap is None for row in rows] == [True, False, False]
