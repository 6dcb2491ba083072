"""Targets and losses of deep Q-learning and SAC against NumPy, exact optima and closed forms."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxrl_llm.kernels import policy_gradient, returns, soft_bellman, value_learning
from tests import oracles

GAMMA = 0.9
MASK = np.array([True, False, True, True])
# The soft optimum of one state with r = -4 (a - .5)^2 on [-1, 1] at temperature 1, by quadrature.
CONTINUOUS_SOFT_VALUE, CONTINUOUS_MEAN_ACTION = -0.202709, 0.443700


def random_arrays(seed: int, *shape: int) -> jax.Array:
    return jnp.array(np.random.default_rng(seed).normal(size=shape))


# Targets


@pytest.mark.parametrize("mask", [None, MASK], ids=["unmasked", "masked"])
def test_double_q_learning_target_of_one_network_is_the_single_one(mask, x64):
    q, target = random_arrays(0, 2, 4)
    reward, discount = jnp.array(1.0), jnp.array(GAMMA)
    keep = np.ones(4, bool) if mask is None else mask
    mask = None if mask is None else jnp.array(mask)
    single = value_learning.q_learning_target(reward, discount, target, mask)
    np.testing.assert_allclose(single, 1 + GAMMA * np.asarray(target)[keep].max(), rtol=1e-12)
    same = value_learning.double_q_learning_target(reward, discount, target, target, mask)
    assert same == single
    double = value_learning.double_q_learning_target(reward, discount, q, target, mask)
    choice = np.flatnonzero(keep)[np.asarray(q)[keep].argmax()]
    np.testing.assert_allclose(double, 1 + GAMMA * float(target[choice]), rtol=1e-12)


def test_targets_are_constants_without_gradient(x64):
    reward, discount, q = jnp.array(1.0), jnp.array(GAMMA), random_arrays(1, 4)
    window = (jnp.ones(3), jnp.full(3, GAMMA), jnp.array([False, False, True]))
    for function, argument in (
        (lambda q: value_learning.q_learning_target(reward, discount, q), q),
        (lambda q: value_learning.double_q_learning_target(reward, discount, q, 2 * q), q),
        (lambda v: value_learning.soft_q_target(reward, discount, v), q[0]),
        (lambda r: value_learning.n_step_target_parts(r, *window[1:]).return_, window[0]),
        (lambda d: value_learning.n_step_target_parts(window[0], d, window[2]).discount, window[1]),
    ):
        np.testing.assert_array_equal(jax.grad(function)(argument), jnp.zeros_like(argument))


def naive_parts(reward, terminated, truncated):
    """Walks through the window, one step after another, until an episode ends."""
    total, discount, step = 0.0, 1.0, 0
    for step in range(len(reward)):
        total += discount * reward[step]
        discount *= 0.0 if terminated[step] else GAMMA
        if terminated[step] or truncated[step]:
            break
    return total, discount, step


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_n_step_target_parts_cut_at_the_first_reset_of_every_pattern(n, x64):
    """Every pattern of going on, dying and running out of time."""
    ends = np.array(list(itertools.product(range(3), repeat=n)))
    terminated, truncated = ends == 1, ends == 2
    reward = np.random.default_rng(2).normal(size=ends.shape)
    compute = jax.jit(jax.vmap(value_learning.n_step_target_parts))
    arrays = (reward, GAMMA * (1 - terminated), terminated | truncated)
    parts = compute(*map(jnp.array, arrays))
    expected = [naive_parts(*row) for row in zip(reward, terminated, truncated, strict=True)]
    for found, known in zip(parts, zip(*expected, strict=True), strict=True):
        np.testing.assert_allclose(found, known, rtol=1e-12)
    assert parts.last.dtype == jnp.int32
    # A window cut by time alone bootstraps, however early: only a death has nothing to follow.
    died = np.array([terminated[row, last] for row, last in enumerate(parts.last)])
    np.testing.assert_array_equal(np.asarray(parts.discount) == 0, died)
    np.testing.assert_allclose(parts.discount[~died], GAMMA ** (parts.last[~died] + 1.0))


def test_n_step_target_parts_make_the_n_step_return(x64):
    n, reset = 4, jnp.array([False, False, True, False])
    reward, next_value = random_arrays(3, 2, n)
    discount = jnp.full(n, GAMMA)
    parts = value_learning.n_step_target_parts(reward, discount, reset)
    target = parts.return_ + parts.discount * next_value[parts.last]
    expected = returns.n_step_returns(reward, discount, next_value, reset, n=n)[0]
    np.testing.assert_allclose(target, expected, rtol=1e-12)
    # One step is Q-learning.
    q = random_arrays(4, 3)
    one = value_learning.n_step_target_parts(reward[:1], discount[:1], reset[:1])
    np.testing.assert_allclose(
        value_learning.q_learning_target(one.return_, one.discount, q),
        value_learning.q_learning_target(reward[0], discount[0], q),
        rtol=1e-12,
    )


# Losses of an error


def test_huber_loss_is_squared_inside_and_its_tangent_outside(x64):
    error = jnp.linspace(-4, 4, 33)
    for delta in (0.5, 1.0, 2.5):
        size = np.abs(np.asarray(error))
        expected = np.where(size <= delta, size**2 / 2, delta * size - delta**2 / 2)
        np.testing.assert_allclose(value_learning.huber_loss(error, delta), expected, rtol=1e-12)
        slope = jax.vmap(jax.grad(value_learning.huber_loss), in_axes=(0, None))(error, delta)
        np.testing.assert_allclose(slope, np.clip(error, -delta, delta), atol=1e-12)
    wide = value_learning.huber_loss(error, 1e9)
    np.testing.assert_allclose(wide, value_learning.squared_loss(error), rtol=1e-12)
    np.testing.assert_allclose(value_learning.squared_loss(error), np.asarray(error) ** 2 / 2)


# Entropy-regularised values


@pytest.mark.parametrize("mask", [None, MASK], ids=["unmasked", "masked"])
def test_soft_value_is_the_mean_plus_the_entropy(mask, x64):
    q, logits = np.array(random_arrays(5, 2, 4))
    keep = np.ones(4, bool) if mask is None else mask
    probability = np.exp(logits[keep]) / np.exp(logits[keep]).sum()
    expected = probability @ (q[keep] - 0.7 * np.log(probability))
    q[~keep] = np.inf  # whatever stands where nothing may be done
    mask = None if mask is None else jnp.array(mask)
    found = value_learning.soft_value(jnp.array(q), jnp.array(logits), 0.7, mask)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("mask", [None, MASK], ids=["unmasked", "masked"])
def test_soft_value_is_largest_at_the_soft_optimum(mask, x64):
    q = random_arrays(6, 4)
    mask = None if mask is None else jnp.array(mask)
    for temperature in (0.05, 1.0, 20.0):
        best = value_learning.soft_value(q, q / temperature, temperature, mask)
        expected = soft_bellman.soft_value(q, temperature, mask)
        np.testing.assert_allclose(best, expected, rtol=1e-10)
        other = value_learning.soft_value(q, random_arrays(7, 4), temperature, mask)
        assert other < best
    greedy = value_learning.soft_value(q, q / 1e-4, 1e-4, mask)
    np.testing.assert_allclose(greedy, jnp.max(q, where=mask, initial=-9.0), atol=1e-3)


def test_soft_value_of_masked_actions_is_finite_at_any_temperature():
    """In float32 a large temperature times the masked log-probability would overflow to 0 · inf."""
    q, logits, mask = jnp.array([1.0, jnp.nan, 3.0]), jnp.zeros(3), jnp.array([True, False, True])
    value, gradients = jax.value_and_grad(value_learning.soft_value, argnums=(0, 1, 2))(
        q, logits, jnp.float32(100), mask
    )
    np.testing.assert_allclose(value, 2 + 100 * np.log(2), rtol=1e-6)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
    np.testing.assert_allclose(gradients[0], [0.5, 0, 0.5])


def test_soft_q_target_has_the_exact_optimum_for_its_fixed_point(x64):
    """Expected SAC targets with the softmax policy of Q, swept over two states."""
    mdp, temperature = oracles.two_state_mdp(), 1.0
    reward = jnp.array(oracles.M2_REWARD)

    def sweep(_, q):
        value = jax.vmap(value_learning.soft_value, in_axes=(0, 0, None))(
            q, q / temperature, temperature
        )
        # Axes: state, action, next state.
        target = value_learning.soft_q_target(
            jnp.broadcast_to(reward[..., None], (2, 2, 2)),
            jnp.broadcast_to(mdp.discount, (2, 2, 2)),
            jnp.broadcast_to(value, (2, 2, 2)),
        )
        return jnp.sum(mdp.transition * target, axis=-1)

    q = jax.lax.fori_loop(0, 300, sweep, jnp.zeros((2, 2)))
    np.testing.assert_allclose(q, oracles.M2_SOFT_Q, atol=1e-4)
    exact = soft_bellman.soft_value_iteration(mdp, temperature=temperature, tolerance=1e-12)
    np.testing.assert_allclose(q, exact.q, atol=1e-9)


# Actors and temperature


def test_sac_actor_loss_is_least_at_the_soft_optimum_of_a_continuous_state(x64):
    """pi* = exp((Q - V*) / temperature), where the loss is -V* at every action."""
    point, weight = np.polynomial.legendre.leggauss(200)
    action, q = jnp.array(point), jnp.array(-4 * (point - 0.5) ** 2)
    value = np.log(weight @ np.exp(q))
    np.testing.assert_allclose(value, CONTINUOUS_SOFT_VALUE, atol=1e-6)
    log_best = q - value
    np.testing.assert_allclose(
        weight @ (np.exp(log_best) * action), CONTINUOUS_MEAN_ACTION, atol=1e-6
    )
    np.testing.assert_allclose(
        value_learning.sac_actor_loss(log_best, q, 1.0), np.full(200, -value), atol=1e-10
    )
    # Any other density pays its divergence from pi*.
    for log_other in (np.full(200, -np.log(2)), np.log((1 + point) / 2)):
        density = weight * np.exp(log_other)
        loss = density @ value_learning.sac_actor_loss(jnp.array(log_other), q, 1.0)
        divergence = density @ (log_other - np.asarray(log_best))
        np.testing.assert_allclose(loss, -value + divergence, rtol=1e-10)
        assert divergence > 0.01


def test_sac_actor_loss_differentiates_through_the_action(x64):
    """a = m + s e of a Gaussian, Q = -a^2: E[loss] = -T (log s + c) + m^2 + s^2."""
    noise = jnp.array(np.polynomial.hermite_e.hermegauss(40)[0])
    weight = jnp.array(np.polynomial.hermite_e.hermegauss(40)[1] / np.sqrt(2 * np.pi))

    def loss(mean, deviation, temperature):
        action = mean + deviation * noise
        log_probability = jax.scipy.stats.norm.logpdf(action, mean, deviation)
        return weight @ value_learning.sac_actor_loss(
            log_probability, -jnp.square(action), temperature
        )

    gradient = jax.grad(loss, argnums=(0, 1, 2))(0.3, 0.8, 0.5)
    np.testing.assert_allclose(gradient, [2 * 0.3, 2 * 0.8 - 0.5 / 0.8, 0], atol=1e-10)


@pytest.mark.parametrize("mask", [None, MASK], ids=["unmasked", "masked"])
def test_sac_discrete_actor_loss_descends_the_divergence_from_the_optimum(mask, x64):
    q, logits = random_arrays(8, 2, 4)
    temperature, mask = jnp.array(0.6), None if mask is None else jnp.array(mask)
    arguments = (logits, q, temperature, mask)
    loss, gradients = jax.value_and_grad(value_learning.sac_discrete_actor_loss, argnums=(0, 1, 2))(
        *arguments
    )
    divergence = policy_gradient.kl_divergence(logits, q / temperature, mask)
    best = soft_bellman.soft_value(q, temperature, mask)
    np.testing.assert_allclose(loss, temperature * divergence - best, rtol=1e-10)
    expected = jax.grad(policy_gradient.kl_divergence)(logits, q / temperature, mask)
    np.testing.assert_allclose(gradients[0], temperature * expected, atol=1e-12)
    assert not gradients[1].any()
    assert gradients[2] == 0
    at_best = jax.grad(value_learning.sac_discrete_actor_loss)(
        q / temperature, q, temperature, mask
    )
    np.testing.assert_allclose(at_best, np.zeros(4), atol=1e-12)
    check_grads(
        lambda x: value_learning.sac_discrete_actor_loss(x, *arguments[1:]), (logits,), order=1
    )


def test_temperature_loss_falls_where_the_policy_is_too_random(x64):
    for entropy, target in ((1.2, 0.5), (0.2, 0.5), (-3.0, -2.0)):
        loss, slope = jax.value_and_grad(value_learning.temperature_loss)(
            jnp.log(0.3), jnp.array(entropy), target
        )
        np.testing.assert_allclose(loss, 0.3 * (entropy - target), rtol=1e-12)
        # A descent step lowers log temperature exactly where the entropy exceeds its target.
        assert np.sign(slope) == np.sign(entropy - target)
    held = jax.grad(value_learning.temperature_loss, argnums=(1, 2))(0.0, 1.2, 0.5)
    assert held == (0, 0)


def test_temperature_loss_finds_the_temperature_of_the_target_entropy(x64):
    q, target = random_arrays(9, 4), 0.9

    def descend(_, log_temperature):
        entropy = policy_gradient.entropy(q / jnp.exp(log_temperature))
        slope = jax.grad(value_learning.temperature_loss)(log_temperature, entropy, target)
        return log_temperature - slope

    log_temperature = jax.lax.fori_loop(0, 500, descend, jnp.array(0.0))
    entropy = policy_gradient.entropy(q / jnp.exp(log_temperature))
    np.testing.assert_allclose(entropy, target, atol=1e-9)


# Quantiles


def naive_quantile_huber_loss(quantiles, targets, levels, delta):
    total = 0.0
    for quantile, level in zip(quantiles, levels, strict=True):
        for target in targets:
            error = target - quantile
            size = abs(error)
            huber = size**2 / 2 if size <= delta else delta * (size - delta / 2)
            weight = level if error >= 0 else 1 - level
            total += weight * huber / delta / len(targets)
    return total


def test_quantile_huber_loss_is_the_naive_double_sum(x64):
    quantiles, targets = random_arrays(10, 3), random_arrays(11, 5)
    levels = jnp.array([0.1, 0.5, 0.8])
    for delta in (1.0, 0.3):
        expected = naive_quantile_huber_loss(
            *map(np.asarray, (quantiles, targets, levels)), delta=delta
        )
        loss, gradients = jax.value_and_grad(value_learning.quantile_huber_loss, argnums=(0, 1))(
            quantiles, targets, levels, delta
        )
        np.testing.assert_allclose(loss, expected, rtol=1e-12)
        assert not gradients[1].any()


def test_quantile_huber_loss_converges_to_the_quantiles(x64):
    """Descent on the whole sample: each quantile stops where a share tau lies below it."""
    sample = np.sort(np.random.default_rng(12).exponential(size=999))
    levels = np.array([0.05, 0.25, 0.5, 0.9])

    def descend(_, quantiles):
        slope = jax.grad(value_learning.quantile_huber_loss)(
            quantiles, jnp.array(sample), jnp.array(levels), 0.02
        )
        return quantiles - 0.5 * slope

    found = jax.jit(lambda: jax.lax.fori_loop(0, 1_000, descend, jnp.ones(4)))()
    below = (sample[:, None] < np.asarray(found)).mean(axis=0)
    np.testing.assert_allclose(below, levels, atol=0.01)
    np.testing.assert_allclose(found, np.quantile(sample, levels), atol=0.03)


def test_kernels_are_the_same_jitted_and_batched(x64):
    q, logits, targets = random_arrays(13, 3, 2, 4)
    reward, discount, scalar = jnp.abs(random_arrays(14, 3, 2))
    levels = jnp.tile(jnp.array([0.1, 0.3, 0.6, 0.9]), (2, 1))
    for function, arguments in (
        (value_learning.q_learning_target, (reward, discount, q)),
        (value_learning.double_q_learning_target, (reward, discount, q, targets)),
        (value_learning.soft_value, (q, logits, scalar)),
        (value_learning.sac_discrete_actor_loss, (logits, q, scalar)),
        (value_learning.quantile_huber_loss, (q, targets, levels)),
    ):
        batched = jax.jit(jax.vmap(function))(*arguments)
        one: Any = function
        alone = [one(*row) for row in zip(*arguments, strict=True)]
        np.testing.assert_allclose(batched, alone, rtol=1e-12)
