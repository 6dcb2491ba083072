"""Eigenvalues, relaxation and mixing against closed forms and powers of the matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.kernels import spectral
from tests import oracles
from tests.kernels import chains

spectrum = jax.jit(spectral.spectrum)
mixing_time = jax.jit(spectral.mixing_time, static_argnames="num_doublings")
distance_to_limit = jax.jit(spectral.distance_to_limit, static_argnums=2)


def test_spectrum_of_the_patient_chain_is_the_oracle(x64):
    found = spectrum(jnp.asarray(chains.PATIENT))
    np.testing.assert_allclose(found.eigenvalues, oracles.PATIENT_CHAIN_EIGENVALUES, atol=5e-7)
    second = oracles.PATIENT_CHAIN_EIGENVALUES[1]
    np.testing.assert_allclose((found.second, found.subdominant), (second, second), atol=5e-7)
    np.testing.assert_allclose(found.gap, 1 - second, atol=5e-7)
    np.testing.assert_allclose(found.relaxation_time, oracles.PATIENT_CHAIN_MIXING_TIME, atol=5e-7)
    assert found.num_unit == 1


def test_spectrum_of_a_reflecting_walk_is_its_cosines(x64):
    size = 8
    found = spectrum(jnp.asarray(chains.reflecting_walk(size)))
    cosines = np.cos(np.pi * np.arange(size) / size)
    np.testing.assert_allclose(np.sort(found.eigenvalues.real), np.sort(cosines), atol=1e-12)
    np.testing.assert_allclose(found.eigenvalues.imag, 0, atol=1e-12)
    # The largest modulus is shared by cos(pi / n) and its negative.
    moduli = np.abs(found.eigenvalues)
    assert np.all(np.diff(moduli) <= 1e-12)
    np.testing.assert_allclose(found.second, np.cos(np.pi / size), atol=1e-12)


@pytest.mark.parametrize("length", [2, 3])
def test_spectrum_of_a_cycle_is_the_roots_of_unity(length, x64):
    found = spectrum(jnp.asarray(chains.cycle(length)))
    roots = np.exp(2j * np.pi * np.arange(length) / length)
    np.testing.assert_allclose(found.eigenvalues, roots, atol=1e-12)
    assert (found.num_unit, found.second, found.subdominant) == (length, 1, 0)
    assert found.gap == 0
    assert np.isinf(found.relaxation_time)


def test_spectrum_of_a_rota_is_the_cube_roots_of_its_teams(x64):
    found = spectrum(jnp.asarray(chains.rota(0.9, 0.8, 0.7)))
    unity = np.exp(2j * np.pi * np.arange(3) / 3)
    expected = np.concatenate([unity, np.cbrt(0.8 * 0.6 * 0.4) * unity])
    by_angle = np.lexsort(
        (np.angle(found.eigenvalues * np.exp(0.1j)), np.abs(found.eigenvalues) < 0.9)
    )
    order = np.lexsort((np.angle(expected * np.exp(0.1j)), np.abs(expected) < 0.9))
    np.testing.assert_allclose(found.eigenvalues[by_angle], expected[order], atol=1e-12)
    np.testing.assert_allclose(found.eigenvalues[0], 1, atol=1e-12)
    assert found.eigenvalues[1].imag > 0 > found.eigenvalues[2].imag
    assert (found.num_unit, found.second) == (3, 1)
    np.testing.assert_allclose(found.subdominant, np.cbrt(0.8 * 0.6 * 0.4), atol=1e-12)


def test_spectrum_of_chains_that_do_not_forget_has_no_gap():
    for matrix, num_unit in ((np.eye(6), 6), (chains.TWO_CLASSES, 4)):
        found = spectrum(jnp.asarray(matrix, jnp.float32))
        assert (found.num_unit, found.second, found.gap) == (num_unit, 1, 0)
    np.testing.assert_allclose(found.subdominant, 0.6, atol=1e-6)
    alone = spectrum(jnp.ones((1, 1)))
    assert (alone.num_unit, alone.second, alone.subdominant) == (1, 0, 0)
    assert alone.relaxation_time == 0


@pytest.mark.slow
def test_spectrum_vmap_equals_loop_equals_numpy_and_eager(x64):
    matrices = jnp.stack([jnp.asarray(chains.random_chain(seed, 6)) for seed in range(4)])
    batched = jax.vmap(spectrum)(matrices)
    for index, matrix in enumerate(matrices):
        alone = spectrum(matrix)
        for one, together in zip(alone, batched, strict=True):
            np.testing.assert_allclose(together[index], one, atol=1e-12)
        moduli = np.sort(np.abs(np.linalg.eigvals(matrix)))[::-1]
        np.testing.assert_allclose(np.abs(alone.eigenvalues), moduli, atol=1e-12)
    last = matrices[-1]
    for jitted, eager in zip(spectrum(last), spectral.spectrum(last), strict=True):
        np.testing.assert_allclose(jitted, eager, atol=1e-12)


def test_relaxation_time_at_the_ends():
    times = jax.vmap(spectral.relaxation_time)(jnp.array([0.0, np.exp(-0.5), 1.0]))
    np.testing.assert_allclose(times, [0, 2, np.inf], rtol=1e-6)
    slopes = jax.vmap(jax.grad(spectral.relaxation_time))(jnp.array([0.0, 0.5, 1.0]))
    assert np.isfinite(slopes).all()


def test_spectrum_gradient_is_that_of_the_eigenvalue():
    def second(stay):
        matrix = jnp.array([[0.0, 1.0], [1.0, 0.0]])
        return spectral.spectrum(stay * jnp.eye(2) + (1 - stay) * matrix).second

    # The eigenvalues are 1 and 2 stay - 1.
    np.testing.assert_allclose(jax.jit(jax.grad(second))(0.8), 2, atol=1e-5)


CONVERGENT = {
    "patient": chains.PATIENT,
    "illness": chains.ILLNESS,
    "random": chains.random_chain(5, 6),
    "birth_death": chains.birth_death(6, up=0.3, down=0.2),
}


@pytest.mark.parametrize("matrix", CONVERGENT.values(), ids=CONVERGENT)
def test_distance_to_limit_equals_powers_and_decays_at_the_second_eigenvalue(matrix, x64):
    size, num_steps = len(matrix), 400
    start = np.eye(size)[0]
    limit = chains.limit(matrix)[0]
    found = distance_to_limit(jnp.asarray(matrix), jnp.asarray(start), num_steps)
    law, expected = start, []
    for _ in range(num_steps + 1):
        expected.append(np.abs(law - limit).sum() / 2)
        law = law @ matrix
    np.testing.assert_allclose(found, expected, atol=1e-12)
    # The mean slope of the last steps above the smallest numbers is ln |lambda_2|.
    log = np.log(found[np.asarray(found) > 1e-80])[-60:]
    slope = (log[-1] - log[0]) / (len(log) - 1)
    second = float(spectrum(jnp.asarray(matrix)).second)
    np.testing.assert_allclose(slope, np.log(second), atol=0.01)


def test_distance_to_limit_of_a_cycle_stays(x64):
    found = distance_to_limit(jnp.asarray(chains.cycle(3)), jnp.eye(3)[0], 400)
    np.testing.assert_allclose(found, 2 / 3, atol=1e-12)


def mixing_by_powers(matrix, epsilon):
    """The first t at which every row of P^t is within epsilon of its limit."""
    limit, power = chains.limit(matrix), np.eye(len(matrix))
    for step in range(10_000):
        if np.abs(power - limit).sum(1).max() / 2 <= epsilon:
            return step
        power = power @ matrix
    raise AssertionError("the chain does not mix")


@pytest.mark.parametrize("matrix", CONVERGENT.values(), ids=CONVERGENT)
def test_mixing_time_is_the_first_power_within_epsilon(matrix, x64):
    for epsilon in (0.9, 0.25, 0.01, 1e-6):
        found = mixing_time(jnp.asarray(matrix), epsilon)
        assert found.mixed
        assert found.steps == mixing_by_powers(matrix, epsilon)


@pytest.mark.slow
def test_mixing_time_of_slow_and_of_other_chains(x64):
    # d(t) = lambda^t / 2 between two states, for a lambda that needs half a million steps.
    rate = 1e-6
    slow = mixing_time(jnp.array([[1 - rate, rate], [rate, 1 - rate]]))
    assert slow.mixed
    assert slow.steps == np.ceil(np.log(0.5) / np.log1p(-2 * rate))
    cut = mixing_time(jnp.array([[1 - rate, rate], [rate, 1 - rate]]), num_doublings=10)
    assert (cut.mixed, cut.steps) == (False, 1023)
    # A cycle never mixes; what is at its limit already needs no step.
    assert not mixing_time(jnp.asarray(chains.cycle(3))).mixed
    identity = mixing_time(jnp.eye(2))
    assert (identity.mixed, identity.steps) == (True, 0)
    # With two absorbing ends: until at most a quarter of the worst start still gambles.
    gamble = chains.gamble(6, 0.5)
    assert mixing_time(jnp.asarray(gamble)).steps == mixing_by_powers(gamble, 0.25)


def test_mixing_time_vmap_equals_loop_and_float32_agrees():
    matrices = jnp.stack(
        [jnp.asarray(chains.random_chain(seed, 6), jnp.float32) for seed in range(4)]
    )
    batched = jax.vmap(lambda matrix: mixing_time(matrix, 0.01))(matrices)
    expected = [mixing_by_powers(chains.random_chain(seed, 6), 0.01) for seed in range(4)]
    assert batched.steps.tolist() == expected
    assert [int(mixing_time(matrix, 0.01).steps) for matrix in matrices] == expected
