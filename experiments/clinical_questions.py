"""Unseen SYNTHETIC cases put to a policy: what it says, how that is marked, how far it has gone.

Research only, not for clinical use.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.data import clinical_text, preference_tokens
from jaxrl_llm.data.clinical_text import Case
from jaxrl_llm.data.preferences import Judgement
from jaxrl_llm.lm import clinical_exam, decoding, evaluate, rewards, rollouts
from jaxrl_llm.lm.base_model import BaseModel
from jaxrl_llm.lm.clinical_exam import Answer
from jaxrl_llm.lm.scores import Estimate
from jaxrl_llm.training.frontier import Curve
from jaxrl_llm.types import Key, Responses, TokenBatch

_PROMPTS_AT_ONCE = 100


class Examined(NamedTuple):
    """What a policy said of unseen cases, how it was marked, and how far it is from a reference."""

    answers: list[Answer]
    marks: dict[str, Estimate]
    divergence: evaluate.Divergence

    @property
    def gold(self) -> list[float]:
        """The gold score of every answer."""
        return [answer.score.total for answer in self.answers]

    @property
    def point(self) -> Curve:
        """Its place among others by KL and gold score."""
        return Curve(self.divergence.kl.mean, *self.marks["gold_score"])

    @property
    def measures(self) -> dict[str, Estimate]:
        """Marks, KL in nats a response, entropy in nats a token, and length in tokens."""
        far = self.divergence
        return {**self.marks, "kl": far.kl, "entropy": far.entropy, "length": far.length}


def as_prompts(policy: BaseModel, asked: Sequence[Case]) -> TokenBatch:
    """The prompts of these cases, padded on the left."""
    prompts = [clinical_text.prompt(case) for case in asked]
    return preference_tokens.prompts(prompts, policy.tokenizer)


def respond(
    config: rollouts.Config, policy: BaseModel, asked: Sequence[Case], key: Key
) -> list[Responses]:
    """What a policy says of these cases, in batches; the last is filled up with padding."""
    batch = as_prompts(policy, asked)
    size = min(len(asked), _PROMPTS_AT_ONCE)
    batches: list[Responses] = []
    for begin in range(0, len(asked), size):
        rows = np.arange(begin, begin + size)
        some = jax.tree.map(lambda leaf, rows=rows: leaf[np.minimum(rows, len(asked) - 1)], batch)
        said = _draw(config, policy.model, jax.random.fold_in(key, begin), policy.params, some)
        real = jnp.asarray(rows < len(asked))[:, None, None]
        batches.append(replace(said, attention_mask=said.attention_mask & real))
    return batches


_draw: Any = jax.jit(rollouts.draw, static_argnums=(0, 1))


def examine(
    config: rollouts.Config,
    policy: BaseModel,
    imitator: BaseModel,
    unseen: Sequence[Case],
    key: Key,
) -> Examined:
    """Asks a policy about unseen cases, marks what it says, and measures how far it has gone.

    Args:
      config: how it is asked, once a case.
      policy: to be examined.
      imitator: that it started from.
      unseen: cases.
      key: of the answers.
    """
    config = replace(config, num_samples=1)
    batches = respond(config, policy, unseen, key)
    texts = [text for batch in batches for text in texts_of(policy, batch)]
    answers = clinical_exam.mark(unseen, texts[: len(unseen)])
    far = evaluate.divergence(
        policy.model,
        policy.params,
        imitator.params,
        batches,
        temperature=config.temperature,
    )
    return Examined(answers, clinical_exam.means(answers), far)


def texts_of(policy: BaseModel, said: Responses) -> list[str]:
    """The text of every response, row after row."""
    ends = decoding.end_tokens(policy.model, None)
    pairs = rewards.texts(
        policy.tokenizer, said.tokens, said.attention_mask, said.response_mask, ends
    )
    return [response for _, response in pairs]


def as_responses(policy: BaseModel, pairs: Sequence[tuple[str, str]], longest: int) -> Responses:
    """Prompts with a response each, as a reward model reads them, `[n, 1]`; longer ones are cut."""
    judgements = [
        Judgement(prompt=prompt, completion=text, desirable=True) for prompt, text in pairs
    ]
    with warnings.catch_warnings(action="ignore"):  # that some are cut
        return preference_tokens.encode_judgements(
            judgements, policy.tokenizer, response_length=longest
        )
