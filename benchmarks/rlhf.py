"""Steps of aligning the tiny GPT-2, beside TRL's trainers on the same weights, and their phases.

A step draws 16 responses of 32 tokens, none of which ends earlier, scores them, asks the reference
and takes one optimiser step on all of them; that of DPO is on 16 pairs. Everything is float32 on a
CPU and bfloat16 (with float32 master weights) on an accelerator, without dropout. Items are tokens
of responses.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import torch_peers, trl_peers
from benchmarks.gpt2 import SIZES
from benchmarks.harness import Case, Peer
from jaxrl_llm.lm import (
    dpo,
    grpo,
    optimizer,
    policy_step,
    ppo,
    reward,
    rewards,
    rloo,
    rollouts,
)
from jaxrl_llm.lm.likelihood import response_likelihood
from jaxrl_llm.lm.order import next_batch
from jaxrl_llm.nn import adapters
from jaxrl_llm.nn.gpt2 import GPT2
from jaxrl_llm.nn.reward_model import RewardModel, from_language_model
from jaxrl_llm.training import loop
from jaxrl_llm.types import Array, Key, Mean, PyTree, Responses, TokenBatch

CONFIG = SIZES["tiny"]
NUM_PROMPTS, NUM_SAMPLES = 4, 4
PROMPT, NUM_NEW = 16, 32
NUM_PAIRS = 16
END = 0  # of the responses of pairs
STEPS = 8  # of a call; the peer takes one
BETA = 0.1

ROLLOUT = rollouts.Config(
    num_prompts=NUM_PROMPTS, num_samples=NUM_SAMPLES, max_new_tokens=NUM_NEW, stop_tokens=()
)
# So small a rate that the weights stay, hence every step, and the peer's, starts from the same.
ADAM = dataclasses.replace(optimizer.ADAM, learning_rate=1e-30)
UPDATE = policy_step.Config(optimizer=ADAM)
GRPO = grpo.Config(rollout=ROLLOUT, update=UPDATE, kl_coefficient=BETA)
RLOO = rloo.Config(rollout=ROLLOUT, update=UPDATE, kl_coefficient=BETA)
PPO = ppo.Config(rollout=ROLLOUT, update=UPDATE, kl_coefficient=BETA)
DPO = dpo.Config(batch_size=NUM_PAIRS, beta=BETA, chunk_size=None, optimizer=ADAM)

# Gradients of other draws, and of deviations with another divisor, differ by less than this.
LIKE_FACTOR = 2.0
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}

Step = Callable[[Key, Any, Any], tuple[Any, dict[str, Mean]]]


def cases() -> Iterable[Case]:
    """A step of each algorithm; the phases of one of GRPO."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    policy = Subject(GPT2(CONFIG, dtype))
    with_values = Subject(GPT2(CONFIG, dtype, value_width=CONFIG.n_embd))
    yield _online("grpo-step-tiny", grpo, GRPO, policy, "GRPO")
    yield _online("rloo-step-tiny", rloo, RLOO, policy, "RLOO")
    yield _dpo("dpo-step-tiny", policy, is_precomputed=False)
    yield _dpo("dpo-step-tiny-precomputed", policy, is_precomputed=True)
    yield _online("ppo-step-tiny", ppo, PPO, with_values)
    yield from _phases(policy)


