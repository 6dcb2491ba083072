"""Many learners of one table, and the exact value of what each has learned so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from numpy.typing import NDArray

from jaxrl_llm import checks
from jaxrl_llm.kernels import bellman, exploration
from jaxrl_llm.training import evaluate, loop, report
from jaxrl_llm.types import MDP, Algorithm, Array, Key, PyTree, SuccessorMDP

_SMALL = 64  # states
_MOST_STEPS = 200  # of a greedy walk


@struct.dataclass(kw_only=True)
class Learned:
    """What `learn` returns, NumPy arrays but for `state`.

    Attributes:
      time: `[T]`, mean over the learners.
      value: `[learners, T]`, exact, of each one's policy at that time.
      state: of the learners at the end, leaves `[learners, ...]`.
    """

    time: NDArray[np.float64]
    value: NDArray[np.float64]
    state: PyTree


def learn(
    algorithm: Algorithm,
    mdp: MDP | SuccessorMDP,
    key: Key,
    *,
    policy: Callable[[PyTree], Array],
    time: Callable[[PyTree], Array] | int,
    num_learners: int,
    num_steps: int,
    num_points: int = 10,
    label: str = "training",
) -> Learned:
    """Trains many learners and solves for the value of each one's policy on the way.

    Args:
      algorithm: of one learner.
      mdp: the problem, for the exact values.
      key: consumed.
      policy: state of one learner -> its policy, as `evaluate.exact_return` takes it.
      time: state of one learner -> how far it is, `[]`; or the time that one step takes.
      num_learners: at least 1.
      num_steps: steps of the algorithm in all.
      num_points: at most this many points of the curve.
      label: of the learners, in the progress.
    """
    for name, value in (("num_learners", num_learners), ("num_points", num_points)):
        checks.at_least(name, value, 1)
    # Learners of a small table run in one `vmap`; the tables of large ones would leave the cache.
    is_small = mdp.num_states <= _SMALL
    if is_small:
        many = Algorithm(
            init=lambda key: jax.vmap(algorithm.init)(jax.random.split(key, num_learners)),
            step=lambda key, state: jax.vmap(algorithm.step)(
                jax.random.split(key, num_learners), state
            ),
        )
    else:
        many = loop.over_seeds(algorithm, num_learners)
    # One dense linear system a learner: small ones all at once, large ones in turn.
    batch = 512 if is_small else 1

    @jax.jit
    def look(mdp: MDP | SuccessorMDP, state: PyTree) -> Array:
        value = partial(evaluate.exact_return, mdp)
        return jax.lax.map(lambda one: value(policy(one)), state, batch_size=batch)

    points: list[tuple[float, NDArray[Any]]] = []

    def record(step: int, _: Any, state: PyTree) -> None:
        so_far = step * time if isinstance(time, int) else jnp.mean(jax.vmap(time)(state))
        points.append((float(so_far), jax.device_get(look(mdp, state))))

    state = loop.run(
        many,
        key,
        num_steps=num_steps,
        chunk_steps=max(-(-num_steps // num_points), 1),
        label=label,
        report=record,
    )
    times, values = zip(*points, strict=True)
    return Learned(time=np.array(times), value=np.stack(values, axis=1), state=state)


@dataclass(frozen=True, kw_only=True)
class Study:
    """Several kinds of learners of a table, one after another.

    Attributes:
      make: `(config, mdp) -> Algorithm`.
      q_values: state of one learner -> its table `[S, A]`.
      key: root of every random number; each problem and learner has its own.
    """

    make: Callable[..., Algorithm]
    q_values: Callable[[PyTree], Array]
    key: Key

    def __call__(
        self,
        mdp: MDP | SuccessorMDP,
        configs: Mapping[str, Any],
        num_learners: int,
        num_steps: int,
        time: str,
    ) -> dict[str, Learned]:
        """`learn` of each of `configs`, by name; `time` is a field of a learner's state."""
        keys = jax.vmap(partial(jax.random.fold_in, self.key))(jnp.arange(len(configs)))
        return {
            name: learn(
                self.make(config, mdp),
                mdp,
                jax.random.fold_in(key, mdp.num_states),
                policy=lambda state: bellman.greedy(self.q_values(state)),
                time=lambda state: getattr(state, time),
                num_learners=num_learners,
                num_steps=num_steps,
                label=name,
            )
            for (name, config), key in zip(configs.items(), keys, strict=True)
        }


def show(
    title: str, references: Mapping[str, float], found: Mapping[str, Learned]
) -> dict[str, float]:
    """Prints the final value of each kind of learner below `references`.

    Returns:
      `<name>_mean`, `<name>_std` and `<name>_min` of each.
    """
    rows: list[tuple[str, ...]] = []
    rows += [(name, f"{level:.4f}", "", "") for name, level in references.items()]
    result = {}
    for name, learned in found.items():
        last = learned.value[:, -1]
        measures = {"mean": last.mean(), "std": last.std(), "min": last.min()}
        rows.append((name, *(f"{value:.4f}" for value in measures.values())))
        result |= {f"{name}_{measure}": float(value) for measure, value in measures.items()}
    num_learners = len(next(iter(found.values())).value)
    columns = ("policy", "exact\nvalue", f"± over\n{num_learners} learners", "worst")
    report.print_table(title, columns, rows, footer=report.RESEARCH_ONLY)
    return result


def show_walks(
    title: str,
    mdp: MDP | SuccessorMDP,
    found: Mapping[str, Learned],
    q_values: Callable[[PyTree], Array],
    epsilon: float,
) -> dict[str, float]:
    """Prints what each kind of learner earns, greedy and while it explores, exactly.

    Args:
      title: of the table.
      mdp: the problem, of one reward of -1 a step and others for accidents.
      found: learners by name.
      q_values: state of one learner -> its table `[S, A]`.
      epsilon: that it explores with.

    Returns:
      `<name>_greedy` and `<name>_exploring`, medians over the learners.
    """

    @jax.jit
    def walk(mdp: MDP | SuccessorMDP, state: PyTree) -> tuple[Array, Array]:
        def one(state: PyTree) -> tuple[Array, Array]:
            q = q_values(state)
            # From the start alone: elsewhere a greedy policy may circle for ever.
            sweeps = partial(bellman.iterative_policy_evaluation, max_iterations=_MOST_STEPS)
            greedy = mdp.initial @ sweeps(mdp, bellman.greedy(q)).value
            law = jax.vmap(lambda q, mask: exploration.epsilon_greedy(q, epsilon, mask))
            return greedy, evaluate.exact_return(mdp, law(q, mdp.action_mask))

        return jax.vmap(one)(state)

    rows, result = [], {}
    for name, learned in found.items():
        both = [float(np.median(values)) for values in walk(mdp, learned.state)]
        rows.append((name.replace("_", " "), *(f"{value:.2f}" for value in both)))
        result |= {f"{name}_greedy": both[0], f"{name}_exploring": both[1]}
    columns = ("learner", "greedy\nreturn", f"return with\nepsilon {epsilon:g}")
    report.print_table(f"{title}: medians", columns, rows)
    return result
