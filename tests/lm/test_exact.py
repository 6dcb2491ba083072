"""A language model on a token MDP: its whole policy, and learners that reach the optimum."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.envs import token_mdp
from jaxrl_llm.kernels import preferences
from jaxrl_llm.lm import exact, rollouts
from jaxrl_llm.training import loop

# It compiles whole iterations.
pytestmark = pytest.mark.slow

SIZE: dict[str, Any] = {"vocab_size": 3, "length": 2, "num_prompts": 2, "kl_coefficient": 0.5}
MDP = token_mdp.make(**SIZE, end_token=1)
LEARNERS = ["ppo", "reinforce", "rloo", "grpo", "grpo_kl_in_reward", "dpo"]


@pytest.fixture(scope="module")
def model():
    return exact.tiny_model(MDP, jax.random.key(0), width=4)


def naive_log_probabilities(model, params, mdp, temperature):
    """One token of one response after another, in a model that reads nothing else."""
    table = np.zeros(mdp.reward.shape)
    read = jax.jit(lambda tokens: model.apply({"params": params}, tokens))
    for prompt, index in np.ndindex(*table.shape):
        kept = np.asarray(mdp.responses[index])[np.asarray(mdp.mask[index])]
        row = [prompt, *kept]
        for place in range(len(kept)):
            # What stands after a token is not read.
            seen = row[: place + 1] + [0] * (mdp.length - place)
            logits = np.asarray(read(jnp.asarray([seen])), np.float64)[0, place] / temperature
            table[prompt, index] += logits[kept[place]] - np.log(np.exp(logits).sum())
    return table


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probabilities_are_those_of_token_after_token(model, temperature):
    learner, params = model
    table = exact.log_probabilities(learner, params, MDP, temperature=temperature)
    expected = naive_log_probabilities(learner, params, MDP, temperature)
    np.testing.assert_allclose(table, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(jnp.exp(table).sum(axis=-1), 1, atol=1e-5)


def test_log_probabilities_under_jit_and_vmap_equal_eager(model):
    learner, params = model
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, 1.1 * leaf]), params)
    table = jax.jit(jax.vmap(lambda each: exact.log_probabilities(learner, each, MDP)))(both)
    np.testing.assert_allclose(table[0], exact.log_probabilities(learner, params, MDP), atol=1e-5)
    assert np.abs(table[1] - table[0]).max() > 1e-3


def test_exact_gradient_of_a_model_equals_autodiff(model):
    learner, params = model
    policy = partial(exact.log_probabilities, learner, mdp=MDP)
    by_score = jax.jit(partial(token_mdp.exact_gradient, MDP, policy))(params)
    by_autodiff = jax.jit(jax.grad(lambda each: token_mdp.exact_objective(MDP, policy(each))))(
        params
    )
    for left, right in zip(*map(jax.tree.leaves, (by_score, by_autodiff)), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-6)


def test_with_reference_leaves_no_divergence_and_the_gap_of_the_reference(model):
    learner, params = model
    mdp = exact.with_reference(learner, params, MDP)
    law = exact.log_probabilities(learner, params, MDP)
    assert float(token_mdp.exact_kl(mdp, law)) == 0
    beta, reward, prior = 0.5, np.asarray(MDP.reward), np.asarray(law)
    best = beta * np.log(np.sum(np.exp(prior + reward / beta), axis=-1))
    expected = np.mean(best - np.sum(np.exp(prior) * reward, axis=-1))
    np.testing.assert_allclose(exact.gap(learner, params, mdp), expected, rtol=1e-4)


@pytest.mark.parametrize("end_token", [None, 0])
def test_rollout_draws_complete_responses_and_reward_is_theirs(end_token):
    mdp = token_mdp.make(**SIZE, end_token=end_token)
    learner, params = exact.tiny_model(mdp, jax.random.key(0), width=4)
    mdp = exact.with_reference(learner, params, mdp)
    config = exact.rollout(mdp, num_prompts=2, num_samples=8)
    task = exact.task(config, learner, mdp, params)
    judge = exact.reward(mdp)
    state = rollouts.start(None, jax.random.key(1), judge)  # type: ignore[arg-type]
    prompts = rollouts.next_prompts(config, state, task)
    draw: Any = jax.jit(partial(rollouts.draw, config, learner))
    drawn = draw(jax.random.key(2), params, prompts)
    beside = jax.tree.map(lambda leaf: leaf - 0.25, drawn.log_probability)
    drawn = replace(drawn, reference_log_probability=beside)
    score = judge.score(None, drawn)[..., 0]
    priced = exact.reward(mdp, kl_coefficient=2.0).score(None, drawn)[..., 0]
    response = drawn.tokens[..., drawn.prompt_length :]
    index = token_mdp.response_index(mdp, response, drawn.response_mask)
    prompt = drawn.tokens[..., drawn.prompt_length - 1]
    assert sorted(np.asarray(prompt[:, 0])) == [0, 1]
    assert int(index.max()) < len(mdp.responses)
    np.testing.assert_array_equal(score, np.asarray(mdp.reward)[prompt, index])
    ratio = 0.25 * response.shape[-1]
    np.testing.assert_allclose(priced, score - 2 * ratio, rtol=1e-5)
    # What the rollout says of each draw is the table's entry.
    table = exact.log_probabilities(learner, params, mdp)
    likelihood = jnp.sum(drawn.log_probability, axis=-1)
    np.testing.assert_allclose(likelihood, table[prompt, index], atol=1e-4)


def test_reward_of_an_incomplete_response_is_nan():
    every = token_mdp.all_responses(MDP)
    cut = replace(every, response_mask=every.response_mask.at[..., 0].set(False))
    assert np.isnan(exact.reward(MDP).score(None, cut)).all()


def test_task_refuses_prompts_that_are_not_equally_likely(model):
    mdp = token_mdp.make(**SIZE, prompt_probability=[0.25, 0.75])
    config = exact.rollout(mdp, num_prompts=2, num_samples=1)
    message = r"^mdp.prompt_probability is \[0.25, 0.75\]; a learner asks all .*equally likely$"
    with pytest.raises(ValueError, match=message):
        exact.task(config, model[0], mdp, model[1])


def test_population_has_every_pair_once_with_bradley_terry_labels():
    pairs = exact.population(MDP)
    number = len(MDP.responses)
    expected = [
        (prompt, first, second)
        for prompt in range(2)
        for first, second in itertools.combinations(range(number), 2)
    ]
    index = token_mdp.response_index(MDP, pairs.tokens[..., 1:], pairs.response_mask)
    found = np.concatenate([np.asarray(pairs.tokens)[:, 0, :1], np.asarray(index)], axis=-1)
    np.testing.assert_array_equal(found, expected)
    assert (np.asarray(pairs.tokens)[:, 0, 0] == np.asarray(pairs.tokens)[:, 1, 0]).all()
    reward = np.asarray(MDP.reward, np.float64)
    prompt, first, second = np.array(expected).T
    chosen = 1 / (1 + np.exp(reward[prompt, second] - reward[prompt, first]))
    assert pairs.score is not None
    np.testing.assert_allclose(pairs.score, np.stack([chosen, 1 - chosen], axis=-1), atol=1e-6)


def test_population_dpo_takes_a_table_to_the_optimum():
    """Gradient descent on the whole population's DPO loss reaches pi* to 1e-3."""
    logits = np.random.default_rng(0).normal(size=(2, MDP.num_prefixes, 3))
    mdp = token_mdp.make(**SIZE, end_token=1, reference_logits=logits)
    pairs = exact.population(mdp)
    prompt = pairs.tokens[..., 0]
    index = token_mdp.response_index(mdp, pairs.tokens[..., 1:], pairs.response_mask)
    reference_first, reference_second = mdp.reference_log_probability[prompt, index].T
    assert pairs.score is not None
    chance = pairs.score[:, 0]

    def loss(table):
        first, second = token_mdp.tabular_log_probability(mdp, table)[prompt, index].T
        won = preferences.dpo_loss(first, second, reference_first, reference_second, 0.5)
        lost = preferences.dpo_loss(second, first, reference_second, reference_first, 0.5)
        return jnp.mean(chance * won + (1 - chance) * lost)

    optimiser = optax.adam(0.05)

    def step(carry, _):
        table, state = carry
        updates, state = optimiser.update(jax.grad(loss)(table), state)
        return (optax.apply_updates(table, updates), state), None

    start = jnp.zeros((2, mdp.num_prefixes, 3))
    (table, _), _ = jax.jit(
        lambda: jax.lax.scan(step, (start, optimiser.init(start)), length=1500)
    )()
    law = jnp.exp(token_mdp.tabular_log_probability(mdp, table))
    best = jnp.exp(token_mdp.exact_optimum(mdp).log_probability)
    assert float(jnp.abs(law - best).max()) < 1e-3
    assert float(jnp.abs(jnp.exp(mdp.reference_log_probability) - best).max()) > 0.1


