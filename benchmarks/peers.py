"""The programs we are measured against, each wrapped as a `Peer` that does one job.

Every adaptor imports its package when called and raises `PeerMissing` where there is none, so a
case passes it unevaluated: `peer=lambda: peers.rlax_gae(reward, discount, values, 0.95)`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import random
import sys
import types
import warnings
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Peer, PeerMissing
from jaxrl_llm.types import MDP, Array, SuccessorMDP

MAXIMUM_ITERATIONS = 1_000_000

# What purejaxrl publishes for CartPole, at the bottom of its ppo.py, without its printing.
PUREJAXRL_PPO: dict[str, Any] = {
    "LR": 2.5e-4,
    "NUM_ENVS": 4,
    "NUM_STEPS": 128,
    "TOTAL_TIMESTEPS": 5e5,
    "UPDATE_EPOCHS": 4,
    "NUM_MINIBATCHES": 4,
    "GAMMA": 0.99,
    "GAE_LAMBDA": 0.95,
    "CLIP_EPS": 0.2,
    "ENT_COEF": 0.01,
    "VF_COEF": 0.5,
    "MAX_GRAD_NORM": 0.5,
    "ACTIVATION": "tanh",
    "ENV_NAME": "CartPole-v1",
    "ANNEAL_LR": True,
    "DEBUG": False,
}

# The same of its dqn.py.
PUREJAXRL_DQN: dict[str, Any] = {
    "NUM_ENVS": 10,
    "BUFFER_SIZE": 10_000,
    "BUFFER_BATCH_SIZE": 128,
    "TOTAL_TIMESTEPS": 5e5,
    "EPSILON_START": 1.0,
    "EPSILON_FINISH": 0.05,
    "EPSILON_ANNEAL_TIME": 25e4,
    "TARGET_UPDATE_INTERVAL": 500,
    "LR": 2.5e-4,
    "LEARNING_STARTS": 10_000,
    "TRAINING_INTERVAL": 10,
    "LR_LINEAR_DECAY": False,
    "GAMMA": 0.99,
    "TAU": 1.0,
    "ENV_NAME": "CartPole-v1",
    "WANDB_MODE": "disabled",
}


def require(module: str) -> types.ModuleType:
    """Imports `module` without its greetings and warnings.

    Raises:
      PeerMissing: it is not installed; the message says how to install it.
    """
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise PeerMissing(f'peer {package} not installed: pip install "jaxrl-llm[peers]"')
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def quantecon(
    problems: Sequence[MDP | SuccessorMDP],
    *,
    method: Literal["value_iteration", "policy_iteration", "modified_policy_iteration"],
    tolerance: float,
) -> Peer:
    """QuantEcon's `DiscreteDP`, one problem after the other, in float64.

    An `MDP` becomes its dense form, a `SuccessorMDP` its sparse list of state-action pairs. Its
    policy iteration does not stop where float64 cannot tell two actions apart, as on ICU-Sepsis.

    Args:
      problems: terminal states become absorbing, with reward 0.
      method: of QuantEcon.
      tolerance: its epsilon; the values it returns are within half of it.

    Returns:
      A peer whose result is a list of QuantEcon's results: value `.v`, policy `.sigma`,
      iterations `.num_iter`.
    """
    markov = require("quantecon.markov")
    programs = [_quantecon_program(markov, problem) for problem in problems]

    def solve() -> list:
        return [
            program.solve(method=method, epsilon=tolerance, max_iter=MAXIMUM_ITERATIONS)
            for program in programs
        ]

    return Peer(f"QuantEcon {method.replace('_', ' ')}", solve)


def _quantecon_program(markov: types.ModuleType, problem: MDP | SuccessorMDP) -> Any:
    reward, allowed = _host_reward(problem)
    discount = float(problem.discount)
    if isinstance(problem, MDP):
        transition = _host_transition(problem)
        return markov.DiscreteDP(np.where(allowed, reward, -np.inf), transition, discount)
    sparse = require("scipy.sparse")
    state, action = np.nonzero(allowed)
    ended = np.asarray(problem.terminal)[state]
    row = np.asarray(problem.row)[state, action]
    probability = np.where(ended[:, None], 0, np.asarray(problem.probability, np.float64)[row])
    successor = np.asarray(problem.successor)[row]
    # A terminal pair keeps its first slot alone, pointed at itself: absorbing.
    probability[ended, 0], successor[ended, 0] = 1, state[ended]
    pair = np.repeat(np.arange(len(state)), successor.shape[1])
    transition = sparse.csr_matrix(
        (probability.ravel(), (pair, successor.ravel())), shape=(len(state), problem.num_states)
    )
    transition.eliminate_zeros()
    return markov.DiscreteDP(reward[state, action], transition, discount, state, action)


def _host_reward(problem: MDP | SuccessorMDP) -> tuple[np.ndarray, np.ndarray]:
    """Expected reward `[S, A]`, 0 in terminal states, and which pairs `[S, A]` are allowed."""
    terminal = np.asarray(problem.terminal)[:, None]
    with jax.enable_x64(True):
        reward = np.array(jax.tree.map(_double, problem).expected_reward())
    return np.where(terminal, 0, reward), np.asarray(problem.action_mask) | terminal


def _double(leaf: Array) -> Array:
    return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _host_transition(problem: MDP) -> np.ndarray:
    """`[S, A, S]` float64, with terminal states absorbing."""
    terminal = np.flatnonzero(problem.terminal)
    transition = np.array(problem.transition, np.float64)
    transition[terminal] = 0
    transition[terminal, :, terminal] = 1
    return transition


def mdptoolbox(
    problem: MDP, *, solver: Literal["ValueIteration", "PolicyIterationModified"], tolerance: float
) -> Peer:
    """pymdptoolbox, which has no masks: every action must be allowed in states that go on.

    Its value iteration stops on the span of the update: the policy is right, but the values are
    off by a constant, so compare policies only.

    Returns:
      A peer whose result is the solver: policy `.policy`, value `.V`, iterations `.iter`.

    Raises:
      ValueError: an action is not allowed in a state that is not terminal.
    """
    solvers = require("mdptoolbox.mdp")
    reward, allowed = _host_reward(problem)
    if not allowed.all():
        state, action = np.argwhere(~allowed)[0]
        raise ValueError(
            f"action_mask[{state}, {action}] is False; pymdptoolbox needs every action allowed"
        )
    transition = np.ascontiguousarray(_host_transition(problem).swapaxes(0, 1))
    # It refuses rows that were rounded to float32.
    transition /= transition.sum(axis=-1, keepdims=True)

    def fresh() -> tuple:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            instance = getattr(solvers, solver)(
                transition,
                reward,
                float(problem.discount),
                epsilon=tolerance,
            )
        return (instance,)

    def solve(instance: Any) -> Any:
        instance.run()
        return instance

    return Peer(f"pymdptoolbox {solver}", solve, fresh)


def rlax_gae(reward: Array, discount: Array, values: Array, lambda_: float) -> Peer:
    """rlax's generalised advantages over axis 1, the fastest of its layouts.

    Args:
      reward: `[T, B]`.
      discount: `[T, B]`.
      values: `[T + 1, B]`, of the states before each step and of the last one after.
      lambda_: trace decay.
    """
    rlax = require("rlax")
    batched = jax.vmap(
        rlax.truncated_generalized_advantage_estimation, in_axes=(1, 1, None, 1), out_axes=1
    )
    return Peer("rlax", jax.jit(batched), (reward, discount, jnp.float32(lambda_), values))


def gymnax_cartpole(num_environments: int, num_steps: int) -> Peer:
    """gymnax CartPole under a random policy: `(observation [B, 4], total reward [])`."""
    environment, parameters = require("gymnax").make("CartPole-v1")

    def rollout(key: Array) -> tuple[Array, Array]:
        reset_key, scan_key = jax.random.split(key)
        observation, state = jax.vmap(environment.reset, in_axes=(0, None))(
            jax.random.split(reset_key, num_environments), parameters
        )

        def step(carry: tuple, step_key: Array) -> tuple[tuple, None]:
            state, _, total = carry
            action_key, environment_key = jax.random.split(step_key)
            action = jax.random.bernoulli(action_key, shape=(num_environments,)).astype(jnp.int32)
            observation, state, reward, _, _ = jax.vmap(environment.step, in_axes=(0, 0, 0, None))(
                jax.random.split(environment_key, num_environments), state, action, parameters
            )
            return (state, observation, total + jnp.sum(reward)), None

        start = (state, observation, jnp.float32(0))
        (_, observation, total), _ = jax.lax.scan(
            step, start, jax.random.split(scan_key, num_steps)
        )
        return observation, total

    items = num_environments * num_steps
    return Peer("gymnax", jax.jit(rollout), (jax.random.key(0),), items)


def gymnasium_cartpole(
    num_environments: int,
    num_steps: int,
    *,
    vectorization: Literal["sync", "vector_entry_point"] = "sync",
) -> Peer:
    """Gymnasium CartPole under a random policy: one environment at a time, or in NumPy arrays."""
    environments = require("gymnasium").make_vec(
        "CartPole-v1", num_envs=num_environments, vectorization_mode=vectorization
    )
    generator = np.random.default_rng(0)

    def rollout() -> float:
        environments.reset(seed=0)
        total = 0.0
        for _ in range(num_steps):
            _, reward, *_ = environments.step(generator.integers(2, size=num_environments))
            total += reward.sum()
        return total

    name = {"sync": "Gymnasium", "vector_entry_point": "Gymnasium in NumPy"}[vectorization]
    return Peer(name, rollout, items=num_environments * num_steps)


def icu_sepsis(num_steps: int) -> Peer:
    """The `icu-sepsis` package's own environment under random admissible actions."""
    require("icu_sepsis")
    environment = require("gymnasium").make("Sepsis/ICU-Sepsis-v2", disable_env_checker=True)
    generator = random.Random(0)

    def rollout() -> float:
        _, info = environment.reset(seed=0)
        total = 0.0
        for _ in range(num_steps):
            action = generator.choice(info["admissible_actions"])
            _, reward, terminated, truncated, info = environment.step(action)
            total += reward
            if terminated or truncated:
                _, info = environment.reset()
        return total

    return Peer("icu-sepsis", rollout, items=num_steps)


