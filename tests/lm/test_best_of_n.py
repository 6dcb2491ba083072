"""Best of n: its law, its expectation over all subsets, and what is kept of what was scored."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.kernels import alignment
from jaxrl_llm.lm import best_of_n, rollouts
from jaxrl_llm.nn import adapters
from jaxrl_llm.types import Responses
from tests.lm import policy_learning as tiny
from tests.lm.tiny import END
from tests.nn.tiny_gpt2 import fast_key

# Whole iterations, and laws over many draws: minutes of compilation.
pytestmark = pytest.mark.slow

MODEL = tiny.POLICY.clone(value_width=None)
PARAMS = adapters.trunk(tiny.PARAMS)


def scored(score: Any) -> Responses:
    score = jnp.asarray(score, jnp.float32)
    responses = tiny.random_responses(num_groups=score.shape[0], num_samples=score.shape[1])
    annotator = jnp.arange(score.shape[0])
    return replace(responses, score=score, annotator=annotator, margin=annotator / 2)


def test_select_keeps_all_that_is_known_of_the_best_response():
    responses = scored([[0.0, 2.0, 1.0], [3.0, -1.0, 3.0], [-2.0, -1.0, 0.5]])
    best = jax.jit(best_of_n.select)(responses)
    # Of equal ones, the first.
    for group, sample in enumerate([1, 0, 2]):
        for name, leaf in vars(best).items():
            whole = getattr(responses, name)
            if name in ("annotator", "margin"):
                np.testing.assert_array_equal(leaf, whole)
            elif whole is None:
                assert leaf is None
            else:
                assert leaf.shape == (3, 1, *whole.shape[2:])
                np.testing.assert_array_equal(leaf[group, 0], whole[group, sample])


def test_select_asks_for_scores():
    message = "responses.score is None; score them first"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        best_of_n.select(replace(scored([[1.0, 2.0]]), score=None))


def naive_expected_score(score: np.ndarray, n: int, gold: np.ndarray) -> float:
    """Over all subsets; those of equal scores share the win."""
    worth = []
    for subset in combinations(range(len(score)), n):
        chosen = list(subset)
        best = score[chosen] == score[chosen].max()
        worth.append(gold[chosen][best].mean())
    return float(np.mean(worth))


@pytest.mark.parametrize("n", [1, 2, 3, 6])
@pytest.mark.parametrize("ties", [False, True])
def test_expected_score_is_the_mean_over_all_subsets(n, ties):
    random = np.random.default_rng(n)
    score = random.integers(3, size=(4, 6)) if ties else random.normal(size=(4, 6))
    gold = random.normal(size=(4, 6))
    inputs = jnp.asarray(score, jnp.float32), jnp.asarray(gold, jnp.float32)
    found = best_of_n.expected_score(inputs[0], n, gold=inputs[1])
    expected = [naive_expected_score(*each, gold=g) for each, g in
                zip([(row, n) for row in score], gold, strict=True)]  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    alone = [naive_expected_score(row, n, row) for row in score]
    np.testing.assert_allclose(best_of_n.expected_score(inputs[0], n), alone, rtol=1e-5)


def test_expected_score_does_not_depend_on_the_order_of_the_samples():
    score = jnp.array([1.0, 0.0, 1.0, 2.0])
    gold = jnp.array([4.0, 1.0, 2.0, 3.0])
    turned = best_of_n.expected_score(score[::-1], 2, gold=gold[::-1])
    np.testing.assert_allclose(best_of_n.expected_score(score, 2, gold=gold), turned, rtol=1e-6)


@pytest.mark.parametrize("n", [0, 4])
def test_expected_score_refuses_more_than_there_are(n):
    message = f"n is {n}; it must be in [1, 3], the number of samples"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        best_of_n.expected_score(jnp.zeros((2, 3)), n)


@pytest.fixture(scope="module")
def draw() -> Any:
    return jax.jit(best_of_n.draw, static_argnums=(0, 1, 2))


def test_what_is_kept_is_what_was_scored(draw):
    """The score of every row of the corpus, computed anew from its tokens, is the kept one."""
    config = replace(tiny.ROLLOUT, num_samples=4)
    task = tiny.task(MODEL)
    candidates = draw(config, MODEL, tiny.REWARD, fast_key(0), PARAMS, task)
    assert candidates.score is not None
    assert candidates.score.shape == (tiny.NUM_PROMPTS, 4)
    corpus = best_of_n.as_corpus(candidates)
    best = np.asarray(candidates.score).max(axis=1)
    assert len(set(best.tolist())) > 1
    for row in range(tiny.NUM_PROMPTS):
        counted = np.asarray(corpus.response_mask[row])
        tokens = np.asarray(corpus.tokens[row])
        written = tokens[counted]
        np.testing.assert_allclose((written == tiny.TARGET).sum() / tiny.NUM_NEW, best[row])
        # Nothing after the end is kept, and the prompt is not learnt from.
        assert END not in written[:-1]
        asked = np.asarray(task.prompts.tokens[row])
        np.testing.assert_array_equal(tokens[: len(asked)], asked)
        assert not counted[: len(asked)].any()
        np.testing.assert_array_equal(np.asarray(corpus.attention_mask[row])[len(asked):],
                                      counted[len(asked):])  # fmt: skip


def test_select_of_drawn_responses_follows_the_law_of_best_of_n(draw):
    """One-token responses to one prompt, of which there are many copies."""
    count, n = 3000, 3
    config = rollouts.Config(num_samples=n, max_new_tokens=1, missing_end_penalty=0.1)
    task = tiny.task(MODEL)
    one = jax.tree.map(lambda leaf: jnp.repeat(leaf[:1], count, axis=0), task.prompts)
    # Paid for TARGET and, by the penalty for the rest, for the end: all others tie.
    candidates = draw(config, MODEL, tiny.REWARD, fast_key(1), PARAMS, replace(task, prompts=one))
    reward = np.full(tiny.VOCABULARY, -0.1)
    reward[tiny.TARGET] += 1
    reward[END] = 0
    best = best_of_n.select(candidates)
    assert best.score is not None
    written = np.asarray(best.tokens)[:, 0, -1]
    np.testing.assert_allclose(best.score[:, 0], reward[written], atol=1e-6)
    mask = task.prompts.attention_mask[:1]
    logits: Any = jax.jit(MODEL.apply)(
        {"params": PARAMS}, task.prompts.tokens[:1], attention_mask=mask
    )
    log_pi = jax.nn.log_softmax(logits[0, -1])
    law = np.exp(alignment.best_of_n_law(log_pi, jnp.asarray(reward, jnp.float32), n))
    assert abs(law[tiny.TARGET] - np.exp(log_pi[tiny.TARGET])) > 0.1
    frequency = np.bincount(written, minlength=tiny.VOCABULARY) / count
    error = np.sqrt(law * (1 - law) / count)
    assert (np.abs(frequency - law) < 4 * error + 1e-9).all()
    # The same samples say what smaller n would reach.
    assert candidates.score is not None
    for smaller in (1, 2):
        expected = (
            np.exp(alignment.best_of_n_law(log_pi, jnp.asarray(reward, jnp.float32), smaller))
            @ reward
        )
        found = np.asarray(best_of_n.expected_score(candidates.score, smaller))
        assert abs(found.mean() - expected) < 4 * found.std() / np.sqrt(count)
