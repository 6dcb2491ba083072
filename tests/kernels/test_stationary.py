"""Long-run laws against closed forms, brute force, and the perturbation of a stationary law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.kernels import stationary
from tests.kernels import chains

stationary_law = jax.jit(stationary.stationary_law)
passage = jax.jit(stationary.mean_first_passage_times)
kemeny = jax.jit(stationary.kemeny_constant)
fundamental = jax.jit(stationary.fundamental_matrix)


def test_stationary_law_of_a_birth_death_chain_is_geometric(x64):
    found = stationary_law(jnp.asarray(chains.birth_death(7, up=0.3, down=0.2)))
    law = 1.5 ** np.arange(7)
    np.testing.assert_allclose(found.law, law / law.sum(), atol=1e-14)
    np.testing.assert_allclose(found.from_state, np.tile(law / law.sum(), (7, 1)), atol=1e-14)
    assert found.unique
    assert found.converges


def test_stationary_law_where_states_are_hard_to_tell_apart_is_right_in_float32():
    matrix = np.array([[1 - 3e-9, 3e-9], [1e-9, 1 - 1e-9]], np.float32)
    np.testing.assert_allclose(stationary_law(jnp.asarray(matrix)).law, [0.25, 0.75], rtol=1e-5)


def test_stationary_law_of_the_patient_chain_is_the_absorbing_state(x64):
    found = stationary_law(jnp.asarray(chains.PATIENT), jnp.array([1.0, 0, 0, 0, 0]))
    np.testing.assert_allclose(found.law, [0, 0, 0, 0, 1], atol=1e-14)
    assert found.unique
    assert found.converges


@pytest.mark.parametrize("length", [2, 3])
def test_stationary_law_of_a_cycle_is_uniform_but_not_a_limit(length, x64):
    found = stationary_law(jnp.asarray(chains.cycle(length)), jnp.eye(length)[0])
    np.testing.assert_allclose(found.law, np.full(length, 1 / length), atol=1e-15)
    assert found.unique
    assert not found.converges


def test_stationary_law_of_two_classes_is_one_each_and_a_mixture_from_a_start(x64):
    initial = np.array([0.5, 0, 0, 0, 0, 0.5])
    found = stationary_law(jnp.asarray(chains.TWO_CLASSES), jnp.asarray(initial))
    first, second = np.array([0, 3 / 4, 1 / 4, 0, 0, 0]), np.array([0, 0, 0, 1, 1, 1]) / 3
    expected = [0 * first, first, first, second, second, second]
    np.testing.assert_allclose(found.of_class, expected, atol=1e-14)
    np.testing.assert_allclose(found.from_state[0], 0.4 * first + 0.6 * second, atol=1e-14)
    np.testing.assert_allclose(found.law, 0.2 * first + 0.8 * second, atol=1e-14)
    assert not found.unique
    assert not found.converges


def test_stationary_law_of_the_identity_is_any_law(x64):
    initial = np.array([0.1, 0.2, 0.7])
    found = stationary_law(jnp.eye(3), jnp.asarray(initial))
    np.testing.assert_array_equal(found.of_class, np.eye(3))
    np.testing.assert_allclose(found.law, initial, atol=1e-16)
    assert not found.unique
    assert found.converges


def test_stationary_law_of_every_kind_of_chain_is_the_limit_of_the_lazy_chain(x64):
    matrices = chains.sparse_chains(1, 100, 7)
    found = jax.vmap(stationary_law)(jnp.asarray(matrices))
    expected = np.stack([chains.limit(matrix) for matrix in matrices])
    np.testing.assert_allclose(found.from_state, expected, atol=1e-10)
    np.testing.assert_allclose(found.law, expected.mean(1), atol=1e-10)
    # Each row of `of_class` is stationary, not merely near it.
    laws = np.asarray(found.of_class)
    np.testing.assert_allclose(laws @ matrices, laws, atol=1e-14)
    for index in range(5):
        alone = stationary_law(jnp.asarray(matrices[index]))
        np.testing.assert_allclose(alone.from_state, found.from_state[index], atol=1e-14)


@pytest.mark.slow
def test_stationary_law_in_jit_equals_eager(x64):
    matrix = jnp.asarray(chains.TWO_CLASSES)
    for jitted, eager in zip(
        stationary_law(matrix), stationary.stationary_law(matrix), strict=True
    ):
        np.testing.assert_allclose(jitted, eager, atol=1e-14)


def test_stationary_law_gradient_is_that_of_a_perturbed_chain(x64):
    """d pi = pi dP (Z - P*), of Schweitzer (1968), equation 11; also with a transient state."""
    random = np.random.default_rng(0)
    # A state that leads into five others and is never seen again.
    matrix = np.zeros((6, 6))
    matrix[0] = random.dirichlet(np.ones(6))
    matrix[1:, 1:] = chains.random_chain(0, 5)
    change = random.normal(size=matrix.shape) * (matrix > 0)
    change -= (matrix > 0) * change.sum(1, keepdims=True) / (matrix > 0).sum(1, keepdims=True)
    weight = random.normal(size=6)
    gradient = jax.jit(jax.grad(lambda matrix: stationary.stationary_law(matrix).law @ weight))(
        jnp.asarray(matrix)
    )
    assert np.isfinite(gradient).all()
    limit = chains.limit(matrix)
    deviation = np.linalg.inv(np.eye(6) - matrix + limit) - limit
    expected = limit[0] @ change @ deviation @ weight
    np.testing.assert_allclose(np.sum(gradient * change), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "matrix",
    [chains.random_chain(2, 6), chains.cycle(6), chains.TWO_CLASSES, np.eye(6)],
    ids=["ergodic", "periodic", "two_classes", "identity"],
)
def test_fundamental_matrix_inverts_its_system_for_every_chain(matrix, x64):
    found = fundamental(jnp.asarray(matrix))
    system = np.eye(6) - matrix + chains.limit(matrix)
    np.testing.assert_allclose(found @ system, np.eye(6), atol=1e-10)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-10)


def test_fundamental_matrix_sums_what_a_start_is_ahead_of_the_law(x64):
    matrix = chains.random_chain(3, 6)
    limit = chains.limit(matrix)
    total, power = np.zeros((6, 6)), np.eye(6)
    for _ in range(200):
        total, power = total + power - limit, power @ matrix
    np.testing.assert_allclose(fundamental(jnp.asarray(matrix)), total + limit, atol=1e-10)


def passage_by_removal(matrix):
    """Expected times to each state, from the chain without it."""
    size = len(matrix)
    times = np.zeros((size, size))
    for goal in range(size):
        others = np.arange(size) != goal
        rest = np.eye(size - 1) - matrix[np.ix_(others, others)]
        times[others, goal] = np.linalg.solve(rest, np.ones(size - 1))
    return times


@pytest.mark.parametrize(
    "matrix",
    [chains.random_chain(4, 6), chains.reflecting_walk(6), chains.rota(0.9, 0.8, 0.7)],
    ids=["ergodic", "walk", "rota"],
)
def test_passage_times_and_kemeny_constant_equal_their_definitions(matrix, x64):
    times = passage_by_removal(matrix)
    np.testing.assert_allclose(passage(jnp.asarray(matrix)), times, atol=1e-9)
    constant = kemeny(jnp.asarray(matrix))
    np.testing.assert_allclose(times @ chains.limit(matrix)[0], np.full(6, constant), rtol=1e-6)
    others = np.linalg.eigvals(matrix)
    others = np.delete(others, np.argmin(abs(others - 1)))
    np.testing.assert_allclose(constant, np.sum(1 / (1 - others)).real, rtol=1e-9)


def test_passage_times_are_infinite_where_a_state_may_be_missed(x64):
    times = passage(jnp.asarray(chains.TWO_CLASSES))
    np.testing.assert_array_equal(np.diagonal(times), 0)
    np.testing.assert_array_equal(times[0, 1:], np.inf)
    np.testing.assert_array_equal(times[1:, 0], np.inf)
    np.testing.assert_allclose(times[1:3, 1:3], [[0, 10], [10 / 3, 0]], atol=1e-12)
    np.testing.assert_allclose(times[3:, 3:], [[0, 1, 2], [2, 0, 1], [1, 2, 0]], atol=1e-12)
    assert np.isinf(kemeny(jnp.asarray(chains.TWO_CLASSES)))
    # From the sick to the well, who stay so: the time to absorption. Nobody comes back.
    times = passage(jnp.asarray(chains.PATIENT))
    expected = np.linalg.solve(np.eye(4) - chains.PATIENT[:4, :4], np.ones(4))
    np.testing.assert_allclose(times[:4, 4], expected, atol=1e-11)
    assert np.isinf(times[4, :4]).all()


def test_one_state_is_at_home():
    matrix = jnp.ones((1, 1))
    assert stationary_law(matrix).law.tolist() == [1]
    assert passage(matrix).tolist() == [[0]]
    assert kemeny(matrix) == 0
