"""How good a language model and its text are: perplexity, calibration, divergence, diversity.

What runs the model takes batches; what judges generated text takes, on the host, sequences of
tokens or words. Means of scores with their intervals, exact match and pass@k are in `scores`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxrl_llm import checks
from jaxrl_llm.data.tokens import next_token_targets
from jaxrl_llm.lm import decoding
from jaxrl_llm.lm.likelihood import exact_kl, response_likelihood, token_likelihood
from jaxrl_llm.lm.scores import Estimate, mean_with_interval, ratio_with_interval
from jaxrl_llm.nn import gpt2
from jaxrl_llm.types import Array, Mean, PyTree, Responses, TokenBatch


@partial(jax.jit, static_argnames=("model", "chunk_size"))
def negative_log_likelihood(
    model: gpt2.GPT2, params: PyTree, batch: TokenBatch, *, chunk_size: int | None = 1024
) -> Mean:
    """-sum_t log p(x_t | x_<t) in nats over the tokens that `batch` counts, and their number.

    Args:
      model: hashable, as any Flax module.
      params: of the model.
      batch: `[B, L]`, padded on either side or packed.
      chunk_size: as in `numerics.token_log_probabilities`.
    """
    likelihood = token_likelihood(model, params, batch, chunk_size=chunk_size)
    return Mean.of(-likelihood.log_probability, likelihood.mask)


class Likelihood(NamedTuple):
    """How likely a model finds a corpus.

    Attributes:
      nats: -log p of all of it.
      num_tokens: that were predicted.
    """

    nats: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """exp(nats a token); infinite beyond the range of a float."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.nats / self.num_tokens))

    def bits_per_byte(self, num_bytes: int) -> float:
        """-log2 p a byte, which compares models across vocabularies; perplexity does not.

        Args:
          num_bytes: of the text that the predicted tokens encode, in UTF-8.

        >>> Likelihood(nats=16 * math.log(2), num_tokens=4).bits_per_byte(8)
        2.0
        """
        checks.at_least("num_bytes", num_bytes, 1)
        return self.nats / math.log(2) / num_bytes


def corpus_likelihood(
    model: gpt2.GPT2,
    params: PyTree,
    batches: Iterable[TokenBatch],
    *,
    chunk_size: int | None = 1024,
) -> Likelihood:
    """The sum of `negative_log_likelihood` over batches, in float64 on the host.

    Args:
      model: hashable, as any Flax module.
      params: of the model.
      batches: of one shape, as `data.tokens.batches` makes them: each new shape is compiled.
      chunk_size: as in `numerics.token_log_probabilities`.

    Raises:
      ValueError: if no batch has a token to predict.
    """
    evaluate = partial(negative_log_likelihood, model, params, chunk_size=chunk_size)
    parts = jax.device_get([evaluate(batch) for batch in batches])
    num_tokens = sum(int(part.weight) for part in parts)
    if not num_tokens:
        place = f"batches has {len(parts)} of them and not one token to predict"
        raise ValueError(f"{place}; response_mask must hold tokens that follow another")
    return Likelihood(math.fsum(float(part.total) for part in parts), num_tokens)


def perplexity(
    model: gpt2.GPT2,
    params: PyTree,
    batches: Iterable[TokenBatch],
    *,
    chunk_size: int | None = 1024,
) -> float:
    """exp(-(1 / T) sum_t log p(x_t | x_<t)) over all `T` counted tokens of all batches.

    Every token weighs the same, whatever its batch. Arguments and errors: `corpus_likelihood`.
    """
    return corpus_likelihood(model, params, batches, chunk_size=chunk_size).perplexity


@struct.dataclass(kw_only=True)
class Calibration:
    """Whether tokens predicted with probability p are right in a share p of cases.

    Parts of a corpus add up: `functools.reduce(operator.add, parts)`. A reliability diagram is
    `accuracy.mean` over `confidence.mean`; each has the number of tokens in a bin as weight.

    Attributes:
      confidence: `[bins]`, the probability of the likeliest token, by bin of that probability.
      accuracy: `[bins]`, whether that token was right.
      brier: `[]`, sum_j (p_j - [j = x])^2, in [0, 2]: a proper score, which rewards a model for
        being sharp as well as calibrated.
    """

    confidence: Mean
    accuracy: Mean
    brier: Mean

    def __add__(self, other: Calibration) -> Calibration:
        return jax.tree.map(jnp.add, self, other)

    @property
    def expected_error(self) -> Array:
        """sum_b n_b / n |accuracy_b - confidence_b|, `[]`; 0 where nothing was counted.

        Source: Guo et al. (2017), "On calibration of modern neural networks", equation 3.
        """
        gap = jnp.abs(self.accuracy.total - self.confidence.total)
        return Mean(total=jnp.sum(gap), weight=jnp.sum(self.accuracy.weight)).mean


