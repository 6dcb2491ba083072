"""Sweeps of a learner whose best settings are known, and of PPO beside exact values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from jaxrl_llm import checks
from jaxrl_llm.agents import ppo
from jaxrl_llm.envs import treatment
from jaxrl_llm.nn.heads import TabularActorCritic
from jaxrl_llm.training import evaluate, experiment, loop, sweep
from jaxrl_llm.types import Algorithm, Array, Mean

RATES, GOALS = [0.1, 0.5, 3.0], [0.0, 1.0]
OPTIMUM, NUM_SEEDS, NUM_STEPS = 1.0, 3, 24


@struct.dataclass(kw_only=True)
class Hyperparameters:
    rate: Array
    goal: Array


@struct.dataclass(kw_only=True)
class State:
    hyperparameters: Hyperparameters
    place: Array


@dataclass(frozen=True, kw_only=True)
class Config:
    rate: float = 0.2
    goal: float = 0.5

    def validate(self) -> None:
        checks.between("rate", self.rate, 0, 1)


def make(config: Config) -> Algorithm:
    """Walks to `goal` and is paid for being near 1: slow below rate 1, and to infinity above 2."""

    def init(key):
        hyperparameters = Hyperparameters(
            rate=jnp.float32(config.rate), goal=jnp.float32(config.goal)
        )
        return State(hyperparameters=hyperparameters, place=5 + jax.random.normal(key))

    def step(key, state):
        h = state.hyperparameters
        # The cube overflows float32 within a few steps of a walk that gets away.
        away = (state.place - h.goal) ** 3 * jnp.where(h.rate > 2, 1, 0)
        place = state.place - h.rate * (state.place - h.goal) + away
        place = place + 0.01 * jax.random.normal(key)
        seldom = Mean(total=place, weight=jnp.float32(0))
        return replace(state, place=place), {"reward": Mean.of(payment(place)), "seldom": seldom}

    return Algorithm(init=init, step=step)


def payment(place: Array) -> Array:
    return -jnp.square(place - OPTIMUM)


def score(state: State) -> Array:
    return payment(state.place)


def root() -> Any:
    return jax.random.key(3)


@pytest.fixture(scope="module")
def ranking() -> sweep.Ranking:
    points = sweep.grid(rate=RATES, goal=GOALS)
    size: dict[str, Any] = {"num_seeds": NUM_SEEDS, "num_steps": NUM_STEPS, "num_evaluations": 4}
    return sweep.run(make(Config()), points, root(), score=score, **size)


def test_grid_is_the_product_and_sample_stays_in_its_ranges():
    points = sweep.grid(rate=[1, 2, 3], goal=[4, 5])
    np.testing.assert_array_equal(points["rate"], [1, 1, 2, 2, 3, 3])
    np.testing.assert_array_equal(points["goal"], [4, 5] * 3)
    drawn = sweep.sample(root(), 2_000, uniform={"goal": (-1, 1)}, log_uniform={"rate": (1e-4, 1)})
    assert drawn["rate"].shape == (2_000,)
    # Uniform in the logarithm: a quarter in each of the four decades.
    decades = np.histogram(np.log10(drawn["rate"]), [-4, -3, -2, -1, 0])[0] / 2_000
    np.testing.assert_allclose(decades, 0.25, atol=0.05)
    np.testing.assert_allclose(np.mean(drawn["goal"] < 0.5), 0.75, atol=0.05)
    assert np.abs(np.corrcoef(np.log(drawn["rate"]), drawn["goal"])[0, 1]) < 0.1


def test_run_finds_the_known_best_point(ranking):
    assert ranking.best == {"rate": 0.5, "goal": 1.0}
    assert ranking.flags(int(ranking.order[0])) == "--rate 0.5 --goal 1"
    assert ranking.flags(1, "agent") == "--agent.rate 0.1 --agent.goal 1"
    # What the goal leaves, or the rate has not walked yet from about 5.
    expected = {(0.5, 1.0): 0, (0.5, 0.0): -1, (0.1, 1.0): -((4 * 0.9**24) ** 2)}
    for (rate, goal), value in expected.items():
        at = RATES.index(rate) * 2 + GOALS.index(goal)
        np.testing.assert_allclose(ranking.mean[at], value, atol=0.08)


def test_run_ranks_a_point_that_diverged_last_and_spares_the_others(ranking):
    np.testing.assert_array_equal(ranking.num_diverged, [0, 0, 0, 0, NUM_SEEDS, NUM_SEEDS])
    assert set(ranking.order[-2:].tolist()) == {4, 5}
    assert np.isnan(ranking.mean[4:]).all()
    assert np.isfinite(ranking.score[:4]).all()


def test_ranking_counts_over_seeds_that_are_sound():
    score = np.array([[1.0, 3.0], [9.0, np.nan], [np.nan, np.nan], [0.0, 1.0]])
    points = {"rate": np.arange(4, dtype=np.float32)}
    ranking = sweep.Ranking(points=points, score=score, steps=np.array([1]), curve=score[None])
    np.testing.assert_array_equal(ranking.mean, [2, 9, np.nan, 0.5])
    np.testing.assert_allclose(ranking.standard_error[[0, 3]], [1, 0.5])
    assert np.isnan(ranking.standard_error[1:3]).all()
    np.testing.assert_array_equal(ranking.order, [0, 3, 1, 2])


def test_run_draws_the_same_numbers_at_every_point_whatever_is_beside_it(ranking):
    """A point alone, and twice in one sweep, is the point in the grid."""
    size: dict[str, Any] = {"num_seeds": NUM_SEEDS, "num_steps": NUM_STEPS, "num_evaluations": 4}
    twice = {"goal": [1.0, 1.0], "rate": [0.5, 0.5]}
    again = sweep.run(make(Config()), twice, root(), score=score, **size)
    np.testing.assert_array_equal(again.curve[:, 0], again.curve[:, 1])
    np.testing.assert_allclose(again.curve[:, 0], ranking.curve[:, 3], rtol=1e-4, atol=1e-6)
    assert len(np.unique(again.score[0])) == NUM_SEEDS
    np.testing.assert_array_equal(again.steps, [6, 12, 18, 24])


@pytest.mark.slow
def test_run_of_one_point_is_the_plain_run_of_its_configuration():
    learners = loop.over_seeds(make(Config(rate=0.3, goal=0.7)), NUM_SEEDS)
    plain = loop.run(learners, root(), num_steps=NUM_STEPS, chunk_steps=NUM_STEPS)
    size: dict[str, Any] = {"num_seeds": NUM_SEEDS, "num_steps": NUM_STEPS, "num_evaluations": 1}
    points = {"rate": [0.3], "goal": [0.7]}
    ranking = sweep.run(make(Config()), points, root(), score=score, **size)
    np.testing.assert_allclose(ranking.score[0], jax.vmap(score)(plain), rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_run_scores_by_a_metric_over_the_last_stretch():
    rewards = []
    learners = loop.over_seeds(make(Config()), NUM_SEEDS)
    loop.run(
        learners,
        root(),
        num_steps=NUM_STEPS,
        chunk_steps=6,
        report=lambda step, metrics, state: rewards.append(metrics["reward"]),
    )
    size: dict[str, Any] = {"num_seeds": NUM_SEEDS, "num_steps": NUM_STEPS, "num_evaluations": 4}
    points = {"rate": [0.2, 3.0]}
    ranking = sweep.run(make(Config()), points, root(), score="reward", **size)
    np.testing.assert_allclose(ranking.curve[:, 0], np.stack(rewards), rtol=1e-4)
    np.testing.assert_array_equal(ranking.num_diverged, [0, NUM_SEEDS])
    with pytest.raises(ValueError, match="score is not known of any of 2 points after step 24"):
        sweep.run(make(Config()), points, root(), score="seldom", **size)


@pytest.mark.slow
def test_train_goes_on_where_it_was_stopped(tmp_path):
    """Stopped at a checkpoint, logged in JSON, and the same ranking in the end."""
    points = {"rate": [0.3, 3.0]}
    config = experiment.SeedsConfig(
        num_seeds=2, num_evaluations=4, num_checkpoints=4, output_dir=tmp_path
    )
    whole = experiment.open_run("whole", config)
    expected = sweep.train(whole, make(Config()), points, num_steps=8, score=score)
    np.testing.assert_array_equal(expected.num_diverged, [0, 2])
    stopped = experiment.open_run("stopped", config)
    sweep.train(stopped, make(Config()), points, num_steps=4, score=score)
    resumed = replace(stopped, resumed=True)
    ranking = sweep.train(resumed, make(Config()), points, num_steps=8, score=score)
    assert ranking.steps[-1] == 8
    np.testing.assert_allclose(ranking.score, expected.score, rtol=1e-6)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ({}, "points is empty"),
        ({"rte": [0.1]}, r"points: name is 'rte'; it must be one of 'rate', 'goal'"),
        ({"rate": []}, r"points\['rate'\] has shape \(0,\)"),
        (
            {"rate": [0.1, 0.2], "goal": [1.0]},
            r"points\['rate'\] has shape \(2,\); it must be \[1\]",
        ),
        ({"rate": [0.1, np.nan]}, r"points\['rate'\]\[1\] is nan; it must be finite"),
    ],
)
def test_run_refuses_in_one_line(points, message):
    with pytest.raises(ValueError, match=message) as error:
        sweep.run(make(Config()), points, root(), num_seeds=1, num_steps=1, score=score)
    assert "\n" not in str(error.value)


def test_other_faults_are_named_in_one_line():
    with pytest.raises(ValueError, match="rate is empty; name at least one"):
        sweep.grid(rate=[])
    with pytest.raises(ValueError, match="values is empty"):
        sweep.grid()
    with pytest.raises(ValueError, match="rate is 0; it must be greater than 0"):
        sweep.sample(root(), 3, log_uniform={"rate": (0, 1)})
    with pytest.raises(ValueError, match=r"rate is 0.1; it must be at least 0.5"):
        sweep.sample(root(), 3, uniform={"rate": (0.5, 0.1)})
    with pytest.raises(ValueError, match=r"point 1: rate is 3.0; it must be in \[0, 1\]"):
        sweep.check_points({"rate": [0.5, 3.0]}, Config())
    with pytest.raises(ValueError, match="points: name is 'rat'; it must be one of 'rate'"):
        sweep.check_points({"rat": [0.5]}, Config())
    sweep.check_points({"rate": [0.5, 1.0]}, Config())
    bare = Algorithm(init=jax.random.normal, step=lambda key, state: (state, {}))
    with pytest.raises(ValueError, match="makes a state without hyperparameters"):
        sweep.side_by_side(bare, {"rate": [1.0]}, 1, score)
    learners = sweep.side_by_side(make(Config()), {"rate": [0.1]}, 1, "rewrd")
    with pytest.raises(ValueError, match="score is 'rewrd'; it must be one of 'reward', 'seldom'"):
        jax.eval_shape(learners.step, root(), jax.eval_shape(learners.init, root()))


@pytest.mark.slow
def test_run_of_ppo_ranks_learning_rates_by_exact_value():
    """A rate of 0 leaves the uniform policy, whose value is known; one point is the plain run."""
    mdp = treatment.mdp()
    network = TabularActorCritic(mdp.num_states, mdp.num_actions)
    config = ppo.Config(num_environments=8, num_steps=16, num_iterations=20)

    def policy_value(params: Any) -> Array:
        policy, _ = network.apply(params, jnp.arange(mdp.num_states))
        return evaluate.exact_return(mdp, jax.nn.softmax(policy.logits))

    algorithm = partial(ppo.make, environment=treatment.make(), network=network)
    points = sweep.grid(learning_rate=[0.0, 0.05], gamma=[0.9])
    size: dict[str, Any] = {"num_seeds": 2, "num_steps": 20, "num_evaluations": 2}
    # It takes keys that a `vmap` over seeds hands to a scan for keys used twice.
    with jax.debug_key_reuse(False):
        ranking = sweep.run(
            algorithm(config),
            points,
            root(),
            score=lambda state: policy_value(state.train.params),
            **size,
        )
        plain = loop.run(
            loop.over_seeds(algorithm(replace(config, learning_rate=0.05, gamma=0.9)), 2),
            root(),
            num_steps=20,
            chunk_steps=10,
        )
    uniform, optimum = evaluate.exact_returns(
        mdp,
        {"uniform": jnp.full((5, 3), 1 / 3), "best": jnp.array([2, 1, 1, 1, 0])},
    ).values()
    np.testing.assert_allclose(ranking.score[0], uniform, rtol=1e-5)
    assert uniform + 0.5 * (optimum - uniform) < ranking.mean[1] < optimum
    assert ranking.best == {"learning_rate": 0.05, "gamma": 0.9}
    expected = jax.vmap(policy_value)(plain.train.params)
    np.testing.assert_allclose(ranking.score[1], expected, rtol=1e-3)
