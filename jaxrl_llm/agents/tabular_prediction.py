"""Learning the value of a fixed policy in a table: TD(lambda), n-step TD, Monte Carlo.

One learner follows one patient, episode after episode; many learners are a `vmap` of `init` and
`step`. Read it from the top: `learn_td_lambda`, `learn_true_online`, `learn_n_step`,
`learn_monte_carlo`, `make`. TD(0) is TD(lambda) with lambda 0. A truncated episode bootstraps from
the state it was cut in, under Monte Carlo too.

Source: Sutton & Barto (2018), sections 5.1, 6.1, 7.1, 12.2 and 12.5.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import struct

from jaxrl_llm import checks
from jaxrl_llm.envs import simulation
from jaxrl_llm.kernels import policy_gradient
from jaxrl_llm.kernels import temporal_difference as td
from jaxrl_llm.types import MDP, Algorithm, Array, Key, Mean, PyTree, SuccessorMDP

Method = Literal["td_lambda", "true_online", "n_step", "first_visit", "every_visit"]

_NUM_DRAWS = 5  # uniform numbers a step: action, two of the move, two of a new start


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a learner; the discount is the problem's."""

    method: Method = "td_lambda"
    """What a state is moved towards; the last two are Monte Carlo."""
    num_steps: int = 100
    """Steps of the patient per step of the algorithm."""
    max_episode_steps: int | None = None
    """An episode is truncated after this many steps; never when None."""
    step_size: float = 0.1
    """alpha, of a state's first update; Monte Carlo takes the mean of all returns instead."""
    step_size_decay: float = 0.0
    """alpha falls as N(s) to the power of minus this; 0 is a constant step size."""
    lambda_: float = 0.0
    """Decay of the traces, besides the discount; 0 is TD(0)."""
    trace: td.TraceKind = "accumulating"
    """What a trace of `td_lambda` does at a state visited again."""
    n: int = 4
    """Rewards in an n-step target."""
    initial_value: float = 0.0
    """Of every state that is not terminal."""

    def validate(self) -> None:
        """Raises ValueError, in one line that starts with the field's name."""
        checks.one_of("method", self.method, get_args(Method))
        checks.one_of("trace", self.trace, get_args(td.TraceKind))
        for name in ("num_steps", "n"):
            checks.at_least(name, getattr(self, name), 1)
        if self.max_episode_steps is not None:
            checks.at_least("max_episode_steps", self.max_episode_steps, 1)
        checks.positive("step_size", self.step_size)
        checks.between("step_size", self.step_size, 0, 1)
        checks.at_least("step_size_decay", self.step_size_decay, 0)
        checks.between("lambda_", self.lambda_, 0, 1)
        checks.finite("initial_value", self.initial_value)


class Returns(NamedTuple):
    """What Monte Carlo knows of the episode under way, `[S]`.

    Attributes:
      weight: what the next reward counts for in the returns of the state's visits.
      total: the returns so far, summed over its visits.
      num_visits: those that count.
    """

    weight: Array
    total: Array
    num_visits: Array


@struct.dataclass(kw_only=True)
class State:
    """A learner under way.

    Attributes:
      value: `[S]`, 0 in terminal states.
      visits: `[S]` float32, updates of each state.
      patients: `[1]`.
      memory: of the method: `td.Traces`, `td.TrueOnline` with its decay, `td.Window` or `Returns`.
    """

    value: Array
    visits: Array
    patients: simulation.Patients
    memory: PyTree


class Step(NamedTuple):
    """One step, `[]`, with the observation before any reset."""

    state: Array
    reward: Array
    discount: Array
    next_state: Array
    reset: Array


def learn_td_lambda(config: Config, learner: State, step: Step) -> State:
    """V <- V + alpha · delta · e."""
    learner, step_size = _count(config, learner, step.state)
    trace = learner.memory.visit(config.trace, step.state, step_size)
    value, next_value = learner.value[step.state], learner.value[step.next_state]
    error = td.td_error(step.reward, step.discount, value, next_value)
    memory = td.Traces(trace, _decay(config, step))
    return dataclasses.replace(
        learner, value=learner.value + step_size * error * trace, memory=memory
    )


def learn_true_online(config: Config, learner: State, step: Step) -> State:
    """The online lambda-return algorithm, by a dutch trace and a correction."""
    learner, step_size = _count(config, learner, step.state)
    trace, old_value, decay = learner.memory
    after = td.true_online_step(
        td.TrueOnline(learner.value, trace, old_value),
        step.state, step.next_state, step.reward, step.discount, decay, step_size,
    )  # fmt: skip
    old_value = jnp.where(step.reset, 0, after.old_value)
    memory = after.trace, old_value, _decay(config, step)
    return dataclasses.replace(learner, value=after.value, memory=memory)


def learn_n_step(config: Config, learner: State, step: Step) -> State:
    """Moves the state of n - 1 steps ago towards its n-step return, also past an episode's end."""
    value, one = learner.value[step.next_state], jnp.float32(1)
    seen = td.Window(
        step.state, step.reward, step.discount, value, one, value, step.reset, one
    )  # fmt: skip
    window = learner.memory.push(seen)
    state, known = window.pair[0], window.known[0]
    learner, step_size = _count(config, learner, state, known)
    change = known * step_size * (window.target() - learner.value[state])
    return dataclasses.replace(learner, value=learner.value.at[state].add(change), memory=window)


