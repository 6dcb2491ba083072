"""How far a policy is from its reference, beside every response of a law that is solved by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.lm import evaluate
from jaxrl_llm.types import Responses
from tests.lm import tiny

pytestmark = pytest.mark.slow

V, P, N = 3, 2, 4
END = 0


@dataclass(frozen=True)
class Shape:
    eos_token_id: int = END


@dataclass(frozen=True)
class Markov:
    """A model whose next token depends on the last one only, by `params["table"]` `[V, V]`."""

    value_width: None = None
    config: Shape = Shape()

    def apply(self, variables, inputs, *, method, **masks):
        if method == "states_after":
            own = inputs[:, :, masks["num_shared"] :]
            return jax.nn.one_hot(own.reshape(-1, own.shape[-1]), V)
        return inputs @ variables["params"]["transformer"]["wte"]["weight"].T


MODEL: Any = Markov()
TABLE, REFERENCE_TABLE = np.random.default_rng(0).normal(size=(2, V, V))


def params_of(table):
    return {"transformer": {"wte": {"weight": jnp.float32(table).T}}}


PARAMS, REFERENCE = params_of(TABLE), params_of(REFERENCE_TABLE)


def law(table, prompt, temperature=1.0):
    """Every complete response to a prompt that ends in `prompt`, and its log-probability."""
    log_pi = tiny.log_softmax(table / temperature)
    found = {}
    for drawn in itertools.product(range(V), repeat=N):
        response = drawn[: drawn.index(END) + 1] if END in drawn else drawn
        states = (prompt, *response[:-1])
        found[response] = sum(log_pi[pair] for pair in zip(states, response, strict=True))
    assert sum(map(math.exp, found.values())) == pytest.approx(1)
    return found


def responses_of(prompts, drawn):
    """`drawn` are lists of as many responses to each prompt."""
    tokens = np.zeros((len(prompts), len(drawn[0]), P + N), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for group, sample in np.ndindex(tokens.shape[:2]):
        row = (1, prompts[group], *drawn[group][sample])
        tokens[group, sample, : len(row)] = row
        mask[group, sample, : len(row)] = True
    return Responses(
        tokens=jnp.asarray(tokens),
        attention_mask=jnp.asarray(mask),
        response_mask=jnp.asarray(mask[..., P:]),
    )


def sample(seed, num_prompts, num_samples, temperature=1.0):
    random = np.random.default_rng(seed)
    prompts = random.integers(V, size=num_prompts).tolist()
    laws = [law(TABLE, prompt, temperature) for prompt in range(V)]
    texts = [list(of_prompt) for of_prompt in laws]
    chances = [np.exp(list(of_prompt.values())) for of_prompt in laws]
    drawn = [
        [texts[x][i] for i in random.choice(len(texts[x]), num_samples, p=chances[x])]
        for x in prompts
    ]
    return prompts, drawn


def expectation(function, temperature=1.0):
    """Of `function(prompt, response, log_probability)` under prompts that are equally likely."""
    total = 0.0
    for prompt in range(V):
        for response, log_pi in law(TABLE, prompt, temperature).items():
            total += math.exp(log_pi) * function(prompt, response, log_pi) / V
    return total


def true_kl(temperature):
    reference = [law(REFERENCE_TABLE, x, temperature) for x in range(V)]
    return expectation(lambda x, y, log_pi: log_pi - reference[x][y], temperature)


def naive(prompts, drawn, temperature):
    """Each response's statistics, one token after another, `[G, K]` each."""
    log_pi, log_ref = (tiny.log_softmax(table / temperature) for table in (TABLE, REFERENCE_TABLE))
    kl, k1, entropy, length, ended = np.zeros((5, len(prompts), len(drawn[0])))
    for place in np.ndindex(kl.shape):
        response = drawn[place[0]][place[1]]
        state = prompts[place[0]]
        for token in response:
            kl[place] += np.exp(log_pi[state]) @ (log_pi[state] - log_ref[state])
            k1[place] += log_pi[state, token] - log_ref[state, token]
            entropy[place] -= np.exp(log_pi[state]) @ log_pi[state]
            state = token
        length[place], ended[place] = len(response), response[-1] == END
    return kl, k1, entropy, length, ended


