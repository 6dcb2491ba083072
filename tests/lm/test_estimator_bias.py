"""How a bias is measured: the two sides against brute force, and a planted bias that is found."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.envs import token_mdp
from jaxrl_llm.lm import estimator_bias, estimators
from jaxrl_llm.lm.estimator_bias import TableModel
from jaxrl_llm.lm.likelihood import exact_kl, response_likelihood
from jaxrl_llm.nn.gpt2 import GPT2

pytestmark = pytest.mark.slow

RAGGED: dict[str, Any] = {"length": 2, "end_token": 1}


def law_of(mdp, logits):
    return np.exp(np.asarray(token_mdp.tabular_log_probability(mdp, logits), np.float64))


def test_random_problem_differs_by_seed_and_from_its_reference():
    first, second = (estimator_bias.random_problem(seed, **RAGGED) for seed in (0, 1))
    assert (np.asarray(first.mdp.reward) != np.asarray(second.mdp.reward)).all()
    assert first.logits.shape == (2, first.mdp.num_prefixes, 3)
    law = token_mdp.tabular_log_probability(*first)
    assert float(token_mdp.exact_kl(first.mdp, law)) > 0.1


@pytest.mark.parametrize("size", [{"length": 2}, {"length": 3, "end_token": 2}])
def test_table_model_has_the_likelihood_of_its_table(size):
    mdp, logits = estimator_bias.random_problem(0, **size)
    model = TableModel(mdp)
    every = token_mdp.all_responses(mdp)
    read = jax.jit(partial(response_likelihood, cast(GPT2, model)))
    found = read(model.params(logits), every)
    expected = token_mdp.tabular_token_log_probability(mdp, logits)
    np.testing.assert_allclose(found.log_probability, expected, rtol=0, atol=1e-6)
    assert found.value is not None
    assert not np.asarray(found.value).any()


def test_table_model_has_the_kl_of_each_state():
    mdp, logits = estimator_bias.random_problem(0, **RAGGED)
    model = TableModel(mdp)
    reference = estimator_bias.reference_logits(mdp)
    tables = (model.params(logits), model.params(reference))
    read = jax.jit(partial(exact_kl, cast(GPT2, model)))
    found = read(*tables, token_mdp.all_responses(mdp))
    policy, prior = (np.asarray(jax.nn.log_softmax(table)) for table in (logits, reference))
    of_state = np.sum(np.exp(policy) * (policy - prior), axis=-1)
    prefix = np.asarray(token_mdp.prefix_index(mdp, mdp.responses, mdp.mask))
    np.testing.assert_allclose(found, of_state[:, prefix] * np.asarray(mdp.mask), atol=1e-6)


def test_target_gradients_are_those_of_the_objective_and_its_divergence():
    mdp, logits = estimator_bias.random_problem(0, **RAGGED)

    def value(table, beta):
        priced = replace(mdp, kl_coefficient=jnp.asarray(beta))
        return token_mdp.exact_objective(priced, token_mdp.tabular_log_probability(mdp, table))

    objective = jax.grad(value)(logits, 0.5)
    found = estimator_bias.target_gradient(mdp, logits, "objective")
    np.testing.assert_allclose(found, objective, rtol=0, atol=1e-6)
    # J is linear in beta, and its slope is minus the divergence.
    slope = jax.grad(value)(logits, 1.0) - jax.grad(value)(logits, 0.0)
    found = estimator_bias.target_gradient(mdp, logits, "kl")
    np.testing.assert_allclose(found, slope, rtol=0, atol=1e-6)


def test_expected_gradient_is_the_sum_over_all_groups():
    """Over pairs, each by its probability, of the gradient of sum(credit log pi)."""
    mdp, logits = estimator_bias.random_problem(0, **RAGGED)
    random = np.random.default_rng(0)
    table = random.normal(size=(len(mdp.responses),) * 2)

    def credit(group):
        # Of both responses, and unequal in them and in the tokens.
        score = np.asarray(mdp.reward, np.float64)
        found = [np.argmin(np.abs(group.score[k][..., None] - score[k]), -1) for k in range(2)]
        each = np.stack([table[pair[..., 0], pair[..., 1]] for pair in found])
        return each[..., None, None] * np.array([[1.0, 2.0], [-1.0, 0.5]])

    made = estimators.make(mdp, logits)["rloo, K = 2"]
    found = estimator_bias.expected_gradient(replace(made, credit=credit), mdp, logits)

    law = jnp.asarray(law_of(mdp, logits), jnp.float32)
    weight = jnp.einsum("pa,pb,ab->pab", law, law, jnp.asarray(table, jnp.float32)) / 2

    @jax.jit
    def total(table_of_logits):
        tokens = token_mdp.tabular_token_log_probability(mdp, table_of_logits)
        of_first, of_second = (tokens @ jnp.array(each) for each in ([1.0, 2.0], [-1.0, 0.5]))
        return jnp.sum(weight * (of_first[:, :, None] + of_second[:, None, :]))

    np.testing.assert_allclose(found, jax.grad(total)(logits), rtol=0, atol=1e-6)


def test_draw_has_the_law_of_the_policy():
    mdp, logits = estimator_bias.random_problem(0, **RAGGED)
    size = 20_000
    draw = jax.jit(estimator_bias.draw, static_argnums=(3, 4))
    drawn: Any = draw(mdp, logits, jax.random.key(0), size, 2)
    assert drawn.tokens.shape == (size, 1, 2, 3)
    prompt, response = np.asarray(drawn.tokens[..., 0]), drawn.tokens[..., 1:]
    index = np.asarray(token_mdp.response_index(mdp, response, drawn.response_mask))
    assert (prompt[..., 0] == prompt[..., 1]).all()
    law = law_of(mdp, logits)
    joint = np.zeros((2, *(len(mdp.responses),) * 2))
    np.add.at(joint, (prompt[:, 0, 0], index[:, 0, 0], index[:, 0, 1]), 1 / size)
    expected = 0.5 * law[:, :, None] * law[:, None, :]
    error = np.sqrt(expected * (1 - expected) / size)
    assert (np.abs(joint - expected) < 5 * error).all()
    policy = token_mdp.tabular_token_log_probability(mdp, logits)
    np.testing.assert_allclose(drawn.log_probability, policy[prompt, index], atol=1e-6)
    prior = np.asarray(mdp.reference_log_probability)[prompt, index]
    np.testing.assert_allclose(drawn.reference_log_probability.sum(-1), prior, atol=1e-5)


def test_bias_finds_a_loss_that_is_not_what_it_is_defined_as():
    mdp, logits = estimator_bias.random_problem(0, **RAGGED)
    sound = estimators.make(mdp, logits)["rloo, K = 2"]

    def short(*arguments):
        return 0.7 * sound.loss(*arguments)

    broken = replace(sound, loss=short)
    good, bad = (
        estimator_bias.bias(each, mdp, logits, jax.random.key(0), num_minibatches=4000)
        for each in (sound, broken)
    )
    assert abs(good.z) < 3
    assert good.largest_z < 4.5
    assert good.predicted == pytest.approx(0, abs=1e-5)
    assert bad.z < -5
    assert bad.measured == pytest.approx(0.7 * (1 + good.measured) - 1, abs=1e-5)
    assert bad.standard_error == pytest.approx(0.7 * good.standard_error, rel=1e-3)


def test_bias_refuses_one_minibatch():
    mdp, logits = estimator_bias.random_problem(0, **RAGGED)
    estimator = estimators.make(mdp, logits)["rloo, K = 2"]
    with pytest.raises(ValueError, match=r"^num_minibatches is 1; it must be at least 2$"):
        estimator_bias.bias(estimator, mdp, logits, jax.random.key(0), num_minibatches=1)


def test_cells_are_per_cent_without_a_negative_zero():
    found = estimator_bias.Bias(-1e-7, 0.1234, 0.05, 1.0)
    assert found.cells() == ("+0.00", "+12.34", "5.00", "+2.47")
