"""Policy gradients against NumPy, finite differences and enumeration of every action."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxrl_llm.kernels import policy_gradient

MASK = np.array([True, False, True, True, False])


def random_logits(seed: int, size: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=size)


def softmax(logits: np.ndarray) -> np.ndarray:
    weight = np.exp(logits - logits.max())
    return weight / weight.sum()


# Logits: masks and divergences


def test_masked_logits_all_true_is_the_identity():
    logits = jnp.array(random_logits(0))
    masked = policy_gradient.masked_logits(logits, jnp.ones(5, bool))
    np.testing.assert_array_equal(masked, logits)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_masked_logits_gives_probability_zero_in_every_dtype(dtype):
    largest = 60000.0 if dtype == jnp.float16 else 1e38
    for scale in (1.0, largest):
        logits = jnp.array([0.5, 1, -0.25, 0, 1], dtype) * jnp.asarray(scale, dtype)
        masked = policy_gradient.masked_logits(logits, jnp.array(MASK))
        assert masked.dtype == dtype
        probability = jax.nn.softmax(masked)
        assert not probability[~MASK].any()
        assert bool(jnp.isfinite(policy_gradient.log_policy(logits, jnp.array(MASK))[MASK]).all())


def test_masked_logits_without_an_allowed_action_is_uniform():
    none = jnp.zeros(5, bool)
    logits = jnp.array(random_logits(0), jnp.float32)
    np.testing.assert_allclose(policy_gradient.entropy(logits, none), np.log(5), rtol=1e-6)
    gradient = jax.grad(policy_gradient.entropy)(logits, none)
    np.testing.assert_array_equal(gradient, np.zeros(5))


def test_masked_logits_stops_nan_and_its_gradient():
    logits = jnp.where(jnp.array(MASK), jnp.array(random_logits(0), jnp.float32), jnp.nan)
    for function in (policy_gradient.entropy, lambda x, m: policy_gradient.log_policy(x, m)[0]):
        value, gradient = jax.value_and_grad(function)(logits, jnp.array(MASK))
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
        assert not gradient[~MASK].any()


@pytest.mark.parametrize("mask", [None, MASK], ids=["unmasked", "masked"])
def test_log_probability_entropy_and_kl_match_numpy(mask, x64):
    logits, reference = random_logits(0), random_logits(1)
    keep = np.ones(5, bool) if mask is None else mask
    pi, ref = softmax(logits[keep]), softmax(reference[keep])
    mask = None if mask is None else jnp.array(mask)
    arrays = jnp.array(logits), jnp.array(reference)
    for position, action in enumerate(np.flatnonzero(keep)):
        actual = policy_gradient.log_probability(arrays[0], jnp.array(action), mask)
        np.testing.assert_allclose(actual, np.log(pi[position]), rtol=1e-12)
    actual = policy_gradient.entropy(arrays[0], mask)
    np.testing.assert_allclose(actual, -np.sum(pi * np.log(pi)), rtol=1e-12)
    actual = policy_gradient.kl_divergence(*arrays, mask)
    np.testing.assert_allclose(actual, np.sum(pi * np.log(pi / ref)), rtol=1e-12)


def test_masked_functions_equal_those_of_the_subset_and_so_do_gradients(x64):
    logits, reference = jnp.array(random_logits(2)), jnp.array(random_logits(3))
    mask = jnp.array(MASK)
    pairs = [
        (
            lambda x: policy_gradient.entropy(x, mask),
            policy_gradient.entropy,
        ),
        (
            lambda x: policy_gradient.kl_divergence(x, reference, mask),
            lambda x: policy_gradient.kl_divergence(x, reference[MASK]),
        ),
        (
            lambda x: policy_gradient.kl_divergence(reference, x, mask),
            lambda x: policy_gradient.kl_divergence(reference[MASK], x),
        ),
        (
            lambda x: policy_gradient.log_probability(x, jnp.array(3), mask),
            lambda x: policy_gradient.log_probability(x, jnp.array(2)),
        ),
    ]
    for masked, subset in pairs:
        value, gradient = jax.value_and_grad(masked)(logits)
        expected_value, expected_gradient = jax.value_and_grad(subset)(logits[MASK])
        np.testing.assert_allclose(value, expected_value, rtol=1e-12)
        np.testing.assert_allclose(gradient[MASK], expected_gradient, rtol=1e-10, atol=1e-14)
        np.testing.assert_array_equal(gradient[~MASK], np.zeros(2))


@pytest.mark.slow
@pytest.mark.parametrize("mask", [None, MASK], ids=["unmasked", "masked"])
def test_gradients_match_finite_differences(mask, x64):
    logits, reference = jnp.array(random_logits(4)), jnp.array(random_logits(5))
    mask = None if mask is None else jnp.array(mask)
    for function in (
        lambda x: policy_gradient.log_probability(x, jnp.array(2), mask),
        lambda x: policy_gradient.entropy(x, mask),
        lambda x: policy_gradient.kl_divergence(x, reference, mask),
        lambda x: policy_gradient.kl_divergence(reference, x, mask),
    ):
        check_grads(function, (logits,), order=2, modes=("fwd", "rev"))


def test_log_policy_is_idempotent(x64):
    logits, mask = jnp.array(random_logits(0)), jnp.array(MASK)
    log_pi = policy_gradient.log_policy(logits, mask)
    again = policy_gradient.log_policy(log_pi)
    np.testing.assert_allclose(again, log_pi, rtol=1e-14)
    np.testing.assert_allclose(
        policy_gradient.entropy(log_pi), policy_gradient.entropy(logits, mask), rtol=1e-14
    )


def test_entropy_extremes_stay_finite():
    certain = jnp.array([1e4, 0.0, -1e4])
    assert policy_gradient.entropy(certain) == 0
    assert np.isfinite(jax.grad(policy_gradient.entropy)(certain)).all()
    one = jnp.array([True, False, False])
    assert np.isfinite(jax.grad(lambda x: 9 * policy_gradient.entropy(x, one))(jnp.zeros(3))).all()
    assert policy_gradient.entropy(jnp.zeros(3), one) == policy_gradient.entropy(jnp.zeros(1)) == 0
    np.testing.assert_allclose(policy_gradient.entropy(jnp.zeros(8)), np.log(8), rtol=1e-6)


def test_kl_divergence_of_a_policy_with_itself_is_zero():
    logits = jnp.array(random_logits(0), jnp.float32)
    shifted = logits + 3.0
    assert policy_gradient.kl_divergence(logits, logits, jnp.array(MASK)) == 0
    np.testing.assert_allclose(policy_gradient.kl_divergence(logits, shifted), 0, atol=1e-6)


def test_functions_of_logits_agree_under_jit_and_vmap():
    rng = np.random.default_rng(6)
    logits, reference = jnp.array(rng.normal(size=(2, 7, 5)), jnp.float32)
    masks = jnp.array(rng.random((7, 5)) < 0.6).at[:, 0].set(True)
    actions = jnp.zeros(7, int)
    for function, arguments in (
        (policy_gradient.masked_logits, (logits, masks)),
        (policy_gradient.log_policy, (logits, masks)),
        (policy_gradient.log_probability, (logits, actions, masks)),
        (policy_gradient.entropy, (logits, masks)),
        (policy_gradient.kl_divergence, (logits, reference, masks)),
    ):
        batched = jax.jit(jax.vmap(function))(*arguments)
        for index in range(7):
            one = function(*(argument[index] for argument in arguments))
            np.testing.assert_allclose(batched[index], one, rtol=1e-6, atol=1e-7)


def test_functions_of_one_state_refuse_a_batch():
    with pytest.raises(AssertionError):
        policy_gradient.entropy(jnp.zeros((3, 5)))
    with pytest.raises(AssertionError):
        policy_gradient.log_probability(jnp.zeros((3, 5)), jnp.zeros(3, int))
    with pytest.raises(AssertionError):
        policy_gradient.ppo_clip_loss(jnp.zeros(3), jnp.zeros(3), jnp.zeros((3, 1)), 0.2)


# Sampled KL, by enumeration of every action


def kl_policies() -> tuple[jax.Array, jax.Array]:
    return jnp.array(random_logits(7)), jnp.array(random_logits(8))


def expected_under(logits, values):
    """E over a ~ pi, where the sampling law itself has no gradient."""
    return jnp.sum(jax.lax.stop_gradient(jax.nn.softmax(logits)) * values)


def test_kl_k1_and_k3_are_unbiased_and_k2_and_k3_not_negative(x64):
    logits, reference = kl_policies()
    log_pi, log_ref = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
    pi, ref = softmax(np.array(logits)), softmax(np.array(reference))
    exact = np.sum(pi * np.log(pi / ref))
    k1 = policy_gradient.kl_k1(log_pi, log_ref)
    k2 = policy_gradient.kl_k2(log_pi, log_ref)
    k3 = policy_gradient.kl_k3(log_pi, log_ref)
    np.testing.assert_allclose(k1, np.log(pi / ref), rtol=1e-12)
    np.testing.assert_allclose(k2, 0.5 * np.log(pi / ref) ** 2, rtol=1e-12)
    np.testing.assert_allclose(k3, ref / pi - 1 - np.log(ref / pi), rtol=1e-10)
    np.testing.assert_allclose(expected_under(logits, k1), exact, rtol=1e-12)
    np.testing.assert_allclose(expected_under(logits, k3), exact, rtol=1e-12)
    assert (k1 < 0).any()
    assert (k2 >= 0).all()
    assert (k3 >= 0).all()


@pytest.mark.parametrize(
    ("estimator", "objective"),
    [
        (policy_gradient.kl_k1, lambda x, reference: 0 * jnp.sum(x)),
        (policy_gradient.kl_k2, policy_gradient.kl_divergence),
        (policy_gradient.kl_k3, lambda x, ref: policy_gradient.kl_divergence(ref, x)),
    ],
    ids=["k1: nothing", "k2: KL(pi || ref)", "k3: KL(ref || pi)"],
)
def test_expected_gradient_of_kl_estimator(estimator, objective, x64):
    logits, reference = kl_policies()

    def loss(logits):
        values = estimator(jax.nn.log_softmax(logits), jax.nn.log_softmax(reference))
        return expected_under(logits, values)

    np.testing.assert_allclose(
        jax.grad(loss)(logits), jax.grad(objective)(logits, reference), rtol=1e-10, atol=1e-14
    )


def test_kl_k3_is_accurate_where_the_policies_nearly_agree():
    # exp(-x) - 1 + x would lose every digit of x^2 / 2 = 5e-9 in float32.
    x = jnp.array([1e-4, -1e-4], jnp.float32)
    actual = policy_gradient.kl_k3(x, jnp.zeros(2))
    np.testing.assert_allclose(actual, [5e-9, 5e-9], rtol=2e-2, atol=1e-11)


# REINFORCE on the two-state oracle


def two_state_problem() -> tuple[np.ndarray, np.ndarray, float]:
    transition = np.array([[[0.9, 0.1], [0.2, 0.8]], [[0.7, 0.3], [0.05, 0.95]]])
    return transition, np.array([[0.0, 1.0], [2.0, 0.0]]), 0.9


def occupancy_value_and_q(policy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Discounted occupancy from state 0, V and Q, by linear solves."""
    transition, reward, discount = two_state_problem()
    chain = np.einsum("sa,sat->st", policy, transition)
    occupancy = np.linalg.solve(np.eye(2) - discount * chain.T, [1.0, 0.0])
    value = np.linalg.solve(np.eye(2) - discount * chain, np.sum(policy * reward, axis=1))
    return occupancy, value, reward + discount * transition @ value


