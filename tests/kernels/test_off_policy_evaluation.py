"""Estimators against NumPy references, exact values and each other."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.kernels import bellman
from jaxrl_llm.kernels import off_policy_evaluation as ope
from jaxrl_llm.types import Trajectories, Transition
from tests import oracles

LENGTH, NUM = 6, 9
ALL_HORIZONS = tuple(range(-1, LENGTH))
estimates = jax.jit(ope.estimates)


def ragged(seed=0, length=LENGTH, num=NUM):
    """Random evidence whose trajectories end everywhere, some of them cut short."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, length + 1, num)
    lengths[:2] = 1, length
    mask = np.arange(length)[:, None] < lengths
    last = np.arange(length)[:, None] == lengths - 1
    drawn: dict[str, Any] = {
        name: 0.2 + 0.8 * random.random((length, num)) for name in ("target", "behaviour")
    }
    fields = ("reward", "action_value", "value", "next_value")
    drawn |= {name: random.normal(size=(length, num)) for name in fields}
    # A model knows one value of a state, seen from before and from after.
    drawn["next_value"][:-1] = np.where(last[:-1], drawn["next_value"][:-1], drawn["value"][1:])
    terminated = last & (random.random(num) < 0.5)
    drawn |= {"discount": np.where(terminated, 0, 0.9), "mask": mask}
    return ope.Evidence(**drawn)


def reference(e, weight):
    """All estimators by loops over trajectories and steps, from their definitions."""
    length, num = e.mask.shape
    share = weight / weight.sum()
    rho, gain, total = np.ones((length, num)), np.zeros((length, num)), np.zeros(num)
    error, robust, start = np.zeros((length, num)), np.zeros(num), e.value[0]
    for i in range(num):
        ratio, power = 1.0, 1.0
        for t in range(length):
            if e.mask[t, i]:
                ratio *= e.target[t, i] / e.behaviour[t, i]
                gain[t, i] = power * e.reward[t, i]
                bootstrap = e.discount[t, i] * e.next_value[t, i]
                error[t, i] = power * (e.reward[t, i] + bootstrap - e.action_value[t, i])
                power *= e.discount[t, i]
            rho[t, i] = ratio
        total[i] = gain[:, i].sum()
        last = int(e.mask[:, i].sum()) - 1
        following = e.next_value[last, i]
        for t in range(last, -1, -1):
            step = e.target[t, i] / e.behaviour[t, i]
            target = e.reward[t, i] + e.discount[t, i] * following
            following = e.value[t, i] + step * (target - e.action_value[t, i])
        robust[i] = following
    normal = rho / (rho @ weight)[:, None]
    # Each trajectory's share of the j-step return, for every j.
    shares = start / weight.sum() + np.vstack([np.zeros(num), np.cumsum(normal * error, axis=0)])
    returns = shares @ weight
    count = weight.sum()
    centred = shares - returns[:, None] / count
    covariance = count / (count - 1) * np.einsum("jb,b,kb->jk", centred, weight, centred)
    return {
        "IS": share @ (rho[-1] * total),
        "WIS": (weight * rho[-1]) @ total / (weight @ rho[-1]),
        "PDIS": share @ (rho * gain).sum(0),
        "WPDIS": ((normal * gain) @ weight).sum(),
        "DR": share @ robust,
        "WDR": returns[-1],
        "MAGIC": magic_reference(returns, covariance),
    }


def magic_reference(returns, covariance):
    """The blend of all j-step returns, by the active set of a quadratic programme."""
    margin = 0.6744897501960817 * np.sqrt(covariance[-1, -1])
    bias = np.sign(returns - returns[-1]) * np.maximum(abs(returns - returns[-1]) - margin, 0)
    matrix = covariance + np.outer(bias, bias)
    best, blend = np.inf, np.nan
    for subset in range(1, 2 ** len(returns)):
        support = [j for j in range(len(returns)) if subset >> j & 1]
        x = np.linalg.lstsq(matrix[np.ix_(support, support)], np.ones(len(support)), rcond=None)[0]
        x = x / x.sum()
        risk = x @ matrix[np.ix_(support, support)] @ x
        if x.min() >= 0 and risk < best:
            best, blend = risk, x @ returns[support]
    return blend


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
def test_estimates_equal_a_numpy_reference(weighted, x64):
    evidence = ragged()
    weight = np.array([1.0, 2, 0, 1, 3, 1, 1, 0, 2]) if weighted else np.ones(NUM)
    expected = reference(evidence, weight)
    found = estimates(jax.tree.map(jnp.asarray, evidence), jnp.asarray(weight))
    magic = ope.magic(evidence, jnp.asarray(weight), horizons=ALL_HORIZONS)
    for name, value in (found | {"MAGIC": magic}).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, atol=1e-6, err_msg=name)
    if not weighted:
        bare = ope.estimates(jax.tree.map(jnp.asarray, evidence))
        for name, value in bare.items():
            np.testing.assert_allclose(value, found[name], rtol=1e-9, err_msg=name)