def purejaxrl_ppo(num_seeds: int = 1) -> Peer:
    """purejaxrl's PPO on CartPole as published: 5e5 environment steps a seed.

    It is no package: the environment variable `PUREJAXRL` names the folder of a clone.

    Returns:
      A peer whose result has `["metrics"]["returned_episode_returns"]`, with a leading axis of
      seeds where there are several.
    """
    per_update = PUREJAXRL_PPO["NUM_ENVS"] * PUREJAXRL_PPO["NUM_STEPS"]
    steps = int(PUREJAXRL_PPO["TOTAL_TIMESTEPS"]) // per_update * per_update
    return _purejaxrl("ppo", PUREJAXRL_PPO, steps, num_seeds)


def purejaxrl_dqn(num_seeds: int = 1) -> Peer:
    """purejaxrl's DQN on CartPole as published: 5e5 environment steps a seed.

    Returns:
      A peer whose result has `["metrics"]["returns"]`, a number for each of its 50,000 steps of ten
      environments, with a leading axis of seeds where there are several.
    """
    return _purejaxrl("dqn", PUREJAXRL_DQN, int(PUREJAXRL_DQN["TOTAL_TIMESTEPS"]), num_seeds)


def _purejaxrl(name: str, config: dict[str, Any], steps: int, num_seeds: int) -> Peer:
    train = _purejaxrl_module(name).make_train(dict(config))
    key = jax.random.key(30)
    if num_seeds > 1:
        train, key = jax.vmap(train), jax.random.split(key, num_seeds)
    return Peer("purejaxrl", jax.jit(train), (key,), num_seeds * steps)


