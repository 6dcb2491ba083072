"""ICU-Sepsis: exact survival, length and identities, and that the environment follows them."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import core, icu_sepsis
from jaxrl_llm.kernels import bellman
from jaxrl_llm.types import Solution
from tests import oracles

ICU = icu_sepsis.DEATH  # states 0 to 712


class Exact(NamedTuple):
    """Of one discount: values `[S]` by policy, and two solutions, masked and not."""

    value: dict[str, Any]
    length: dict[str, Any]
    solution: Solution
    unmasked: Solution


@jax.jit
def solve(problem):
    """Everything asked about one problem, compiled once a dtype."""
    solution = bellman.policy_iteration(problem)
    unmasked = bellman.policy_iteration(
        problem.replace(action_mask=jnp.ones_like(problem.action_mask))
    )
    policies = {
        "random": bellman.uniform_policy(problem),
        "random over 25": jnp.full(problem.action_mask.shape, 1 / 25, problem.discount.dtype),
        "expert": icu_sepsis.expert_policy().astype(problem.discount.dtype),
        "optimal": jax.nn.one_hot(solution.policy, 25, dtype=problem.discount.dtype),
    }
    steps = problem.replace(
        reward=jnp.ones_like(problem.reward), discount=jnp.ones_like(problem.discount)
    )

    def evaluate(problem):
        return {
            name: bellman.policy_evaluation(problem, policy).value
            for name, policy in policies.items()
        }

    return Exact(evaluate(problem), evaluate(steps), solution, unmasked)


def exact(problem, discount):
    return jax.device_get(solve(problem.replace(discount=jnp.asarray(discount, float))))


@pytest.fixture(scope="module")
def problem():
    with jax.enable_x64(True):
        return bellman.successor_form(icu_sepsis.mdp())


@pytest.fixture(scope="module")
def undiscounted(problem):
    with jax.enable_x64(True):
        return exact(problem, 1.0)


@pytest.fixture(scope="module")
def environment():
    return icu_sepsis.make()


@pytest.mark.slow
def test_policies_have_the_published_survival(undiscounted):
    initial = icu_sepsis.data().initial
    assert undiscounted.value["random"].dtype == np.float64
    for name, survival in oracles.ICU_SEPSIS_RETURN.items():
        np.testing.assert_allclose(initial @ undiscounted.value[name], survival, atol=5e-5)
        np.testing.assert_allclose(
            initial @ undiscounted.length[name], oracles.ICU_SEPSIS_LENGTH[name], atol=5e-5
        )


@pytest.mark.slow
def test_policies_have_the_published_discounted_survival(problem):
    with jax.enable_x64(True):
        discounted = exact(problem, 0.99)
    initial = icu_sepsis.data().initial
    for name, survival in oracles.ICU_SEPSIS_DISCOUNTED_RETURN.items():
        np.testing.assert_allclose(initial @ discounted.value[name], survival, atol=5e-5)


@pytest.mark.slow
def test_policies_have_the_same_values_in_float32(problem, undiscounted):
    single = jax.tree.map(
        lambda leaf: leaf.astype(np.float32) if leaf.dtype == np.float64 else leaf,
        jax.device_get(problem),
    )
    found = exact(jax.tree.map(jnp.asarray, single), 1.0)
    assert found.value["random"].dtype == np.float32
    assert bool(found.solution.converged)
    for name, value in undiscounted.value.items():
        np.testing.assert_allclose(found.value[name], value, rtol=0, atol=1e-5)
        np.testing.assert_allclose(found.length[name], undiscounted.length[name], rtol=2e-5)


def test_random_policy_agrees_with_a_linear_solve(undiscounted):
    arrays = icu_sepsis.data()
    policy = arrays.admissible / arrays.admissible.sum(axis=1, keepdims=True)
    chain = np.einsum("sa,sat->st", policy[:ICU], arrays.transition[:ICU])
    value = np.linalg.solve(np.eye(ICU) - chain[:, :ICU], chain[:, icu_sepsis.SURVIVAL])
    np.testing.assert_allclose(undiscounted.value["random"][:ICU], value, atol=1e-12)


def test_random_over_all_actions_equals_random_over_admissible_ones(undiscounted):
    np.testing.assert_allclose(
        undiscounted.value["random over 25"], undiscounted.value["random"], atol=1e-12
    )


def test_optimum_over_all_actions_equals_that_over_admissible_ones(undiscounted):
    assert bool(undiscounted.unmasked.converged)
    np.testing.assert_allclose(undiscounted.unmasked.value, undiscounted.solution.value, atol=1e-12)


def test_policy_iteration_stops_in_spite_of_ties(undiscounted):
    solution = undiscounted.solution
    assert bool(solution.converged)
    assert 1 <= int(solution.iterations) <= 10
    # Without the mask the lowest index among equals is inadmissible in 17% of the states.
    states = np.arange(ICU)
    greedy = solution.q[:ICU].argmax(axis=1)
    admissible = icu_sepsis.data().admissible
    assert 0.165 < (~admissible[states, greedy]).mean() < 0.175
    assert admissible[states, solution.policy[:ICU]].all()


def test_data_has_the_documented_admissible_actions():
    admissible = icu_sepsis.data().admissible
    assert admissible.shape == (716, 25)
    # 2238 pairs over the 713 ICU states; the three states behind them allow every action.
    assert admissible[:ICU].sum() == oracles.ICU_SEPSIS_ADMISSIBLE_PAIRS
    np.testing.assert_allclose(admissible[:ICU].sum(axis=1).mean(), 3.139, atol=5e-4)
    assert admissible[:ICU].any(axis=1).all()
    assert admissible[ICU:].all()


def test_data_gives_inadmissible_actions_the_mean_of_the_admissible_ones():
    arrays = icu_sepsis.data()
    for state in (0, 100, 712):
        allowed = arrays.admissible[state]
        mean = arrays.transition[state, allowed].mean(axis=0)
        others = arrays.transition[state, ~allowed]
        np.testing.assert_allclose(others, np.broadcast_to(mean, others.shape), atol=1e-9)


def test_data_rewards_survival_alone_and_never_starts_there():
    arrays = icu_sepsis.data()
    possible = arrays.transition[:ICU] > 0
    rewards = arrays.reward[:ICU]
    survival = np.arange(716) == icu_sepsis.SURVIVAL
    assert (rewards[..., survival][possible[..., survival]] == 1).all()
    assert (rewards[..., ~survival][possible[..., ~survival]] == 0).all()
    assert not possible[..., icu_sepsis.ABSORBING].any()
    assert arrays.initial[ICU:].sum() == 0


def test_expert_policy_is_a_distribution_with_inadmissible_mass(problem):
    arrays = icu_sepsis.data()
    policy = np.asarray(icu_sepsis.expert_policy(), np.float64)
    np.testing.assert_allclose(policy.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(policy[ICU:], 1 / 25, rtol=1e-6)
    chain = np.einsum("sa,sat->st", policy[:ICU], arrays.transition[:ICU])[:, :ICU]
    visits = np.linalg.solve(np.eye(ICU) - chain.T, arrays.initial[:ICU])
    inadmissible = (policy[:ICU] * ~arrays.admissible[:ICU]).sum(axis=1)
    np.testing.assert_allclose(visits @ inadmissible / visits.sum(), 0.121, atol=5e-4)


def test_data_says_how_to_install_the_package(monkeypatch):
    monkeypatch.setattr(icu_sepsis, "find_spec", lambda name: None)
    message = re.escape("icu_sepsis is not installed; run: pip install icu-sepsis")
    with pytest.raises(ModuleNotFoundError, match=message):
        icu_sepsis.data.__wrapped__()


def test_names_match_the_arrays():
    assert len(icu_sepsis.state_names) == 716
    assert icu_sepsis.state_names[icu_sepsis.SURVIVAL] == "Survival"
    assert len(icu_sepsis.action_names) == 25
    assert icu_sepsis.action_names[13] == "Fluid 2, vasopressor 3"


def test_mdp_refuses_an_unknown_strategy():
    unknown: Any = "ignore"
    message = re.escape("inadmissible is 'ignore'; it must be one of 'mean', 'terminate', 'raise'")
    with pytest.raises(ValueError, match=message):
        icu_sepsis.mdp(inadmissible=unknown)


@pytest.mark.slow
def test_mdp_that_terminates_punishes_inadmissible_actions_alone(undiscounted):
    problem = icu_sepsis.mdp(inadmissible="terminate")
    admissible = icu_sepsis.data().admissible
    to_death = np.asarray(problem.transition[..., icu_sepsis.DEATH])
    np.testing.assert_array_equal(to_death[~admissible], 1)
    assert not np.asarray(problem.expected_reward())[~admissible].any()
    uniform = jnp.full((716, 25), 1 / 25)
    masked = bellman.policy_evaluation(problem, bellman.uniform_policy(problem)).value
    unmasked = bellman.policy_evaluation(problem, uniform).value
    np.testing.assert_allclose(masked, undiscounted.value["random"], atol=1e-5)
    # Of 25 actions 22 are deadly on average, whereas masked 78% survive.
    assert float(problem.initial @ unmasked) < 0.2


def rollout(environment, *, num_environments, num_steps, admissible_only=True):
    def policy(key, observation, action_mask):
        allowed = action_mask if admissible_only else jnp.ones_like(action_mask)
        return jax.random.categorical(key, jnp.where(allowed, 0.0, -jnp.inf)), {}

    @jax.jit
    def collect(key):
        start_key, rollout_key = jax.random.split(key)
        running = core.start_batch(environment, start_key, num_environments)
        return core.rollout(environment, policy, rollout_key, running, num_steps=num_steps)[1]

    return jax.device_get(collect(jax.random.key(0)))


@pytest.mark.slow
def test_make_lets_a_random_policy_survive_as_often_as_computed(environment):
    num_episodes = 4000
    batch = rollout(environment, num_environments=num_episodes, num_steps=150)
    assert batch.terminated.any(axis=0).all()
    # The first episode of each environment: later ones would favour short episodes.
    end = batch.terminated.argmax(axis=0)
    episodes = np.arange(num_episodes)
    survived = batch.reward[end, episodes]
    last = batch.next_observation[end, episodes]
    np.testing.assert_array_equal(survived, last == icu_sepsis.SURVIVAL)
    np.testing.assert_array_equal(survived == 0, last == icu_sepsis.DEATH)
    survival = oracles.ICU_SEPSIS_RETURN["random"]
    error = np.sqrt(survival * (1 - survival) / num_episodes)
    assert abs(survived.mean() - survival) < 4 * error
    length = end + 1
    error = length.std() / np.sqrt(num_episodes)
    assert abs(length.mean() - oracles.ICU_SEPSIS_LENGTH["random"]) < 4 * error


@pytest.mark.slow
def test_make_reports_the_mask_and_the_sofa_score(environment):
    batch = rollout(environment, num_environments=8, num_steps=10)
    arrays = icu_sepsis.data()
    np.testing.assert_array_equal(batch.extras["action_mask"], arrays.admissible[batch.observation])
    state, _ = environment.reset(jax.random.key(1), environment.default_params)
    action = jnp.argmax(environment.action_mask(state, environment.default_params))
    _, time_step = environment.step(jax.random.key(2), state, action, environment.default_params)
    assert set(time_step.info) == {"action_mask", "sofa_score"}
    reached = int(time_step.observation)
    np.testing.assert_array_equal(time_step.info["action_mask"], arrays.admissible[reached])
    assert time_step.info["action_mask"].shape == (25,)
    np.testing.assert_allclose(time_step.info["sofa_score"], arrays.sofa_score[reached], rtol=1e-6)


@pytest.mark.slow
def test_make_truncates_after_500_steps(environment):
    params = environment.default_params
    state, _ = environment.reset(jax.random.key(0), params)
    keys = jax.random.split(jax.random.key(1), 64)

    @jax.vmap
    def step(key):
        late = state.replace(time=jnp.int32(499))
        early = state.replace(time=jnp.int32(498))
        return [
            environment.step(jax.random.clone(key), timed, jnp.int32(0), params)[1]
            for timed in (early, late)
        ]

    early, late = step(keys)
    assert not early.truncated.any()
    np.testing.assert_array_equal(late.truncated, ~late.terminated)
    assert late.truncated.any()


@pytest.mark.slow
def test_make_that_terminates_kills_on_inadmissible_actions():
    environment = icu_sepsis.make(inadmissible="terminate", max_steps=None)
    batch = rollout(environment, num_environments=64, num_steps=8, admissible_only=False)
    admissible = icu_sepsis.data().admissible[batch.observation, batch.action]
    np.testing.assert_array_equal(batch.next_observation[~admissible], icu_sepsis.DEATH)
    assert batch.terminated[~admissible].all()
    assert not batch.reward[~admissible].any()


@pytest.mark.slow
def test_make_that_raises_reports_inadmissible_actions():
    environment = icu_sepsis.make(inadmissible="raise", max_steps=None)
    params = environment.default_params
    allowed = icu_sepsis.data().admissible[0]

    @jax.vmap
    def report(action):
        return environment.step(jax.random.key(0), jnp.int32(0), action, params)[1].info

    inadmissible = report(jnp.arange(25))["inadmissible"]
    np.testing.assert_array_equal(inadmissible, ~allowed)
