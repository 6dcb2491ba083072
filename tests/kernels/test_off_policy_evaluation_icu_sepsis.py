"""What the estimators reach on ICU-Sepsis, where the truth is known: root mean square errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data import behaviour_policy
from jaxrl_llm.envs import icu_sepsis
from jaxrl_llm.kernels import bellman
from jaxrl_llm.kernels import off_policy_evaluation as ope
from jaxrl_llm.training import evaluate, log_evaluation

REPETITIONS, NUM_EPISODES = 100, 1000


@pytest.mark.slow
def test_doubly_robust_with_the_true_model_halves_the_error_of_wis():
    """The target is .9 optimal + .1 uniform; the behaviour policy is estimated from each log."""
    mdp = icu_sepsis.mdp()
    optimum = bellman.inexact_policy_iteration(bellman.successor_form(mdp))
    random = bellman.uniform_policy(mdp)
    target = 0.9 * jax.nn.one_hot(optimum.policy, mdp.num_actions) + 0.1 * random
    behaviour = 0.9 * icu_sepsis.expert_policy() + 0.1 * random
    np.testing.assert_allclose(evaluate.exact_return(mdp, behaviour), 0.7817, atol=1e-4)
    exact = float(evaluate.exact_return(mdp, target))
    np.testing.assert_allclose(exact, 0.8636, atol=1e-4)

    logs = log_evaluation.sample_log(
        icu_sepsis.make(),
        behaviour,
        jax.random.key(0),
        num_episodes=REPETITIONS * NUM_EPISODES,
        num_steps=120,
    )
    rows = jax.tree.map(
        lambda leaf: jnp.moveaxis(leaf.reshape(*leaf.shape[:-1], REPETITIONS, -1), -2, 0), logs
    )
    q = bellman.policy_evaluation(mdp, target).q

    @jax.jit
    def estimates(logs, target, q):
        def one(log):
            estimated = behaviour_policy.estimate_policy(log, mdp.action_mask)
            evidence = ope.tabular_evidence(log, target, estimated, q, gamma=1.0)
            return ope.estimates(evidence), jnp.min(ope.step_effective_sample_size(evidence))

        return jax.lax.map(one, logs)

    found, size = estimates(rows, target, q)
    errors = {name: float(jnp.sqrt(jnp.mean((x - exact) ** 2))) for name, x in found.items()}
    # Published with the behaviour policy given: WIS .122, DR with the true model .041.
    assert errors["WIS"] >= 2 * errors["DR"], errors
    assert 0.06 < errors["WIS"] < 0.15, errors
    assert 0.02 < errors["DR"] < 0.05, errors
    assert errors["MAGIC"] < errors["DR"], errors
    assert 5 < float(jnp.median(size)) < 30

    given = jax.jit(
        partial(jax.lax.map, lambda log: ope.estimates(
            ope.tabular_evidence(log, target, behaviour, q, gamma=1.0)
        ))
    )(rows)  # fmt: skip
    errors = {name: float(jnp.sqrt(jnp.mean((x - exact) ** 2))) for name, x in given.items()}
    # Its ratios have heavy tails: two sets of 100 logs gave WIS an error of .083 and .103.
    assert 0.07 < errors["WIS"] < 0.15, errors
    # So heavy that a single trajectory decides the error of DR, .144 here: the median tells more.
    typical = float(jnp.median(jnp.abs(given["DR"] - exact)))
    assert typical < 0.04, typical
