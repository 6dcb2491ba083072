"""Patient monitoring, the simple variant: ten vital signs as deviations from normal, four actions.

SYNTHETIC; research only, not for clinical use. The state is x `[10]`, each vital sign's deviation
from normal in standard deviations. Untreated deviations grow by 10 % a step; a treatment shrinks
them, the more the costlier it is:

    x' = gain[action] · x + deviation · noise,   noise ~ N(0, I)
    reward = 1 - mean(x'²) / critical² - cost[action]

The patient is critical, and the episode terminated, when the root mean square of x' exceeds
`critical`. Treating all the time wastes the cost and never treating is fatal: it pays to act when
the patient is far from normal.

All directions of x are alike, so that m = mean(x²) is a sufficient state: given m,
10 m' / deviation² is noncentral χ² with 10 degrees of freedom and noncentrality
10 · gain² m / deviation². `latent_mdp` is that problem on a grid of m, so that the optimum is one
of a single dimension.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from scipy.stats import ncx2

from jaxrl_llm import checks, make_mdp
from jaxrl_llm.envs import interpolation
from jaxrl_llm.types import MDP, Array, Box, Discrete, Environment, Key, TimeStep

NUM_VITALS = 10
NUM_NODES = 161  # of the grid of `latent_mdp`


@struct.dataclass(kw_only=True)
class Params:
    """What `step` and `reset` read.

    Attributes:
      gain: `[4]`, what an action multiplies the deviations with.
      cost: `[4]`, of an action.
      deviation: `[]`, of the noise of each vital sign, in standard deviations of the vital sign.
      initial_deviation: `[]`, of each vital sign at the start, around normal.
      critical: `[]`, the root mean square beyond which the episode ends.
    """

    gain: Array
    cost: Array
    deviation: Array
    initial_deviation: Array
    critical: Array


def default_params() -> Params:
    """The numbers of the module, made up."""
    return Params(
        gain=jnp.array([1.1, 1.0, 0.85, 0.6]),
        cost=jnp.array([0.0, 0.1, 0.35, 0.9]),
        deviation=jnp.float32(0.2),
        initial_deviation=jnp.float32(1.5),
        critical=jnp.float32(3.0),
    )


def reset(key: Key, params: Params) -> tuple[Array, Array]:
    """A patient around normal; the observation is x / critical."""
    vitals = params.initial_deviation * jax.random.normal(key, (NUM_VITALS,))
    return vitals, vitals / params.critical


def step(key: Key, state: Array, action: Array, params: Params) -> tuple[Array, TimeStep]:
    """One step of the equations of the module.

    `TimeStep.info` holds `vitals` `[10]` (x'), `severity` `[]` (its root mean square) and `dose`
    `[]` (the action's level, 0 to 1).
    """
    noise = params.deviation * jax.random.normal(key, state.shape)
    vitals = params.gain[action] * state + noise
    mean_square = jnp.mean(vitals**2)
    return vitals, TimeStep(
        observation=vitals / params.critical,
        reward=1 - mean_square / params.critical**2 - params.cost[action],
        terminated=mean_square > params.critical**2,
        truncated=jnp.bool_(False),
        info={
            "vitals": vitals,
            "severity": jnp.sqrt(mean_square),
            "dose": action / (params.gain.shape[0] - 1),
        },
    )


def make() -> Environment:
    """The environment, without a time limit."""
    params = default_params()
    return Environment(
        name="monitoring (guide)",
        reset=reset,
        step=step,
        default_params=params,
        observation_space=Box(shape=(NUM_VITALS,), low=-np.inf, high=np.inf),
        action_space=Discrete(num=params.gain.shape[0]),
    )


def latent_mdp(*, num_nodes: int = NUM_NODES, discount: float = 1.0) -> MDP:
    """The same problem in m = mean(x²) alone, `num_nodes` + 1 states × 4 actions.

    The states are `latent_severity`; the last one is critical, terminal. The value is that of the
    problem but for interpolation, of second order in the distance of the nodes.

    Args:
      num_nodes: of the grid, at least 2.
      discount: in [0, 1].
    """
    checks.at_least("num_nodes", num_nodes, 2)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, float), default_params())
    nodes = _nodes(num_nodes)
    mean = params.gain**2 * nodes[:, None]
    law = _law(nodes, mean, params.deviation)
    critical = np.maximum(1 - law.sum(axis=-1, keepdims=True), 0)
    # E[m'] is linear in m, so that the reward needs no grid.
    expected = mean + params.deviation**2
    reward = 1 - expected / params.critical**2 - params.cost
    transition = np.concatenate([law, critical], axis=-1)
    transition = np.concatenate([transition, np.zeros_like(transition[:1])])
    initial = _law(nodes, np.zeros(()), params.initial_deviation)
    return make_mdp(
        transition / np.maximum(transition.sum(axis=-1, keepdims=True), 1e-30),
        np.concatenate([reward, np.zeros_like(reward[:1])]),
        discount,
        initial=np.append(initial / initial.sum(), 0),
        terminal=np.arange(num_nodes + 1) == num_nodes,
    )


def _nodes(num_nodes: int) -> interpolation.Table:
    """The grid of m, even in severity, `[num_nodes]`."""
    return float(default_params().critical) ** 2 * np.linspace(0, 1, num_nodes) ** 2


def latent_severity(num_nodes: int = NUM_NODES) -> Array:
    """Severity, the root mean square, in each state of `latent_mdp`: `[num_nodes + 1]`."""
    severity = np.sqrt(_nodes(num_nodes))
    return jnp.asarray(np.append(severity, severity[-1]), float)


def _law(
    nodes: interpolation.Table, mean: interpolation.Table, deviation: interpolation.Table
) -> interpolation.Table:
    """Of m' on the grid, where E[m'] = `mean` `[...]` + deviation²: `[..., K]`.

    The partial mean is E[X; X <= t] = k F(t; k + 2) + λ F(t; k + 4), with F the distribution
    function of a noncentral χ² of k degrees of freedom and noncentrality λ.
    """
    unit = deviation**2 / NUM_VITALS
    place, noncentrality = nodes / unit, mean[..., None] / unit
    mass, two_more, four_more = (
        ncx2.cdf(place, NUM_VITALS + extra, noncentrality) for extra in (0, 2, 4)
    )
    moment = NUM_VITALS * two_more + noncentrality * four_more
    return interpolation.grid_law(nodes, mass, unit * moment)