@partial(jax.jit, static_argnames=("model", "num_bins", "chunk_size"))
def calibration(
    model: gpt2.GPT2,
    params: PyTree,
    batch: TokenBatch,
    *,
    num_bins: int = 15,
    chunk_size: int = 512,
) -> Calibration:
    """Calibration of the model's next-token probabilities over the tokens that `batch` counts.

    Probabilities `[N, V]` exist for `chunk_size` tokens at a time.

    Args:
      model: hashable, as any Flax module.
      params: of the model.
      batch: `[B, L]`, padded on either side or packed.
      num_bins: of equal width; bin b of M holds (b / M, (b + 1) / M].
      chunk_size: tokens at a time.

    Source: Guo et al. (2017), section 2, equations 1 and 2; Brier (1950), "Verification of
      forecasts expressed in terms of probability".
    """
    checks.at_least("num_bins", num_bins, 1)
    checks.at_least("chunk_size", chunk_size, 1)
    hidden: Any = model.apply(
        {"params": params},
        batch.tokens,
        attention_mask=batch.attention_mask,
        segment=batch.segment,
        method="hidden_states",
    )
    targets, mask = (x.reshape(-1) for x in next_token_targets(batch))

    def predict(inputs: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        """Of one token: hidden `[E]` and target `[]`."""
        hidden, target = inputs
        logits: Any = model.apply({"params": params}, hidden, method="logits")
        probability = jax.nn.softmax(logits)
        brier = jnp.sum(jnp.square(probability)) - 2 * probability[target] + 1
        return jnp.max(probability), jnp.argmax(logits) == target, brier

    flat = hidden.reshape(-1, hidden.shape[-1])
    confidence, correct, brier = jax.lax.map(predict, (flat, targets), batch_size=chunk_size)
    bins = jnp.clip(jnp.ceil(confidence * num_bins).astype(jnp.int32) - 1, 0, num_bins - 1)

    def by_bin(values: Array) -> Mean:
        return jax.vmap(lambda index: Mean.of(values, mask & (bins == index)))(jnp.arange(num_bins))

    return Calibration(
        confidence=by_bin(confidence), accuracy=by_bin(correct), brier=Mean.of(brier, mask)
    )


class Divergence(NamedTuple):
    """How far a policy is from its reference, and what its responses are like.

    Both estimates of KL(pi || ref) = E log(pi(y) / ref(y)), in nats a response, are unbiased.

    Attributes:
      kl: the mean of sum_t KL(pi(· | x, y_<t) || ref(· | x, y_<t)), each exact over the vocabulary:
        k1 with every token integrated out given those before it, so never below 0.
      k1: the mean of sum_t log(pi(y_t | x, y_<t) / ref(y_t | x, y_<t)), of the tokens drawn.
      entropy: of pi(· | x, y_<t), nats a token.
      length: tokens a response, its end token included.
      ended: the share of responses that ended by a stop token rather than by the limit.
    """

    kl: Estimate
    k1: Estimate
    entropy: Estimate
    length: Estimate
    ended: Estimate


def divergence(
    model: gpt2.GPT2,
    params: PyTree,
    reference: PyTree,
    batches: Iterable[Responses],
    *,
    temperature: float = 1.0,
    stop_tokens: tuple[int, ...] | None = None,
    num_resamples: int = 5000,
) -> Divergence:
    """KL from the reference, entropy and length of sampled responses, with intervals of 95%.

    It means what it says of responses that pi itself drew, at `temperature` and from the whole
    vocabulary. Intervals resample prompts, since the responses to one are alike. Prompts that are
    padding throughout do not count.

    Args:
      model: of both.
      params: of pi.
      reference: of ref, such as `adapters.trunk(params)`.
      batches: of one shape, and all with as many responses to a prompt: each new shape is compiled.
      temperature: of both.
      stop_tokens: each ends a response; the model's `eos_token_id` by default.
      num_resamples: of the prompts, for the intervals.

    Raises:
      ValueError: if there are fewer than two prompts, no tokens, or a number that is not finite.

    Source: Ranganath et al. (2014), "Black box variational inference", section 3.1, for
      integrating out (Rao-Blackwellisation).
    """
    stop_tokens = decoding.end_tokens(model, stop_tokens)
    parts: list[dict[str, Any]] = []
    for batch in batches:
        part = _divergence(model, params, reference, batch, temperature, stop_tokens)
        real = np.asarray(batch.attention_mask).any((1, 2))
        parts.append({name: np.asarray(values)[real] for name, values in part.items()})
    if not parts:
        raise ValueError("batches is empty; give at least one")
    total = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    mean = partial(mean_with_interval, num_resamples=num_resamples)
    return Divergence(
        kl=mean(total["kl"]),
        k1=mean(total["k1"]),
        entropy=ratio_with_interval(total["entropy"], total["length"], num_resamples=num_resamples),
        length=mean(total["length"]),
        ended=mean(total["ended"]),
    )


@partial(jax.jit, static_argnames=("model", "stop_tokens"))
def _divergence(
    model: gpt2.GPT2,
    params: PyTree,
    reference: PyTree,
    responses: Responses,
    temperature: Array | float,
    stop_tokens: tuple[int, ...],
) -> dict[str, Array]:
    """Sums over each response, `[G, K]`."""
    pi, ref = (
        response_likelihood(model, each, responses, temperature=temperature)
        for each in (params, reference)
    )
    exact = exact_kl(model, params, reference, responses, temperature=temperature)
    return {
        "kl": jnp.sum(exact, axis=-1),
        "k1": jnp.sum(pi.log_probability - ref.log_probability, axis=-1),
        "entropy": jnp.sum(pi.entropy, axis=-1),
        "length": jnp.sum(responses.response_mask, axis=-1),
        "ended": decoding.has_ended(responses, stop_tokens),
    }


def responses(batch: TokenBatch) -> list[list[int]]:
    """What each row counts as its response, end token included, on the host.

    Rows that are padding throughout are left out; a prompt answered by nothing is not.

    Args:
      batch: `[B, L]`, one sequence a row.

    Raises:
      ValueError: if it is packed.
    """
    if batch.segment is not None:
        raise ValueError("batch.segment is given; responses are told apart one a row only")
    tokens, mask, real = map(np.asarray, (batch.tokens, batch.response_mask, batch.attention_mask))
    return [tokens[row, mask[row]].tolist() for row in np.flatnonzero(real.any(axis=-1))]


def distinct_n(sequences: Iterable[Sequence[Hashable]], n: int) -> float:
    """The share of a corpus' n-grams that are distinct: |unique n-grams| / |n-grams|.

    1 where no n-gram occurs twice, 0 where there is none. Falls with the size of the corpus, so
    compare equal sizes only.

    Args:
      sequences: of tokens or words, without their end tokens.
      n: of the n-grams, at least 1.

    Source: Li et al. (2016), "A diversity-promoting objective function for neural conversation
      models", section 4.1. They divide by the number of tokens, which keeps 1 out of reach.

    >>> distinct_n([["no", "fever"], ["no", "cough"]], 1)
    0.75
    """
    checks.at_least("n", n, 1)
    grams = [gram for sequence in sequences for gram in _grams(sequence, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(sequence: Sequence[Hashable], n: int) -> float:
    """The share of a sequence's n-grams that it has had before: 1 - |unique n-grams| / |n-grams|.

    0 where there is none. Average it over sequences.

    Args:
      sequence: of tokens or words.
      n: of the n-grams, at least 1; 4 finds loops.

    Source: Welleck et al. (2020), "Neural text generation with unlikelihood training", seq-rep-n,
      equation 10.

    >>> repetition("rest and rest and rest".split(), 2)
    0.5
    """
    checks.at_least("n", n, 1)
    grams = _grams(sequence, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _grams(sequence: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return list(zip(*(sequence[start:] for start in range(n)), strict=False))


class Lengths(NamedTuple):
    """How long responses are, in tokens, the end token included.

    Attributes:
      mean: of all.
      median: of all.
      ended: the share that ended by a stop token rather than by the limit.
    """

    mean: float
    median: float
    ended: float


def lengths(sequences: Sequence[Sequence[int]], *, stop_tokens: Collection[int]) -> Lengths:
    """Length of responses, and how many ended by themselves.

    Args:
      sequences: token ids, as `responses` returns them.
      stop_tokens: the ids that end a response.

    Raises:
      ValueError: if there is no sequence.
    """
    if not len(sequences):
        raise ValueError("sequences is empty; give at least one")
    sizes = [len(sequence) for sequence in sequences]
    ended = [len(sequence) > 0 and int(sequence[-1]) in stop_tokens for sequence in sequences]
    return Lengths(float(np.mean(sizes)), float(np.median(sizes)), float(np.mean(ended)))