@dataclass(frozen=True)
class Subject:
    """A policy and what it learns on, made when first asked for."""

    model: GPT2

    @functools.cached_property
    def params(self) -> PyTree:
        """Random weights in float32."""
        draw = jax.jit(self.model.init)
        return draw(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]

    @functools.cached_property
    def reference(self) -> PyTree:
        """Another policy, not far from the first."""
        return jax.tree.map(lambda leaf: 0.9 * leaf, adapters.trunk(self.params))

    @functools.cached_property
    def task(self) -> rollouts.Task:
        tokens = _prompts()
        every = jnp.ones(tokens.shape, bool)
        prompts = TokenBatch(tokens=tokens, attention_mask=every, response_mask=~every)
        return rollouts.make_task(ROLLOUT, self.model, prompts, reference=self.reference)

    @functools.cached_property
    def responses(self) -> Responses:
        """Of one rollout, with all that an update reads."""
        state = grpo.start(GRPO, self.params, jax.random.key(1), _reward())
        collect = jax.jit(partial(rollouts.collect, ROLLOUT, self.model, _reward()))
        return collect(jax.random.key(2), state, self.task).responses

    @functools.cached_property
    def pairs(self) -> Responses:
        """Unrelated responses that end in the last place, and how the reference likes them."""
        prompts = jnp.repeat(_tokens(1, NUM_PAIRS, 1, PROMPT), 2, axis=1)
        written = _tokens(2, NUM_PAIRS, 2, NUM_NEW).at[..., -1].set(END)
        tokens = jnp.concatenate([prompts, written], axis=-1)
        pairs = Responses(
            tokens=tokens,
            attention_mask=jnp.ones(tokens.shape, bool),
            response_mask=jnp.ones(written.shape, bool),
        )
        return dpo.with_reference(DPO, self.model, self.reference, pairs)

    @property
    def dtype(self) -> str:
        return jnp.dtype(self.model.dtype).name

    @property
    def setting(self) -> trl_peers.Setting:
        """The same for TRL."""
        return trl_peers.Setting(
            config=self.model.config,
            params=self.params,
            reference=self.reference,
            adamw=ADAM,
            beta=BETA,
            dtype=self.dtype,
        )

    def start(self, module: Any, config: Any, *reward: rewards.Reward) -> Any:
        """A state to donate."""
        params = jax.tree.map(jnp.copy, self.params)
        return module.start(config, params, jax.random.key(1), *reward)


def _online(
    name: str,
    module: Any,
    config: Any,
    subject: Subject,
    trainer: Literal["GRPO", "RLOO"] | None = None,
) -> Case:
    """A step of `module`, beside the `trainer` of TRL that does the same."""

    def peer() -> Peer:
        assert trainer is not None
        return trl_peers.online(
            trainer,
            subject.setting,
            _prompts(),
            _host_score,
            num_samples=NUM_SAMPLES,
            max_new_tokens=NUM_NEW,
        )

    return Case(
        name=name,
        function=_compiled(partial(take, module.make(config, subject.model, _reward()).step)),
        arguments=lambda: (
            jax.random.key(0),
            subject.start(module, config, _reward()),
            subject.task,
        ),
        items=STEPS * ROLLOUT.num_responses * NUM_NEW,
        unit="tokens",
        peer=None if trainer is None else peer,
        agree=None if trainer is None else _similar,
    )


def _dpo(name: str, subject: Subject, *, is_precomputed: bool) -> Case:
    """A step of DPO, the reference asked before or in it."""
    model = subject.model

    def step(
        key: Key, state: dpo.State, data: tuple[Responses, PyTree]
    ) -> tuple[dpo.State, dict[str, Mean]]:
        del key  # nothing is drawn
        pairs, reference = data
        batch = next_batch(state, DPO.batch_size, pairs)
        if not is_precomputed:
            batch = dpo.with_reference(DPO, model, reference, batch)
        return dpo.update(DPO, model, state, batch)

    def peer() -> Peer:
        tokens = np.asarray(subject.pairs.tokens)
        return trl_peers.dpo(
            subject.setting,
            tokens[:, 0, :PROMPT],
            *(tokens[:, which, PROMPT:] for which in range(2)),
            is_precomputed=is_precomputed,
        )

    return Case(
        name=name,
        function=_compiled(partial(take, step)),
        arguments=lambda: (
            jax.random.key(0),
            subject.start(dpo, DPO),
            (subject.pairs, subject.reference),
        ),
        items=STEPS * NUM_PAIRS * 2 * NUM_NEW,
        unit="tokens",
        peer=peer,
        agree=partial(_same_step, subject.dtype),
    )


