"""Learning to control in a table: Q-learning, SARSA and their families.

One step of the algorithm follows `num_environments` patients for `num_steps` steps, all of whom
teach ONE table. Many learners are a `vmap` of `init` and `step`: thousands of learners of one
patient each run side by side as fast as one learner of thousands. All random numbers are drawn
before the loop. Read it from the top: `choose`, `learn_one_step`, `learn_by_traces`, `make`.

Where patients leave one pair in the same step, it moves once, as in `td.shared_step_size`; where no
two meet, the updates are the book's.

A truncated episode bootstraps from the state it was cut in. In the table an action that is not
allowed has the value -inf: nothing ever takes it.

Source: Sutton & Barto (2018), sections 6.4 to 6.7, 7.2, 7.5, 12.7 and 12.10.
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
from jaxrl_llm.envs.simulation import look_up
from jaxrl_llm.kernels import bellman, exploration, policy_gradient
from jaxrl_llm.kernels import temporal_difference as td
from jaxrl_llm.types import MDP, Algorithm, Array, Key, Mean, PyTree, SuccessorMDP

Method = Literal[
    "q_learning", "double_q_learning", "sarsa", "expected_sarsa",
    "n_step_sarsa", "tree_backup", "sarsa_lambda", "watkins_q_lambda",
]  # fmt: skip
Exploration = Literal["epsilon_greedy", "boltzmann", "ucb"]

_N_STEP, _TRACES = ("n_step_sarsa", "tree_backup"), ("sarsa_lambda", "watkins_q_lambda")
_LOOKS_AHEAD = ("sarsa", *_N_STEP, *_TRACES)  # the next action is chosen before the update
_NUM_DRAWS = 6  # uniform numbers a step: action, two of the move, two of a new start, one to spare


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a learner in a table; the discount is the problem's."""

    method: Method = "q_learning"
    """What the target is."""
    num_environments: int = 1
    """Patients followed side by side, who teach one table; 1 for the methods with traces."""
    num_steps: int = 100
    """Steps of each patient per step of the algorithm."""
    num_episodes: int | None = None
    """Learning stops after the step in which this many have ended; never when None."""
    max_episode_steps: int | None = None
    """An episode is truncated after this many steps; never when None."""
    step_size: float = 0.1
    """alpha, of a pair's first update."""
    step_size_decay: float = 0.0
    """alpha falls as N(s, a) to the power of minus this; 0 is a constant step size."""
    initial_value: float = 0.0
    """Of every pair; above any return it makes a greedy learner try everything (optimism)."""
    exploration: Exploration = "epsilon_greedy"
    """Uniform with probability epsilon, softmax of Q, or greedy in an upper confidence bound."""
    epsilon: float = 0.1
    """Of epsilon-greedy, at the start."""
    temperature: float = 1.0
    """Of Boltzmann exploration, at the start, in units of the return."""
    ucb_coefficient: float = 1.0
    """Width of the upper confidence bound, in units of the return."""
    final_exploration: float | None = None
    """Epsilon or the temperature falls linearly to this; constant when None."""
    schedule_length: int = 1
    """Episodes or steps, of all patients together, that the fall takes."""
    schedule_unit: Literal["episodes", "steps"] = "episodes"
    """What the schedule counts. It is read once per step of the algorithm."""
    use_action_mask: bool = True
    """Explore, and look ahead, among the allowed actions alone."""
    n: int = 4
    """Rewards in an n-step target."""
    lambda_: float = 0.9
    """Decay of the traces, besides the discount; 0 is the one-step method."""
    trace: td.TraceKind = "replacing"
    """What a trace does at a pair visited again."""

    def validate(self) -> None:
        """Raises ValueError, in one line that starts with the field's name."""
        checks.one_of("method", self.method, get_args(Method))
        checks.one_of("exploration", self.exploration, get_args(Exploration))
        checks.one_of("schedule_unit", self.schedule_unit, ("episodes", "steps"))
        checks.one_of("trace", self.trace, get_args(td.TraceKind))
        for name in ("num_environments", "num_steps", "n", "schedule_length"):
            checks.at_least(name, getattr(self, name), 1)
        for name in ("num_episodes", "max_episode_steps"):
            if getattr(self, name) is not None:
                checks.at_least(name, getattr(self, name), 1)
        for name in ("epsilon", "lambda_", "step_size"):
            checks.between(name, getattr(self, name), 0, 1)
        for name in ("step_size", "temperature"):
            checks.positive(name, getattr(self, name))
        checks.finite("initial_value", self.initial_value)
        for name in ("step_size_decay", "ucb_coefficient"):
            checks.at_least(name, getattr(self, name), 0)
        self._validate_combinations()

    def _validate_combinations(self) -> None:
        if self.final_exploration is not None and self.exploration == "boltzmann":
            checks.positive("final_exploration", self.final_exploration)
        elif self.final_exploration is not None:
            high = 1.0 if self.exploration == "epsilon_greedy" else float("inf")
            checks.between("final_exploration", self.final_exploration, 0, high)
        if self.method in _TRACES and self.num_environments > 1:
            number = f"num_environments is {self.num_environments}; {self.method}"
            raise ValueError(f"{number} follows 1 patient: vmap learners instead")
        if self.method in ("expected_sarsa", "tree_backup") and self.exploration == "ucb":
            raise ValueError(f"exploration is 'ucb'; {self.method} needs a law of actions")


