"""Writing as an environment: what it shows, when it ends, what it pays, and who learns it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.agents import ppo
from jaxrl_llm.envs import core, language, token_mdp
from jaxrl_llm.nn.heads import ActorCritic
from jaxrl_llm.types import Box, Discrete
from tests.envs.test_token_mdp import make_random
from tests.lm import tiny

pytestmark = pytest.mark.slow

quick_compilation = pytest.fixture(scope="module", autouse=True)(tiny.quick_compilation)

PROMPTS = np.array([[9, 3, 1], [2, 0, 3], [9, 9, 2]])
PROMPT_MASK = PROMPTS < 9
OPTIONS: Any = {"vocab_size": 4, "max_new_tokens": 3, "end_token": 0, "prompt_mask": PROMPT_MASK}


def weighted_sum(tokens, attention_mask):
    """Depends on every token, on its place and on the mask."""
    return jnp.sum(jnp.where(attention_mask, (tokens + 1) * 10 ** jnp.arange(len(tokens)), 0))


def play(environment, prompt, tokens):
    """The states, observations and time steps of one response to a prompt."""
    step = jax.jit(environment.step)
    state, _ = environment.reset(jax.random.key(0), environment.default_params)
    prompts = environment.default_params
    length = len(prompts.tokens[prompt])
    state = state.replace(
        tokens=state.tokens.at[:length].set(prompts.tokens[prompt]),
        attention_mask=state.attention_mask.at[:length].set(prompts.attention_mask[prompt]),
        prompt=jnp.int32(prompt),
    )
    course = []
    for token in tokens:
        state, time_step = step(jax.random.key(0), state, jnp.int32(token), prompts)
        course.append((state, time_step))
        if time_step.terminated:
            break
    return course


def test_reset_shows_each_prompt_equally_often():
    environment = language.make(weighted_sum, PROMPTS, **OPTIONS)
    keys = jax.random.split(jax.random.key(0), 9000)
    reset = jax.jit(jax.vmap(environment.reset, in_axes=(0, None)))
    state, _ = reset(keys, environment.default_params)
    counts = np.bincount(state.prompt, minlength=3)
    assert np.sum((counts - 3000) ** 2 / 3000) < 13.8  # the 99.9% quantile, 2 degrees of freedom
    prompts = np.where(PROMPT_MASK, PROMPTS, 0)[state.prompt]
    np.testing.assert_array_equal(state.tokens, np.pad(prompts, ((0, 0), (0, 3))))
    np.testing.assert_array_equal(
        state.attention_mask, np.pad(PROMPT_MASK[state.prompt], ((0, 0), (0, 3)))
    )
    assert not state.length.any()


def test_step_writes_the_tokens_and_pays_for_the_whole_row():
    environment = language.make(weighted_sum, PROMPTS, **OPTIONS)
    course = play(environment, 0, [2, 3, 1])
    rows = [[0, 3, 1, 2, 0, 0], [0, 3, 1, 2, 3, 0], [0, 3, 1, 2, 3, 1]]
    for place, (state, time_step) in enumerate(course):
        np.testing.assert_array_equal(state.tokens, rows[place])
        kept = np.arange(6) < 4 + place
        np.testing.assert_array_equal(state.attention_mask, kept & (np.arange(6) > 0))
        assert int(state.length) == place + 1
        assert bool(time_step.terminated) == (place == 2)
        assert float(time_step.reward) == (243240 if place == 2 else 0)
        assert not bool(time_step.truncated)


def test_step_terminates_at_the_end_token_and_keeps_it():
    environment = language.make(weighted_sum, PROMPTS, **OPTIONS)
    course = play(environment, 1, [1, 0, 3])
    assert len(course) == 2
    state, time_step = course[-1]
    np.testing.assert_array_equal(state.tokens, [2, 0, 3, 1, 0, 0])
    np.testing.assert_array_equal(state.attention_mask, [1, 1, 1, 1, 1, 0])
    assert float(time_step.reward) == 12413


def test_step_terminates_and_does_not_truncate_at_the_limit():
    environment = language.make(weighted_sum, PROMPTS, **(OPTIONS | {"end_token": None}))
    course = play(environment, 0, [0, 0, 0])
    assert [bool(step.terminated) for _, step in course] == [False, False, True]
    assert not any(bool(step.truncated) for _, step in course)


def test_step_ignores_a_reward_that_fails_on_an_unfinished_response():
    def reward(tokens, attention_mask):
        return jnp.where(attention_mask[-1], 1.0, jnp.nan)

    environment = language.make(reward, [[0]], vocab_size=2, max_new_tokens=2)
    assert [float(step.reward) for _, step in play(environment, 0, [1, 1])] == [0, 1]


@pytest.mark.parametrize("observation", ["one_hot", "tokens"])
def test_observation_tells_all_states_apart(observation):
    environment = language.make(weighted_sum, PROMPTS, observation=observation, **OPTIONS)
    space = environment.observation_space
    assert isinstance(space, Box)
    seen = {}
    for prompt in range(3):
        for first in range(4):
            for second in range(4):
                for state, time_step in play(environment, prompt, [first, second]):
                    observed = np.asarray(time_step.observation)
                    assert observed.shape == space.shape
                    assert observed.dtype == np.float32
                    assert observed.min() >= np.min(space.low)
                    assert observed.max() <= np.max(space.high)
                    shown = (*state.tokens.tolist(), *state.attention_mask.tolist())
                    assert seen.setdefault(tuple(observed.tolist()), shown) == shown
    assert len(seen) == 3 * (4 + 3 * 4)


def test_observation_is_one_block_a_place():
    environment = language.make(weighted_sum, PROMPTS, **OPTIONS)
    _, time_step = play(environment, 0, [2])[0]
    blocks = np.asarray(time_step.observation).reshape(6, 4)
    expected = np.zeros((6, 4))
    expected[[1, 2, 3], [3, 1, 2]] = 1
    np.testing.assert_array_equal(blocks, expected)
    assert environment.action_space == Discrete(num=4)


def test_step_under_jit_and_vmap_equals_a_loop():
    environment = language.make(weighted_sum, PROMPTS, **OPTIONS)
    keys = jax.random.split(jax.random.key(3), 4)
    states, _ = jax.vmap(environment.reset, in_axes=(0, None))(
        jax.random.clone(keys), environment.default_params
    )
    actions = jnp.array([0, 1, 2, 3])

    def step(key, state, action):
        return environment.step(key, state, action, environment.default_params)

    batch = jax.jit(jax.vmap(step))(jax.random.clone(keys), states, actions)
    for place, key in enumerate(keys):
        one = step(key, jax.tree.map(lambda leaf, i=place: leaf[i], states), actions[place])
        jax.tree.map(
            lambda many, single, i=place: np.testing.assert_array_equal(many[i], single), batch, one
        )


def test_rollout_starts_anew_after_each_response():
    environment = language.make(weighted_sum, PROMPTS, **OPTIONS)

    def write(key, observation, action_mask):
        return jnp.ones(len(observation), jnp.int32), {}

    running = core.start_batch(environment, jax.random.key(0), 5)
    _, batch = core.rollout(environment, write, jax.random.key(1), running, num_steps=6)
    np.testing.assert_array_equal(
        batch.terminated, np.broadcast_to([[0], [0], [1], [0], [0], [1]], (6, 5))
    )
    length = np.asarray(batch.observation).reshape(6, 5, 6, 4)[:, :, 3:].sum(axis=(2, 3))
    np.testing.assert_array_equal(length, np.broadcast_to([[0], [1], [2], [0], [1], [2]], (6, 5)))


@pytest.mark.parametrize(("vocab_size", "length", "end_token"), [(3, 3, 2), (2, 3, None)])
def test_make_pays_what_the_token_mdp_pays(vocab_size, length, end_token):
    mdp = make_random(vocab_size, length, end_token)

    def reward(tokens, attention_mask):
        return token_mdp.response_reward(mdp, tokens[0], tokens[1:], attention_mask[1:])

    writer = language.make(
        reward,
        mdp.prompts,
        vocab_size=vocab_size,
        max_new_tokens=length,
        end_token=end_token,
    )
    tabular = token_mdp.environment(mdp)
    step = jax.jit(tabular.step)
    for prompt, response in np.ndindex(*mdp.reward.shape):
        tokens = mdp.responses[response][mdp.mask[response]]
        course = play(writer, prompt, tokens)
        state = jnp.int32(prompt * mdp.num_prefixes)
        assert len(course) == len(tokens)
        for token, (_, written) in zip(tokens, course, strict=True):
            state, time_step = step(jax.random.key(0), state, token, tabular.default_params)
            np.testing.assert_allclose(written.reward, time_step.reward, rtol=1e-6)
            assert bool(written.terminated) == bool(time_step.terminated)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 1}, "vocab_size is 1; it must be at least 2"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"end_token": 4}, r"end_token is 4; it must be in \[0, 3\]"),
        ({"observation": "text"}, "observation is 'text'; it must be one of 'one_hot', 'tokens'"),
        ({"prompts": [1, 2]}, r"prompts has shape \(2,\); it must be \[prompts, tokens\]"),
        ({"prompts": np.zeros((0, 2), int)}, r"prompts has shape \(0, 2\); it must be"),
        ({"prompts": [[0.5, 1, 2]] * 3}, "prompts is float64; it must hold integers"),
        ({"prompts": [[9, 3, 4]] * 3}, r"prompts\[0, 2\] is 4; it must be in \[0, 4\)"),
        ({"prompt_mask": PROMPT_MASK[:2]}, r"prompt_mask has shape \(2, 3\); it must be \(3, 3\)"),
        (
            {"prompt_mask": [[1, 1, 1], [1, 1, 0], [1, 1, 1]]},
            r"prompt_mask\[1\] is \[1, 1, 0\]; pad on the left, and leave a token",
        ),
        ({"prompt_mask": [[0, 0, 0]] * 3}, r"prompt_mask\[0\] is \[0, 0, 0\]; pad on the left"),
        ({"prompt_mask": [[1, 0, 1]] * 3}, r"prompt_mask\[0\] is \[1, 0, 1\]; pad on the left"),
        ({"reward": lambda tokens, mask: tokens}, r"reward returns shape \(6,\); it must return"),
    ],
)
def test_make_refuses(change, message):
    arguments: Any = {"reward": weighted_sum, "prompts": PROMPTS, **OPTIONS, **change}
    with pytest.raises(ValueError, match=message):
        language.make(**arguments)


@pytest.mark.slow
def test_ppo_learns_to_copy_the_prompt():
    """The last token of the prompt, four times: what a network finds and chance does not."""

    def reward(tokens, attention_mask):
        return jnp.mean(tokens[2:] == tokens[1])

    prompts = [[0, token] for token in range(4)]
    environment = language.make(reward, prompts, vocab_size=4, max_new_tokens=4)
    config = ppo.Config(
        num_environments=16,
        num_steps=64,
        num_iterations=100,
        learning_rate=3e-3,
        gamma=1.0,
        entropy_coefficient=0.0,
        value_clip_epsilon=None,
    )
    algorithm = ppo.make(config, environment, ActorCritic(environment.action_space))

    @jax.jit
    def train(key):
        init_key, steps_key = jax.random.split(key)
        keys = jax.random.split(steps_key, config.num_iterations)
        return jax.lax.scan(lambda s, k: algorithm.step(k, s), algorithm.init(init_key), keys)[1]

    earned = train(jax.random.key(0))["episode_return"].mean
    assert abs(float(earned[0]) - 0.25) < 0.05
    assert float(earned[-10:].mean()) > 0.98
