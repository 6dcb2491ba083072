"""The sepsis simulator of Oberst and Sontag: four vital signs, three treatments, hidden diabetes.

SYNTHETIC; research only, not for clinical use. A state is diabetes (no, yes), heart rate and
systolic blood pressure (low, normal, high), oxygen (low, normal), glucose (very low, low, normal,
high, very high) and which of antibiotics, vasopressors and ventilation are on: 2·3·3·2·5·2³ = 1440.
An action turns each treatment on or off for the next step: 8. Three abnormal vital signs are death,
-1; none, with every treatment off, is discharge, +1; both end the episode.

Within a step the four signs move independently of each other, so that a law is a product of four
small tables. What a treatment does depends on its phase: off, just withdrawn, or given.

- antibiotics given: high heart rate and blood pressure become normal with probability .5;
  withdrawn: normal ones become high with .1.
- ventilation given: low oxygen becomes normal with .7; withdrawn: normal becomes low with .1.
- vasopressors given: blood pressure rises by one with .7; of a diabetic, low becomes normal with .5
  and high with .4, normal becomes high with .9, and glucose rises by one with .5. Withdrawn: blood
  pressure falls by one with .1, of a diabetic with .05.
- a sign that no treatment touches fluctuates: up or down by one, each with .1, a diabetic's glucose
  with .3. Only giving vasopressors keeps glucose from fluctuating.

In the published program an upward fluctuation of glucose without diabetes ends no higher than low,
so that it lowers every level above low. `glucose="legacy"` keeps that, to compare with published
numbers; `"corrected"` lets glucose rise by one, as the program's own comments say.

Source: Oberst & Sontag (2019), "Counterfactual off-policy evaluation with Gumbel-max structural
  causal models", arXiv:1905.05824, and its program, github.com/clinicalml/gumbel-max-scm (MIT).
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxrl_llm import checks
from jaxrl_llm.envs import tabular
from jaxrl_llm.types import Environment, SuccessorMDP

Glucose = Literal["legacy", "corrected"]
Table = NDArray[np.float64]

_LEVELS = {
    "diabetes": ("no diabetes", "diabetes"),
    "heart rate": ("low", "normal", "high"),
    "blood pressure": ("low", "normal", "high"),
    "oxygen": ("low", "normal"),
    "glucose": ("very low", "low", "normal", "high", "very high"),
    "antibiotics": ("off", "on"),
    "vasopressors": ("off", "on"),
    "ventilation": ("off", "on"),
}
_SHAPE = tuple(len(levels) for levels in _LEVELS.values())
_NORMAL = {"heart rate": 1, "blood pressure": 1, "oxygen": 1, "glucose": 2}
_OFF, _WITHDRAWN, _GIVEN = range(3)  # phases of a treatment
# A law depends on diabetes, the four signs and the phases of the three treatments.
_LAWS = (*_SHAPE[:5], 3, 3, 3)

# Bits of an action, the most significant first.
_TREATMENTS = ("antibiotics", "ventilation", "vasopressors")
action_names = tuple(
    " + ".join(name for name, on in zip(_TREATMENTS, given, strict=True) if on) or "no treatment"
    for given in itertools.product((False, True), repeat=3)
)
state_names = tuple(
    "; ".join(
        level if name == "diabetes" else f"{name} {level}"
        for name, level in zip(_LEVELS, levels, strict=True)
    )
    for levels in itertools.product(*_LEVELS.values())
)


def mdp(
    *, glucose: Glucose = "legacy", diabetic: float = 0.2, discount: float = 0.99
) -> SuccessorMDP:
    """The problem, 1440 states × 8 actions; the agent sees diabetes too.

    The first state has all treatments off: vital signs as in `_initial`, drawn again where they
    would end the episode at once.

    Args:
      glucose: how it fluctuates without diabetes, see the module.
      diabetic: the probability of diabetes before that, in [0, 1].
      discount: in [0, 1]; with 1 a value is P(discharge) - P(death).
    """
    checks.one_of("glucose", glucose, ("legacy", "corrected"))
    checks.between("diabetic", diabetic, 0, 1)
    levels = np.indices(_SHAPE).reshape(len(_SHAPE), -1)
    outcome = _outcome(levels)
    terminal = outcome != 0
    antibiotics, ventilation, vasopressors = np.indices((2, 2, 2)).reshape(3, -1)
    given = np.stack([antibiotics, vasopressors, ventilation])
    # What was on is withdrawn, unless it is given again.
    phases = np.where(given[:, None, :], _GIVEN, levels[5:, :, None])
    row = np.ravel_multi_index((*levels[:5, :, None], *phases), _LAWS)
    successor, probability = _laws(glucose)
    initial = np.where(terminal, 0, _initial(diabetic))
    return checks.mdp(
        SuccessorMDP(
            successor=jnp.asarray(successor, jnp.int32),
            probability=jnp.asarray(probability, float),
            reward=jnp.asarray(outcome[successor], float),
            row=jnp.asarray(row, jnp.int32),
            discount=jnp.asarray(discount, float),
            initial=jnp.asarray(initial / initial.sum(), float),
            terminal=jnp.asarray(terminal),
            action_mask=jnp.ones(row.shape, bool),
        )
    )


def make(
    *, glucose: Glucose = "legacy", diabetic: float = 0.2, max_steps: int | None = 20
) -> Environment:
    """The problem as an environment, truncated after `max_steps` steps; never when None."""
    problem = mdp(glucose=glucose, diabetic=diabetic)
    return tabular.make(problem, name="sepsis_oberst", max_steps=max_steps)


def _outcome(levels: NDArray[np.int64]) -> Table:
    """-1 in death, 1 in discharge, 0 elsewhere, of states `[8, S]`."""
    signs = [levels[list(_LEVELS).index(name)] != normal for name, normal in _NORMAL.items()]
    abnormal = np.sum(signs, axis=0)
    treated = levels[5:].any(axis=0)
    return np.where(abnormal >= 3, -1.0, np.where((abnormal == 0) & ~treated, 1.0, 0.0))


def _initial(diabetic: float) -> Table:
    """Independent vital signs, no treatment, `[S]`."""
    glucose = [[0.05, 0.15, 0.6, 0.15, 0.05], [0.01, 0.05, 0.15, 0.6, 0.19]]
    law = np.zeros(_SHAPE)
    law[..., 0, 0, 0] = np.einsum(
        "d,h,b,o,dg->dhbog",
        [1 - diabetic, diabetic],
        [0.25, 0.5, 0.25],
        [0.25, 0.5, 0.25],
        [0.2, 0.8],
        glucose,
    )
    return law.ravel()


def _laws(glucose: Glucose) -> tuple[NDArray[np.int64], Table]:
    """The distinct laws: successors and their probabilities, each `[4860, 54]`.

    Successors run over heart rate, blood pressure, oxygen and at most 3 levels of glucose.
    """
    diabetes, *signs, antibiotics, vasopressors, ventilation = np.indices(_LAWS).reshape(8, -1)
    heart_rate, blood_pressure, oxygen, sugar = signs
    level, level_probability = _successors(_glucose(glucose), 3)
    probability = np.einsum(
        "nh,nb,no,ng->nhbog",
        _heart_rate()[antibiotics, heart_rate],
        _blood_pressure()[diabetes, antibiotics, vasopressors, blood_pressure],
        _oxygen()[ventilation, oxygen],
        level_probability[diabetes, vasopressors, sugar],
    )

    def each_law(values: NDArray[Any]) -> NDArray[np.int64]:
        return values.astype(int).reshape(-1, 1, 1, 1, 1)

    successor = np.ravel_multi_index(
        (
            each_law(diabetes),
            *np.ix_(range(3), range(3), range(2), [0])[:3],
            level[diabetes, vasopressors, sugar][:, None, None, None],
            each_law(antibiotics == _GIVEN),
            each_law(vasopressors == _GIVEN),
            each_law(ventilation == _GIVEN),
        ),
        _SHAPE,
    )
    return successor.reshape(len(diabetes), -1), probability.reshape(len(diabetes), -1)


def _successors(table: Table, width: int) -> tuple[NDArray[np.int64], Table]:
    """The levels that have a probability, at most `width` of them, and it: `[..., width]`."""
    level = np.argsort(table <= 0, axis=-1, kind="stable")[..., :width]
    return level, np.take_along_axis(table, level, axis=-1)


def _heart_rate() -> Table:
    """`[phase of antibiotics, from, to]`."""
    return np.stack([_drift(3, up=0.1, down=0.1), *_antibiotics()])


def _antibiotics() -> tuple[Table, Table]:
    """Of heart rate or blood pressure, when withdrawn and when given, `[from, to]`."""
    return _moves(3, {(1, 2): 0.1}), _moves(3, {(2, 1): 0.5})


def _blood_pressure() -> Table:
    """`[diabetes, phase of antibiotics, of vasopressors, from, to]`; antibiotics act first."""
    antibiotics = np.stack([np.eye(3), *_antibiotics()])
    raised = _moves(3, {(0, 1): 0.5, (0, 2): 0.4, (1, 2): 0.9})
    vasopressors = np.array(
        [
            [np.eye(3), _drift(3, down=0.1), _drift(3, up=0.7)],
            [np.eye(3), _drift(3, down=0.05), raised],
        ]
    )
    table = np.einsum("pij,dqjk->dpqik", antibiotics, vasopressors)
    table[:, _OFF, _OFF] = _drift(3, up=0.1, down=0.1)
    return table


def _oxygen() -> Table:
    """`[phase of ventilation, from, to]`."""
    return np.stack([_drift(2, up=0.1, down=0.1), _drift(2, down=0.1), _drift(2, up=0.7)])


def _glucose(glucose: Glucose) -> Table:
    """`[diabetes, phase of vasopressors, from, to]`."""
    without, diabetic = _drift(5, up=0.1, down=0.1), _drift(5, up=0.3, down=0.3)
    if glucose == "legacy":
        capped = {(0, 1): 0.1, (2, 1): 0.1, (3, 1): 0.1, (4, 1): 0.1}
        without = _moves(5, capped) + _drift(5, down=0.1) - np.eye(5)
    return np.array([[without, without, np.eye(5)], [diabetic, diabetic, _drift(5, up=0.5)]])


def _drift(size: int, *, up: float = 0.0, down: float = 0.0) -> Table:
    """To the next level up or down, `[from, to]`; nowhere, past the last one."""
    pairs = range(size - 1)
    rising, falling = {(k, k + 1): up for k in pairs}, {(k + 1, k): down for k in pairs}
    return _moves(size, rising | falling)


def _moves(size: int, probability: dict[tuple[int, int], float]) -> Table:
    """From a level to another one with the probability given, else staying, `[from, to]`."""
    table = np.zeros((size, size))
    for place, chance in probability.items():
        table[place] = chance
    return table + np.diag(1 - table.sum(axis=1))
