"""Patient monitoring, the clinical variant: a patient who deteriorates, and a drug that lags.

SYNTHETIC; research only, not for clinical use. Behind the ten vital signs are three latent
quantities: severity s (0 healthy, 1 lethal), the drug's concentration in the tissue c and organ
side effects h, both in [0, 1]. A step is an hour. With dose d in [0, 1] of the action,

    s' = s + drift - benefit · sensitivity · c + harm · susceptibility · h + noise · N(0, 1)
    c' = c + uptake · (d - c)                    the drug acts an hour late and lingers
    h' = h + recovery · (c³ - h)                 a moderate concentration is nearly safe

    reward = -discomfort · (s + h) - cost[action], and 1 on discharge (s' <= 0), -1 on death
    (s' >= 1), which both end the episode.

Each patient has an own sensitivity to the drug and susceptibility to its side effects, drawn at
reset from a few levels and kept in the state. The vital signs, in their units, are

    v = normal + loadings · (s, c, h) + spread · N(0, I),

but for mean pressure, which is (systolic + 2 diastolic) / 3. Under a constant action (s, c, h)
changes by geometric sums, and severity is normal around them until the episode ends. `latent_mdp`
is the whole problem on a grid.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from numpy.typing import NDArray

from jaxrl_llm import checks
from jaxrl_llm.envs import interpolation
from jaxrl_llm.types import Array, Box, Discrete, Environment, Key, SuccessorMDP, TimeStep

# Name: unit, normal range, effect of severity 1, of drug 1, of side effects 1, spread, limits.
VITALS = {
    "heart rate": ("1/min", 60, 100, 65, 5, 10, 3.0, 0, 250),
    "systolic pressure": ("mmHg", 100, 140, -60, 8, -10, 4.0, 0, 300),
    "diastolic pressure": ("mmHg", 60, 90, -40, 6, -8, 3.0, 0, 200),
    "mean pressure": ("mmHg", 70, 105, 0, 0, 0, 0.0, 0, 230),
    "respiratory rate": ("1/min", 12, 20, 22, 0, 3, 1.2, 0, 70),
    "temperature": ("°C", 36.1, 37.8, 2.6, -0.4, 0.2, 0.15, 25, 43),
    "oxygen saturation": ("%", 94, 100, -22, 2, -3, 0.8, 0, 100),
    "glucose": ("mg/dL", 70, 140, 90, 25, 60, 8.0, 10, 1000),
    "lactate": ("mmol/L", 0.5, 2.0, 8, 0, 2, 0.2, 0, 30),
    "coma scale": ("points", 14, 15, -10, 0, -2, 0.3, 3, 15),
}
vital_names = tuple(VITALS)
vital_units = tuple(row[0] for row in VITALS.values())
latent_names = (
    "severity",
    "drug concentration",
    "side effects",
    "drug sensitivity",
    "side-effect susceptibility",
)
observation_names = (*vital_names, *latent_names)

_TABLE = np.array([row[1:] for row in VITALS.values()], float)
normal_range = _TABLE[:, :2]
NUM_NODES = (33, 17, 21)  # of the grid of `latent_mdp`
_SYSTOLIC, _DIASTOLIC, _MEAN = 1, 2, 3
# What an observation of 1 is away from the middle of the normal range, in the sign's unit: five
# half-widths of that range, or the effect of a lethal severity where that is more.
observation_scale = np.maximum(2.5 * np.diff(normal_range)[:, 0], np.abs(_TABLE[:, 2]))


@struct.dataclass(kw_only=True)
class Params:
    """What `step` and `reset` read; per hour where it is a rate.

    Attributes:
      drift: `[]`, deterioration of severity.
      benefit: `[]`, of concentration 1 to severity.
      harm: `[]`, of side effects 1 to severity.
      noise: `[]`, standard deviation of severity's change.
      uptake: `[]`, share of the way to the dose that the concentration goes.
      recovery: `[]`, share of the way to c³ that the side effects go.
      dose: `[4]`, of each action, in [0, 1].
      cost: `[4]`, of each action.
      discomfort: `[]`, of severity or side effects 1.
      admission: `[2]`, the range of severity at reset, uniform.
      sensitivity: `[L]`, levels of patients, all as likely.
      susceptibility: `[L]`, levels of patients, all as likely.
      loadings: `[10, 3]`, of vital signs on (s, c, h), in the units of the vital signs.
      spread: `[10]`, standard deviation of a vital sign beside, in its unit.
    """

    drift: Array
    benefit: Array
    harm: Array
    noise: Array
    uptake: Array
    recovery: Array
    dose: Array
    cost: Array
    discomfort: Array
    admission: Array
    sensitivity: Array
    susceptibility: Array
    loadings: Array
    spread: Array


@struct.dataclass(kw_only=True)
class State:
    """A patient.

    Attributes:
      latent: `[3]`, severity, drug concentration, side effects.
      sensitivity: `[]`, of this patient to the drug.
      susceptibility: `[]`, of this patient to side effects.
    """

    latent: Array
    sensitivity: Array
    susceptibility: Array


def default_params() -> Params:
    """The numbers of the module, made up."""
    return Params(
        drift=jnp.float32(0.015),
        benefit=jnp.float32(0.07),
        harm=jnp.float32(0.08),
        noise=jnp.float32(0.03),
        uptake=jnp.float32(0.5),
        recovery=jnp.float32(0.1),
        dose=jnp.array([0.0, 1 / 3, 2 / 3, 1.0]),
        cost=jnp.array([0.0, 0.002, 0.005, 0.01]),
        discomfort=jnp.float32(0.01),
        admission=jnp.array([0.4, 0.7]),
        sensitivity=jnp.array([0.8, 1.2]),
        susceptibility=jnp.array([0.5, 1.5]),
        loadings=jnp.asarray(_TABLE[:, 2:5], jnp.float32),
        spread=jnp.asarray(_TABLE[:, 5], jnp.float32),
    )


def latent_step(state: State, action: Array, params: Params) -> Array:
    """Mean of the next (s, c, h), `[3]`; noise comes to severity alone."""
    severity, drug, side_effects = state.latent
    return jnp.stack(
        [
            severity
            + params.drift
            - params.benefit * state.sensitivity * drug
            + params.harm * state.susceptibility * side_effects,
            drug + params.uptake * (params.dose[action] - drug),
            side_effects + params.recovery * (drug**3 - side_effects),
        ]
    )


def vital_signs(latent: Array, noise: Array, params: Params) -> Array:
    """The vital signs in their units, `[10]`, from (s, c, h) and standard normal noise `[10]`."""
    middle = jnp.asarray(normal_range.mean(axis=1), jnp.float32)
    vitals = middle + params.loadings @ latent + params.spread * noise
    return vitals.at[_MEAN].set((vitals[_SYSTOLIC] + 2 * vitals[_DIASTOLIC]) / 3)


def make(*, is_hidden: bool = False) -> Environment:
    """The environment, without a time limit.

    `TimeStep.info` holds, of the new state, `vitals` `[10]` in their units and within their
    physiological limits, `severity`, `drug` and `side_effects` `[]`, the `dose` `[]` just given,
    and whether the patient has `died` or was `discharged`, `[]` bool.

    Args:
      is_hidden: observe the ten vital signs alone, rather than also the latent quantities and what
        kind of patient it is.
    """
    low, high = jnp.asarray(_TABLE[:, 6:8], jnp.float32).T
    middle, scale = (
        jnp.asarray(row, jnp.float32) for row in (normal_range.mean(axis=1), observation_scale)
    )

    def observe(vitals: Array, state: State) -> Array:
        scaled = (vitals - middle) / scale
        if is_hidden:
            return scaled
        kind = jnp.stack([state.sensitivity, state.susceptibility])
        return jnp.concatenate([scaled, state.latent, kind])

    def reset(key: Key, params: Params) -> tuple[State, Array]:
        severity_key, sensitivity_key, susceptibility_key, vital_key = jax.random.split(key, 4)
        severity = jax.random.uniform(
            severity_key, minval=params.admission[0], maxval=params.admission[1]
        )
        state = State(
            latent=jnp.stack([severity, jnp.zeros(()), jnp.zeros(())]),
            sensitivity=_draw(sensitivity_key, params.sensitivity),
            susceptibility=_draw(susceptibility_key, params.susceptibility),
        )
        noise = jax.random.normal(vital_key, (len(VITALS),))
        return state, observe(vital_signs(state.latent, noise, params), state)

    def step(key: Key, state: State, action: Array, params: Params) -> tuple[State, TimeStep]:
        noise = jax.random.normal(key, (1 + len(VITALS),))
        latent = latent_step(state, action, params).at[0].add(params.noise * noise[0])
        following = dataclasses.replace(state, latent=latent)
        vitals = vital_signs(latent, noise[1:], params)
        discharged, died = latent[0] <= 0, latent[0] >= 1
        burden = params.discomfort * (state.latent[0] + state.latent[2])
        return following, TimeStep(
            observation=observe(vitals, following),
            reward=discharged - jnp.float32(died) - burden - params.cost[action],
            terminated=discharged | died,
            truncated=jnp.bool_(False),
            info={
                "vitals": jnp.clip(vitals, min=low, max=high),
                "severity": latent[0],
                "drug": latent[1],
                "side_effects": latent[2],
                "dose": params.dose[action],
                "died": died,
                "discharged": discharged,
            },
        )

    params = default_params()
    return Environment(
        name="monitoring (clinical)",
        reset=reset,
        step=step,
        default_params=params,
        observation_space=Box(
            shape=(len(VITALS) + (0 if is_hidden else len(latent_names)),), low=-np.inf, high=np.inf
        ),
        action_space=Discrete(num=params.dose.shape[0]),
    )


def _draw(key: Key, levels: Array) -> Array:
    return levels[jax.random.randint(key, (), 0, levels.shape[0])]


def kinds() -> tuple[tuple[float, float], ...]:
    """Sensitivity and susceptibility of each kind of patient; all kinds are as likely."""
    params = default_params()
    return tuple(itertools.product(params.sensitivity.tolist(), params.susceptibility.tolist()))


def latent_severity(num_nodes: tuple[int, int, int] = NUM_NODES) -> Array:
    """Severity in each state of `latent_mdp`: `[S]`, 0 and 1 in the last two."""
    severity = np.repeat(np.linspace(0, 1, num_nodes[0]), num_nodes[1] * num_nodes[2])
    return jnp.asarray(np.append(severity, [0, 1]), float)


def latent_mdp(
    sensitivity: float,
    susceptibility: float,
    *,
    num_nodes: tuple[int, int, int] = NUM_NODES,
    discount: float = 1.0,
) -> SuccessorMDP:
    """The problem of one kind of patient on a grid of (s, c, h), × 4 actions.

    The last two states are discharge and death, terminal. Severity's normal law becomes weights of
    nodes, the other two move to a place between nodes: the value is that of the problem but for
    interpolation, of second order in the distance of the nodes.

    Args:
      sensitivity: of the patient to the drug.
      susceptibility: of the patient to side effects.
      num_nodes: of the grids of s, c and h, at least 2 each.
      discount: in [0, 1].
    """
    for place, number in enumerate(num_nodes):
        checks.at_least(f"num_nodes[{place}]", number, 2)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, float), default_params())
    axes = [
        np.linspace(0, 1, number) ** power
        for number, power in zip(num_nodes, (1, 1, 2), strict=True)
    ]
    latent = np.stack(np.meshgrid(*axes, indexing="ij")).reshape(3, -1)
    num_live, num_actions = latent.shape[1], len(params.dose)
    state = State(
        latent=jnp.asarray(latent),
        sensitivity=jnp.asarray(sensitivity),
        susceptibility=jnp.asarray(susceptibility),
    )
    mean = [latent_step(state, action, params) for action in jnp.arange(num_actions)]
    successor, probability = _transitions(
        axes, np.asarray(jnp.stack(mean, axis=-1), float), float(params.noise)
    )
    burden = params.discomfort * (latent[0] + latent[2])
    running = -(burden[:, None] + params.cost).reshape(-1, 1)
    outcome = np.where(successor == num_live, 1, np.where(successor == num_live + 1, -1, 0))
    row = np.arange(num_live * num_actions).reshape(num_live, num_actions)
    start = interpolation.uniform_law(axes[0], *params.admission)
    initial = np.zeros(num_nodes)
    initial[:, 0, 0] = start / start.sum()
    return checks.mdp(
        SuccessorMDP(
            successor=jnp.asarray(successor, jnp.int32),
            probability=jnp.asarray(probability, float),
            reward=jnp.asarray(running + outcome, float),
            row=jnp.asarray(np.append(row, np.zeros((2, num_actions), int), axis=0), jnp.int32),
            discount=jnp.asarray(discount, float),
            initial=jnp.asarray(np.append(initial.ravel(), [0, 0]), float),
            terminal=jnp.arange(num_live + 2) >= num_live,
            action_mask=jnp.ones((num_live + 2, num_actions), bool),
        )
    )


def _transitions(
    axes: list[interpolation.Table], mean: interpolation.Table, noise: float
) -> tuple[NDArray[np.int64], interpolation.Table]:
    """Successors and their probabilities, each `[S · A, K]`, of `mean` `[3, S, A]`.

    Severity's mean does not depend on the action, whose dose only reaches the tissue.
    """
    num_nodes = tuple(len(nodes) for nodes in axes)
    _, num_live, num_actions = mean.shape
    severity = interpolation.normal_law(axes[0], mean[0, :, 0], noise)
    # Only nodes within five standard deviations are listed.
    window = min(int(np.ceil(10 * noise * (num_nodes[0] - 1))) + 2, num_nodes[0])
    first = np.searchsorted(axes[0], mean[0, :, 0] - 5 * noise) - 1
    listed = np.clip(first, 0, num_nodes[0] - window)[:, None] + np.arange(window)
    severity = np.take_along_axis(severity, listed, axis=1)
    (drug, drug_law), (harm, harm_law) = (
        interpolation.point_law(axes[axis], mean[axis]) for axis in (1, 2)
    )
    inside = np.einsum("sk,sai,saj->sakij", severity, drug_law, harm_law)
    places = np.ravel_multi_index(
        (
            listed[:, None, :, None, None],
            drug[:, :, None, :, None],
            harm[:, :, None, None, :],
        ),
        num_nodes,
    )
    leaving = interpolation.normal_tails(axes[0], mean[0], noise)
    ends = np.broadcast_to([num_live, num_live + 1], leaving.shape)
    rows = (num_live, num_actions, -1)
    successor = np.concatenate([places.reshape(rows), ends], axis=-1)
    probability = np.concatenate([inside.reshape(rows), leaving], axis=-1)
    probability = probability / probability.sum(axis=-1, keepdims=True)
    return successor.reshape(num_live * num_actions, -1), probability.reshape(
        num_live * num_actions, -1
    )