def expected_loss(loss):
    """sum_s d(s) sum_a pi(a|s) loss(log pi(a|s), s, a) for logits [2, 2] at the uniform policy."""
    policy = np.full((2, 2), 0.5)
    occupancy, value, q = occupancy_value_and_q(policy)

    def total(logits):
        log_pi = jax.vmap(policy_gradient.log_policy)(logits)
        losses = loss(log_pi, jnp.array(q), jnp.array(value)[:, None] * jnp.ones((1, 2)))
        return jnp.sum(jnp.array(occupancy[:, None] * policy) * losses)

    return total


GRADIENT = [[-1.783607, 1.783607], [1.986325, -1.986325]]  # of the return, uniform policy


@pytest.mark.parametrize("baseline_scale", [0.0, 1.0], ids=["no baseline", "V"])
def test_reinforce_loss_expected_gradient_is_that_of_the_return(baseline_scale, x64):
    def loss(log_pi, q, value):
        return policy_gradient.reinforce_loss(log_pi, q, baseline_scale * value)

    gradient = jax.grad(expected_loss(loss))(jnp.zeros((2, 2)))
    np.testing.assert_allclose(gradient, -np.array(GRADIENT), atol=5e-7)

    def exact_return(logits):
        return occupancy_value_and_q(np.stack([softmax(row) for row in logits]))[1][0]

    for index in np.ndindex(2, 2):
        step = np.zeros((2, 2))
        step[index] = 1e-5
        slope = (exact_return(step) - exact_return(-step)) / 2e-5
        np.testing.assert_allclose(gradient[index], -slope, rtol=1e-7)


