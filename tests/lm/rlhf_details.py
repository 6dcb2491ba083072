"""What the tests of the details of RLHF share: a policy that drew, every loss of what it drew.

Research only, not for clinical use: tokens here mean nothing.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.lm import dpo, grpo, optimizer, ppo, rloo, rollouts
from jaxrl_llm.lm.likelihood import response_likelihood
from jaxrl_llm.nn.gpt2 import GPT2
from tests.lm import policy_learning
from tests.lm.policy_learning import NUM_NEW, NUM_PROMPTS, REWARD
from tests.lm.tiny import PADDING

TEMPERATURE = 0.7
CONFIG = rollouts.Config(
    num_prompts=NUM_PROMPTS, num_samples=2, max_new_tokens=NUM_NEW, temperature=TEMPERATURE
)
# Less sure of themselves than theirs, so that responses of every length are drawn.
PARAMS, REFERENCE = (
    jax.tree.map(lambda leaf, scale=scale: scale * leaf, policy_learning.PARAMS)
    for scale in (0.6, 0.5)
)
BETA = jnp.float32(0.3)
PPO = ppo.Config(rollout=CONFIG, kl_coefficient=0.3)
RLOO = rloo.Config(rollout=CONFIG)
GRPO = grpo.Config(rollout=CONFIG)
DPO = dpo.Config()
ALGORITHMS = ("ppo", "rloo", "grpo", "dpo")

draw = jax.jit(rollouts.draw, static_argnums=(0, 1))
collect = jax.jit(rollouts.collect, static_argnums=(0, 1, 2))
score = jax.jit(partial(response_likelihood, chunk_size=None), static_argnums=0)


def state() -> rollouts.State:
    """A policy that has PARAMS, before its first iteration."""
    return rollouts.start(optimizer.start(optimizer.ADAM, 1, PARAMS), jax.random.key(5), REWARD)


def task(reference: Any = PARAMS) -> rollouts.Task:
    """To write what policy_learning.REWARD pays for, near `reference`."""
    return policy_learning.task(reference=reference)


def padded(responses: Any, *, left: int = 0, right: int = 0, token: int = PADDING) -> Any:
    """The same responses with more columns of padding, which hold `token`."""

    def wider(leaf: Any, before: int, filling: int = 0) -> Any:
        width = [(0, 0)] * (leaf.ndim - 1) + [(before, right)]
        return jnp.pad(leaf, width, constant_values=filling)

    of_tokens = ("response_mask", "log_probability", "reference_log_probability", "value")
    known = {name: getattr(responses, name) for name in of_tokens}
    return responses.replace(
        tokens=wider(responses.tokens, left, token),
        attention_mask=wider(responses.attention_mask, left),
        **{name: wider(leaf, 0) for name, leaf in known.items() if leaf is not None},
    )


@partial(jax.jit, static_argnums=(0, 1))
def learn(algorithm: str, model: GPT2, responses: Any) -> Any:
    """The gradient of the loss of `algorithm` over one whole step at PARAMS, and its metrics."""
    if algorithm == "dpo":
        # A pair whose first response is the better one.
        pairs = responses.replace(score=None)
        gradient, metrics = dpo.gradient_of_mean(DPO, model, PARAMS, pairs)
        return gradient, {**metrics, "loss": metrics["loss"].mean}
    if algorithm == "ppo":
        batch: Any = ppo.weigh(ppo.as_batch(PPO, responses, BETA, None))
        loss = partial(ppo.loss, PPO, model, REFERENCE, BETA)
    elif algorithm == "rloo":
        advantage = rloo.advantage(RLOO, responses)
        batch = rloo.weigh(rloo.Batch(responses=responses, advantage=advantage, weight=advantage))
        loss = partial(rloo.loss, RLOO, model)
    else:
        batch = grpo.weigh(GRPO, grpo.as_batch(GRPO, model, responses))
        loss = partial(grpo.loss, GRPO, model, REFERENCE)
    (total, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(PARAMS, batch)
    return gradient, {"loss": total, **metrics}


def with_stored(responses: Any, **leaves: Any) -> Any:
    """`responses` with other leaves `[G, K, N]`, which are 0 where there is no token."""
    mask = responses.response_mask
    return replace(responses, **{name: jnp.where(mask, leaf, 0) for name, leaf in leaves.items()})
