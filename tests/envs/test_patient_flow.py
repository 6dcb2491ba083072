"""Patient flow: the simulator against exact probabilities, beds, and no patient lost."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from jaxrl_llm.envs import core, patient_flow
from jaxrl_llm.kernels import bellman
from jaxrl_llm.types import Box, Discrete

SMALL = {"num_ward_beds": 2, "num_icu_beds": 1, "max_queue": 2}


@pytest.fixture(scope="module")
def problem():
    return patient_flow.mdp(**SMALL)


@pytest.fixture(scope="module")
def states():
    return patient_flow.state_counts(**SMALL)


@pytest.fixture(scope="module")
def steps():
    """Many steps from one state: the counts after, and the rewards."""
    environment = patient_flow.make(**SMALL, max_steps=None)

    @jax.jit
    def run(key, counts, action):
        state = patient_flow.State(counts=counts, totals=jnp.zeros(4, jnp.int32))
        following, result = jax.vmap(environment.step, in_axes=(0, None, None, None))(
            jax.random.split(key, 20_000), state, action, environment.default_params
        )
        return following.counts, result.reward, result.info

    return run


def test_step_follows_the_law_of_the_mdp(problem, states, steps):
    """Chi-square of the successors, and the mean reward within four standard errors."""
    index = {tuple(row): state for state, row in enumerate(states.tolist())}
    full = index[1, 1, 1, 1, 0, 1]
    pairs = [(0, 0), (full, 0), (full, 6), (index[1, 1, 0, 1, 0, 0], 3)]
    pairs += [(index[1, 1, 1, 0, 0, 0], 1), (index[0, 2, 0, 1, 1, 0], 5)]
    pairs += [(index[0, 1, 1, 1, 0, 0], 4)]
    for seed, (state, action) in enumerate(pairs):
        counts, reward, _ = steps(jax.random.key(seed), jnp.asarray(states[state], int), action)
        seen = np.bincount(
            [index[tuple(row)] for row in np.asarray(counts).tolist()], minlength=len(states)
        )
        expected = np.asarray(problem.transition[state, action], np.float64) * len(reward)
        assert not seen[expected == 0].any()
        large = expected > 5
        cells = np.append(expected[large], expected[~large].sum())
        statistic = (
            (np.append(seen[large], seen[~large].sum()) - cells) ** 2 / np.maximum(cells, 1e-9)
        )[cells > 1].sum()
        assert statistic < chi2.ppf(1 - 1e-5, (cells > 1).sum() - 1), (state, action)
        error = np.std(reward) / np.sqrt(len(reward))
        difference = np.mean(reward) - float(problem.reward[state, action, 0])
        assert abs(difference) < 4 * error + 1e-5, (state, action)


def test_mdp_law_of_one_patient_by_hand(problem, states):
    """A stable patient alone in the ward of an hour without arrivals: 3 % worse, 15 % home."""
    index = {tuple(row): state for state, row in enumerate(states.tolist())}
    law = np.asarray(problem.transition[index[0, 0, 1, 0, 0, 0], 0])
    nobody = np.exp(-0.5) / sum(np.exp(-0.5) * 0.5**k / f for k, f in enumerate((1, 1, 2, 6, 24)))
    assert law[index[0, 0, 1, 0, 0, 0]] == pytest.approx(0.82 * nobody, rel=1e-5)
    assert law[index[0, 0, 0, 1, 0, 0]] == pytest.approx(0.03 * nobody, rel=1e-5)
    assert law[0] == pytest.approx(0.15 * nobody, rel=1e-5)


def test_mdp_never_exceeds_beds_and_masks_impossible_moves(problem, states):
    occupied = states.reshape(-1, 3, 2).sum(-1)
    assert (occupied <= [2, 2, 1]).all()
    assert len(np.unique(states, axis=0)) == len(states) == 108
    mask = np.asarray(problem.action_mask)
    queue, ward, icu = (states[:, slice(2 * place, 2 * place + 2)] for place in range(3))
    ward_free, icu_free = ward.sum(1) < 2, icu.sum(1) < 1
    expected = [
        np.ones(108, bool),
        (queue[:, 0] > 0) & ward_free,
        (queue[:, 1] > 0) & ward_free,
        (queue[:, 1] > 0) & icu_free,
        (ward[:, 1] > 0) & icu_free,
        (icu[:, 0] > 0) & ward_free,
        ward[:, 0] > 0,
    ]
    np.testing.assert_array_equal(mask, np.stack(expected, axis=1))
    # A move that is impossible is as good as none.
    hold = np.broadcast_to(problem.transition[:, :1], problem.transition.shape)
    np.testing.assert_array_equal(np.asarray(problem.transition)[~mask], hold[~mask])


def test_rollout_loses_no_patient_and_overfills_no_bed():
    """Any actions, allowed or not, in a hospital under pressure."""
    room = np.array([3, 4, 2])
    environment = patient_flow.make(
        num_ward_beds=4, num_icu_beds=2, max_queue=3, arrival_rate=2, max_steps=None
    )
    params = environment.default_params

    @jax.jit
    def run(keys, actions):
        def body(state, inputs):
            state, result = jax.vmap(environment.step, in_axes=(0, 0, 0, None))(
                inputs[0], state, inputs[1], params
            )
            return state, result.info

        start = jax.vmap(environment.reset, in_axes=(0, None))(keys[0], params)[0]
        return jax.lax.scan(body, start, (keys[1:], actions))[1]

    keys = jax.random.split(jax.random.key(0), (61, 64))
    info = run(keys, jax.random.randint(jax.random.key(1), (60, 64), 0, 7))
    counts, totals = np.asarray(info["counts"]), np.asarray(info["totals"])
    assert counts.min() >= 0
    occupied = counts.reshape(60, 64, 3, 2).sum(-1)
    assert (occupied <= room).all()
    assert (occupied == room).any(axis=(0, 1)).all()
    arrived, discharged, died, turned_away = np.moveaxis(totals, -1, 0)
    np.testing.assert_array_equal(arrived, counts.sum(-1) + discharged + died + turned_away)
    hourly = np.stack([info[name] for name in ("arrived", "discharged", "died", "turned_away")], -1)
    np.testing.assert_array_equal(np.cumsum(hourly, axis=0), totals)
    assert (totals[-1].sum(axis=0) > 100).all()


@pytest.mark.slow
def test_mdp_predicts_the_return_of_its_optimal_policy(problem, states):
    solved = bellman.value_iteration(problem)
    uniform = bellman.policy_evaluation(problem, bellman.uniform_policy(problem))
    hold = bellman.policy_evaluation(problem, jnp.zeros(len(states), int))
    # The numbers of this hospital: the best, at random among allowed actions, and none.
    np.testing.assert_allclose(
        [solved.value[0], uniform.value[0], hold.value[0]],
        [-10.2132, -17.8072, -30.7184],
        atol=1e-3,
    )
    environment = patient_flow.make(**SMALL, max_steps=None)
    table = jnp.asarray(states)

    def policy(noise, observation, mask):
        counts = jnp.round(observation * jnp.repeat(environment.default_params.room, 2)[None])
        state = jnp.argmax((counts[:, None] == table[None]).all(-1), axis=-1)
        return solved.policy[state], {}

    running = core.start_batch(environment, jax.random.key(0), 2000)
    _, batch = core.rollout(environment, policy, jax.random.key(1), running, num_steps=160)
    assert bool(jnp.take_along_axis(batch.extras["action_mask"], batch.action[..., None], -1).all())
    returns = np.asarray(0.95 ** np.arange(160) @ np.asarray(batch.reward, np.float64))
    error = returns.std() / np.sqrt(len(returns))
    assert abs(returns.mean() - float(solved.value[0])) < 4 * error + 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_ward_beds": 0}, "num_ward_beds is 0; it must be at least 1"),
        ({"arrival_rate": 0.0}, "arrival_rate is 0.0; it must be greater than 0"),
        ({"max_arrivals": 0}, "max_arrivals is 0; it must be at least 1"),
    ],
)
def test_make_refuses_hospitals_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        patient_flow.make(**options)


def test_mdp_refuses_a_hospital_too_large_to_list():
    with pytest.raises(ValueError, match="the hospital has 20250 states; at most 1500, drop beds"):
        patient_flow.mdp(num_ward_beds=8, num_icu_beds=3, max_queue=8)


def test_names_match_the_spaces():
    environment = patient_flow.make()
    assert environment.action_space == Discrete(num=len(patient_flow.action_names))
    size = len(patient_flow.observation_names)
    assert environment.observation_space == Box(shape=(size,), low=0.0, high=1.0)