def test_ppo_losses_at_ratio_one_have_the_gradient_of_reinforce(x64):
    old = jnp.log(jnp.full((2, 2), 0.5))
    for loss in (
        lambda log_pi, q, value: policy_gradient.ppo_clip_loss(log_pi, old, q - value, 0.2),
        lambda log_pi, q, value: policy_gradient.ppo_dual_clip_loss(
            log_pi, old, q - value, 0.2, 3.0
        ),
        lambda log_pi, q, value: policy_gradient.ppo_kl_penalty_loss(
            log_pi, old, q - value, jnp.zeros((2, 2)), 0.5
        ),
    ):
        gradient = jax.grad(expected_loss(loss))(jnp.zeros((2, 2)))
        np.testing.assert_allclose(gradient, -np.array(GRADIENT), atol=5e-7)


def test_reinforce_loss_gives_no_gradient_to_return_or_baseline():
    gradients = jax.grad(policy_gradient.reinforce_loss, argnums=(0, 1, 2))(-0.5, 2.0, 0.5)
    assert gradients == (-1.5, 0, 0)


# PPO


RATIOS = np.array([1e-3, 0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.9, 3.1, 50.0])


@pytest.mark.parametrize("advantage", [-2.0, 0.0, 1.5])
@pytest.mark.parametrize("ratio", RATIOS)
def test_ppo_losses_and_gradients_by_sign_and_ratio(ratio, advantage, x64):
    epsilon, dual_clip = 0.2, 3.0
    surrogate = min(ratio * advantage, np.clip(ratio, 1 - epsilon, 1 + epsilon) * advantage)
    leaving = (advantage > 0 and ratio > 1 + epsilon) or (advantage < 0 and ratio < 1 - epsilon)
    # d ratio / d log-probability = ratio.
    slope = 0.0 if leaving else -ratio * advantage
    old = jnp.array(-0.7)
    log_probability = old + np.log(ratio)
    clip = jax.value_and_grad(policy_gradient.ppo_clip_loss)
    value, gradient = clip(log_probability, old, jnp.array(advantage), epsilon)
    np.testing.assert_allclose(value, -surrogate, rtol=1e-12)
    np.testing.assert_allclose(gradient, slope, rtol=1e-12, atol=1e-15)

    capped = advantage < 0 and ratio > dual_clip
    dual = jax.value_and_grad(policy_gradient.ppo_dual_clip_loss)
    value, gradient = dual(log_probability, old, jnp.array(advantage), epsilon, dual_clip)
    expected = -dual_clip * advantage if capped else -surrogate
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient, 0.0 if capped else slope, rtol=1e-12, atol=1e-15)


