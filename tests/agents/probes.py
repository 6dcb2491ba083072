"""Five environments, each the smallest that one kind of fault in a learner fails, and a sixth.

An agent that learns them all in seconds has its targets, its data and its policy the right way
round; the first one that fails says where to look. Every optimal value is exact.

Source: the idea is that of A. Jones (2021), "Debugging RL, without the agonizing pain".
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxrl_llm.types import Array, Box, Discrete, Environment, Key, TimeStep

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


def _environment(
    name: str,
    first: tuple[float, ...],
    step: Callable[[Array, Array], tuple[Array, Array, Array, Array]],
) -> Environment:
    """Starts from one of `first`; the state is the observation.

    `step` maps observation `[1]` and action to the next observation, reward, terminated, truncated.
    """

    def reset(key: Key, params: None) -> tuple[Array, Array]:
        observation = jnp.array(first)[jax.random.randint(key, (1,), 0, len(first))]
        return observation, observation

    def whole_step(key: Key, state: Array, action: Array, params: None) -> tuple[Array, TimeStep]:
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
        observation_space=Box(shape=(1,), low=-1.0, high=2.0),
        action_space=Discrete(num=NUM_ACTIONS),
    )


def _one_step(
    name: str,
    observation: tuple[float, ...],
    reward: Callable[[Array, Array], Array],
    *,
    terminated: bool = True,
) -> Environment:
    """Every episode is one decision; it ends by a time limit where it is not `terminated`."""

    def step(state: Array, action: Array) -> tuple[Array, Array, Array, Array]:
        return state, reward(state[0], action), jnp.bool_(terminated), jnp.bool_(not terminated)

    return _environment(name, observation, step)


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