@struct.dataclass(kw_only=True)
class State:
    """A learner under way.

    Attributes:
      q: `[M · S, A]`, action values; double Q-learning has two tables, one below the other.
      visits, tally: `[S · A]` float32, updates of each pair, in all and (0 between steps) at once.
      patients: `[P]`.
      action: `[P]` int32, chosen ahead, for the methods that do so.
      memory: of the method: `td.Window` `[n, P]`, `td.Traces` or `()`.
      num_episodes, num_steps: `[]` int32, ended and taken so far, of all patients.
    """

    q: Array
    visits: Array
    tally: Array
    patients: simulation.Patients
    action: Array
    memory: PyTree
    num_episodes: Array
    num_steps: Array


class Problem(NamedTuple):
    """What a learner reads of an MDP; `discount` is `[]`."""

    simulator: simulation.Simulator
    discount: Array
    choices: simulation.Choices


class Step(NamedTuple):
    """One step of each patient, `[P]`, before any reset; a pair is state · A + action."""

    pair: Array
    reward: Array
    discount: Array
    next_state: Array
    next_action: Array
    reset: Array
    coin: Array


def q_values(state: State) -> Array:
    """Q `[S, A]` that the learner acts on, -inf where an action is not allowed."""
    num_actions = state.q.shape[-1]
    return jnp.mean(state.q.reshape(-1, state.visits.size // num_actions, num_actions), axis=0)


def choose(
    config: Config, problem: Problem, parameter: Array, state: State, at: Array, uniform: Array
) -> Array:
    """The action of each patient in states `at` `[P]`, from one uniform number each."""
    q, shape = look_up(state.q, at), problem.choices.allowed.shape
    if config.method == "double_q_learning":
        q = 0.5 * (q + look_up(state.q, shape[0] + at))
    if config.exploration == "boltzmann":
        return jax.vmap(policy_gradient.sample_action)(q / parameter, uniform)
    if config.exploration == "ucb":
        visits = look_up(state.visits.reshape(shape), at)
        bound = jax.vmap(exploration.upper_confidence_bound, in_axes=(0, 0, None, 0))
        return bellman.greedy(bound(q, visits, parameter, q > -jnp.inf))
    draw = jax.vmap(exploration.epsilon_greedy_draw, in_axes=(0, None, 0))
    explores, rank = draw(uniform, parameter, look_up(problem.choices.number, at))
    return jnp.where(explores, problem.choices.action(at, rank), bellman.greedy(q))


def law(config: Config, parameter: Array, q: Array) -> Array:
    """What `choose` draws from, `[A]` probabilities; -inf in `q` `[A]` is not allowed."""
    laws = {"boltzmann": exploration.boltzmann, "epsilon_greedy": exploration.epsilon_greedy}
    return laws[config.exploration](q, parameter, q > -jnp.inf)


def learn_one_step(config: Config, parameter: Array, state: State, step: Step) -> State:
    """Q(s, a) <- Q(s, a) + alpha (target - Q(s, a)) of all patients, by the one-step methods."""
    reward, discount, pair = step.reward, step.discount, step.pair
    if config.method == "double_q_learning":
        num_states = state.visits.size // state.q.shape[1]
        table = (step.coin < 0.5).astype(jnp.int32)
        next_q = look_up(state.q, table * num_states + step.next_state)
        other = look_up(state.q, (1 - table) * num_states + step.next_state)
        target = jax.vmap(td.double_q_learning_target)(reward, discount, next_q, other)
        return move(config, state, pair, target, offset=table * state.visits.size)
    next_q = look_up(state.q, step.next_state)
    if config.method == "sarsa":
        target = jax.vmap(td.sarsa_target)(reward, discount, next_q, step.next_action)
    elif config.method == "expected_sarsa":
        laws = jax.vmap(partial(law, config, parameter))(next_q)
        target = jax.vmap(td.expected_sarsa_target)(reward, discount, next_q, laws)
    else:
        target = jax.vmap(td.q_learning_target)(reward, discount, next_q)
    return move(config, state, pair, target)


def learn_n_step(config: Config, parameter: Array, state: State, step: Step) -> State:
    """Moves the pair of n - 1 steps ago towards its n-step target, also past an episode's end."""

    def newest(next_q: Array, action: Array) -> tuple[Array, Array, Array]:
        if config.method == "n_step_sarsa":
            return next_q[action], jnp.float32(1), next_q[action]
        chances, one = law(config, parameter, next_q), jnp.float32(1)
        value = td.expected_sarsa_target(jnp.float32(0), one, next_q, chances)
        return value, chances[action], next_q[action]

    ahead = jax.vmap(newest)(look_up(state.q, step.next_state), step.next_action)
    seen = td.Window(*step[:3], *ahead, step.reset, jnp.ones(step.reward.shape))
    window = jax.vmap(td.Window.push, in_axes=(1, 0), out_axes=1)(state.memory, seen)
    target = jax.vmap(td.Window.target, in_axes=1)(window)
    state = move(config, state, window.pair[0], target, weight=window.known[0])
    return dataclasses.replace(state, memory=window)


def learn_by_traces(config: Config, _: Array, state: State, step: Step) -> State:
    """Every pair moves by alpha · delta · its eligibility; alpha is that of the pair just left."""
    pair, reward, discount, next_state, next_action, reset = (leaf[0] for leaf in step[:6])
    flat, next_q = state.q.reshape(-1), state.q[next_state]
    visits = state.visits.at[pair].add(1)
    step_size = config.step_size * visits[pair] ** -config.step_size_decay
    trace = state.memory.visit(config.trace, pair, step_size)
    decay = jnp.where(reset, 0, config.lambda_ * discount)
    following = next_q[next_action]
    if config.method == "watkins_q_lambda":
        decay, following = td.watkins_decay(decay, next_q, next_action), jnp.max(next_q)
    error = td.td_error(reward, discount, flat[pair], following)
    q = (flat + step_size * error * trace).reshape(state.q.shape)
    return dataclasses.replace(state, q=q, visits=visits, memory=td.Traces(trace, decay))


def move(
    config: Config,
    state: State,
    pair: Array,
    target: Array,
    *,
    weight: Array | None = None,
    offset: Array | None = None,
) -> State:
    """Moves pairs `[P]`, those of weight 1, in the tables at `offset` towards their targets."""
    weight = jnp.ones(pair.shape) if weight is None else weight
    visits = state.visits.at[pair].add(weight, mode="promise_in_bounds")
    # Counted apart: reading the visits both before and after would copy the table every step.
    tally, together = state.tally, weight
    if config.num_environments > 1:
        tally = tally.at[pair].add(weight, mode="promise_in_bounds")
        together = look_up(tally, pair)
        tally = tally.at[pair].set(0, mode="promise_in_bounds")
    step_size = jnp.full(pair.shape, config.step_size)
    if config.step_size_decay > 0:
        first = jnp.maximum(look_up(visits, pair) - together + 1, 1)
        step_size *= jnp.exp(-config.step_size_decay * jnp.log(first))
    if config.num_environments > 1:
        step_size = td.shared_step_size(step_size, together)
    flat, place = state.q.reshape(-1), pair if offset is None else offset + pair
    change = weight * step_size * (target - look_up(flat, place))
    flat = flat.at[place].add(change, mode="promise_in_bounds")
    q = flat.reshape(state.q.shape)
    return dataclasses.replace(state, q=q, visits=visits, tally=tally)


def make(config: Config, mdp: MDP | SuccessorMDP) -> Algorithm:
    """A learner on the table of `mdp`.

    Args:
      config: validated here.
      mdp: the problem; its discount, initial law and mask count.

    Returns:
      An `Algorithm` whose state is a `State`, with the mean return and length of ended episodes.

    Raises:
      ValueError: for a setting that is out of range or has no meaning.
    """
    config.validate()
    allowed = mdp.action_mask if config.use_action_mask else jnp.ones_like(mdp.action_mask)
    discount, choices = mdp.discount.astype(jnp.float32), simulation.Choices.among(allowed)
    problem = Problem(simulation.make(mdp), discount, choices)

    def step(key: Key, state: State) -> tuple[State, dict[str, Mean]]:
        size = config.num_steps, _NUM_DRAWS, config.num_environments
        follow = partial(_follow, config, problem, simulation.random_words(key, *size))
        if config.num_episodes is None:
            return follow(state)
        rest = {name: Mean.of(jnp.zeros(0)) for name in ("episode_return", "episode_length")}
        is_done = state.num_episodes >= config.num_episodes
        return jax.lax.cond(is_done, lambda state: (state, rest), follow, state)

    return Algorithm(init=partial(_init, config, problem), step=step)


def _init(config: Config, problem: Problem, key: Key) -> State:
    width = config.num_environments
    slot, side, uniform = jax.random.uniform(key, (3, width))
    start = problem.simulator.start(slot, side)
    table = jnp.where(problem.choices.allowed, jnp.float32(config.initial_value), -jnp.inf)
    memory: PyTree = ()
    if config.method in _N_STEP:
        windows = [td.Window.empty(config.n)] * width
        memory = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *windows)
    elif config.method in _TRACES:
        memory = td.Traces(jnp.zeros(table.size), jnp.float32(0))
    state = State(
        q=jnp.tile(table, (2 if config.method == "double_q_learning" else 1, 1)),
        visits=jnp.zeros(table.size),
        tally=jnp.zeros(table.size),
        patients=simulation.Patients.begin(start),
        action=jnp.zeros(width, jnp.int32),
        memory=memory,
        num_episodes=jnp.int32(0),
        num_steps=jnp.int32(0),
    )
    action = choose(config, problem, _parameter(config, state), state, start, uniform)
    return dataclasses.replace(state, action=action)


def _follow(
    config: Config, problem: Problem, words: Array, state: State
) -> tuple[State, dict[str, Mean]]:
    """`num_steps` steps of every patient, from random words `[num_steps, draws, P]`."""
    pick = partial(choose, config, problem, _parameter(config, state))
    looks_ahead = config.method in _LOOKS_AHEAD
    kinds = dict.fromkeys(_N_STEP, learn_n_step) | dict.fromkeys(_TRACES, learn_by_traces)
    learn = partial(kinds.get(config.method, learn_one_step), config, _parameter(config, state))

    def body(carry: tuple[State, Array, Array], bits: Array) -> tuple[tuple, None]:
        state, num_ended, total_return = carry
        uniform, at = simulation.uniform(bits), state.patients.state
        action = state.action if looks_ahead else pick(state, at, uniform[0])
        moved = problem.simulator.step(uniform[1], uniform[2], at, action)
        patients, ended = state.patients.after(moved, config.max_episode_steps)
        following = pick(state, moved.state, uniform[0]) if looks_ahead else action
        step = Step(
            pair=at * problem.choices.allowed.shape[1] + action,
            reward=moved.reward,
            discount=jnp.where(moved.terminated, 0, problem.discount),
            next_state=moved.state,
            next_action=following,
            reset=ended,
            coin=uniform[5],
        )
        state = learn(state, step)
        start = problem.simulator.start(uniform[3], uniform[4])
        if looks_ahead:
            following = jnp.where(ended, pick(state, start, uniform[5]), following)
        num_ended += ended
        total_return += jnp.where(ended, patients.episode_return, 0)
        state = dataclasses.replace(
            state, patients=patients.restart(ended, start), action=following
        )
        return (state, num_ended, total_return), None

    width = config.num_environments
    carry = state, jnp.zeros(width, jnp.int32), jnp.zeros(width)
    (after, num_ended, total_return), _ = jax.lax.scan(body, carry, words)
    num_steps = config.num_steps * width
    count = state.num_episodes + jnp.sum(num_ended)
    after = dataclasses.replace(after, num_episodes=count, num_steps=state.num_steps + num_steps)
    # What ended is what was under way, and what was added, less what is still under way.
    length = jnp.sum(state.patients.time) + num_steps - jnp.sum(after.patients.time)
    weight = jnp.sum(num_ended).astype(jnp.float32)
    return after, {
        "episode_return": Mean(total=jnp.sum(total_return), weight=weight),
        "episode_length": Mean(total=length.astype(jnp.float32), weight=weight),
    }


def _parameter(config: Config, state: State) -> Array:
    """Epsilon, the temperature or the width of the bound, `[]`, where the schedule stands."""
    start = {"epsilon_greedy": config.epsilon, "boltzmann": config.temperature}
    first = start.get(config.exploration, config.ucb_coefficient)
    if config.final_exploration is None:
        return jnp.float32(first)
    time = state.num_episodes if config.schedule_unit == "episodes" else state.num_steps
    return exploration.linear_schedule(
        time, first, config.final_exploration, config.schedule_length
    )