def test_ppo_losses_give_gradient_to_the_new_policy_alone():
    arguments = (-0.5, -0.6, 2.0)
    for loss, rest in (
        (policy_gradient.ppo_clip_loss, (0.2,)),
        (policy_gradient.ppo_dual_clip_loss, (0.2, 3.0)),
        (policy_gradient.ppo_kl_penalty_loss, (jnp.array(0.1), 0.5)),
    ):
        new, old, advantage = jax.grad(loss, argnums=(0, 1, 2))(*arguments, *rest)
        np.testing.assert_allclose(new, -2 * np.exp(0.1), rtol=1e-6)
        assert old == 0
        assert advantage == 0


def test_ppo_kl_penalty_loss_gradient_matches_finite_differences(x64):
    old_logits = jnp.array(random_logits(9))
    old = jax.nn.log_softmax(old_logits)[1]

    def loss(logits):
        log_pi = policy_gradient.log_probability(logits, jnp.array(1))
        kl = policy_gradient.kl_divergence(old_logits, logits)
        return policy_gradient.ppo_kl_penalty_loss(log_pi, old, jnp.array(1.5), kl, 0.7)

    logits = jnp.array(random_logits(10))
    pi, old_pi = softmax(np.array(logits)), softmax(np.array(old_logits))
    expected = -pi[1] / old_pi[1] * 1.5 + 0.7 * np.sum(old_pi * np.log(old_pi / pi))
    np.testing.assert_allclose(loss(logits), expected, rtol=1e-12)
    check_grads(loss, (logits,), order=1, modes=("rev",))


