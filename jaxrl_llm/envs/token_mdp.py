"""Token MDPs so small that every response is listed: the exact answers of language-model alignment.

A policy is any function to log pi(y | prompt) over the `Y` complete responses, `[K, Y]`: a table, a
tiny GPT-2 run on `all_responses`, or the exact optimum. Of each, this module knows the objective

  J(pi) = E_prompt [ E_{y ~ pi}[r(prompt, y)] - beta KL(pi(. | prompt) || pi_ref(. | prompt)) ],

its gradient, its maximum and the policy that attains it, hence the bias of every estimator and the
gap of every learner. Prompt k is the single token k. Log-probabilities and KL are in nats.

`K` prompts, `Y` responses of at most `T` tokens, `V` tokens, and `S` prefixes: what a response may
look like before its next token, the empty prefix first, then by length and in lexicographic order.

Source: Korbak et al. (2022), "RL with KL penalties is better viewed as Bayesian inference",
  arXiv:2205.11275; Rafailov et al. (2023), "Direct preference optimization", arXiv:2305.18290.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from numpy.typing import ArrayLike, NDArray

from jaxrl_llm import checks, make_mdp
from jaxrl_llm.envs import tabular
from jaxrl_llm.types import MDP, Array, Environment, PyTree, Responses

PAD = 0  # the token after the end of a response; masks tell it from a real 0
MAX_VOCAB_SIZE, MAX_LENGTH = 4, 4

Response = tuple[int, ...]


@struct.dataclass(kw_only=True)
class TokenMDP:
    """Prompts, every complete response, what each is worth, and the policy to stay close to.

    A response ends with the end token, where there is one, or at `T` tokens.

    Attributes:
      responses: `[Y, T]` int32, in lexicographic order, `PAD` after the end.
      mask: `[Y, T]` bool, True on the tokens of the response, its end token included.
      prompt_probability: `[K]`, the law of the prompt.
      reward: `[K, Y]`.
      reference_log_probability: `[K, Y]`, nats, finite.
      kl_coefficient: `[]`, beta, 0 or more.
      vocab_size: V.
      end_token: None where every response has `T` tokens.
    """

    responses: Array
    mask: Array
    prompt_probability: Array
    reward: Array
    reference_log_probability: Array
    kl_coefficient: Array
    vocab_size: int = struct.field(pytree_node=False)
    end_token: int | None = struct.field(pytree_node=False)

    @property
    def num_prompts(self) -> int:
        return self.reward.shape[-2]

    @property
    def length(self) -> int:
        return self.responses.shape[-1]

    @property
    def prompts(self) -> Array:
        """`[K, 1]` int32."""
        return jnp.arange(self.num_prompts, dtype=jnp.int32)[:, None]

    @property
    def num_continuations(self) -> int:
        """How many tokens do not end a response."""
        return self.vocab_size - (self.end_token is not None)

    @property
    def num_prefixes(self) -> int:
        return sum(self.num_continuations**length for length in range(self.length))


@struct.dataclass(kw_only=True)
class Optimum:
    """The best policy and its worth.

    Attributes:
      log_probability: `[K, Y]`, nats; -inf where the policy is 0.
      log_normaliser: `[K]`, log Z = log E_{y ~ ref} exp(r / beta), nats. With beta 0, where it is
        infinite, the largest reward, which is the limit of beta log Z.
      objective: `[]`, J of the policy, E_prompt[beta log Z].
    """

    log_probability: Array
    log_normaliser: Array
    objective: Array


def make(
    reward: ArrayLike | Callable[[int, Response], float] | None = None,
    *,
    vocab_size: int,
    length: int,
    kl_coefficient: float,
    reference_logits: ArrayLike | None = None,
    end_token: int | None = None,
    num_prompts: int = 1,
    prompt_probability: ArrayLike | None = None,
    seed: int = 0,
) -> TokenMDP:
    """Lists every complete response, on the host. Float32; float64 under `jax.enable_x64(True)`.

    >>> mdp = make(lambda prompt, response: sum(response), vocab_size=2, length=2,
    ...            kl_coefficient=0.5, end_token=0)
    >>> mdp.responses.tolist(), mdp.reward.tolist()
    ([[0, 0], [1, 0], [1, 1]], [[0.0, 1.0, 2.0]])

    Args:
      reward: `[K, Y]`, or `[Y]` for every prompt; or `(prompt, response) -> float`, with a response
        as its tokens without padding; standard normal numbers of `seed` when None.
      vocab_size: V, 2 to 4.
      length: T, 1 to 4.
      kl_coefficient: beta, 0 or more.
      reference_logits: of the reference policy, `[K, S, V]` or what broadcasts to it; uniform over
        the tokens when None.
      end_token: ends a response, not a prompt; responses have `length` tokens when None.
      num_prompts: K, at most V.
      prompt_probability: `[K]`; uniform when None.
      seed: of the random reward; not read when `reward` is given.

    Raises:
      ValueError: for too many responses, saying how many, or a wrong shape or value.
    """
    checks.at_least("vocab_size", vocab_size, 2)
    checks.at_least("length", length, 1)
    if end_token is not None:
        checks.between("end_token", end_token, 0, vocab_size - 1)
    if vocab_size > MAX_VOCAB_SIZE or length > MAX_LENGTH:
        count = 1.0
        for _ in range(length):
            count = (vocab_size - 1) * count + 1 if end_token is not None else vocab_size * count
        raise ValueError(
            f"vocab_size is {vocab_size} and length {length}, which makes {count:g} responses; "
            f"use at most vocab_size {MAX_VOCAB_SIZE} and length {MAX_LENGTH}, or envs.language"
        )
    checks.between("num_prompts", num_prompts, 1, vocab_size)
    checks.at_least("kl_coefficient", kl_coefficient, 0)
    rows = _complete_responses(vocab_size, length, end_token)
    table = (num_prompts, len(rows))
    if reward is None:
        reward = np.random.default_rng(seed).normal(size=table)
    elif callable(reward):
        reward = [[reward(prompt, row) for row in rows] for prompt in range(num_prompts)]
    if prompt_probability is None:
        prompt_probability = 1 / num_prompts
    law = _finite("prompt_probability", prompt_probability, (num_prompts,))
    if law.min() < 0 or abs(law.sum() - 1) > 1e-5:
        raise ValueError(f"prompt_probability is {law.tolist()}; it must be a law, with sum 1")
    mask = np.array([[place < len(row) for place in range(length)] for row in rows])
    responses = np.full(mask.shape, PAD, np.int32)
    responses[mask] = np.concatenate(rows)
    mdp = TokenMDP(
        responses=jnp.asarray(responses),
        mask=jnp.asarray(mask),
        prompt_probability=jnp.asarray(law, float),
        reward=jnp.asarray(_finite("reward", reward, table), float),
        reference_log_probability=jnp.asarray(np.zeros(table), float),
        kl_coefficient=jnp.asarray(kl_coefficient, float),
        vocab_size=vocab_size,
        end_token=end_token,
    )
    shape = (num_prompts, mdp.num_prefixes, vocab_size)
    logits = _finite("reference_logits", 0 if reference_logits is None else reference_logits, shape)
    reference = jax.jit(tabular_log_probability)(mdp, jnp.asarray(logits, float))
    return dataclasses.replace(mdp, reference_log_probability=reference)


# Exact answers. `log_probability` is log pi(y | prompt), [K, Y], normalised over Y; -inf allowed.


def expectation(mdp: TokenMDP, log_probability: Array, value: Array) -> Array:
    """E_prompt E_{y ~ pi}[value], `[]`, of any `value` `[K, Y]`; not read where pi is 0."""
    chex.assert_equal_shape((log_probability, value, mdp.reward))
    value = jnp.where(log_probability > -jnp.inf, value, 0)
    return mdp.prompt_probability @ jnp.sum(jnp.exp(log_probability) * value, axis=-1)


def kl_divergence(mdp: TokenMDP, log_probability: Array, other: Array) -> Array:
    """E_prompt KL(pi || other), `[]`, nats, of two policies `[K, Y]`."""
    return expectation(mdp, log_probability, log_probability - other)


def exact_reward(mdp: TokenMDP, log_probability: Array) -> Array:
    """E_prompt E_{y ~ pi}[r], `[]`."""
    return expectation(mdp, log_probability, mdp.reward)


def exact_kl(mdp: TokenMDP, log_probability: Array) -> Array:
    """E_prompt KL(pi || pi_ref), `[]`, nats."""
    return kl_divergence(mdp, log_probability, mdp.reference_log_probability)


def exact_objective(mdp: TokenMDP, log_probability: Array) -> Array:
    """J(pi) = E[r] - beta KL(pi || pi_ref), `[]`, to be maximised.

    Source: Rafailov et al. (2023), equation 3.
    """
    penalty = mdp.kl_coefficient * exact_kl(mdp, log_probability)
    return exact_reward(mdp, log_probability) - penalty


def exact_optimum(mdp: TokenMDP) -> Optimum:
    """pi*(y) = pi_ref(y) exp(r(y) / beta) / Z, for each prompt.

    It gives every policy's gap: J(pi*) - J(pi) = beta E_prompt KL(pi || pi*). With beta 0 it is
    the limit: pi_ref restricted to the responses of the largest reward.

    Source: Rafailov et al. (2023), equation 4.
    """
    beta = mdp.kl_coefficient
    positive = beta > 0
    safe_beta = jnp.where(positive, beta, 1)
    top = jnp.max(mdp.reward, axis=-1)
    below = mdp.reward - top[:, None]
    # Relative to the best response, so that a small beta overflows nowhere.
    tilt = jnp.where(positive, below / safe_beta, jnp.where(below < 0, -jnp.inf, 0))
    weight = mdp.reference_log_probability + tilt
    log_mass = jax.nn.logsumexp(weight, axis=-1)
    return Optimum(
        log_probability=weight - log_mass[:, None],
        log_normaliser=jnp.where(positive, top / safe_beta + log_mass, top),
        objective=mdp.prompt_probability @ (top + beta * log_mass),
    )


def exact_gradient(mdp: TokenMDP, policy: Callable[[PyTree], Array], params: PyTree) -> PyTree:
    """Gradient of J by the score-function formula, with every response in the place of samples.

      E_prompt sum_y pi(y) (r(y) - beta log(pi(y) / pi_ref(y)) - b) d log pi(y)

    where b, each prompt's mean of what it is taken from, only keeps numbers small. J itself is
    not differentiated, so autodiff of `exact_objective` is an independent check.

    Args:
      mdp: the problem.
      policy: `params -> [K, Y]`, log-probabilities, normalised over Y.
      params: any pytree; the result is one like it.

    Source: Williams (1992), "Simple statistical gradient-following algorithms", theorem 1.
    """
    log_probability, pull_back = jax.vjp(policy, params)
    log_ratio = log_probability - mdp.reference_log_probability
    possible = log_probability > -jnp.inf
    worth = jnp.where(possible, mdp.reward - mdp.kl_coefficient * log_ratio, 0)
    probability = jnp.exp(log_probability)
    baseline = jnp.sum(probability * worth, axis=-1, keepdims=True)
    weight = mdp.prompt_probability[:, None] * probability * (worth - baseline)
    return pull_back(weight)[0]


def gap(mdp: TokenMDP, log_probability: Array) -> Array:
    """J(pi*) - J(pi), `[]`, 0 or more but for rounding."""
    return exact_optimum(mdp).objective - exact_objective(mdp, log_probability)


def relative_gap(mdp: TokenMDP, log_probability: Array, start: Array) -> Array:
    """The gap as a share of that of `start` `[K, Y]`, not itself optimal: 0 is the optimum."""
    return gap(mdp, log_probability) / gap(mdp, start)


def tabular_token_log_probability(mdp: TokenMDP, logits: Array) -> Array:
    """log pi(y_t | prompt, y_<t), `[K, Y, T]`, 0 after the end, from `logits` `[K, S, V]`."""
    chex.assert_shape(logits, (mdp.num_prompts, mdp.num_prefixes, mdp.vocab_size))
    prefix = prefix_index(mdp, mdp.responses, mdp.mask)
    log_probability = jax.nn.log_softmax(logits)[:, prefix, mdp.responses]
    return jnp.where(mdp.mask[None], log_probability, 0)


def tabular_log_probability(mdp: TokenMDP, logits: Array) -> Array:
    """log pi(y | prompt), `[K, Y]`, from `logits` `[K, S, V]` after each prompt and prefix."""
    return jnp.sum(tabular_token_log_probability(mdp, logits), axis=-1)


def conditional_log_probability(mdp: TokenMDP, log_probability: Array) -> Array:
    """log pi(token | prompt, prefix), `[K, S, V]`, of any policy `[K, Y]`: its logits as a table.

    The inverse of `tabular_log_probability`. Uniform after a prefix of probability 0.
    """
    step = prefix_index(mdp, mdp.responses, mdp.mask) * mdp.vocab_size + mdp.responses
    steps = jnp.arange(mdp.num_prefixes * mdp.vocab_size)
    passes = (step[:, :, None] == steps[None, None, :]) & mdp.mask[:, :, None]
    through = jnp.where(jnp.any(passes, axis=1)[None], log_probability[:, :, None], -jnp.inf)
    mass = jax.nn.logsumexp(through, axis=1).reshape(-1, mdp.num_prefixes, mdp.vocab_size)
    reached = jnp.any(mass > -jnp.inf, axis=-1, keepdims=True)
    return jax.nn.log_softmax(jnp.where(reached, mass, 0))


# From sampled tokens `[..., T]`, with `mask` True on those of the response, to their places. What
# stands where the mask is False is not read.


def prefix_index(mdp: TokenMDP, tokens: Array, mask: Array) -> Array:
    """Which of the S prefixes stands before each token, `[..., T]` int32; 0 where masked out."""
    chex.assert_axis_dimension(tokens, -1, mdp.length)
    digit = tokens if mdp.end_token is None else tokens - (tokens > mdp.end_token)
    # Prefixes by length are the nodes of a tree by depth, numbered as a heap is.
    index = [jnp.zeros(tokens.shape[:-1], jnp.int32)]
    for place in range(mdp.length - 1):
        index.append(mdp.num_continuations * index[-1] + 1 + digit[..., place])
    return jnp.where(mask, jnp.stack(index, axis=-1), 0)


def response_index(mdp: TokenMDP, tokens: Array, mask: Array) -> Array:
    """Which of the Y responses each row is, `[...]` int32; Y where it is none of them."""

    def find(row: Array, kept: Array) -> Array:
        same = (row[None] == mdp.responses) | ~mdp.mask
        found = jnp.all(same & (kept[None] == mdp.mask), axis=-1)
        return jnp.where(jnp.any(found), jnp.argmax(found), len(found)).astype(jnp.int32)

    return jnp.vectorize(find, signature="(t),(t)->()")(tokens, mask)


def response_reward(mdp: TokenMDP, prompt: Array, tokens: Array, mask: Array) -> Array:
    """The reward of responses to `prompt` `[...]`, `[...]`; NaN where one is not complete."""
    index = response_index(mdp, tokens, mask)
    return mdp.reward.at[prompt, index].get(mode="fill", fill_value=jnp.nan)


def all_responses(mdp: TokenMDP) -> Responses:
    """Every response to every prompt as one batch, with the reward as `score`.

    What a language model of the same vocabulary finds of its rows is that model's policy `[K, Y]`.
    """
    table = mdp.reward.shape
    prompt = jnp.broadcast_to(mdp.prompts[:, None], (*table, 1))
    response = jnp.broadcast_to(mdp.responses[None], (*table, mdp.length))
    mask = jnp.broadcast_to(mdp.mask[None], response.shape)
    return Responses(
        tokens=jnp.concatenate([prompt, response], axis=-1),
        attention_mask=jnp.concatenate([jnp.ones_like(prompt, bool), mask], axis=-1),
        response_mask=mask,
        score=mdp.reward.astype(jnp.float32),
    )


def to_mdp(mdp: TokenMDP) -> MDP:
    """States are prompts with prefixes, actions are tokens; undiscounted.

    State `prompt * S + prefix`, and last the terminal one. The reward comes with the last token;
    the KL penalty is left out, so the value under a policy is its `exact_reward`.
    """
    prefix = np.asarray(jax.jit(prefix_index)(mdp, mdp.responses, mdp.mask))
    token, mask = np.asarray(mdp.responses), np.asarray(mdp.mask)
    is_last = mask & ~np.pad(mask[:, 1:], ((0, 0), (0, 1)))
    first = np.arange(mdp.num_prompts) * mdp.num_prefixes
    end = mdp.num_prompts * mdp.num_prefixes
    state = first[:, None, None] + prefix
    following = np.where(is_last, end, np.roll(state, -1, axis=-1))
    transition = np.zeros((end + 1, mdp.vocab_size, end + 1), mdp.reward.dtype)
    transition[state[:, mask], token[mask], following[:, mask]] = 1
    reward = np.zeros_like(transition[:, :, end])
    reward[state[:, is_last], token[is_last]] = mdp.reward
    initial = np.zeros_like(reward[:, 0])
    initial[first] = mdp.prompt_probability
    return make_mdp(transition, reward, 1.0, initial=initial, terminal=np.arange(end + 1) == end)


def environment(mdp: TokenMDP) -> Environment:
    """`to_mdp` as an environment: the observation is the state's index, the action a token."""
    return tabular.make(to_mdp(mdp), name="token_mdp")


def _complete_responses(vocab_size: int, length: int, end_token: int | None) -> list[Response]:
    open_rows: list[Response] = [()]
    ended: list[Response] = []
    for _ in range(length):
        longer = [(*row, token) for row in open_rows for token in range(vocab_size)]
        open_rows = [row for row in longer if row[-1] != end_token]
        ended += [row for row in longer if row[-1] == end_token]
    return sorted(ended + open_rows)


def _finite(name: str, array: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.float64]:
    host = np.asarray(array, np.float64)
    try:
        host = np.broadcast_to(host, shape)
    except ValueError:
        raise ValueError(f"{name} has shape {host.shape}; it must broadcast to {shape}") from None
    if not np.isfinite(host).all():
        place = tuple(int(axis) for axis in np.argwhere(~np.isfinite(host))[0])
        raise ValueError(f"{name}{list(place)} is {host[place]}; it must be finite")
    return host
