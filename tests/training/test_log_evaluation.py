"""Evaluation of a log from end to end, on the five-state treatment problem."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import treatment
from jaxrl_llm.kernels import bellman
from jaxrl_llm.kernels import off_policy_evaluation as ope
from jaxrl_llm.training import log_evaluation

pytestmark = pytest.mark.slow

GAMMA, NUM_STEPS = 0.9, 12


@pytest.fixture(scope="module")
def plan():
    mdp = treatment.mdp()
    solution = bellman.policy_iteration(mdp)
    random = bellman.uniform_policy(mdp)
    best = jax.nn.one_hot(solution.policy, 3)
    log = log_evaluation.sample_log(
        treatment.make(), random, jax.random.key(0), num_episodes=300, num_steps=NUM_STEPS
    )
    targets = {"near": 0.8 * random + 0.2 * best, "far": best}
    return log_evaluation.Plan(
        log, targets, mdp, solution, treatment.state_names, treatment.action_names
    )


@pytest.fixture(scope="module")
def found(plan):
    return log_evaluation.evaluate_policies(plan, jax.random.key(1), gamma=GAMMA, num_resamples=200)


def test_sample_log_has_one_truncated_episode_a_patient(plan):
    assert plan.log.mask.shape == (NUM_STEPS, 300)
    np.testing.assert_array_equal(plan.log.patient, np.arange(300))
    np.testing.assert_array_equal(plan.log.steps.truncated.sum(0), 1)
    taken = np.bincount(np.ravel(plan.log.steps.action)) / (300 * NUM_STEPS)
    np.testing.assert_allclose(taken, 1 / 3, atol=0.03)


def test_evaluate_policies_covers_the_exact_value_near_the_behaviour(plan, found):
    exact = float(
        plan.mdp.initial @ bellman.policy_evaluation(plan.mdp, plan.targets["near"]).value
    )
    estimates = found["near"].estimates
    assert list(estimates) == [*ope.ESTIMATORS, "FQE"]
    # Those with a model bootstrap where the log stops; MAGIC leans on the model, whose own error
    # its interval does not hold.
    for name in ("DR", "WDR"):
        value, low, high = estimates[name]
        assert low < value < high, name
        assert low < exact < high, name
        assert high - low < 30, name


def test_warnings_fire_far_from_the_behaviour_and_not_near(plan, found):
    assert log_evaluation.warnings("near", found["near"], 300) == []
    (line,) = log_evaluation.warnings("far", found["far"], 300)
    assert line.startswith("LOW EFFECTIVE SAMPLE SIZE: of 300 trajectories ")
    assert "log more patients, or evaluate a policy nearer to the clinicians'" in line
    poor = found["near"]._replace(covered=0.8)
    (line,) = log_evaluation.warnings("near", poor, 300)
    assert line.startswith("POOR COVERAGE: the log never took 20% of what near would do.")


def test_show_prints_every_estimate_and_saves_pictures(plan, found, tmp_path, capsys):
    log_evaluation.show(tmp_path, "Treatment", plan, found, exact={"near": 59.0, "far": 138.0})
    output = capsys.readouterr().out
    for name in (*ope.ESTIMATORS, "FQE", "EXACT", "effective sample size", "Critical"):
        assert f"\n{name} " in output
    assert output.count("Research only, not for clinical use.") == 2
    assert output.count("LOW EFFECTIVE SAMPLE SIZE") == 1
    assert (tmp_path / "estimates.png").exists()
    assert (tmp_path / "effective_sample_size.png").exists()


def test_learn_plans_on_other_patients_than_it_evaluates_by(plan):
    learned = log_evaluation.learn(
        plan.log, treatment.state_names, treatment.action_names, gamma=GAMMA
    )
    assert learned.log.num_trajectories == 150
    policy = np.asarray(learned.targets["9/10 learned"])
    np.testing.assert_allclose(policy.sum(1), 1, rtol=1e-5)
    value = bellman.policy_evaluation(plan.mdp, jnp.asarray(policy)).value
    random = bellman.policy_evaluation(plan.mdp, bellman.uniform_policy(plan.mdp)).value
    assert float(plan.mdp.initial @ value) > float(plan.mdp.initial @ random) + 30