@pytest.mark.parametrize("value", [-1.0, 0.31, 0.5, 0.69, 0.71, 2.0])
@pytest.mark.parametrize("return_", [-1.0, 0.6, 3.0])
def test_clipped_value_loss_is_half_the_larger_square(value, return_, x64):
    old, epsilon = 0.5, 0.2
    clipped = np.clip(value, old - epsilon, old + epsilon)
    squares = (value - return_) ** 2, (clipped - return_) ** 2
    loss, gradients = jax.value_and_grad(policy_gradient.clipped_value_loss, argnums=(0, 1, 2))(
        value, old, return_, epsilon
    )
    np.testing.assert_allclose(loss, 0.5 * max(squares), rtol=1e-12)
    if squares[0] >= squares[1] - 1e-12:
        np.testing.assert_allclose(gradients[0], value - return_, rtol=1e-12)
    else:
        assert gradients[0] == 0
    assert gradients[1:] == (0, 0)


def test_losses_are_elementwise():
    """A whole array at once, jitted, equals one number at a time."""
    rng = np.random.default_rng(11)
    arrays = jnp.array(rng.normal(size=(4, 3, 2)), jnp.float32)
    for function, num_arrays in (
        (policy_gradient.kl_k1, 2),
        (policy_gradient.kl_k2, 2),
        (policy_gradient.kl_k3, 2),
        (policy_gradient.importance_ratio, 2),
        (policy_gradient.reinforce_loss, 3),
        (partial(policy_gradient.ppo_clip_loss, clip_epsilon=0.2), 3),
        (partial(policy_gradient.ppo_dual_clip_loss, clip_epsilon=0.2, dual_clip=3.0), 3),
        (partial(policy_gradient.ppo_kl_penalty_loss, kl_coefficient=0.2), 4),
        (partial(policy_gradient.clipped_value_loss, clip_epsilon=0.2), 3),
    ):
        arguments = tuple(arrays[:num_arrays])
        whole = jax.jit(function)(*arguments)
        assert whole.shape == (3, 2)
        for index in np.ndindex(3, 2):
            one = function(*(argument[index] for argument in arguments))
            np.testing.assert_allclose(whole[index], one, rtol=1e-5, atol=1e-6)
