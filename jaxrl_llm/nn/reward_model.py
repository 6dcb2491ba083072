"""A reward model: GPT-2's trunk with a head that scores a whole text and one for each criterion.

Its trunk carries the names of GPT-2's own, so that of any language model drops in.

Source: Stiennon et al. (2020), "Learning to summarize from human feedback", section 3.4, for a
scalar head on a fine-tuned trunk. A head starts with deviation 1 / sqrt(d + 1), and a gain and a
bias standardise the scores, as in Ziegler et al. (2019), "Fine-tuning language models from human
preferences".
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxrl_llm.nn import adapters, shared_prompts
from jaxrl_llm.nn.gpt2 import Transformer, init_cache
from jaxrl_llm.nn.gpt2_config import GPT2Config
from jaxrl_llm.numerics import token_log_probabilities
from jaxrl_llm.types import Array, Key, KVCache, PyTree

CRITERIA = ("accuracy", "safety", "clarity")


class Scores(NamedTuple):
    """What a reward model says of texts, float32.

    Attributes:
      overall: `[B]`, the greater the better; of two texts, raw scores differ by the log-odds that
        the first is preferred.
      criteria: `[B, C]`, an estimate of each rating in (0, 1).
    """

    overall: Array
    criteria: Array


class RewardModel(nn.Module):
    """Reads a prompt with its response; scores the response as a whole and by criterion.

    Attributes:
      config: of the trunk.
      dtype: of the trunk's computation; parameters and heads are float32.
      remat: whether the backward pass recomputes each block rather than store what is inside.
      criteria: names of the criteria, `C`; none for the overall score alone.
      pooling: what the heads read: the hidden state of the `last` real token, or the `mean` of
        those of the response.
      surprisal: whether the heads also read how unlikely the trunk finds the response: the mean of
        its hidden states, each weighted by -log p(token), and of these numbers the sum, the mean
        and the greatest. A fine-tuned language model knows what belongs into a response; a head
        that had to learn so from comparisons would need many more.
    """

    config: GPT2Config
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    criteria: tuple[str, ...] = CRITERIA
    pooling: Literal["last", "mean"] = "last"
    surprisal: bool = False

    def setup(self) -> None:
        self.transformer = Transformer(self.config, self.dtype, self.remat, None)
        # A hidden state ends in a layer normalisation: a score starts with a variance of about 1.
        start = nn.initializers.normal(1 / math.sqrt(self.config.n_embd + 1))
        self.overall = nn.Dense(1, kernel_init=start)
        if self.criteria:
            self.by_criterion = nn.Dense(len(self.criteria), kernel_init=start)
        self.gain = self.param("gain", nn.initializers.ones, ())
        self.bias = self.param("bias", nn.initializers.zeros, ())

    def __call__(
        self,
        tokens: Array,
        attention_mask: Array | None = None,
        response_mask: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Scores:
        """Scores whose overall one is gain · raw + bias; these are 1 and 0 until someone sets them.

        Args:
          tokens: `[B, L]` integers in [0, V).
          attention_mask: `[B, L]`, True (or 1) on real tokens; None where all are. Padding on
            either side changes nothing.
          response_mask: `[B, N]`, the tokens of the response, which are the last `N`; None counts
            the whole text as the response. Only the pooling `mean` and surprisal read it. The mean
            of no token is 0, which scores as the heads' biases.
          deterministic: False drops out, drawing from the random stream `dropout`.
        """
        features = self.features(tokens, attention_mask, response_mask, deterministic=deterministic)
        return self.normalised(self.raw(features))

    def features(
        self,
        tokens: Array,
        attention_mask: Array | None = None,
        response_mask: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Array:
        """What the heads read of each text, `[B, F]`; arguments as above."""
        hidden, _ = self.transformer(tokens, attention_mask, None, None, deterministic)
        return self.pooled(hidden, tokens, attention_mask, response_mask)

    def states_after(self, tokens: Array, *, attention_mask: Array, num_shared: int) -> Array:
        """Of the trunk, as those of `GPT2`."""
        cache = init_cache(self.config, tokens.shape[0], num_shared, self.dtype)

        def read(tokens: Array, *, attention_mask: Array, cache: KVCache) -> Any:
            return self.transformer(tokens, attention_mask, None, cache, True)

        return shared_prompts.hidden_states(read, cache, tokens, attention_mask, num_shared)

    def pooled(
        self,
        hidden: Array,
        tokens: Array,
        attention_mask: Array | None,
        response_mask: Array | None,
    ) -> Array:
        """What the heads read, `[B, F]`, of the trunk's states `[B, L, E]` of some tokens."""
        real = jnp.ones(tokens.shape, bool) if attention_mask is None else attention_mask > 0
        counted = real if response_mask is None else response_mask > 0
        unread = ((0, 0), (real.shape[1] - counted.shape[1], 0))
        counted = jnp.pad(counted, unread) & real
        pooled = _at_last_token(hidden, real) if self.pooling == "last" else _mean(hidden, counted)
        if not self.surprisal:
            return pooled
        read = counted[:, 1:] & real[:, :-1]
        surprisal = jnp.where(read, self._surprisal(hidden, tokens), 0)
        weighted = _mean(hidden[:, 1:], read, surprisal)
        return jnp.concatenate([pooled, weighted, _summary(surprisal, read)], axis=-1)

    def raw(self, features: Array) -> Scores:
        """Scores without gain and bias, which are what a loss trains, of `features`."""
        overall = self.overall(features)[:, 0]
        if not self.criteria:
            return Scores(overall, jnp.zeros((*overall.shape, 0), overall.dtype))
        return Scores(overall, jax.nn.sigmoid(self.by_criterion(features)))

    def normalised(self, raw: Scores) -> Scores:
        """The same scores with gain and bias."""
        return raw._replace(overall=self.gain * raw.overall + self.bias)

    def _surprisal(self, hidden: Array, tokens: Array) -> Array:
        """-log p of every token after the first, `[B, L - 1]` nats."""
        embedding = jnp.asarray(self.transformer.wte.weight).astype(hidden.dtype)
        before = hidden[:, :-1].reshape(-1, hidden.shape[-1])
        log_probability, _ = token_log_probabilities(before, embedding, tokens[:, 1:].reshape(-1))
        return -log_probability.reshape(tokens.shape[0], -1)


