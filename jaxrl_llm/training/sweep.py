"""Many settings of a learner trained side by side in one compiled program, and ranked.

    points = sweep.grid(learning_rate=[1e-3, 1e-2, 1e-1], entropy_coefficient=[0.0, 0.01])
    ranking = sweep.run(algorithm, points, key, num_seeds=4, num_steps=50, score=exact_value)
    ranking.best  # {"learning_rate": ..., "entropy_coefficient": ...}

An algorithm can be swept if its state has `hyperparameters`, a pytree dataclass of scalars that
`step` reads: one program then serves all points, and a `vmap` trains them at once. Seed i draws the
same random numbers at every point (common random numbers): points differ by what they are and not
by luck, and none by which others are beside it.

A point whose metrics or score stop being finite has diverged: it is ranked last, and the others go
on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from numpy.typing import ArrayLike, NDArray

from jaxrl_llm import checks
from jaxrl_llm.training import experiment, loop
from jaxrl_llm.types import Algorithm, Array, Key, Mean, PyTree

Points = dict[str, NDArray[np.float32]]
Score = str | Callable[[PyTree], Array]
_Log = list[tuple[int, dict[str, Any]]]


# Points


def grid(**values: Sequence[float] | NDArray[Any]) -> Points:
    """Every combination of the values of each hyper-parameter, `[P]` by name.

    The last name varies fastest.

    Raises:
      ValueError: if there is no combination.

    >>> {name: column.tolist() for name, column in grid(gamma=[0.5, 1.0], tau=[1.0, 2.0]).items()}
    {'gamma': [0.5, 0.5, 1.0, 1.0], 'tau': [1.0, 2.0, 1.0, 2.0]}
    """
    checks.not_empty("values", values)
    for name, column in values.items():
        checks.not_empty(name, list(column))
    columns = np.meshgrid(*values.values(), indexing="ij")
    return {
        name: column.ravel().astype(np.float32)
        for name, column in zip(values, columns, strict=True)
    }


def sample(
    key: Key,
    num_points: int,
    *,
    uniform: Mapping[str, tuple[float, float]] | None = None,
    log_uniform: Mapping[str, tuple[float, float]] | None = None,
) -> Points:
    """Random points, which cover each hyper-parameter better than a grid of as many would.

    Args:
      key: consumed.
      num_points: P.
      uniform: low and high by name.
      log_uniform: the same, uniform in the logarithm: for rates, whose order of magnitude counts.

    Returns:
      Values `[P]` by name.

    Raises:
      ValueError: if a range is empty, or one of `log_uniform` not positive.

    Source: Bergstra & Bengio (2012), "Random search for hyper-parameter optimization".
    """
    checks.at_least("num_points", num_points, 1)
    uniform, log_uniform = uniform or {}, log_uniform or {}
    checks.not_empty("uniform and log_uniform", [*uniform, *log_uniform])
    for name, (low, high) in [*uniform.items(), *log_uniform.items()]:
        checks.finite(name, low)
        checks.at_least(name, high, low)
    for name, (low, _) in log_uniform.items():
        checks.positive(name, low)
    ranges = dict(uniform) | {
        name: tuple(map(math.log, ends)) for name, ends in log_uniform.items()
    }
    draws = np.asarray(jax.random.uniform(key, (len(ranges), num_points)), np.float64)
    points = {}
    for (name, (low, high)), draw in zip(ranges.items(), draws, strict=True):
        column = low + (high - low) * draw
        points[name] = (np.exp(column) if name in log_uniform else column).astype(np.float32)
    return points


def check_points(points: Mapping[str, ArrayLike], config: Any) -> None:
    """Raises a ValueError for an unknown name or the first point that `config.validate()` refuses.

    Args:
      points: values `[P]` by name.
      config: a dataclass with fields of those names, such as an agent's `Config`.
    """
    known = [field.name for field in dataclasses.fields(config)]
    for name in points:
        checks.one_of("points: name", name, known)
    columns = {name: np.asarray(column).tolist() for name, column in points.items()}
    for index, values in enumerate(zip(*columns.values(), strict=True)):
        try:
            dataclasses.replace(config, **dict(zip(columns, values, strict=True))).validate()
        except ValueError as error:
            raise ValueError(f"point {index}: {error}") from None


# Training


@struct.dataclass(kw_only=True)
class State:
    """Learners of every point.

    Attributes:
      learners: states of the algorithm, leaves `[P, ...]`.
      diverged: `[P]` bool, whose metrics have not always been finite.
    """

    learners: PyTree
    diverged: Array


def side_by_side(
    algorithm: Algorithm, points: Mapping[str, ArrayLike], num_seeds: int, score: Score
) -> Algorithm:
    """The learners of all seeds and points as one algorithm; states and metrics `[seeds, P, ...]`.

    Args:
      algorithm: of one learner.
      points: values `[P]` by name of a hyper-parameter; the others are as `algorithm.init` has
        them. One that the compiled program does not read, because its part was left out of it,
        changes nothing.
      num_seeds: of each point.
      score: where it is a metric's name, that metric is also `score`, and `counted` tells whether
        there was anything to count.

    Returns:
      An `Algorithm` whose state is a `State`.

    Raises:
      ValueError: if a name is none of a hyper-parameter or metric, or a value is not finite.
    """
    columns = _check(algorithm, points)
    num_points = _size(columns)

    def init(key: Key) -> State:
        def every_point(leaf: Array) -> Array:
            return jnp.broadcast_to(leaf, (num_points, *leaf.shape))

        learners = jax.tree.map(every_point, algorithm.init(key))
        swept = {name: jnp.asarray(column) for name, column in columns.items()}
        hyperparameters = dataclasses.replace(learners.hyperparameters, **swept)
        return State(
            learners=dataclasses.replace(learners, hyperparameters=hyperparameters),
            diverged=jnp.zeros(num_points, bool),
        )

    def step(key: Key, state: State, *data: PyTree) -> tuple[State, dict[str, Mean]]:
        # One key for all points: what is drawn from it alone is drawn once.
        every_point = jax.vmap(lambda learner: algorithm.step(key, learner, *data))
        learners, metrics = every_point(state.learners)
        finite = jax.tree.map(jnp.isfinite, jax.tree.leaves(metrics))
        diverged = state.diverged | ~jnp.all(jnp.stack(finite), axis=0)
        if isinstance(score, str):
            checks.one_of("score", score, sorted(metrics))
            metrics = {**metrics, "score": metrics[score], "counted": _counted(metrics[score])}
        sound = jax.tree.map(lambda leaf: jnp.where(diverged, 0, leaf), metrics)
        return State(learners=learners, diverged=diverged), sound

    return loop.over_seeds(Algorithm(init=init, step=step), num_seeds)


def _counted(metric: Mean) -> Mean:
    """1 where it counts anything, in a stretch of steps above 0 where any step did."""
    counted = (metric.weight > 0).astype(jnp.float32)
    return Mean(total=counted, weight=jnp.ones_like(counted))


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """What each point of a sweep reached, as NumPy arrays.

    Attributes:
      points: values `[P]` by name of a hyper-parameter.
      score: `[P, seeds]`, at the end; NaN where the learner diverged.
      steps: `[T]`, of the algorithm.
      curve: `[T, P, seeds]`, the score on the way there.
    """

    points: Points
    score: NDArray[np.float64]
    steps: NDArray[np.int64]
    curve: NDArray[np.float64]

    @property
    def num_diverged(self) -> NDArray[np.int64]:
        """Seeds `[P]` that diverged."""
        return np.isnan(self.score).sum(axis=1)

    @property
    def mean(self) -> NDArray[np.float64]:
        """Over the seeds that did not diverge, `[P]`; NaN where all did."""
        count = self.score.shape[1] - self.num_diverged
        total = np.nansum(self.score, axis=1)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    @property
    def standard_error(self) -> NDArray[np.float64]:
        """Of the mean, `[P]`; NaN for fewer than two seeds."""
        count = self.score.shape[1] - self.num_diverged
        squares = np.nansum(np.square(self.score - self.mean[:, None]), axis=1)
        return np.where(count > 1, np.sqrt(squares / np.maximum(count * (count - 1), 1)), np.nan)

    @property
    def order(self) -> NDArray[np.int64]:
        """Points `[P]`, the best first; the fewer seeds diverged the better, then the mean."""
        return np.lexsort((-np.nan_to_num(self.mean, nan=-np.inf), self.num_diverged))

    @property
    def best(self) -> dict[str, float]:
        """The first of them."""
        return self.point(int(self.order[0]))

    def point(self, index: int) -> dict[str, float]:
        """Values of point `index`, in as many digits as float32 has."""
        return {name: float(f"{column[index]:.7g}") for name, column in self.points.items()}

    def flags(self, index: int, prefix: str = "") -> str:
        """Point `index` for the command line of an experiment: `--ppo.learning-rate 0.01 ...`."""
        dotted = f"{prefix}." if prefix else ""
        values = self.point(index).items()
        return " ".join(f"--{dotted}{name.replace('_', '-')} {value:g}" for name, value in values)


def run(
    algorithm: Algorithm,
    points: Mapping[str, ArrayLike],
    key: Key,
    *,
    num_seeds: int,
    num_steps: int,
    score: Score,
    num_evaluations: int = 10,
    items_per_step: int = 1,
    data: PyTree | None = None,
    unit: str = "steps",
) -> Ranking:
    """Trains every point with every seed, in memory, and ranks them.

    Args:
      algorithm: of one learner; its state has `hyperparameters`.
      points: values `[P]` by name, as of `grid` or `sample`.
      key: consumed. One point and one seed give the same learner as `loop.over_seeds` with it.
      num_seeds: of each point.
      num_steps: of the algorithm, for each learner.
      score: the greater the better: `state -> []` of one learner, or the name of a metric, of which
        it is the mean over the last stretch of the curve.
      num_evaluations: points of the curve.
      items_per_step: of one learner, for the progress.
      data: as in `loop.run`.
      unit: of the items, in the plural.

    Raises:
      ValueError: as `side_by_side`, or if no learner has a score.
    """
    learners = side_by_side(algorithm, points, num_seeds, score)
    evaluate, steps, rows = _evaluator(score), [], []

    def report(step: int, metrics: loop.Metrics, state: State) -> None:
        steps.append(step)
        rows.append({**metrics, **jax.device_get(evaluate(state))})

    loop.run(
        learners,
        key,
        num_steps=num_steps,
        chunk_steps=max(num_steps // num_evaluations, 1),
        items_per_step=items_per_step * num_seeds * _size(points),
        report=report,
        data=data,
        label="sweep",
        unit=unit,
    )
    curves = {name: np.stack([row[name].T for row in rows]) for name in _logged(score)}
    return _ranking(points, np.array(steps), curves)


def train(
    run: experiment.Run[experiment.SeedsConfig],
    algorithm: Algorithm,
    points: Mapping[str, ArrayLike],
    *,
    num_steps: int,
    score: Score,
    items_per_step: int = 1,
    **options: Any,
) -> Ranking:
    """`run` within an experiment, logged and saved: a resumed sweep goes on where it was stopped.

    Args:
      run: from `experiment.open_run`; its configuration has the number of seeds.
      algorithm, points, num_steps, score, items_per_step: as in `run`.
      **options: as in `experiment.train`.
    """
    num_seeds = run.config.num_seeds
    experiment.train(
        run,
        side_by_side(algorithm, points, num_seeds, score),
        num_steps=num_steps,
        items_per_step=items_per_step * num_seeds * _size(points),
        evaluate=_evaluator(score),
        **options,
    )
    steps, _ = experiment.curve(run, "score")
    # `experiment.curve` has time last.
    curves = {name: np.moveaxis(experiment.curve(run, name)[1], -1, 0) for name in _logged(score)}
    return _ranking(points, steps, curves)


def _evaluator(score: Score) -> Callable[[State], dict[str, Array]]:
    """State -> what is logged of it besides its metrics, `[seeds, P]` each."""

    @jax.jit
    def evaluate(state: State) -> dict[str, Array]:
        if isinstance(score, str):
            return {"diverged": state.diverged.astype(jnp.float32)}
        value = jax.vmap(jax.vmap(score))(state.learners)
        sound = jnp.isfinite(value) & ~state.diverged
        # NaN of a learner that diverged would not survive a log of JSON as such.
        return {"score": jnp.where(sound, value, 0), "diverged": (~sound).astype(jnp.float32)}

    return evaluate


def _logged(score: Score) -> list[str]:
    return ["score", "diverged"] + (["counted"] if isinstance(score, str) else [])


def _ranking(
    points: Mapping[str, ArrayLike], steps: NDArray[Any], curves: Mapping[str, NDArray[Any]]
) -> Ranking:
    """From what was logged, `[T, P, seeds]` by name."""
    unknown = (curves["diverged"] > 0) | (curves.get("counted", np.ones(())) == 0)
    curve = np.where(unknown, np.nan, curves["score"]).astype(np.float64)
    if np.isnan(curve[-1]).all():
        raise ValueError(
            f"score is not known of any of {_size(points)} points after step {steps[-1]}: all "
            "diverged or counted nothing; lower the rates, or train longer"
        )
    columns = {name: np.asarray(column, np.float32) for name, column in points.items()}
    return Ranking(points=columns, score=curve[-1], steps=steps, curve=curve)


def _size(points: Mapping[str, ArrayLike]) -> int:
    return min(np.size(column) for column in points.values())


def _check(algorithm: Algorithm, points: Mapping[str, ArrayLike]) -> Points:
    """The points as arrays `[P]`, if they are points of `algorithm`."""
    state = jax.eval_shape(algorithm.init, jax.random.key(0))
    if not dataclasses.is_dataclass(getattr(state, "hyperparameters", None)):
        raise ValueError(
            "algorithm.init makes a state without hyperparameters; only an algorithm that reads "
            "them from its state can be swept"
        )
    known = [field.name for field in dataclasses.fields(state.hyperparameters)]
    checks.not_empty("points", points)
    columns = {name: np.asarray(column, np.float32) for name, column in points.items()}
    for name, column in columns.items():
        checks.one_of("points: name", name, known)
        if column.shape != (_size(columns),) or not column.size:
            wanted = f"it must be [{_size(columns)}], at least 1 and as many for every name"
            raise ValueError(f"points[{name!r}] has shape {column.shape}; {wanted}")
        if not np.isfinite(column).all():
            at = np.isfinite(column).argmin()
            raise ValueError(f"points[{name!r}][{at}] is {column[at]}; it must be finite")
    return columns