def test_learners_config_refuses_what_cannot_learn():
    for name, value in (("num_iterations", 0), ("num_samples", 1), ("learning_rate", 0.0)):
        with pytest.raises(ValueError, match=f"^{name} is {value}; "):
            replace(exact.LearnersConfig(), **{name: value}).validate()


def test_learners_start_from_copies_of_one_policy(model):
    learner, params = model
    mdp = exact.with_reference(learner, params, MDP)
    config = exact.LearnersConfig(num_iterations=2, num_samples=2)
    found = exact.learners(config, learner, params, mdp, jax.random.key(0))
    assert list(found) == LEARNERS
    first = float(exact.gap(learner, params, mdp))
    for each in found.values():
        start = each.state.train.params
        assert float(exact.gap(learner, start, mdp)) == first
        leaf = start["transformer"]["wte"]["weight"]
        assert leaf is not params["transformer"]["wte"]["weight"]
    assert isinstance(found["ppo"].data, rollouts.Task)
    assert found["ppo"].data.reference is not None


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), [*((name, 0) for name in LEARNERS), ("rloo", 1)])
def test_learners_reach_the_optimum(name, seed):
    """2 % of the first gap is left; not of GRPO with its KL in the loss, whose goal is another."""
    mdp = token_mdp.make(**SIZE | {"length": 3}, end_token=0, seed=seed)
    learner, params = exact.tiny_model(mdp, jax.random.key(seed))
    mdp = exact.with_reference(learner, params, mdp)
    config = exact.LearnersConfig()
    each = exact.learners(config, learner, params, mdp, jax.random.key(seed))[name]
    first = float(exact.gap(learner, params, mdp))
    size = config.num_iterations
    state = loop.run(
        each.algorithm, jax.random.key(7), num_steps=size, chunk_steps=size, state=each.state,
        data=each.data,
    )  # fmt: skip
    share = float(exact.gap(learner, state.train.params, mdp)) / first
    if name == "grpo":
        assert share > 0.02
    else:
        assert -1e-4 < share < 0.02
    if name == "dpo":
        law = jnp.exp(exact.log_probabilities(learner, state.train.params, mdp))
        best = jnp.exp(token_mdp.exact_optimum(mdp).log_probability)
        assert float(jnp.abs(law - best).max()) < 1e-3