def from_language_model(model: RewardModel, params: PyTree, key: Key) -> PyTree:
    """Parameters of `model` with the trunk of a language model, and heads drawn from `key`.

    Args:
      model: of the same shape as the language model.
      params: of the language model; its output layer, adapters, value head and LoRA are left out,
        so merge a LoRA that is to count (`adapters.merge_lora`).
      key: of the heads.
    """

    @jax.jit  # so that nothing is drawn for the leaves that the trunk brings
    def start(key: Key, trunk: PyTree) -> PyTree:
        fresh = model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        return adapters.attach(fresh, {"transformer": trunk})

    return start(key, adapters.trunk(params)["transformer"])


def _at_last_token(hidden: Array, real: Array) -> Array:
    """Of `[B, L, E]`, `[B, E]` at the last True of `real` `[B, L]`."""
    last = real.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def _mean(hidden: Array, counted: Array, weight: Array | None = None) -> Array:
    """The mean `[B, E]` of `[B, L, E]`, times `weight`, over the True of `counted` `[B, L]`."""
    weight = counted.astype(hidden.dtype) if weight is None else jnp.where(counted, weight, 0)
    total = jnp.einsum("ble,bl->be", hidden, weight)
    return total / jnp.maximum(jnp.sum(counted, axis=1), 1)[:, None]


def _summary(surprisal: Array, read: Array) -> Array:
    """Sum, mean and maximum, `[B, 3]`, of numbers `[B, L]` that are 0 where `read` is False."""
    total = jnp.sum(surprisal, axis=1)
    mean = total / jnp.maximum(jnp.sum(read, axis=1), 1)
    # A whole response has tens of nats, and heads start with weights for numbers of about 1.
    return jnp.stack([0.1 * total, mean, jnp.max(surprisal, axis=1, initial=0)], axis=-1)