@pytest.mark.slow
def test_estimates_of_weights_are_those_of_copies(x64):
    evidence, weight = ragged(1), np.array([2, 1, 0, 1, 1, 3, 0, 1, 1])
    copies = jax.tree.map(lambda leaf: np.repeat(leaf, weight, axis=1), evidence)
    expected = ope.estimates(copies)
    for name, value in estimates(evidence, jnp.asarray(weight, float)).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-8, err_msg=name)


@pytest.mark.slow
def test_estimates_under_vmap_over_weights_are_a_loop():
    evidence = jax.tree.map(jnp.asarray, ragged())
    weights = jax.random.poisson(jax.random.key(0), 2.0, (3, NUM)).astype(jnp.float32)
    batched = jax.jit(jax.vmap(ope.estimates, in_axes=(None, 0)))(evidence, weights)
    for row in range(3):
        single = estimates(evidence, weights[row])
        for name in single:
            np.testing.assert_allclose(batched[name][row], single[name], rtol=2e-3, atol=1e-4)


def test_estimates_ignore_padding():
    evidence = ragged()
    spoilt = evidence._replace(
        **{
            name: np.where(evidence.mask, getattr(evidence, name), np.float32(7))
            for name in evidence._fields
            if name not in ("mask", "discount")
        }
    )
    clean, found = estimates(evidence, jnp.ones(NUM)), estimates(spoilt, jnp.ones(NUM))
    for name, value in clean.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


def test_weighted_estimators_survive_ratios_beyond_the_dtype():
    length, num = 300, 4
    evidence = jax.tree.map(np.array, ragged(2, length, num))
    evidence = evidence._replace(
        target=np.ones((length, num)), behaviour=np.full((length, num), 0.5)
    )  # 2^300 on the longest
    for name in ("WIS", "WPDIS", "WDR"):
        assert np.isfinite(ope.ESTIMATORS[name](evidence)), name
    last = evidence.mask.sum(0).argmax()
    expected = ope.observed_return(jax.tree.map(lambda leaf: leaf[:, last], evidence))
    np.testing.assert_allclose(ope.weighted_importance_sampling(evidence), expected, rtol=1e-5)


def test_estimates_are_0_and_finite_where_the_target_does_nothing_of_the_log():
    evidence = ragged()._replace(target=np.zeros((LENGTH, NUM)))
    found = estimates(evidence, jnp.ones(NUM))
    for name in ("IS", "WIS", "PDIS", "WPDIS"):
        assert float(found[name]) == 0
    start = evidence.value[0].mean()
    for name in ("DR", "WDR", "MAGIC"):
        np.testing.assert_allclose(found[name], start, rtol=1e-5)


def test_ended_trajectories_keep_their_ratio():
    evidence = ragged()
    log_ratio = jax.vmap(ope.log_cumulative_ratio, in_axes=1, out_axes=1)(
        evidence.target, evidence.behaviour, evidence.mask
    )
    for i, length in enumerate(evidence.mask.sum(0)):
        np.testing.assert_array_equal(log_ratio[length:, i], log_ratio[length - 1, i])


def test_j_step_returns_begin_with_the_model_and_end_with_wdr():
    evidence = ragged()
    returns = ope.j_step_returns(evidence)
    np.testing.assert_allclose(returns[0], evidence.value[0].mean(), rtol=1e-5)
    np.testing.assert_allclose(returns[-1], ope.weighted_doubly_robust(evidence), rtol=1e-6)


def test_doubly_robust_return_without_a_model_is_per_decision_importance_sampling():
    zero = np.zeros((LENGTH, NUM))
    evidence = ragged()._replace(action_value=zero, value=zero, next_value=zero)
    expected = ope.per_decision_importance_sampling(evidence)
    np.testing.assert_allclose(ope.doubly_robust(evidence), expected, rtol=1e-5)


@pytest.mark.slow
def test_estimators_have_finite_gradients():
    evidence = jax.tree.map(jnp.asarray, ragged())

    def total(reward, action_value, weight):
        changed = evidence._replace(reward=reward, action_value=action_value)
        return sum(ope.estimates(changed, weight).values())

    gradients = jax.jit(jax.grad(total, (0, 1, 2)))(
        evidence.reward, evidence.action_value, jnp.ones(NUM)
    )
    assert all(bool(jnp.all(jnp.isfinite(gradient))) for gradient in gradients)