def test_divergence_matches_a_loop_over_tokens():
    prompts, drawn = sample(1, 6, 3, 0.7)
    batches = [responses_of(prompts[:3], drawn[:3]), responses_of(prompts[3:], drawn[3:])]
    result = evaluate.divergence(MODEL, PARAMS, REFERENCE, batches, temperature=0.7)
    kl, k1, entropy, length, ended = naive(prompts, drawn, 0.7)
    assert result.kl.mean == pytest.approx(kl.mean(), rel=1e-5)
    assert result.k1.mean == pytest.approx(k1.mean(), rel=1e-5)
    assert result.entropy.mean == pytest.approx(entropy.sum() / length.sum(), rel=1e-5)
    assert result.length.mean == pytest.approx(length.mean())
    assert result.ended.mean == pytest.approx(ended.mean())
    assert 0 < result.ended.mean < 1
    for estimate in result:
        assert estimate.low < estimate.mean < estimate.high


def test_divergence_covers_the_exact_kl_entropy_and_length():
    """200 sets of 60 prompts with 2 responses: counts are binomial, within 4 deviations."""
    num_sets, num_prompts = 200, 60
    prompts, drawn = sample(2, num_sets * num_prompts, 2)
    parts = np.split(np.arange(len(prompts)), num_sets)
    counts = np.zeros(5)
    entropy = -tiny.log_softmax(TABLE) * np.exp(tiny.log_softmax(TABLE))
    total_entropy = expectation(lambda x, y, _: sum(entropy[state].sum() for state in (x, *y[:-1])))
    length = expectation(lambda _x, y, _log: len(y))
    ended = expectation(lambda _x, y, _log: y[-1] == END)
    truth = np.array([true_kl(1.0), true_kl(1.0), total_entropy / length, length, ended])
    errors = np.zeros((num_sets, 5))
    for number, part in enumerate(parts):
        batch = responses_of([prompts[i] for i in part], [drawn[i] for i in part])
        result = evaluate.divergence(MODEL, PARAMS, REFERENCE, [batch], num_resamples=200)
        means, low, high = np.array(list(result)).T
        counts += (low <= truth) & (truth <= high)
        errors[number] = means - truth
    np.testing.assert_allclose(counts / num_sets, 0.95, atol=4 * math.sqrt(0.05 * 0.95 / num_sets))
    deviation = errors.std(0)
    assert (np.abs(errors.mean(0)) < 4 * deviation / math.sqrt(num_sets)).all()
    # The point of the exact sum: the tokens drawn add nothing to its variance.
    assert deviation[0] < 0.8 * deviation[1]


def test_divergence_of_a_policy_from_itself_is_0():
    batch = responses_of(*sample(3, 4, 2))
    result = evaluate.divergence(MODEL, PARAMS, PARAMS, [batch])
    assert tuple(result.kl + result.k1) == pytest.approx((0,) * 6, abs=1e-6)


def test_divergence_leaves_out_prompts_that_are_padding():
    batch = responses_of(*sample(4, 4, 2))
    padded = jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 2), (0, 0), (0, 0))), batch)
    expected = evaluate.divergence(MODEL, PARAMS, REFERENCE, [batch])
    actual = evaluate.divergence(MODEL, PARAMS, REFERENCE, [padded])
    for one, other in zip(actual, expected, strict=True):
        assert tuple(one) == pytest.approx(tuple(other))


def test_divergence_ends_by_the_stop_tokens_it_is_given():
    responses = responses_of([1, 1, 1], [[(1, 0)], [(2, 1, 1, 2)], [(1, 1, 1, 1)]])
    ended = partial(evaluate.divergence, MODEL, PARAMS, REFERENCE, [responses], num_resamples=10)
    assert ended().ended.mean == pytest.approx(1 / 3)
    assert ended(stop_tokens=(0, 2)).ended.mean == pytest.approx(2 / 3)


def test_divergence_counts_an_empty_response():
    responses = responses_of([1, 1], [[(1, 0)], [()]])
    result = evaluate.divergence(MODEL, PARAMS, REFERENCE, [responses], num_resamples=10)
    assert (result.length.mean, result.ended.mean) == (1, 0.5)


def test_divergence_refuses_what_has_no_interval():
    with pytest.raises(ValueError, match="batches is empty; give at least one"):
        evaluate.divergence(MODEL, PARAMS, REFERENCE, [])
    with pytest.raises(ValueError, match=r"must be \[n\] with n at least 2"):
        evaluate.divergence(MODEL, PARAMS, REFERENCE, [responses_of([1], [[(1, 0)]])])
    broken = jax.tree.map(lambda leaf: leaf * math.nan, PARAMS)
    with pytest.raises(ValueError, match=r"values\[0, 0\] is nan; it must be finite"):
        evaluate.divergence(MODEL, broken, REFERENCE, [responses_of(*sample(5, 2, 1))])