def _phases(subject: Subject) -> Iterable[Case]:
    """Of a step of GRPO, each alone; here a reward model as large as the policy gives the score."""
    model, num_tokens = subject.model, ROLLOUT.num_responses * NUM_NEW
    judge = RewardModel(CONFIG, model.dtype)

    def draw(key: Key, params: PyTree, prompts: TokenBatch) -> Array:
        return rollouts.draw(ROLLOUT, model, key, params, prompts).tokens

    yield Case(
        name="generate",
        function=_compiled(draw, donate=False),
        arguments=lambda: (jax.random.key(0), subject.params, subject.task.prompts),
        items=num_tokens,
        unit="tokens",
        peer=lambda: torch_peers.decode(
            CONFIG,
            subject.params,
            subject.dtype,
            jnp.repeat(_prompts(), NUM_SAMPLES, axis=0),
            ROLLOUT.decoding,
        ),
        agree=_same_size,
    )

    def score(params: PyTree, responses: Responses) -> Array:
        return reward.score(judge, params, responses).overall

    yield Case(
        name="score",
        function=_compiled(score, donate=False),
        arguments=lambda: (
            from_language_model(judge, subject.params, jax.random.key(3)),
            subject.responses,
        ),
        items=num_tokens,
        unit="tokens",
    )

    def ask(params: PyTree, responses: Responses) -> Array:
        return response_likelihood(model, params, responses, chunk_size=None).log_probability

    yield Case(
        name="reference",
        function=_compiled(ask, donate=False),
        arguments=lambda: (subject.reference, subject.responses),
        items=num_tokens,
        unit="tokens",
        peer=lambda: torch_peers.score(
            CONFIG,
            subject.reference,
            subject.dtype,
            subject.responses.tokens.reshape(ROLLOUT.num_responses, -1),
        ),
        agree=lambda ours, theirs: _close(
            subject.dtype, ours.reshape(-1, NUM_NEW), torch_peers.to_numpy(theirs)[:, -NUM_NEW:]
        ),
    )

    def update(
        key: Key, state: rollouts.State, responses: Responses
    ) -> tuple[rollouts.State, dict[str, Mean]]:
        reference = adapters.trunk(state.train.params)
        train, metrics = grpo.update(GRPO, model, key, state.train, responses, reference)
        return dataclasses.replace(state, train=train), metrics

    yield Case(
        name="update",
        function=_compiled(partial(take, update)),
        arguments=lambda: (
            jax.random.key(0),
            subject.start(grpo, GRPO, _reward()),
            subject.responses,
        ),
        items=STEPS * num_tokens,
        unit="tokens",
    )


def take(step: Step, key: Key, state: Any, data: Any) -> tuple[Any, dict[str, Mean]]:
    """`STEPS` steps in one program, as `loop.run` takes them, and their summed metrics."""

    def body(state: Any, index: Array) -> tuple[Any, dict[str, Mean]]:
        return step(jax.random.fold_in(key, index), state, data)

    state, metrics = jax.lax.scan(body, state, jnp.arange(STEPS))
    return state, jax.tree.map(partial(jnp.sum, axis=0), metrics)


def _compiled(function: Callable[..., Any], *, donate: bool = True) -> Any:
    """As `loop.run` compiles it where it is told that operations are large."""
    options = loop.SEQUENTIAL if jax.default_backend() == "cpu" else None
    return jax.jit(function, donate_argnums=1 if donate else (), compiler_options=options)


def _prompts() -> Array:
    return _tokens(0, NUM_PROMPTS, PROMPT)


def _tokens(seed: int, *shape: int) -> Array:
    random = np.random.default_rng(seed)
    return jnp.asarray(random.integers(1, CONFIG.vocab_size, size=shape), jnp.int32)


def _reward() -> rewards.Reward:
    """One that costs nothing: the last token, by its number."""
    return rewards.of_function(lambda responses: responses.tokens[..., -1] / CONFIG.vocab_size)


def _host_score(responses: list[list[int]]) -> list[float]:
    """The same on the host."""
    return [tokens[-1] / CONFIG.vocab_size for tokens in responses]


def _similar(ours: tuple, theirs: trl_peers.Step) -> None:
    """Gradients of the same size: what other responses leave the same."""
    norm = float(ours[1]["gradient_norm"].mean)
    ratio = norm / theirs.gradient_norm
    assert 1 / LIKE_FACTOR < ratio < LIKE_FACTOR, f"{norm} is unlike {theirs.gradient_norm}"


def _same_step(dtype: str, ours: tuple, theirs: trl_peers.Step) -> None:
    for name, expected in theirs._asdict().items():
        _close(dtype, ours[1][name].mean, expected)


def _same_size(ours: Array, theirs: Any) -> None:
    """All that other random numbers leave the same."""
    assert ours.size == theirs.numel(), f"{ours.size} tokens are not {theirs.numel()}"


def _close(dtype: str, ours: Array, expected: Any) -> None:
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(np.asarray(ours), expected, rtol=tolerance, atol=tolerance)
