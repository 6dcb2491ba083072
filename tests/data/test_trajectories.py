"""Logs as trajectories: every row where it belongs, and every fault named."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data import trajectories
from jaxrl_llm.types import Transition

LOG = {
    "patient": [7, 7, 7, 3, 9, 9],
    "time": [0, 1, 2, 5, 0, 1],
    "state": [0, 1, 2, 1, 2, 0],
    "action": [1, 0, 1, 1, 0, 0],
    "reward": [0.5, 0.0, 1.0, -1.0, 0.0, 2.0],
}


def build(**changes):
    columns = {name: changes.pop(name, LOG[name]) for name in LOG}
    return trajectories.from_arrays(**columns, **changes)


def test_from_arrays_puts_each_patient_in_a_column():
    log = build(num_states=3, num_actions=2)
    np.testing.assert_array_equal(log.mask.T, [[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    np.testing.assert_array_equal(log.patient, [0, 1, 2])
    np.testing.assert_array_equal(log.steps.observation.T, [[0, 1, 2], [1, 0, 0], [2, 0, 0]])
    np.testing.assert_array_equal(log.steps.action.T, [[1, 0, 1], [1, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(log.steps.reward.T, [[0.5, 0, 1], [-1, 0, 0], [0, 2, 0]])
    np.testing.assert_array_equal(log.steps.terminated.T, [[0, 0, 1], [1, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(log.steps.next_observation.T[0, :2], [1, 2])
    assert not log.steps.truncated.any()


def test_from_arrays_takes_a_last_row_without_action_as_where_the_record_ended():
    for end in ("terminated", "truncated"):
        log = build(action=[1, 0, -1, 1, 0, -1], patient=[7, 7, 7, 9, 9, 9],
                    time=[0, 1, 2, 0, 1, 2], end=end)  # fmt: skip
        np.testing.assert_array_equal(log.mask.T, [[1, 1], [1, 1]])
        np.testing.assert_array_equal(log.steps.next_observation.T, [[1, 2], [2, 0]])
        np.testing.assert_array_equal(getattr(log.steps, end).T, [[0, 1], [0, 1]])


def test_from_arrays_keeps_extras():
    log = build(extras={"sofa": np.arange(6)})
    np.testing.assert_array_equal(log.steps.extras["sofa"].T, [[0, 1, 2], [3, 0, 0], [4, 5, 0]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time": [0, 1, 3, 5, 0, 1]}, "row 2: patient 7 goes from time 1 to 3, not by 1; fill"),
        ({"time": [0, 2, 1, 5, 0, 1], "time_step": None}, "row 2: patient 7 has time 1 after 2"),
        ({"time": [0, 1, 1, 5, 0, 1]}, "row 2: patient 7 has time 1 twice; keep one decision"),
        (
            {"state": [0, 1, 4, 1, 2, 0], "num_states": 3},
            r"row 2: state is 4; it must be in \[0, 3",
        ),
        ({"action": [1, -2, 1, 1, 0, 0]}, "row 1: action is -2; it must be at least 0"),
        ({"action": [1, -1, 1, 1, 0, 0]}, "row 1: patient 7 has no action at time 1, and goes on"),
        ({"action": [1, 0, 1, -1, 0, 0]}, "row 3: patient 3 has no action; leave the episode out"),
        ({"state": [0, 1.5, 2, 1, 2, 0]}, "row 1: state is 1.5; it must be an integer, or give st"),
        ({"reward": [0, 0, np.nan, 0, 0, 0]}, "row 2: reward is nan; it must be finite"),
        ({"reward": [0.0]}, r"reward has shape \(1,\); it must be \(6,\) as patient"),
        ({"end": "truncated"}, "row 2: patient 7 ends with an action, and the state that followed"),
        ({"end": "dead"}, "end is 'dead'; it must be one of 'terminated', 'truncated'"),
        ({name: [] for name in LOG}, "the log has no row; give at least one decision"),
    ],
)
def test_from_arrays_names_the_fault(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def rollout():
    """Two streams of six steps: lengths 2, 3, (1 under way) and 4, (2 under way)."""
    ends = np.zeros((6, 2), bool)
    ends[[1, 4], 0] = ends[3, 1] = True
    state = np.arange(12).reshape(6, 2)
    return Transition(
        observation=jnp.asarray(state),
        action=jnp.asarray(state % 3),
        reward=jnp.asarray(state, float),
        terminated=jnp.asarray(ends & (state != 2)),
        truncated=jnp.asarray(ends & (state == 2)),
        next_observation=jnp.asarray(state + 2),
        extras={"feature": jnp.asarray(state)[..., None] * jnp.ones((1, 1, 2))},
    )


def test_from_rollout_cuts_streams_into_episodes():
    log = trajectories.from_rollout(rollout())
    np.testing.assert_array_equal(log.mask.sum(0), [2, 3, 4])
    np.testing.assert_array_equal(log.patient, [0, 0, 1])
    expected = [[0, 2, 0, 0], [4, 6, 8, 0], [1, 3, 5, 7]]
    np.testing.assert_array_equal(log.steps.observation.T, expected)
    np.testing.assert_array_equal(log.steps.extras["feature"][..., 1].T, expected)
    np.testing.assert_array_equal(log.steps.truncated.T[0], [0, 1, 0, 0])
    np.testing.assert_array_equal(log.steps.terminated.sum(0), [0, 1, 1])


def test_from_rollout_can_keep_what_was_under_way_and_only_the_first():
    log = trajectories.from_rollout(rollout(), incomplete="truncated")
    np.testing.assert_array_equal(log.mask.sum(0), [2, 3, 1, 4, 2])
    np.testing.assert_array_equal(log.steps.truncated.sum(0), [1, 0, 1, 0, 1])
    first = trajectories.from_rollout(rollout(), episodes="first")
    np.testing.assert_array_equal(first.mask.sum(0), [2, 4])


def test_from_rollout_without_an_episode_says_so():
    steps = rollout()
    none = jnp.zeros((6, 2), bool)
    with pytest.raises(ValueError, match="transition has no complete episode in 6 steps; take"):
        trajectories.from_rollout(replace(steps, terminated=none, truncated=none))


def many():
    patient = np.repeat(np.arange(20), 3)
    log = trajectories.from_rollout(rollout())
    return trajectories.Trajectories(
        steps=replace(
            rollout(),
            **{
                name: jnp.zeros((2, 60), getattr(log.steps, name).dtype)
                for name in ("observation", "action", "reward", "terminated", "truncated")
            },
            next_observation=jnp.zeros((2, 60), int),
            extras={},
        ),
        mask=jnp.asarray(np.arange(2)[:, None] <= (patient >= 10)),
        patient=jnp.asarray(patient, jnp.int32),
    )


def test_split_has_no_patient_on_both_sides():
    first, second = trajectories.split(many(), 0.3, seed=1)
    sets = [set(np.asarray(side.patient).tolist()) for side in (first, second)]
    assert [len(side) for side in sets] == [6, 14]
    assert not sets[0] & sets[1]
    assert first.num_trajectories + second.num_trajectories == 60
    again, _ = trajectories.split(many(), 0.3, seed=1)
    np.testing.assert_array_equal(again.patient, first.patient)
    other, _ = trajectories.split(many(), 0.3, seed=2)
    assert set(np.asarray(other.patient).tolist()) != sets[0]


def test_folds_keep_patients_whole_and_sizes_even():
    fold = trajectories.folds(many(), 4)
    patient = np.asarray(many().patient)
    assert all(len(set(fold[patient == one])) == 1 for one in range(20))
    np.testing.assert_array_equal(np.bincount(fold), 15)
    with pytest.raises(ValueError, match="num_folds is 21; it must be at most the number of"):
        trajectories.folds(many(), 21)


def test_select_drops_padding_that_nobody_needs():
    short = trajectories.select(many(), np.asarray(many().patient) < 10)
    assert short.mask.shape == (1, 30)
    assert short.mask.all()


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_split_refuses_an_empty_side(fraction):
    with pytest.raises(ValueError, match=f"fraction is {fraction}; it must be between 0 and 1"):
        trajectories.split(many(), fraction)
