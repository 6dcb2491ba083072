"""Objectives against enumeration, Monte Carlo, published fronts and exactly solved problems."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.kernels import bellman, objectives
from tests import oracles

# Deep Sea Treasure: treasures and minus the time to reach each. On the first map the front is
# concave (Vamplew et al. 2011), on the second convex (Yang et al. 2019).
TIMES = -np.array([1.0, 3, 5, 7, 8, 9, 13, 14, 17, 19])
CONCAVE = np.array([1.0, 2, 3, 5, 8, 16, 24, 50, 74, 124])
CONVEX = np.array([0.7, 8.2, 11.5, 14.0, 15.1, 16.1, 19.6, 20.3, 22.4, 23.7])
CONVEX_HYPERVOLUME = 401.8  # at (0, -25)

hypervolume = jax.jit(objectives.hypervolume)


def front(treasure: np.ndarray) -> jax.Array:
    return jnp.stack([jnp.array(treasure), jnp.array(TIMES)], axis=1)


# Several objectives


def test_weighted_sum_misses_a_concave_front_and_chebyshev_finds_it(x64):
    share = jnp.linspace(0.0005, 0.9995, 1_000)
    weights = jnp.stack([share, 1 - share], axis=1)
    sums = jax.vmap(jax.vmap(objectives.weighted_sum, (0, None)), (None, 0))
    worst = jax.vmap(jax.vmap(objectives.chebyshev, (0, None, None)), (None, 0, None))

    def found(scores):
        return set(np.asarray(scores).argmax(axis=1).tolist())

    assert found(sums(front(CONCAVE), weights)) == {0, 9}
    assert found(worst(front(CONCAVE), weights, jnp.array([125.0, 0]))) == set(range(10))
    # All but one of the convex map, which lies just inside the hull of its neighbours.
    hull = found(sums(front(CONVEX), weights))
    assert len(hull) > 5
    assert {0, 9} < hull


def test_weighted_sum_and_chebyshev_are_worked_by_hand(x64):
    f, w, z = map(jnp.array, ([3.0, 1.0, 2.0], [0.5, 0.25, 0.25], [4.0, 4.0, 2.0]))
    assert objectives.weighted_sum(f, w) == 2.25
    # Shortfalls .5, .75, 0.
    assert objectives.chebyshev(f, w, z) == -0.75
    assert objectives.chebyshev(f, w, z, 0.1) == -0.75 - 0.125
    assert objectives.chebyshev(z, w, z) == 0


def test_chebyshev_augmented_refuses_a_weakly_optimal_point():
    better, weak = jnp.array([1.0, 2.0]), jnp.array([1.0, 0.5])
    weights, utopia = jnp.ones(2), jnp.array([5.0, 3.0])
    plain = [objectives.chebyshev(f, weights, utopia) for f in (better, weak)]
    assert plain[0] == plain[1]
    augmented = [objectives.chebyshev(f, weights, utopia, 1e-3) for f in (better, weak)]
    assert augmented[0] > augmented[1]


def naive_lexicographic(rows, thresholds, slack, mask):
    left = [index for index in range(len(rows)) if mask[index]]
    for column in range(rows.shape[1]):
        value = {index: min(rows[index, column], thresholds[column]) for index in left}
        best = max(value.values())
        left = [index for index in left if value[index] >= best - slack[column]]
    return left


def test_lexicographic_filter_is_the_naive_one():
    random = np.random.default_rng(0)
    function = jax.jit(objectives.lexicographic_filter)
    sizes = []
    for _ in range(40):
        rows = random.integers(4, size=(6, 3)).astype(np.float32)
        thresholds = random.choice([1.0, 2.0, np.inf], size=3).astype(np.float32)
        slack = random.choice([0.0, 1.0], size=3).astype(np.float32)
        mask = random.random(6) < 0.7
        mask[random.integers(6)] = True
        left = function(*map(jnp.array, (rows, thresholds, slack, mask)))
        expected = naive_lexicographic(rows, thresholds, slack, mask)
        np.testing.assert_array_equal(np.flatnonzero(left), expected)
        sizes.append(len(expected))
    assert 1 in sizes
    assert max(sizes) > 1


def test_lexicographic_filter_puts_safety_first():
    # Safety, comfort, price.
    rows = jnp.array([[0.99, 0.2, 1.0], [0.97, 0.9, 0.0], [0.70, 1.0, 9.0]])
    anything, exact = jnp.full(3, jnp.inf), jnp.zeros(3)
    strict = objectives.lexicographic_filter(rows, anything, exact)
    assert strict.tolist() == [True, False, False]
    safe_enough = objectives.lexicographic_filter(rows, jnp.array([0.95, jnp.inf, jnp.inf]), exact)
    assert safe_enough.tolist() == [False, True, False]
    slack = objectives.lexicographic_filter(rows, anything, jnp.array([0.05, 0, 0]))
    assert slack.tolist() == [False, True, False]


def test_pareto_filter_is_the_naive_one_and_keeps_equals():
    points = np.random.default_rng(1).integers(5, size=(60, 3)).astype(np.float32)
    points = np.concatenate([points, points[:5]])
    expected = [
        not any((other >= own).all() and (other > own).any() for other in points) for own in points
    ]
    kept = jax.jit(objectives.pareto_filter)(jnp.array(points))
    np.testing.assert_array_equal(kept, expected)
    assert 0 < sum(expected) < len(expected)
    assert objectives.pareto_filter(jnp.ones((3, 2))).all()
    assert objectives.pareto_filter(front(CONVEX)).all()
    assert objectives.pareto_filter(front(CONCAVE)).all()


def test_hypervolume_of_the_convex_deep_sea_treasure_is_the_published_one(x64):
    found = hypervolume(front(CONVEX), jnp.array([0.0, -25]))
    np.testing.assert_allclose(found, CONVEX_HYPERVOLUME, rtol=1e-12)


def inclusion_exclusion(corners: np.ndarray) -> float:
    total = 0.0
    for size in range(1, len(corners) + 1):
        for chosen in itertools.combinations(corners, size):
            total -= (-1) ** size * np.prod(np.min(chosen, axis=0))
    return total


@pytest.mark.parametrize("num_objectives", [1, 2, 3, 4])
def test_hypervolume_is_inclusion_and_exclusion(num_objectives, x64):
    random = np.random.default_rng(2)
    reference = random.normal(size=num_objectives)
    above = random.random((6, num_objectives))
    above[1] = above[0]  # an equal point
    above[2, -1] = above[3, -1]  # a tie
    below = reference - 0.5 * np.eye(num_objectives)[:1] + 0.9 * (1 - np.eye(num_objectives)[:1])
    points = np.concatenate([reference + above, below])
    found = hypervolume(jnp.array(points), jnp.array(reference))
    np.testing.assert_allclose(found, inclusion_exclusion(above), rtol=1e-10)
    # Neither the order nor what is dominated matters.
    again = hypervolume(jnp.array(points[::-1].copy()), jnp.array(reference))
    np.testing.assert_allclose(again, found, rtol=1e-12)


def test_hypervolume_is_the_share_of_random_points_dominated(x64):
    random = np.random.default_rng(3)
    points, samples = random.random((30, 3)), random.random((50_000, 3))
    share = np.zeros(len(samples), bool)
    for point in points:
        share |= (samples <= point).all(axis=1)
    found = hypervolume(jnp.array(points), jnp.zeros(3))
    np.testing.assert_allclose(found, share.mean(), atol=4 * 0.5 / np.sqrt(len(samples)))


@pytest.mark.slow
def test_hypervolume_of_nothing_is_nothing_and_gradients_are_side_areas(x64):
    assert hypervolume(jnp.zeros((0, 2)), jnp.zeros(2)) == 0
    assert hypervolume(-jnp.ones((3, 3)), jnp.zeros(3)) == 0
    points = jnp.array([[2.0, 1.0], [1.0, 3.0], [0.5, 0.5]])
    gradient = jax.grad(objectives.hypervolume)(points, jnp.zeros(2))
    np.testing.assert_allclose(gradient, [[1, 1], [2, 1], [0, 0]])


# The scale of rewards


def test_running_moments_of_batches_are_those_of_the_whole_stream():
    """In float32, where sums of squares around 10,000 would lose a spread of 1 altogether."""
    random = np.random.default_rng(4)
    stream = (1e4 + random.normal(size=(500, 2)) * [1, 5]).astype(np.float32)
    moments, update = (
        objectives.RunningMoments.empty((2,)),
        jax.jit(objectives.RunningMoments.update),
    )
    for batch in (stream[:1], stream[1:101], stream[101:102], stream[102:500]):
        moments = update(moments, jnp.array(batch))
    assert moments.weight == 500
    exact = stream.astype(np.float64)
    np.testing.assert_allclose(moments.mean, exact.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(moments.deviation, exact.std(axis=0), rtol=1e-3)
    whole = moments.standardise(jnp.array(stream))
    np.testing.assert_allclose(whole.mean(axis=0), np.zeros(2), atol=5e-3)
    np.testing.assert_allclose(whole.std(axis=0), np.ones(2), rtol=1e-3)
    scaled = moments.scale(jnp.array(stream))
    np.testing.assert_allclose(scaled, stream / np.asarray(moments.deviation), rtol=1e-6)


def test_running_moments_merge_in_any_order(x64):
    values = jnp.array(np.random.default_rng(5).normal(size=20))
    empty = objectives.RunningMoments.empty()
    first, second = empty.update(values[:7]), empty.update(values[7:])
    for merged in (first.merge(second), second.merge(first), empty.update(values)):
        np.testing.assert_allclose(merged.mean, values.mean(), rtol=1e-12)
        np.testing.assert_allclose(merged.deviation, values.std(), rtol=1e-12)
    np.testing.assert_array_equal(first.merge(empty), first)


def test_running_moments_without_spread_leave_the_scale():
    empty = objectives.RunningMoments.empty()
    assert empty.standardise(jnp.array(3.0)) == 3
    constant = empty.update(jnp.full(5, 2.0))
    assert constant.scale(jnp.array(3.0)) == 3
    assert constant.standardise(jnp.array(3.0)) == 1
    slope = jax.grad(lambda x: constant.update(x).deviation)(jnp.full(2, 2.0))
    assert np.isfinite(slope).all()


def test_clip_reward_and_signed_log_with_its_inverse(x64):
    reward = jnp.array([-100.0, -0.5, 0, 1e-9, 2, 1e6])
    np.testing.assert_array_equal(objectives.clip_reward(reward, 1.0), np.clip(reward, -1, 1))
    small = objectives.signed_log(reward)
    np.testing.assert_allclose(small[-1], np.log(1e6 + 1), rtol=1e-12)
    np.testing.assert_allclose(objectives.signed_exp(small), reward, rtol=1e-12)
    np.testing.assert_allclose(objectives.signed_log(-reward), -small)
    slope = jax.vmap(jax.grad(objectives.signed_log))(reward[jnp.array([0, 1, 4])])
    np.testing.assert_allclose(slope, 1 / (1 + np.array([100, 0.5, 2])), rtol=1e-12)


# Shaping


@pytest.mark.slow
@pytest.mark.parametrize(
    "mdp",
    [
        oracles.treatment_mdp,
        lambda: oracles.random_mdp(6, 7, 3, 0.9, masked=True),
        lambda: oracles.terminal_mdp(7, 6, 3),
    ],
    ids=["treatment", "random", "terminal"],
)
def test_shaping_reward_moves_q_by_the_potential_and_keeps_the_policy(mdp, x64):
    """Solved exactly with a random potential, terminal states' included: Q' = Q - Phi."""
    mdp = mdp()
    potential = jnp.array(np.random.default_rng(8).normal(size=mdp.num_states) * 20)
    shape = (mdp.num_states, mdp.num_actions, mdp.num_states)
    discount = mdp.discount * (1 - mdp.terminal)
    shaping = objectives.shaping_reward(
        jnp.broadcast_to(potential[:, None, None], shape),
        jnp.broadcast_to(potential, shape),
        jnp.broadcast_to(discount, shape),
    )
    solve = jax.jit(bellman.policy_iteration)
    plain, shaped = solve(mdp), solve(replace(mdp, reward=mdp.reward + shaping))
    assert plain.converged
    assert shaped.converged
    alive = ~np.asarray(mdp.terminal)
    allowed = np.asarray(mdp.action_mask) & alive[:, None]
    moved = plain.q - potential[:, None]
    np.testing.assert_allclose(shaped.q[allowed], moved[allowed], atol=1e-8)
    np.testing.assert_array_equal(shaped.policy[alive], plain.policy[alive])


def test_shaping_reward_telescopes_along_an_episode(x64):
    potential = jnp.array(np.random.default_rng(9).normal(size=5))
    discount = jnp.array([0.9, 0.9, 0.9, 0.0])
    shaping = objectives.shaping_reward(potential[:-1], potential[1:], discount)
    total = np.sum(0.9 ** np.arange(4) * shaping)
    np.testing.assert_allclose(total, -potential[0], rtol=1e-12)
    # A timeout is not the end: the potential that is left counts.
    shaping = objectives.shaping_reward(potential[:-1], potential[1:], jnp.full(4, 0.9))
    total = np.sum(0.9 ** np.arange(4) * shaping)
    np.testing.assert_allclose(total, 0.9**4 * potential[4] - potential[0], rtol=1e-12)
