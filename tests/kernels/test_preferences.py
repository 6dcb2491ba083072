"""Preferences against naive NumPy, probabilities that add up, and the gradients of the papers."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxrl_llm.kernels import preferences

SHAPE = (3, 4)
EXTREMES = np.array([-1e4, -30.0, -1.0, 0.0, 1.0, 30.0, 1e4])


def sigma(x):
    return 1 / (1 + np.exp(-x))


def log_odds(average):
    return average - np.log1p(-np.exp(average))


def arguments(seed: int = 0) -> dict[str, np.ndarray]:
    """Two scores or log-probabilities with their references, and a law of who is better."""
    random = np.random.default_rng(seed)
    return {
        "first": random.normal(size=SHAPE),
        "second": random.normal(size=SHAPE),
        "first_log_pi": -random.gamma(4.0, size=SHAPE),
        "second_log_pi": -random.gamma(4.0, size=SHAPE),
        "first_log_ref": -random.gamma(4.0, size=SHAPE),
        "second_log_ref": -random.gamma(4.0, size=SHAPE),
        "preference": random.choice([0.0, 0.25, 0.5, 1.0], size=SHAPE),
        "desirable": random.random(SHAPE) < 0.5,
        "logit": random.normal(size=SHAPE),
    }


PAIR = ("first", "second")
LOG_PI = ("first_log_pi", "second_log_pi")
LOG_REF = ("first_log_ref", "second_log_ref")


def cross_entropy(probability, preference):
    return -preference * np.log(probability) - (1 - preference) * np.log(1 - probability)


def naive_rao_kupper(first, second, preference):
    theta = np.exp(0.3)
    strength, other = np.exp(first), np.exp(second)
    win = strength / (strength + theta * other)
    loss = other / (other + theta * strength)
    tie = (theta**2 - 1) * strength * other
    tie /= (strength + theta * other) * (other + theta * strength)
    np.testing.assert_allclose(win + tie + loss, 1, rtol=1e-12)
    outcome = np.where(preference == 0.5, tie, np.where(preference > 0.5, win, loss))
    return -np.log(outcome)


# Name: (function, names of its arguments, the same in NumPy).
CASES = {
    "soft_bradley_terry": (
        preferences.soft_bradley_terry_loss,
        (*PAIR, "preference"),
        lambda a, b, p: cross_entropy(sigma(a - b), p),
    ),
    "bradley_terry": (
        partial(preferences.bradley_terry_loss, margin=0.7, label_smoothing=0.1),
        PAIR,
        lambda a, b: cross_entropy(sigma(a - b - 0.7), 0.9),
    ),
    "rao_kupper": (
        partial(preferences.rao_kupper_loss, tie_width=0.3),
        (*PAIR, "preference"),
        naive_rao_kupper,
    ),
    "crowd_bradley_terry": (
        preferences.crowd_bradley_terry_loss,
        (*PAIR, "preference", "logit"),
        lambda a, b, p, logit: cross_entropy(
            sigma(logit) * sigma(a - b) + sigma(-logit) * sigma(b - a), p
        ),
    ),
    "implicit_reward": (
        partial(preferences.implicit_reward, beta=0.2),
        ("first_log_pi", "first_log_ref"),
        lambda a, ra: 0.2 * (a - ra),
    ),
    "dpo": (
        partial(preferences.dpo_loss, beta=0.2, label_smoothing=0.1),
        (*LOG_PI, *LOG_REF),
        lambda a, b, ra, rb: cross_entropy(sigma(0.2 * ((a - ra) - (b - rb))), 0.9),
    ),
    "ipo": (
        partial(preferences.ipo_loss, beta=0.2),
        (*LOG_PI, *LOG_REF),
        lambda a, b, ra, rb: ((a - ra) - (b - rb) - 2.5) ** 2,
    ),
    "kto": (
        partial(
            preferences.kto_loss,
            kl=jnp.array(0.5),
            beta=0.2,
            desirable_weight=1.5,
            undesirable_weight=0.5,
        ),
        ("first_log_pi", "first_log_ref", "desirable"),
        lambda a, ra, desirable: np.where(
            desirable,
            1.5 * (1 - sigma(0.2 * (a - ra - 0.5))),
            0.5 * (1 - sigma(0.2 * (0.5 - a + ra))),
        ),
    ),
    "simpo": (
        partial(preferences.simpo_loss, beta=2.0, margin=0.5),
        LOG_PI,
        lambda a, b: -np.log(sigma(2 * (a - b) - 0.5)),
    ),
    "orpo": (
        partial(preferences.orpo_loss, beta=0.3),
        LOG_PI,
        lambda a, b: -a - 0.3 * np.log(sigma(log_odds(a) - log_odds(b))),
    ),
}


def case(name: str, seed: int = 0):
    """The function, its arguments as JAX arrays, and what NumPy makes of them."""
    function, names, oracle = CASES[name]
    host = [arguments(seed)[argument] for argument in names]
    return function, [jnp.asarray(argument) for argument in host], oracle(*host)


@pytest.mark.parametrize("name", CASES)
def test_losses_equal_their_equations(name, x64):
    function, inputs, expected = case(name)
    np.testing.assert_allclose(function(*inputs), expected, rtol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_losses_are_elementwise_under_jit_and_vmap(name):
    """One example at a time, a batch, and a compiled one are the same."""
    function, inputs, _ = case(name)
    expected = function(*inputs)
    assert expected.shape == SHAPE
    jitted = jax.jit(function)
    np.testing.assert_allclose(jitted(*inputs), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(function))(*inputs), expected, rtol=1e-6)
    for place in itertools.product(*map(range, SHAPE)):
        np.testing.assert_allclose(jitted(*(x[place] for x in inputs)), expected[place], 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_gradients_match_finite_differences(name, x64):
    function, inputs, _ = case(name)
    moving = 1 if name in ("implicit_reward", "kto") else 2
    function = jax.jit(function)
    check_grads(lambda *x: function(*x, *inputs[moving:]), inputs[:moving], 1, ("rev",))


def grid(*axes: np.ndarray) -> list[jax.Array]:
    return [jnp.asarray(x.ravel(), jnp.float32) for x in np.meshgrid(*axes, indexing="ij")]


@pytest.mark.parametrize("name", CASES)
def test_extreme_scores_keep_values_and_gradients_finite(name):
    function, names, _ = CASES[name]
    averages = np.array([-1e4, -30.0, -1.0, -1e-6, 0.0])
    choices = {
        "first": EXTREMES,
        "second": EXTREMES,
        "preference": np.array([0.0, 0.5, 1.0]),
        "logit": EXTREMES,
        "desirable": np.array([False, True]),
    }
    inputs = grid(*(choices.get(argument, averages) for argument in names))
    if "desirable" in names:
        inputs[-1] = inputs[-1].astype(bool)
    differentiable = tuple(i for i, argument in enumerate(names) if argument != "desirable")

    def total(*inputs):
        losses = function(*inputs)
        return jnp.sum(losses), losses

    gradients, losses = jax.jit(jax.grad(total, differentiable, has_aux=True))(*inputs)
    assert np.isfinite(losses).all()
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_bradley_terry_loss_gradient_is_how_wrong_the_model_is(x64):
    first, second, preference = (jnp.asarray(arguments()[n]) for n in (*PAIR, "preference"))

    def total(first, second):
        return jnp.sum(preferences.soft_bradley_terry_loss(first, second, preference))

    gradients = jax.grad(total, (0, 1))(first, second)
    np.testing.assert_allclose(gradients[0], sigma(first - second) - preference, rtol=1e-10)
    np.testing.assert_allclose(gradients[1], -gradients[0], rtol=1e-12)


def test_bradley_terry_loss_without_margin_or_smoothing_is_minus_log_sigma(x64):
    first, second = (jnp.asarray(arguments()[name]) for name in PAIR)
    plain = preferences.bradley_terry_loss(first, second)
    np.testing.assert_allclose(plain, -np.log(sigma(first - second)), rtol=1e-12)
    moved = preferences.bradley_terry_loss(first + 0.7, second, margin=0.7)
    np.testing.assert_allclose(moved, plain, rtol=1e-12)
    margins = jnp.asarray(arguments(1)["first"])
    by_pair = preferences.bradley_terry_loss(first + margins, second, margin=margins)
    np.testing.assert_allclose(by_pair, plain, rtol=1e-12)


def test_bradley_terry_loss_smoothing_moves_the_minimum_to_its_odds(x64):
    best = jnp.log(jnp.array(9.0))

    def loss(difference):
        return preferences.bradley_terry_loss(difference, jnp.zeros(()), label_smoothing=0.1)

    np.testing.assert_allclose(jax.grad(loss)(best), 0, atol=1e-14)
    assert loss(best) < min(loss(best - 0.1), loss(best + 0.1))


def test_rao_kupper_loss_outcomes_are_all_there_is(x64):
    first, second = (jnp.asarray(arguments()[name]) for name in PAIR)
    outcomes = jnp.broadcast_to(jnp.array([0.0, 0.5, 1.0])[:, None, None], (3, *SHAPE))
    law = jax.jit(jax.vmap(preferences.rao_kupper_loss, (None, None, 0, None)))
    for width in (0.0, 1e-6, 0.3, 5.0, 400.0):
        probability = np.exp(-law(first, second, outcomes, width))
        np.testing.assert_allclose(probability.sum(0), np.ones(SHAPE), rtol=1e-12)


def test_rao_kupper_loss_of_no_width_is_bradley_terry():
    first, second = (jnp.asarray(arguments()[name]) for name in PAIR)
    preference = jnp.asarray(arguments()["first_log_pi"] > -4).astype(jnp.float32)
    expected = preferences.soft_bradley_terry_loss(first, second, preference)
    actual, gradient = jax.value_and_grad(
        lambda width: jnp.sum(preferences.rao_kupper_loss(first, second, preference, width))
    )(jnp.zeros(()))
    np.testing.assert_allclose(actual, jnp.sum(expected), rtol=1e-6)
    assert np.isfinite(gradient)


def test_rao_kupper_loss_learns_the_width_that_made_the_ties(x64):
    difference, zero = np.meshgrid([0.0, 0.8, -1.5], np.zeros(3))
    outcome = jnp.broadcast_to(jnp.array([0.0, 0.5, 1.0])[:, None], (3, 3))
    loss = partial(preferences.rao_kupper_loss, jnp.array(difference), jnp.array(zero), outcome)
    probability = jnp.exp(-loss(0.6))

    @jax.jit
    @jax.value_and_grad
    def expected_loss(width):
        return jnp.sum(probability * loss(width))

    least, gradient = expected_loss(0.6)
    np.testing.assert_allclose(gradient, 0, atol=1e-12)
    assert least < min(expected_loss(0.5)[0], expected_loss(0.7)[0])


def test_crowd_bradley_terry_loss_of_a_certain_annotator_is_bradley_terry():
    first, second, preference = (jnp.asarray(arguments()[n]) for n in (*PAIR, "preference"))
    expected = preferences.soft_bradley_terry_loss(first, second, preference)
    for logit, sign in ((40.0, 1), (-40.0, -1)):
        actual = preferences.crowd_bradley_terry_loss(
            sign * first, sign * second, preference, jnp.full(SHAPE, logit)
        )
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_crowd_bradley_terry_loss_of_a_random_annotator_teaches_no_score(x64):
    first, second, preference = (jnp.asarray(arguments()[n]) for n in (*PAIR, "preference"))

    def total(first):
        loss = preferences.crowd_bradley_terry_loss(first, second, preference, jnp.zeros(SHAPE))
        return jnp.sum(loss), loss

    gradient, loss = jax.grad(total, has_aux=True)(first)
    np.testing.assert_allclose(loss, np.full(SHAPE, np.log(2)), rtol=1e-12)
    np.testing.assert_allclose(gradient, np.zeros(SHAPE), atol=1e-15)


def test_crowd_bradley_terry_loss_finds_how_reliable_an_annotator_is(x64):
    """Of 4 labels that contradict certain scores in one case: reliability 3/4."""
    scores = jnp.full(4, 50.0)
    labels = jnp.array([1.0, 1.0, 0.0, 1.0])

    def loss(logit):
        logits = jnp.broadcast_to(logit, (4,))
        return jnp.sum(preferences.crowd_bradley_terry_loss(scores, jnp.zeros(4), labels, logits))

    np.testing.assert_allclose(jax.grad(loss)(jnp.log(jnp.array(3.0))), 0, atol=1e-12)
    assert jax.grad(loss)(jnp.zeros(())) < 0 < jax.grad(loss)(jnp.array(2.0))


def test_dpo_loss_gradient_is_that_of_the_paper(x64):
    """beta sigma(r_l - r_w) (-1 for the chosen, 1 for the rejected), equation 7 derived."""
    chosen, rejected, ref_chosen, ref_rejected = (
        jnp.asarray(arguments()[name]) for name in (*LOG_PI, *LOG_REF)
    )

    def total(chosen, rejected, ref_chosen, ref_rejected):
        return jnp.sum(preferences.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.2))

    gradients = jax.grad(total, (0, 1, 2, 3))(chosen, rejected, ref_chosen, ref_rejected)
    wrong = sigma(0.2 * ((rejected - ref_rejected) - (chosen - ref_chosen)))
    np.testing.assert_allclose(gradients[0], -0.2 * wrong, rtol=1e-10)
    np.testing.assert_allclose(gradients[1], 0.2 * wrong, rtol=1e-10)
    for gradient in gradients[2:]:
        np.testing.assert_array_equal(gradient, np.zeros(SHAPE))


def test_dpo_loss_of_the_reference_itself_is_log_2():
    chosen, rejected = (jnp.asarray(arguments()[name]) for name in LOG_PI)
    loss = preferences.dpo_loss(chosen, rejected, chosen, rejected, 0.2)
    np.testing.assert_allclose(loss, np.full(SHAPE, np.log(2)), rtol=1e-6)


def test_dpo_loss_over_a_population_is_least_at_the_tilted_reference(x64):
    """At pi ∝ ref exp(r / beta), with labels of Bradley-Terry, its gradient is 0."""
    random = np.random.default_rng(3)
    reward, reference = jnp.array(random.normal(size=5)), jnp.array(random.normal(size=5))
    reference = jax.nn.log_softmax(reference)
    first, second = np.triu_indices(5, 1)

    def population_loss(logits):
        log_pi = jax.nn.log_softmax(logits)
        one = preferences.implicit_reward(log_pi, reference, 0.5)
        preference = jax.nn.sigmoid(reward[first] - reward[second])
        return jnp.sum(preferences.soft_bradley_terry_loss(one[first], one[second], preference))

    gradient = jax.grad(population_loss)
    np.testing.assert_allclose(gradient(reference + reward / 0.5), np.zeros(5), atol=1e-12)
    assert np.abs(gradient(reference)).max() > 0.1


def test_ipo_loss_is_least_at_its_margin(x64):
    zero = jnp.zeros(())

    def loss(chosen):
        return preferences.ipo_loss(chosen, zero, zero, zero, 0.1)

    assert loss(jnp.array(5.0)) == 0
    assert jax.grad(loss)(jnp.array(4.0)) < 0 < jax.grad(loss)(jnp.array(6.0))


def test_kto_loss_pushes_by_label_and_stops_at_the_divergence():
    log_pi, log_ref = jnp.array([-3.0, -3.0]), jnp.array([-4.0, -4.0])
    desirable = jnp.array([True, False])

    def total(log_pi, kl):
        return jnp.sum(preferences.kto_loss(log_pi, log_ref, desirable, kl, 0.1))

    gradient, of_kl = jax.grad(total, (0, 1))(log_pi, jnp.array(0.3))
    assert gradient[0] < 0 < gradient[1]
    assert of_kl == 0
    negative, zero = (
        preferences.kto_loss(log_pi, log_ref, desirable, jnp.array(kl), 0.1) for kl in (-5.0, 0.0)
    )
    np.testing.assert_array_equal(negative, zero)


def test_simpo_loss_without_margin_is_bradley_terry_of_averages():
    chosen, rejected = (jnp.asarray(arguments()[name]) for name in LOG_PI)
    actual = preferences.simpo_loss(chosen, rejected, 2.0, margin=0.0, label_smoothing=0.2)
    expected = preferences.bradley_terry_loss(2 * chosen, 2 * rejected, label_smoothing=0.2)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_orpo_loss_without_its_weight_is_the_likelihood_and_both_terms_prefer_the_chosen():
    chosen, rejected = (jnp.asarray(arguments()[name]) for name in LOG_PI)
    np.testing.assert_array_equal(preferences.orpo_loss(chosen, rejected, 0.0), -chosen)

    def total(chosen, rejected):
        return jnp.sum(preferences.orpo_loss(chosen, rejected, 0.5))

    of_chosen, of_rejected = jax.grad(total, (0, 1))(chosen, rejected)
    assert (of_chosen < -1).all()
    assert (of_rejected > 0).all()
