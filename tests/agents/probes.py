"""Environments, each the smallest that one kind of fault in a learner fails.

An agent that learns them all in seconds has its targets, its data and its policy the right way
round; the first one that fails says where to look. Every optimal value is exact.

- `PROBES`, five with two actions, `TIMEOUT` and `CHANCE_TIMEOUT`;
- `CONTINUOUS_PROBES`, with a dose, and `CONTINUOUS_TIMEOUT`;
- `HYBRID_PROBES`, with a choice and an amount of it, and `HYBRID_TIMEOUT`;
- `memory`, which only a policy with a memory solves.

Source: the idea is that of A. Jones (2021), "Debugging RL, without the agonizing pain".
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxrl_llm.types import (
    Array,
    Box,
    Discrete,
    Environment,
    Hybrid,
    HybridAction,
    Key,
    Space,
    TimeStep,
)

NUM_ACTIONS = 2


@dataclass(frozen=True, kw_only=True)
class Probe:
    """An environment and its exact answer.

    Attributes:
      environment: observations `[1]` float32, two actions, no parameters.
      discount: at which the answer holds.
      observation: `[N, 1]`, all that an agent acts on; each is met as often as the others.
      q: `[N, 2]`, the optimal action values there: a policy pi `[N, 2]` is right where the sum of
        pi q over actions is `value`.
    """

    environment: Environment
    discount: float
    observation: NDArray[np.float32]
    q: NDArray[np.float64]

    @property
    def value(self) -> NDArray[np.float64]:
        """V*, `[N]`."""
        return self.q.max(axis=1)


@dataclass(frozen=True, kw_only=True)
class ActionProbe:
    """An environment with other actions than two choices, and its exact answer.

    Attributes:
      environment: observations `[1]` float32, no parameters.
      discount: at which the answer holds.
      observation: `[N, 1]`, all that an agent which acts rightly acts on.
      value: `[N]`, V* there.
      q: `(observation [1], action) -> []`, Q*. An action is right where it earns V*.
    """

    environment: Environment
    discount: float
    observation: NDArray[np.float32]
    value: NDArray[np.float64]
    q: Callable[[Array, Any], Array]

    def earned(self, action: Any) -> NDArray[np.float32]:
        """Q* `[N]` of one action an observation, leaves `[N, ...]`."""
        return np.asarray(jax.vmap(self.q)(jnp.asarray(self.observation), action))


def _environment(
    name: str,
    first: tuple[float, ...],
    step: Callable[[Array, Any], tuple[Array, Array, Array, Array]],
    action_space: Space = Discrete(num=NUM_ACTIONS),  # noqa: B008
) -> Environment:
    """Starts from one of `first`; the state is the observation.

    `step` maps observation `[1]` and action to the next observation, reward, terminated, truncated.
    """

    def reset(key: Key, params: None) -> tuple[Array, Array]:
        observation = jnp.array(first)[jax.random.randint(key, (1,), 0, len(first))]
        return observation, observation

    def whole_step(key: Key, state: Array, action: Any, params: None) -> tuple[Array, TimeStep]:
        observation, reward, terminated, truncated = step(state, action)
        return observation, TimeStep(
            observation=observation,
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            info={},
        )

    return Environment(
        name=name,
        reset=reset,
        step=whole_step,
        default_params=None,
        observation_space=Box(shape=(1,), low=-1.0, high=4.0),
        action_space=action_space,
    )


def _one_step(
    name: str,
    observation: tuple[float, ...],
    reward: Callable[[Array, Any], Array],
    *,
    terminated: bool = True,
    action_space: Space = Discrete(num=NUM_ACTIONS),  # noqa: B008
) -> Environment:
    """Every episode is one decision; it ends by a time limit where it is not `terminated`."""

    def step(state: Array, action: Any) -> tuple[Array, Array, Array, Array]:
        return state, reward(state[0], action), jnp.bool_(terminated), jnp.bool_(not terminated)

    return _environment(name, observation, step, action_space)


def _two_steps(state: Array, action: Array) -> tuple[Array, Array, Array, Array]:
    # The reward of the second step equals its observation, 1; the terminal observation is 2.
    return state + 1, state[0], state[0] == 1, jnp.bool_(False)


def _probe(environment: Environment, observation: list[float], q: list[list[float]]) -> Probe:
    return Probe(
        environment=environment,
        discount=0.9,
        observation=np.array(observation, np.float32)[:, None],
        q=np.array(q),
    )


# Is the value of a death 0, and does the value function learn a constant at all?
CONSTANT = _probe(
    _one_step("constant reward", (0.0,), lambda observation, action: jnp.float32(1)),
    [0],
    [[1, 1]],
)
# Does it read the observation that belongs to the reward?
OBSERVATION = _probe(
    _one_step("reward of the observation", (-1.0, 1.0), lambda observation, action: observation),
    [-1, 1],
    [[-1, -1], [1, 1]],
)
# Does it discount, and bootstrap from the next observation rather than this one?
DISCOUNTING = _probe(_environment("two steps", (0.0,), _two_steps), [0, 1], [[0.9, 0.9], [1, 1]])
# Does the policy follow the advantage, with the right sign?
ACTION = _probe(
    _one_step("reward of the action", (0.0,), lambda observation, action: 2.0 * action - 1),
    [0],
    [[-1, 1]],
)
# Does the policy depend on the observation?
ACTION_AND_OBSERVATION = _probe(
    _one_step(
        "reward of action and observation",
        (-1.0, 1.0),
        lambda observation, action: observation * (2.0 * action - 1),
    ),
    [-1, 1],
    [[1, -1], [-1, 1]],
)
PROBES = (CONSTANT, OBSERVATION, DISCOUNTING, ACTION, ACTION_AND_OBSERVATION)

# CONSTANT, but every episode is cut by a time limit: a learner that takes this for a death says 1.
TIMEOUT = _probe(
    _one_step(
        "constant reward, cut", (0.0,), lambda observation, action: jnp.float32(1), terminated=False
    ),
    [0],
    [[10, 10]],
)


def _cut_by_chance(key: Key, state: Array, action: Any, params: None) -> tuple[Array, TimeStep]:
    return state, TimeStep(
        observation=state,
        reward=jnp.float32(1),
        terminated=jnp.bool_(False),
        truncated=jax.random.bernoulli(key),
        info={},
    )


# The same, cut at every step with probability 1/2: for a learner with a memory, to which the second
# step of an episode is another state than the first, and which must have been there to know it.
CHANCE_TIMEOUT = dataclasses.replace(
    TIMEOUT,
    environment=dataclasses.replace(
        TIMEOUT.environment, name="constant reward, cut by chance", step=_cut_by_chance
    ),
)


# Continuous actions: a dose in a range that is neither centred at 0 nor of width 2.
DOSE = Box(shape=(1,), low=-1.0, high=2.0)
DOSES = Box(shape=(2,), low=(-1.0, 0.0), high=(2.0, 4.0))


def _action_probe(
    name: str,
    action_space: Space,
    reward: Callable[[Array, Any], Array],
    optimum: dict[float, float],
    *,
    terminated: bool = True,
) -> ActionProbe:
    """One decision an episode; `optimum` is the best reward by observation."""
    first = tuple(optimum)
    value = np.array(list(optimum.values()))
    discount = 0.9
    future = 0.0 if terminated else discount * value.mean() / (1 - discount)
    return ActionProbe(
        environment=_one_step(
            name, first, reward, terminated=terminated, action_space=action_space
        ),
        discount=discount,
        observation=np.array(first, np.float32)[:, None],
        value=value + future,
        q=lambda observation, action: reward(observation[0], action) + future,
    )


def _constant(observation: Array, action: Any) -> Array:
    return jnp.float32(1)


# Is the value of a death 0?
CONTINUOUS_CONSTANT = _action_probe("constant reward, dose", DOSE, _constant, {0: 1})
# Is the dose the one that the density was computed for, in the environment's own scale?
CONTINUOUS_TARGET = _action_probe(
    "distance from the best dose",
    DOSE,
    lambda observation, action: -jnp.square(action[0] - 1),
    {0: 0},
)
# Does the dose depend on the observation, and has each of two doses its own scale?
CONTINUOUS_OBSERVATION = _action_probe(
    "distance from the best two doses",
    DOSES,
    lambda observation, action: (
        -jnp.square(action[0] - 0.5 - observation / 2)
        - jnp.square((action[1] - 2 - observation) / 2)
    ),
    {-1: 0, 1: 0},
)


def _two_doses(state: Array, action: Array) -> tuple[Array, Array, Array, Array]:
    # The first dose is the next observation less 2, which alone is rewarded, one step later.
    is_second = state[0] > 0.5
    reward = jnp.where(is_second, 1 - jnp.square(state[0] - 2.5), 0)
    return action + 2, reward, is_second, jnp.bool_(False)


# Is a dose paid for what it leads to?
CONTINUOUS_DELAY = ActionProbe(
    environment=_environment("dose rewarded a step later", (0.0,), _two_doses, DOSE),
    discount=0.9,
    observation=np.array([[0.0]], np.float32),
    value=np.array([0.9]),
    q=lambda observation, action: 0.9 * (1 - jnp.square(action[0] - 0.5)),
)
CONTINUOUS_PROBES = (
    CONTINUOUS_CONSTANT,
    CONTINUOUS_TARGET,
    CONTINUOUS_OBSERVATION,
    CONTINUOUS_DELAY,
)
CONTINUOUS_TIMEOUT = _action_probe(
    "constant reward, dose, cut", DOSE, _constant, {0: 1}, terminated=False
)

# Hybrid actions: nothing, or so much of one of two treatments.
TREATMENTS = Hybrid(num=3, amount=DOSE, has_amount=(False, True, True))


def _treatment_reward(observation: Array, action: HybridAction) -> Array:
    dose = action.amount[0]
    by_choice = jnp.stack(
        [
            jnp.float32(0.5),
            observation - jnp.square(dose - 1.5),
            -observation - jnp.square(dose + 0.5),
        ]
    )
    return by_choice[action.choice]


HYBRID_CONSTANT = _action_probe("constant reward, hybrid", TREATMENTS, _constant, {0: 1})
# Is each choice learned with its own amount, and where nothing is best, nothing?
HYBRID_OBSERVATION = _action_probe(
    "the best treatment at its best dose", TREATMENTS, _treatment_reward, {-1: 1, 0: 0.5, 1: 1}
)
HYBRID_PROBES = (HYBRID_CONSTANT, HYBRID_OBSERVATION)
HYBRID_TIMEOUT = _action_probe(
    "constant reward, hybrid, cut", TREATMENTS, _constant, {0: 1}, terminated=False
)


def memory(length: int) -> Environment:
    """The first observation shows a cue, -1 or 1; the last of `length` actions must repeat it.

    Observations are `[2]`: the cue, 0 from the second step on, and 1 at the last step, else 0. The
    last action earns 1 if it agrees with the cue and -1 if not. So an episode returns 1 with a
    memory, and 0 without one, whatever the policy.
    """

    def observe(cue: Array, time: Array) -> Array:
        return jnp.stack([jnp.where(time == 0, cue, 0), jnp.float32(time == length - 1)])

    def reset(key: Key, params: None) -> tuple[tuple[Array, Array], Array]:
        cue = 2 * jax.random.bernoulli(key).astype(jnp.float32) - 1
        return (cue, jnp.int32(0)), observe(cue, jnp.int32(0))

    def step(
        key: Key, state: tuple[Array, Array], action: Array, params: None
    ) -> tuple[tuple[Array, Array], TimeStep]:
        cue, time = state
        is_last = time == length - 1
        time_step = TimeStep(
            observation=observe(cue, time + 1),
            reward=jnp.where(is_last, cue * (2.0 * action - 1), 0),
            terminated=is_last,
            truncated=jnp.bool_(False),
            info={},
        )
        return (cue, time + 1), time_step

    return dataclasses.replace(
        _environment("memory of a cue", (0.0,), _two_steps),
        reset=reset,
        step=step,
        observation_space=Box(shape=(2,), low=-1.0, high=1.0),
    )