def learn_monte_carlo(config: Config, learner: State, step: Step) -> State:
    """At an episode's end, V is the mean of all returns that followed a visit (or a first one).

    The returns of every visit are summed as the rewards come: a reward counts for each earlier
    visit with the discount since then.
    """
    weight, total, count = learner.memory
    counts = jnp.float32(1)
    if config.method == "first_visit":
        counts = (count[step.state] == 0).astype(jnp.float32)
    weight, count = weight.at[step.state].add(counts), count.at[step.state].add(counts)
    # Bootstraps where the episode is cut, and not where it ends.
    cut = jnp.where(step.reset, step.discount * learner.value[step.next_state], 0)
    total += (step.reward + cut) * weight
    visits = learner.visits + count
    mean = learner.value + (total - count * learner.value) / jnp.maximum(visits, 1)
    ends = step.reset
    memory = Returns(*(jnp.where(ends, 0, leaf) for leaf in (step.discount * weight, total, count)))
    return dataclasses.replace(
        learner,
        value=jnp.where(ends, mean, learner.value),
        visits=jnp.where(ends, visits, learner.visits),
        memory=memory,
    )


_LEARN = {
    "td_lambda": learn_td_lambda,
    "true_online": learn_true_online,
    "n_step": learn_n_step,
    "first_visit": learn_monte_carlo,
    "every_visit": learn_monte_carlo,
}


def make(config: Config, mdp: MDP | SuccessorMDP, policy: Array) -> Algorithm:
    """A learner of the value of `policy` on `mdp`.

    Args:
      config: validated here.
      mdp: the problem; its `discount` and `initial` law count.
      policy: `[S, A]`, action probabilities.

    Returns:
      An `Algorithm` whose state is a `State`; the metric is the mean `td_error` squared, of one
      step, before each update.

    Raises:
      ValueError: for a setting out of range, or a policy of another shape.
    """
    config.validate()
    if policy.shape != mdp.action_mask.shape:
        wanted = mdp.action_mask.shape
        raise ValueError(f"policy has shape {policy.shape}; it must be {wanted}, probabilities")
    simulator = simulation.make(mdp)
    discount = mdp.discount.astype(jnp.float32)
    logits = jnp.where(policy > 0, jnp.log(jnp.where(policy > 0, policy, 1)), -jnp.inf)
    learn = partial(_LEARN[config.method], config)
    num_states = mdp.num_states

    def init(key: Key) -> State:
        slot, side = jax.random.uniform(key, (2, 1))
        zeros, zero = jnp.zeros(num_states), jnp.float32(0)
        memory: PyTree = Returns(zeros, zeros, zeros)
        if config.method == "td_lambda":
            memory = td.Traces(zeros, zero)
        elif config.method == "true_online":
            memory = zeros, zero, zero
        elif config.method == "n_step":
            memory = td.Window.empty(config.n)
        return State(
            value=jnp.where(mdp.terminal, 0, jnp.float32(config.initial_value)),
            visits=zeros,
            patients=simulation.Patients.begin(simulator.start(slot, side)),
            memory=memory,
        )

    def body(learner: State, words: Array) -> tuple[State, Array]:
        uniform, at = simulation.uniform(words), learner.patients.state
        action = policy_gradient.sample_action(logits[at[0]], uniform[0, 0])[None]
        moved = simulator.step(uniform[1], uniform[2], at, action)
        patients, ended = learner.patients.after(moved, config.max_episode_steps)
        step = Step(
            state=at[0],
            reward=moved.reward[0],
            discount=jnp.where(moved.terminated[0], 0, discount),
            next_state=moved.state[0],
            reset=ended[0],
        )
        value, next_value = learner.value[step.state], learner.value[step.next_state]
        error = td.td_error(step.reward, step.discount, value, next_value)
        start = simulator.start(uniform[3], uniform[4])
        learner = dataclasses.replace(learn(learner, step), patients=patients.restart(ended, start))
        return learner, jnp.square(error)

    def step(key: Key, learner: State) -> tuple[State, dict[str, Mean]]:
        words = simulation.random_words(key, config.num_steps, _NUM_DRAWS, 1)
        learner, errors = jax.lax.scan(body, learner, words)
        return learner, {"td_error": Mean.of(errors)}

    return Algorithm(init=init, step=step)


def _count(
    config: Config, learner: State, state: Array, weight: Array | float = 1.0
) -> tuple[State, Array]:
    """Counts one more update of `state`, unless `weight` is 0, and gives its step size `[]`."""
    visits = learner.visits.at[state].add(weight)
    step_size = config.step_size * jnp.maximum(visits[state], 1) ** -config.step_size_decay
    return dataclasses.replace(learner, visits=visits), step_size


def _decay(config: Config, step: Step) -> Array:
    """Of the traces, until the next step, `[]`."""
    return jnp.where(step.reset, 0, config.lambda_ * step.discount)
