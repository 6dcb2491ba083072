"""Classes, recurrence and periods against brute force on hundreds of random chains."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.kernels import bellman, markov_chain
from tests import oracles
from tests.kernels import chains

structure = jax.jit(markov_chain.structure)
PROPERTIES = (
    """same_recurrent num_recurrent_classes num_unit_eigenvalues aperiodic irreducible""".split()
)


def describe(matrix):
    """Every field and property, by name."""
    found = markov_chain.structure(matrix)
    return found._asdict() | {name: getattr(found, name) for name in PROPERTIES}


described = jax.jit(describe)


def reachable(matrix):
    """Warshall's closure."""
    reaches = (matrix > 0) | np.eye(len(matrix), dtype=bool)
    for middle in range(len(matrix)):
        reaches |= reaches[:, [middle]] & reaches[[middle]]
    return reaches


def periods(matrix):
    """The greatest common divisor of the return times up to twice the square of the size."""
    possible = (matrix > 0).astype(int)
    power, found = np.eye(len(matrix), dtype=int), np.zeros(len(matrix), int)
    for step in range(1, 2 * len(matrix) ** 2):
        power = np.minimum(power @ possible, 1)
        found = np.where(np.diagonal(power) > 0, np.gcd(found, step), found)
    return found


def brute_force(matrix):
    reaches = reachable(matrix)
    both = reaches & reaches.T
    recurrent = np.array([both[s][reaches[s]].all() for s in range(len(matrix))])
    period, class_of = periods(matrix), both.argmax(1)
    of_classes = [int(period[s]) for s in np.unique(class_of[recurrent])]
    return {
        "reaches": reaches,
        "class_of": class_of,
        "recurrent": recurrent,
        "period": period,
        "same_recurrent": both & recurrent[:, None],
        "num_recurrent_classes": len(of_classes),
        "num_unit_eigenvalues": sum(of_classes),
        "aperiodic": math.lcm(*of_classes) == 1,
        "irreducible": reaches.all(),
    }


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_structure_of_every_kind_of_chain_equals_brute_force_and_vmap_equals_loop():
    matrices = chains.sparse_chains(0, 300, 7)
    found = jax.vmap(described)(jnp.asarray(matrices))
    expected = [brute_force(matrix) for matrix in matrices]
    assert_same(found, {name: np.stack([one[name] for one in expected]) for name in expected[0]})
    # Properties of the batch are the batch of properties, and a chain alone is one of the batch.
    batch = markov_chain.ChainStructure(
        *(found[name] for name in markov_chain.ChainStructure._fields)
    )
    np.testing.assert_array_equal(batch.num_unit_eigenvalues, found["num_unit_eigenvalues"])
    for index in range(10):
        assert_same(described(jnp.asarray(matrices[index])), expected[index])
    # The sample has what could go wrong: transient states, several classes, periods.
    assert not found["recurrent"].all()
    assert set(np.unique(found["num_recurrent_classes"])) >= {1, 2, 3}
    assert set(np.unique(found["period"])) >= {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    "matrix",
    [np.ones((1, 1)), np.eye(4), chains.cycle(12), chains.rota(0.9, 0.8), chains.TWO_CLASSES],
    ids=["one_state", "identity", "cycle", "rota", "two_classes"],
)
def test_structure_of_known_chains(matrix):
    assert_same(described(jnp.asarray(matrix)), brute_force(matrix))


@pytest.mark.slow
def test_structure_in_jit_equals_eager():
    matrix = jnp.asarray(chains.TWO_CLASSES)
    assert_same(describe(matrix), described(matrix))


def test_structure_counts_any_positive_probability():
    almost = np.array([[1.0, 1e-37], [0, 1]], np.float32)
    assert structure(jnp.asarray(almost)).num_recurrent_classes == 1
    assert structure(jnp.eye(2)).num_recurrent_classes == 2


def test_stop_at_makes_terminal_states_absorb():
    mdp = oracles.corridor(4, step=-1.0, arrival=0.0)
    chain = mdp.under(bellman.uniform_policy(mdp))
    stopped = markov_chain.stop_at(chain, mdp.terminal)
    np.testing.assert_array_equal(stopped[:3], chain[:3])
    np.testing.assert_array_equal(stopped[3], [0, 0, 0, 1])
    np.testing.assert_array_equal(structure(stopped).recurrent, mdp.terminal)


def test_escape_is_identity_minus_transition_and_keeps_rare_exits():
    matrix = chains.random_chain(0, 6).astype(np.float32)
    np.testing.assert_allclose(
        markov_chain.escape(jnp.asarray(matrix)), np.eye(6) - matrix, atol=3e-7
    )
    rare = jnp.array([[1 - 1e-9, 1e-9], [0, 1]], jnp.float32)
    np.testing.assert_allclose(markov_chain.escape(rare)[0], [1e-9, -1e-9], rtol=1e-6)
