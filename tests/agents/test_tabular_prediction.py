"""Values learned from experience against the exact ones."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import make_mdp
from jaxrl_llm.agents import tabular_prediction as prediction
from jaxrl_llm.envs import random_walk
from tests import oracles

pytestmark = pytest.mark.slow

METHODS = {
    "TD(0)": {},
    "accumulating": {"lambda_": 0.6},
    "replacing": {"lambda_": 0.6, "trace": "replacing"},
    "dutch": {"lambda_": 0.6, "trace": "dutch"},
    "true online": {"method": "true_online", "lambda_": 0.6},
    "n-step": {"method": "n_step", "n": 3},
    "first visit": {"method": "first_visit"},
    "every visit": {"method": "every_visit"},
}
every_method = pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)


def train(config, mdp, policy, *, num_learners=1):
    algorithm = prediction.make(config, mdp, policy)

    @jax.jit
    def run(first, second):
        learners = jax.vmap(algorithm.init)(first)
        return jax.vmap(algorithm.step)(second, learners)[0]

    first, second = jax.random.split(jax.random.key(0))
    return run(jax.random.split(first, num_learners), jax.random.split(second, num_learners))


@every_method
def test_random_walk_is_learned(options):
    """V = i / 6, as the mean over 100 learners."""
    mdp = random_walk.mdp()
    config = prediction.Config(num_steps=3000, step_size=0.5, step_size_decay=0.5, **options)
    state = train(config, mdp, jnp.ones((7, 1)), num_learners=100)
    # First-visit means are unbiased; every-visit ones are consistent.
    np.testing.assert_allclose(state.value.mean(0)[1:-1], np.arange(1, 6) / 6, atol=0.02)
    np.testing.assert_array_equal(state.value[:, [0, -1]], 0)


def test_a_stochastic_policy_is_evaluated():
    config = prediction.Config(num_steps=4000, step_size=1.0, step_size_decay=0.5, lambda_=0.5)
    policy = jnp.array(oracles.M2_EVALUATED)
    state = train(config, oracles.two_state_mdp(), policy, num_learners=100)
    np.testing.assert_allclose(state.value.mean(0), oracles.M2_EVALUATED_VALUE, atol=0.3)


@every_method
def test_a_timeout_bootstraps(options):
    mdp = make_mdp(np.ones((1, 1, 1)), np.ones((1, 1)), 0.9)
    config = prediction.Config(num_steps=800, max_episode_steps=1, step_size=0.5, **options)
    monte_carlo = options.get("method", "").endswith("visit")
    # The mean of all targets keeps the early ones, so it comes near from below.
    low = 4.0 if monte_carlo else 9.99
    value = float(train(config, mdp, jnp.ones((1, 1))).value[0, 0])
    assert low < value < 10.01


def test_monte_carlo_is_the_mean_of_the_returns_of_its_visits():
    """A corridor: 3 steps that pay 1, 2 and 4, then the end."""
    leave = np.eye(4)
    transition = np.stack([leave[1], leave[2], leave[3], leave[3]])[:, None]
    mdp = make_mdp(
        transition, np.array([[1.0], [2.0], [4.0], [0.0]]), 0.5,
        initial=leave[0], terminal=np.arange(4) == 3,
    )  # fmt: skip
    for method in ("first_visit", "every_visit"):
        config = prediction.Config(method=method, num_steps=30)
        state = train(config, mdp, jnp.ones((4, 1)))
        np.testing.assert_allclose(state.value[0], [3, 4, 4, 0])
        np.testing.assert_array_equal(state.visits[0], [10, 10, 10, 0])


def test_first_and_every_visit_differ_as_the_book_says():
    """One state left with probability 1/2, paying 1 a step: both see the return 2 on average."""
    transition = np.array([[[0.5, 0.5]], [[0.0, 1.0]]])
    mdp = make_mdp(
        transition, np.ones((2, 1)), 1.0,
        initial=np.eye(2)[0], terminal=np.array([False, True]),
    )  # fmt: skip
    first, every = (
        train(
            prediction.Config(method=method, num_steps=4000), mdp, jnp.ones((2, 1)), num_learners=50
        )
        for method in ("first_visit", "every_visit")
    )
    for state in (first, every):
        np.testing.assert_allclose(state.value[:, 0].mean(), 2, atol=0.05)
    np.testing.assert_allclose(first.visits[:, 0].mean(), 2000, rtol=0.03)
    np.testing.assert_array_less(3990, every.visits[:, 0])


def test_wrong_arguments_are_named():
    mdp, policy = oracles.two_state_mdp(), jnp.full((2, 2), 0.5)
    with pytest.raises(ValueError, match=r"policy has shape \(2,\); it must be \(2, 2\)"):
        prediction.make(prediction.Config(), mdp, policy[0])
    with pytest.raises(ValueError, match=r"lambda_ is 2.0; it must be in \[0, 1\]"):
        prediction.make(replace(prediction.Config(), lambda_=2.0), mdp, policy)
