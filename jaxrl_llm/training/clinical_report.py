"""A plan as a clinician reads it: by the name of the state, what to do, and who does the same.

Research only, not for clinical use: every table says so.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxrl_llm import checks
from jaxrl_llm.data import behaviour_policy
from jaxrl_llm.training import report
from jaxrl_llm.types import MDP, Solution, SuccessorMDP, Trajectories

_GAP = "Gap: what the second-best action loses; a small one means that the two are about as good."
_NAME_CHARACTERS = 40


class Recommendation(NamedTuple):
    """What a plan does in one state.

    Attributes:
      state: index.
      action: index.
      value: of the action.
      gap: to the value of the second-best allowed action; None where only one is allowed.
      visits: logged decisions in the state; 0 without a log.
      agreement: the fraction of them that were this action; None where there are none.
      usual: the action that was logged most often there; None where there is none.
    """

    state: int
    action: int
    value: float
    gap: float | None
    visits: int
    agreement: float | None
    usual: int | None


def recommendations(
    mdp: MDP | SuccessorMDP, solution: Solution, trajectories: Trajectories | None = None
) -> list[Recommendation]:
    """What to do in each state that is not terminal, in the order of the states.

    Args:
      mdp: the problem.
      solution: of it.
      trajectories: the log of clinicians to compare with; observations are states.
    """
    host = jax.tree.map(np.asarray, solution)
    num_states, num_actions = host.q.shape
    gap = report.gap_to_second_best(host.q, np.asarray(mdp.action_mask))
    visits = rate = np.zeros(num_states)
    usual = np.zeros(num_states, int)
    if trajectories is not None:
        visits, rate, _ = behaviour_policy.agreement(np.eye(num_actions)[host.policy], trajectories)
        count = behaviour_policy.action_counts(
            trajectories, num_states=num_states, num_actions=num_actions
        )
        usual = np.asarray(count).argmax(axis=1)
    rows = []
    for state in np.flatnonzero(~np.asarray(mdp.terminal)).tolist():
        action, is_met = int(host.policy[state]), visits[state] > 0
        rows.append(
            Recommendation(
                state=state,
                action=action,
                value=float(host.q[state, action]),
                gap=float(gap[state]) if np.isfinite(gap[state]) else None,
                visits=int(visits[state]),
                agreement=float(rate[state]) if is_met else None,
                usual=int(usual[state]) if is_met else None,
            )
        )
    return rows


def show_recommendations(
    title: str,
    mdp: MDP | SuccessorMDP,
    solution: Solution,
    state_names: Sequence[str],
    action_names: Sequence[str],
    *,
    trajectories: Trajectories | None = None,
    value_name: str = "value",
    max_rows: int = 20,
) -> None:
    """Prints the table: the states that were met most often first, where there are too many.

    Args:
      title: of the problem.
      mdp: the problem.
      solution: of it.
      state_names: `S` names.
      action_names: `A` names.
      trajectories: the log of clinicians to compare with, if there is one.
      value_name: what a value is, with its unit.
      max_rows: of the table; all states where there are no more.
    """
    checks.at_least("max_rows", max_rows, 1)
    rows = recommendations(mdp, solution, trajectories)
    notes, shown = [_GAP], rows
    if len(rows) > max_rows:
        # A stable sort: without a log, the first states.
        shown = sorted(rows, key=lambda row: -row.visits)[:max_rows]
        which = "first" if trajectories is None else "most often met"
        notes.insert(0, f"The {max_rows} states {which}, of {len(rows)}.")
    columns = ["state", "recommended", value_name, "gap to\nsecond best"]
    if trajectories is not None:
        columns += ["clinicians\nusually", "clinicians\nagree", "decisions\nlogged"]
        num_agreed = sum(row.visits * (row.agreement or 0) for row in rows)
        share = num_agreed / max(sum(row.visits for row in rows), 1)
        notes.append(f"Clinicians did what is recommended in {share:.0%} of all decisions.")
    cells = [_cells(row, state_names, action_names)[: len(columns)] for row in shown]
    footer = "\n".join([*notes, report.RESEARCH_ONLY])
    report.print_table(f"{title}: what to do", columns, cells, footer=footer)


def _cells(
    row: Recommendation, state_names: Sequence[str], action_names: Sequence[str]
) -> tuple[str, ...]:
    def short(name: str) -> str:
        return textwrap.shorten(name, _NAME_CHARACTERS, placeholder="\N{HORIZONTAL ELLIPSIS}")

    return (
        short(state_names[row.state]),
        short(action_names[row.action]),
        f"{row.value:.3f}",
        "" if row.gap is None else f"{row.gap:.3f}",
        "" if row.usual is None else short(action_names[row.usual]),
        "" if row.agreement is None else f"{row.agreement:.0%}",
        str(row.visits),
    )
