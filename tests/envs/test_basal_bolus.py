"""The rule gives the doses that one works out by hand, and keeps most people in range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import basal_bolus, glucose, glucose_outcome

DAILY = 1.78 * 24  # U, of somebody with a basal rate of 1 U/h


def hours(reading, announced=0.0, on_board=0.0, **options):
    seen = glucose.Readable(
        readings=jnp.full(6, reading),
        insulin_on_board=jnp.float32(on_board),
        announced=jnp.float32(announced),
        carbohydrates_on_board=jnp.float32(0),
        basal=jnp.float32(1),
    )
    return float(basal_bolus.hours_of_insulin(seen, basal_bolus.rule(**options)))


MEAL = 60 * DAILY / 500
EXCESS = (235 - 115) * DAILY / 1800


@pytest.mark.parametrize(
    ("expected", "arguments"),
    [
        (0, {"reading": 115.0}),
        (0, {"reading": 140.0}),
        (MEAL, {"reading": 115.0, "announced": 60.0}),
        (EXCESS, {"reading": 235.0}),
        (MEAL + EXCESS - 1, {"reading": 235.0, "announced": 60.0, "on_board": 1.0}),
        (MEAL, {"reading": 235.0, "announced": 60.0, "on_board": 9.0}),
        (MEAL - 35 * DAILY / 1800, {"reading": 80.0, "announced": 60.0}),
        (0, {"reading": 50.0, "announced": 1.0}),
    ],
)
def test_hours_of_insulin_are_basal_and_bolus(expected, arguments):
    np.testing.assert_allclose(hours(**arguments), 1 / 12 + expected, rtol=1e-5)


def test_hours_of_insulin_stop_where_told():
    assert hours(75.0, suspend_below=80.0) == 0
    np.testing.assert_allclose(hours(85.0, suspend_below=80.0), 1 / 12, rtol=1e-6)


def test_action_is_the_dose_of_an_observation():
    observation = jnp.zeros((3, 12)).at[:, 9].set(0.5).at[1, 7].set(0.6)
    action = basal_bolus.action(observation, basal_bolus.rule(threshold=400.0))
    assert action.shape == (3, 1)
    np.testing.assert_allclose(
        glucose.to_dose(action[:, 0]), 1 / 12 + np.array([0, MEAL, 0]), rtol=1e-4
    )


@pytest.mark.slow
def test_rule_meets_the_consensus_targets_in_a_thousand_people():
    environment, rule = glucose.make(), basal_bolus.rule()

    @jax.jit
    def day(key):
        return glucose_outcome.outcome(
            environment, lambda _, observation: basal_bolus.action(observation, rule), key
        )

    outcome = day(jax.random.key(0))
    assert outcome.in_range > 0.9
    assert outcome.below_70 < 0.01
    assert outcome.below_54 < 0.001
    assert outcome.above_250 < 0.01
    assert outcome.ended == 0
    # Resalat et al. (2019): 42.3 U a day on average, of the same weights.
    np.testing.assert_allclose(outcome.insulin, 42.3, rtol=0.2)
