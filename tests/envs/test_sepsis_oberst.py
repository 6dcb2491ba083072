"""The sepsis simulator against its published numbers and a step-by-step model of its program."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import sepsis_oberst
from jaxrl_llm.kernels import bellman
from tests.envs.grids import tables

SHAPE = (2, 3, 3, 2, 5, 2, 2, 2)  # diabetes, heart rate, pressure, oxygen, glucose, treatments
# With the published simulator, from its law of the first state: optimal and random.
LEGACY = {"discounted": (0.4756, -0.8096), "20 steps": (0.4483, -0.7588)}
CORRECTED = {"discounted": (0.7437, -0.7668), "20 steps": (0.5808, -0.7164)}


@pytest.fixture(scope="module")
def problems():
    with jax.enable_x64(True):
        return {name: sepsis_oberst.mdp(glucose=name) for name in ("legacy", "corrected")}


def fluctuate(level, top, chance, highest=None):
    """{level: probability} of a step down, a step up (to `highest` at most), and staying."""
    up = min(top, level + 1) if highest is None else min(highest, level + 1)
    law = {}
    for to, p in ((max(0, level - 1), chance), (up, chance), (level, 1 - 2 * chance)):
        law[to] = law.get(to, 0) + p
    return law


def then(law, step):
    """A law followed by a random step."""
    result = {}
    for level, p in law.items():
        for to, q in step(level).items():
            result[to] = result.get(to, 0) + p * q
    return result


def move(chances):
    """From a level to others with the chances given, and else staying."""

    def step(level):
        out = dict(chances.get(level, {}))
        return {level: 1 - sum(out.values()), **out}

    return step


def vital_signs(diabetes, signs, was, on, glucose):
    """The laws of the four signs after one step, effect after effect as the program has them."""
    heart, pressure, oxygen, sugar = ({sign: 1.0} for sign in signs)
    antibiotics, vasopressors, ventilation = (
        "given" if now else "withdrawn" if before else "off"
        for before, now in zip(was, on, strict=True)
    )
    if antibiotics != "off":
        effect = {2: {1: 0.5}} if antibiotics == "given" else {1: {2: 0.1}}
        heart, pressure = then(heart, move(effect)), then(pressure, move(effect))
    if ventilation != "off":
        effect = {0: {1: 0.7}} if ventilation == "given" else {1: {0: 0.1}}
        oxygen = then(oxygen, move(effect))
    if vasopressors == "given" and diabetes:
        pressure = then(pressure, move({0: {1: 0.5, 2: 0.4}, 1: {2: 0.9}}))
        sugar = then(sugar, move({level: {level + 1: 0.5} for level in range(4)}))
    elif vasopressors == "given":
        pressure = then(pressure, move({0: {1: 0.7}, 1: {2: 0.7}}))
    elif vasopressors == "withdrawn":
        fall = 0.05 if diabetes else 0.1
        pressure = then(pressure, move({1: {0: fall}, 2: {1: fall}}))
    if antibiotics == "off":
        heart = then(heart, lambda level: fluctuate(level, 2, 0.1))
        if vasopressors == "off":
            pressure = then(pressure, lambda level: fluctuate(level, 2, 0.1))
    if ventilation == "off":
        oxygen = then(oxygen, lambda level: fluctuate(level, 1, 0.1))
    if vasopressors != "given":
        highest = 1 if glucose == "legacy" and not diabetes else None
        chance = 0.3 if diabetes else 0.1
        sugar = then(sugar, lambda level: fluctuate(level, 4, chance, highest))
    return heart, pressure, oxygen, sugar


@pytest.mark.parametrize("glucose", ["legacy", "corrected"])
def test_mdp_has_the_laws_of_a_step_by_step_model(glucose, problems):
    mdp = jax.tree.map(np.asarray, problems[glucose])
    random = np.random.default_rng(0)
    for state, action in random.integers((1440, 8), size=(600, 2)):
        diabetes, *rest = np.unravel_index(state, SHAPE)
        on = action >> 2 & 1, action & 1, action >> 1 & 1
        laws = vital_signs(diabetes, rest[:4], rest[4:], on, glucose)
        expected = np.zeros(1440)
        for outcome in itertools.product(*(law.items() for law in laws)):
            levels = [level for level, _ in outcome]
            place = np.ravel_multi_index((diabetes, *levels, *on), SHAPE)
            expected[place] += np.prod([probability for _, probability in outcome])
        row = mdp.row[state, action]
        law = np.zeros(1440)
        np.add.at(law, mdp.successor[row], mdp.probability[row])
        np.testing.assert_allclose(law, expected, atol=1e-12)


def test_mdp_ends_in_death_or_discharge(problems):
    mdp = problems["legacy"]
    _, *signs, antibiotics, vasopressors, ventilation = np.indices(SHAPE).reshape(8, -1)
    heart, pressure, oxygen, sugar = signs
    abnormal = sum(map(np.int64, (heart != 1, pressure != 1, oxygen != 1, sugar != 2)))
    treated = antibiotics + vasopressors + ventilation > 0
    death, discharge = abnormal >= 3, (abnormal == 0) & ~treated
    np.testing.assert_array_equal(mdp.terminal, death | discharge)
    arrival = np.where(death, -1.0, np.where(discharge, 1.0, 0.0))
    np.testing.assert_array_equal(mdp.reward, arrival[np.asarray(mdp.successor)])
    initial = np.asarray(mdp.initial)
    assert not initial[death | discharge | treated].any()
    assert initial.sum() == pytest.approx(1)
    # Of four signs of which three are abnormal with probabilities .5, .5 and .2, and glucose with
    # .4 or, with diabetes, .85, the episode goes on with probability .71, or .665.
    assert initial[720:].sum() == pytest.approx(0.2 * 0.665 / (0.2 * 0.665 + 0.8 * 0.71))


def returns_of(mdp):
    """{"discounted" or "20 steps": (optimal, random)}."""
    uniform = bellman.uniform_policy(mdp)
    optimal = jax.jit(bellman.value_iteration)(mdp, tolerance=1e-8)
    assert optimal.converged
    undiscounted = mdp.replace(discount=jnp.ones_like(mdp.discount))
    look_ahead = jax.jit(bellman.q_values)
    best = average = jnp.zeros(mdp.num_states)
    for _ in range(20):
        best = look_ahead(undiscounted, best).max(axis=1)
        average = look_ahead(undiscounted, average).mean(axis=1)
    values = {
        "discounted": (
            optimal.value,
            jax.jit(bellman.iterative_policy_evaluation)(mdp, uniform, tolerance=1e-8).value,
        ),
        "20 steps": (best, average),
    }
    return {
        name: tuple(float(mdp.initial @ value) for value in pair) for name, pair in values.items()
    }


def test_mdp_with_legacy_glucose_has_the_published_values(problems, x64):
    found = returns_of(problems["legacy"])
    for name, expected in LEGACY.items():
        np.testing.assert_allclose(found[name], expected, atol=5e-5)


def test_mdp_with_corrected_glucose_is_kinder(problems, x64):
    """Its numbers are those of a dense model written apart, by value iteration in NumPy."""
    found = returns_of(problems["corrected"])
    for name, expected in CORRECTED.items():
        np.testing.assert_allclose(found[name], expected, atol=5e-5)
        assert np.all(np.array(expected) > LEGACY[name])


def test_mdp_lists_each_law_once(problems):
    mdp = problems["legacy"]
    assert mdp.successor.shape == mdp.probability.shape == (4860, 54)
    assert mdp.row.shape == (1440, 8)
    assert len(np.unique(mdp.row)) == 4860
    transition, _ = tables(mdp)
    np.testing.assert_allclose(transition.sum(axis=-1), 1, atol=1e-12)


def test_mdp_of_diabetics_only_begins_with_diabetes():
    assert not sepsis_oberst.mdp(diabetic=1.0).initial[:720].any()
    assert not sepsis_oberst.mdp(diabetic=0.0).initial[720:].any()


def test_names_match_the_tables():
    assert len(sepsis_oberst.state_names) == 1440
    assert len(set(sepsis_oberst.state_names)) == 1440
    assert sepsis_oberst.action_names[5] == "antibiotics + vasopressors"
    state = np.ravel_multi_index((1, 0, 2, 1, 4, 1, 0, 0), SHAPE)
    assert sepsis_oberst.state_names[state] == (
        "diabetes; heart rate low; blood pressure high; oxygen normal; glucose very high; "
        "antibiotics on; vasopressors off; ventilation off"
    )


def test_mdp_refuses():
    unknown: Any = "new"
    with pytest.raises(ValueError, match="glucose is 'new'; it must be one of 'legacy', 'corr"):
        sepsis_oberst.mdp(glucose=unknown)
    with pytest.raises(ValueError, match=r"diabetic is 1.2; it must be in \[0, 1\]"):
        sepsis_oberst.mdp(diabetic=1.2)


@pytest.mark.slow
def test_make_starts_without_treatment_and_is_truncated():
    environment = sepsis_oberst.make(max_steps=1)
    params = environment.default_params
    keys = jax.random.split(jax.random.key(0), 200)
    state, observation = jax.vmap(environment.reset, in_axes=(0, None))(keys, params)
    assert (np.asarray(observation) % 8 == 0).all()
    step = jax.vmap(environment.step, in_axes=(0, 0, None, None))
    keys = jax.random.split(jax.random.key(1), 200)
    _, time_step = step(keys, state, jnp.int32(7), params)
    assert (np.asarray(time_step.observation) % 8 == 7).all()
    assert (time_step.truncated | time_step.terminated).all()