def test_step_effective_sample_size_of_equal_and_of_one():
    one = ragged()._replace(
        target=np.full((LENGTH, NUM), 0.5), behaviour=np.full((LENGTH, NUM), 0.5)
    )
    np.testing.assert_allclose(ope.step_effective_sample_size(one), NUM, rtol=1e-6)
    target = np.where(np.arange(NUM) == 1, 0.5, 0) * np.ones((LENGTH, 1))
    np.testing.assert_allclose(
        ope.step_effective_sample_size(one._replace(target=target)), 1, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("behaviour", 0.0, r"behaviour\[1, 4\] is 0; an action that was taken has a probability"),
        ("target", 1.5, r"target\[1, 4\] is 1.5; it must be in \[0, 1\]"),
        ("reward", np.nan, r"reward\[1, 4\] is nan; it must be finite"),
        ("value", np.inf, r"value\[1, 4\] is inf; it must be finite"),
    ],
)
def test_check_evidence_names_the_place(field, value, message):
    evidence = ragged()
    evidence.mask[:2, 4] = True
    getattr(evidence, field)[1, 4] = value
    with pytest.raises(ValueError, match=message):
        ope.check_evidence(evidence)
    evidence.mask[:, 4] = np.arange(LENGTH) < 1
    assert ope.check_evidence(evidence) is evidence


def test_check_evidence_refuses_an_empty_trajectory():
    evidence = ragged()
    evidence.mask[:, 3] = False
    with pytest.raises(ValueError, match=r"mask\[:, 3\] is False; leave out"):
        ope.check_evidence(evidence)


# A process of two states that may end, known exactly


GAMMA, NUM_STEPS = 0.9, 12
BEHAVIOUR, TARGET = oracles.M2_BEHAVIOUR, np.array([[0.5, 0.5], [0.6, 0.4]])


def simulate(seed, num):
    """Trajectories of M2 with a chance of .3 to end after each step, and its exact Q."""
    random = np.random.default_rng(seed)
    state, alive = np.zeros(num, int), np.ones(num, bool)
    rows = []
    for _ in range(NUM_STEPS):
        action = (random.random(num) < BEHAVIOUR[state, 1]).astype(int)
        following = (random.random(num) < oracles.M2_TRANSITION[state, action, 1]).astype(int)
        ends = random.random(num) < 0.3
        reward = oracles.M2_REWARD[state, action]
        rows.append((state, action, reward, ends, following, alive))
        state, alive = following, alive & ~ends
    state, action, reward, ends, following, mask = (jnp.stack(x) for x in zip(*rows, strict=True))
    steps = Transition(
        observation=state,
        action=action,
        reward=reward,
        terminated=ends,
        truncated=jnp.zeros_like(ends),
        next_observation=following,
        extras={},
    )
    return Trajectories(
        steps=steps,
        mask=mask,
        patient=jnp.arange(num, dtype=jnp.int32),
    )


def exact_q(policy):
    mdp = replace(oracles.two_state_mdp(), discount=jnp.float32(GAMMA * 0.7))
    return bellman.policy_evaluation(mdp, jnp.asarray(policy)).q


@pytest.mark.slow
def test_estimators_agree_with_the_exact_value():
    q = exact_q(TARGET)
    exact = float(TARGET[0] @ np.asarray(q)[0])
    log = simulate(0, 20_000)
    evidence = ope.tabular_evidence(
        log, jnp.asarray(TARGET), jnp.asarray(BEHAVIOUR), q, gamma=GAMMA
    )
    for name, value in estimates(evidence, jnp.ones(20_000)).items():
        # Twelve steps leave out what comes later: .63^12 of the value.
        np.testing.assert_allclose(value, exact, rtol=0.04, err_msg=name)
    # With the true model the corrections average to 0.
    np.testing.assert_allclose(ope.doubly_robust(evidence), exact, rtol=0.01)


def test_tabular_evidence_takes_the_table_of_the_fold():
    log = simulate(1, 5)
    q, fold = jnp.arange(8.0).reshape(2, 2, 2), jnp.array([0, 1, 0, 1, 1])
    behaviour = jnp.stack([jnp.full((2, 2), 0.25), jnp.full((2, 2), 0.75)])
    found = ope.tabular_evidence(log, jnp.asarray(TARGET), behaviour, q, gamma=GAMMA, fold=fold)
    state, action = np.asarray(log.steps.observation), np.asarray(log.steps.action)
    for i in range(5):
        table = np.asarray(q[fold[i]])
        np.testing.assert_array_equal(found.action_value[:, i], table[state[:, i], action[:, i]])
        expected = (TARGET * table).sum(1)[state[:, i]]
        np.testing.assert_allclose(found.value[:, i], expected, rtol=1e-6)
        np.testing.assert_array_equal(found.behaviour[:, i], 0.25 if fold[i] == 0 else 0.75)
