"""What the tests of policy optimisation share: a tiny policy, prompts, and a reward to learn.

Research only, not for clinical use: tokens here mean nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrl_llm.lm import objective, optimizer, policy_step, rollouts
from jaxrl_llm.lm.rewards import Reward
from jaxrl_llm.nn.adapters import LoRA
from jaxrl_llm.nn.gpt2 import GPT2
from jaxrl_llm.types import Array, Responses, TokenBatch
from tests.lm.tiny import SHAPE
from tests.nn.tiny_gpt2 import random_params

VOCABULARY, TARGET = 6, 3  # tokens 0 and 1 are the end and the padding
NUM_PROMPTS, NUM_NEW = 8, 4
POLICY_SHAPE = replace(SHAPE, vocab_size=VOCABULARY)
POLICY = GPT2(POLICY_SHAPE, value_width=8)
LORA_POLICY = GPT2(POLICY_SHAPE, value_width=8, lora=LoRA(rank=4))
PARAMS: Any = random_params(POLICY)
ROLLOUT = rollouts.Config(num_prompts=NUM_PROMPTS, num_samples=2, max_new_tokens=NUM_NEW)
FAST = replace(optimizer.ADAM, learning_rate=0.02, decay="constant")
UPDATE = policy_step.Config(num_epochs=2, num_minibatches=2, optimizer=FAST)


def target_share(params: Any, responses: Responses) -> Array:
    """Which share of the places of each response holds TARGET, times `params`, `[G, K, 1]`.

    Only who never ends before the limit reaches 1.
    """
    written = responses.tokens[..., responses.prompt_length :]
    share = jnp.mean((written == TARGET) & responses.response_mask, axis=-1)
    return params * share[..., None]


REWARD = Reward(criteria=("target_share",), score=target_share, mix=objective.weighted((1.0,)))


def prompts(count: int = NUM_PROMPTS) -> TokenBatch:
    """Prompts of 1 to 3 tokens."""
    random = np.random.default_rng(0)
    tokens = random.integers(2, VOCABULARY, size=(count, 3)).astype(np.int32)
    length = 1 + np.arange(count) % 3
    mask = np.arange(3)[None] >= 3 - length[:, None]
    return TokenBatch(
        tokens=jnp.asarray(tokens),
        attention_mask=jnp.asarray(mask),
        response_mask=jnp.zeros(mask.shape, bool),
    )


def task(
    model: GPT2 = POLICY,
    *,
    reference: Any = PARAMS,
    text: TokenBatch | None = None,
    scale: float = 1.0,
) -> rollouts.Task:
    """To write TARGET, which pays `scale`; `reference` None is the trunk of who learns."""
    return rollouts.make_task(
        ROLLOUT, model, prompts(), reference=reference, reward=jnp.float32(scale), text=text
    )


def random_responses(seed: int = 0, *, num_groups: int = 4, num_samples: int = 2) -> Responses:
    """Ragged responses with all that a rollout knows of them, values and probabilities made up."""
    random = np.random.default_rng(seed)
    asked = prompts(num_groups)
    groups = (num_groups, num_samples)
    length = random.integers(1, NUM_NEW + 1, size=groups)
    length[0, 0] = NUM_NEW
    mask = np.arange(NUM_NEW) < length[..., None]
    written = np.where(mask, random.integers(2, VOCABULARY, size=mask.shape), 1)

    def repeated(leaf: Array) -> Array:
        return jnp.repeat(leaf[:, None], num_samples, axis=1)

    def of_tokens(low: float, high: float) -> Array:
        return jnp.asarray(np.where(mask, random.uniform(low, high, mask.shape), 0), jnp.float32)

    return Responses(
        tokens=jnp.concatenate([repeated(asked.tokens), jnp.asarray(written, jnp.int32)], axis=-1),
        attention_mask=jnp.concatenate(
            [repeated(asked.attention_mask), jnp.asarray(mask)], axis=-1
        ),
        response_mask=jnp.asarray(mask),
        score=jnp.asarray(random.normal(size=groups), jnp.float32),
        log_probability=of_tokens(-3, -0.1),
        reference_log_probability=of_tokens(-3, -0.1),
        value=of_tokens(-1, 1),
    )
