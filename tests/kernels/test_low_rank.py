"""The best approximation of a rank, and the bounds on what it costs, shown to hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.kernels import low_rank as kernel
from tests import oracles
from tests.kernels import chains

MATRICES = {
    "chain": chains.random_chain(0, 8),
    "treatment": oracles.TREATMENT_TRANSITION.reshape(-1, 5),
    "patient": chains.PATIENT,
}
compiled = jax.jit(kernel.low_rank, static_argnames="rank")


def low_rank(matrix, rank):
    """Of NumPy arrays, so that truncating it compiles nothing."""
    return jax.device_get(compiled(jnp.asarray(matrix), rank=rank))


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_low_rank_errors_are_those_of_the_matrix_left_out(matrix, x64):
    full = low_rank(matrix, rank=min(matrix.shape))
    np.testing.assert_allclose(full.matrix, matrix, atol=1e-13)
    assert full.spectral_error == 0
    singular = np.linalg.svd(matrix, compute_uv=False)
    for rank in (0, 1, 3):
        found = full.truncate(rank)
        left_out = matrix - np.asarray(found.matrix)
        np.testing.assert_allclose(found.spectral_error, singular[rank], atol=1e-13)
        np.testing.assert_allclose(np.linalg.norm(left_out, 2), singular[rank], atol=1e-12)
        np.testing.assert_allclose(np.linalg.norm(left_out), found.frobenius_error, atol=1e-12)
        assert np.linalg.matrix_rank(found.matrix) == rank


def test_low_rank_is_no_worse_than_other_matrices_of_its_rank(x64):
    matrix, random = MATRICES["chain"], np.random.default_rng(0)
    found = low_rank(matrix, rank=3)
    for _ in range(200):
        near = np.asarray(found.left) + 0.1 * random.normal(size=(8, 3))
        other = near @ np.linalg.lstsq(near, matrix)[0]
        assert np.linalg.norm(matrix - other, 2) >= found.spectral_error - 1e-12
        assert np.linalg.norm(matrix - other) >= found.frobenius_error - 1e-12


def test_low_rank_of_a_low_rank_matrix_is_exact_and_truncations_agree(x64):
    random = np.random.default_rng(1)
    # Two kinds of patients: each row is a mixture of two laws.
    matrix = random.dirichlet(np.ones(2), size=9) @ random.dirichlet(np.ones(6), size=2)
    found = low_rank(matrix, rank=2)
    np.testing.assert_allclose(found.matrix, matrix, atol=1e-14)
    assert found.spectral_error < 1e-14
    direct, later = low_rank(matrix, rank=1), found.truncate(1)
    for one, other in zip(direct, later, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-14)
    np.testing.assert_allclose(found.truncate(2).frobenius_error, found.frobenius_error)


def test_value_error_bound_holds_for_policies_and_tightens_with_rank(x64):
    bounds = []
    for seed in range(20):
        matrix, reward = chains.random_chain(seed, 8), np.random.default_rng(seed).normal(size=8)
        value = np.linalg.solve(np.eye(8) - 0.9 * matrix, reward)
        full = low_rank(matrix, rank=8)
        for rank in (1, 4, 7):
            near = np.asarray(full.truncate(rank).matrix)
            approximate = np.linalg.solve(np.eye(8) - 0.9 * near, reward)
            change = near - matrix
            bound = kernel.value_error_bound(jnp.asarray(change), jnp.asarray(approximate), 0.9)
            norms = np.abs(change).sum(1).max() * np.abs(approximate).max()
            error = np.abs(approximate - value).max()
            assert error <= bound <= 0.9 * norms / (1 - 0.9) + 1e-12
            bounds.append((rank, error, float(bound)))
    ranks, errors, limits = np.array(bounds).T
    assert limits[ranks == 7].mean() < 0.3 * limits[ranks == 1].mean()
    assert errors[ranks == 7].mean() < 0.3 * errors[ranks == 1].mean()


def test_value_error_bound_holds_for_the_optimum(x64):
    """Rows of every state and action, and the Bellman equation of control, solved by sweeps."""
    rows, shape = MATRICES["treatment"], oracles.TREATMENT_TRANSITION.shape
    reward = rows @ oracles.TREATMENT_STATE_REWARD
    reward = reward + np.tile(oracles.TREATMENT_ACTION_REWARD, shape[0])
    full, errors = low_rank(rows, rank=5), []
    for rank in (3, 4, 5):
        near, value = np.asarray(full.truncate(rank).matrix), np.zeros(5)
        for _ in range(2000):
            value = (reward + 0.9 * near @ value).reshape(shape[:2]).max(1)
        errors.append(np.abs(value - oracles.TREATMENT_VALUE).max())
        bound = kernel.value_error_bound(jnp.asarray(near - rows), jnp.asarray(value), 0.9)
        assert errors[-1] <= bound + 1e-6
    assert errors[0] > errors[1] > errors[2]


def test_low_rank_vmap_equals_loop_and_eager(x64):
    matrices = jnp.stack([jnp.asarray(chains.random_chain(seed, 5)) for seed in range(3)])
    batched = jax.vmap(lambda matrix: compiled(matrix, rank=2))(matrices)
    for index, matrix in enumerate(matrices):
        np.testing.assert_allclose(
            batched.matrix[index], kernel.low_rank(matrix, 2).matrix, atol=1e-13
        )
        np.testing.assert_allclose(
            batched.frobenius_error[index], low_rank(matrix, rank=2).frobenius_error, atol=1e-13
        )


@pytest.mark.parametrize("rank", [-1, 6])
def test_low_rank_refuses_a_rank_that_there_is_not(rank):
    with pytest.raises(ValueError, match=rf"rank is {rank}; it must be in \[0, 5\]"):
        kernel.low_rank(jnp.eye(5), rank)