def _purejaxrl_module(name: str) -> types.ModuleType:
    folder = Path(os.environ.get("PUREJAXRL", "")) / "purejaxrl"
    if "PUREJAXRL" not in os.environ or not (folder / f"{name}.py").exists():
        raise PeerMissing(
            "peer purejaxrl not found: set PUREJAXRL to a clone of github.com/luchris429/purejaxrl"
        )
    for package in ("gymnax", "distrax", "flashbax"):
        require(package)
    if not hasattr(jax, "tree_map"):
        # What its DQN was written for; JAX has since renamed it.
        jax.tree_map = jax.tree.map  # pyright: ignore[reportAttributeAccessIssue]
    with _importable(folder, name):
        return importlib.import_module(name)


@contextlib.contextmanager
def _importable(folder: Path, name: str) -> Generator[None]:
    """Lets `name` be imported from `folder`, with stand-ins for what it never uses."""
    unused = types.ModuleType("unused")
    vars(unused).update(dict.fromkeys(("envs", "EpisodeWrapper", "AutoResetWrapper")))
    brax = ("brax", "brax.envs", "brax.envs.wrappers", "brax.envs.wrappers.training")
    names = (*brax, "navix", "wandb")
    absent = [name for name in names if importlib.util.find_spec(name.partition(".")[0]) is None]
    sys.modules.update(dict.fromkeys(absent, unused))
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for module in (*absent, name, "wrappers"):
            sys.modules.pop(module, None)
