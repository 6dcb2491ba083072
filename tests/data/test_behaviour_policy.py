"""The policy that acted: counts by hand, calibration of the truth, agreement."""

import jax.numpy as jnp
import numpy as np

from jaxrl_llm.data import behaviour_policy, trajectories
from tests.kernels.test_off_policy_evaluation import BEHAVIOUR, simulate

LOG = trajectories.from_arrays(
    patient=[0, 0, 0, 1, 1, 2],
    time=[0, 1, 2, 0, 1, 0],
    state=[0, 0, 1, 0, 1, 1],
    action=[0, 1, 2, 0, 2, 0],
    reward=np.zeros(6),
)
MASK = jnp.array([[True, True, False], [True, False, True], [False, True, True]])


def test_action_counts_count():
    count = behaviour_policy.action_counts(LOG, num_states=3, num_actions=3)
    np.testing.assert_array_equal(count, [[2, 1, 0], [1, 0, 2], [0, 0, 0]])
    weight = jnp.array([2.0, 0, 1])
    count = behaviour_policy.action_counts(LOG, num_states=3, num_actions=3, weight=weight)
    np.testing.assert_array_equal(count, [[2, 2, 0], [1, 0, 2], [0, 0, 0]])


def test_estimate_policy_smooths_within_the_admissible_actions():
    found = behaviour_policy.estimate_policy(LOG, MASK)
    np.testing.assert_allclose(found, [[2 / 3, 1 / 3, 0], [1 / 3, 0, 2 / 3], [0, 0.5, 0.5]])
    found = behaviour_policy.estimate_policy(LOG, MASK, smoothing=1.0)
    np.testing.assert_allclose(found, [[3 / 5, 2 / 5, 0], [2 / 5, 0, 3 / 5], [0, 0.5, 0.5]])
    # An action that was taken although it is not admissible is possible all the same.
    strict = MASK.at[1, 2].set(False)
    found = behaviour_policy.estimate_policy(LOG, strict, smoothing=1.0)
    np.testing.assert_allclose(found[1], [2 / 4, 0, 2 / 4])


def test_calibration_of_the_true_policy_is_good_and_of_a_wrong_one_is_not():
    log = simulate(0, 4000)
    right = behaviour_policy.calibration(BEHAVIOUR, log)
    assert right.error < 0.01
    filled = right.size > 0
    np.testing.assert_allclose(right.observed[filled], right.predicted[filled], atol=0.02)
    assert right.size.sum() == 2 * np.asarray(log.mask).sum()
    wrong = behaviour_policy.calibration(np.array([[0.95, 0.05], [0.6, 0.4]]), log)
    # By .2 in either state.
    np.testing.assert_allclose(wrong.error, 0.2, atol=0.01)


def test_calibration_of_few_predictions_is_their_arithmetic():
    policy = np.array([[0.6, 0.4, 0.0], [0.25, 0.0, 0.75], [0.0, 0.5, 0.5]])
    found = behaviour_policy.calibration(policy, LOG, num_bins=2)
    # Below a half: .4 thrice (taken once) and .25 thrice (taken once); above: .6 and .75 thrice.
    np.testing.assert_allclose(found.predicted, [1.95 / 6, 4.05 / 6])
    np.testing.assert_allclose(found.observed, [2 / 6, 4 / 6])
    np.testing.assert_array_equal(found.size, [6, 6])
    np.testing.assert_allclose(found.error, 0.1 / 12)


def test_agreement_weighs_states_by_their_visits():
    policy = np.array([[1.0, 0, 0], [0.5, 0, 0.5], [0, 1, 0]])
    found = behaviour_policy.agreement(policy, LOG)
    np.testing.assert_array_equal(found.visits, [3, 3, 0])
    np.testing.assert_allclose(found.rate, [2 / 3, 1 / 2, 0])
    np.testing.assert_allclose(found.overall, 3.5 / 6)
