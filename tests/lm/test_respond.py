"""Text in, text out: whose response is whose, what ends it, and what it does not depend on."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from jaxrl_llm.data.tokens import encode_prompt, pad
from jaxrl_llm.lm import generate, tokenizer
from jaxrl_llm.lm.generate import Config, Response, respond
from jaxrl_llm.nn.gpt2 import GPT2, GPT2Config
from tests.nn.tiny_gpt2 import random_params

pytestmark = pytest.mark.slow

PROMPTS = ("Fever and cough.", "Chest pain.", "Rash", "Fever.", "Pain in the chest since noon.")
# So many tokens end a response that some end and some are cut.
STOPS = tuple(range(0, 256, 8))
CONFIG = Config(max_new_tokens=6, num_samples=2, stop_tokens=STOPS)


@pytest.fixture(scope="module")
def words() -> Any:
    return tokenizer.train(PROMPTS, vocab_size=280, min_frequency=1)


@pytest.fixture(scope="module")
def model(words) -> GPT2:
    return GPT2(
        GPT2Config(
            vocab_size=len(words),
            n_positions=40,
            n_embd=16,
            n_layer=1,
            n_head=2,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )


@pytest.fixture(scope="module")
def params(model) -> Any:
    return random_params(model)


@pytest.fixture(scope="module")
def answers(model, params, words) -> list[Response]:
    return respond(model, params, words, PROMPTS, jax.random.key(0), CONFIG, batch_size=2)


def test_respond_decodes_what_generate_draws_for_each_prompt_in_turn(model, params, words, answers):
    assert len(answers) == len(PROMPTS) * CONFIG.num_samples
    sequences = [encode_prompt(prompt, words) for prompt in PROMPTS]
    rows = pad(sequences, max(len(each.tokens) for each in sequences), side="left")
    root = jax.random.key(0)
    batch = generate.generate(model, params, rows.tokens, rows.attention_mask, root, CONFIG)
    written = zip(np.asarray(batch.tokens), np.asarray(batch.response_mask), strict=True)
    for answer, (ids, mask) in zip(answers, written, strict=True):
        kept = ids[mask].tolist()
        assert answer.ended == (kept[-1] in STOPS)
        assert answer.text == words.decode(kept[:-1] if answer.ended else kept)
    assert 0 < sum(answer.ended for answer in answers) < len(answers)
    # Two samples of a prompt differ, and so do those of two prompts.
    assert len({answer.text for answer in answers if not answer.ended}) > 1
    assert any(one != other for one, other in zip(answers[::2], answers[1::2], strict=True))


def test_respond_does_not_depend_on_the_batch_or_the_prompts_that_follow(
    model, params, words, answers
):
    key = jax.random.key(0)
    assert respond(model, params, words, PROMPTS[:2], key, CONFIG) == answers[:4]


def test_respond_leaves_the_stop_token_out_of_the_text(model, params, words):
    ids = words.encode("rash", add_special_tokens=False)
    stop = words.encode(".", add_special_tokens=False)
    config = Config(forced_tokens=(*ids, *stop), stop_tokens=tuple(stop), max_new_tokens=8)
    found = respond(model, params, words, PROMPTS[:2], jax.random.key(0), config)
    assert found == [Response("rash", True)] * 2


def test_respond_to_no_prompt_is_no_response(model, params, words):
    assert respond(model, params, words, [], jax.random.key(0), CONFIG) == []


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        (["Rash", ""], {}, "prompts[1] is empty; give at least a word"),
        (
            ["Rash " * 50],
            {},
            (
                r"tokens\[0\] has \d+ tokens; with max_new_tokens 6 that is more than the "
                "context of 40; shorten either"
            ),
        ),
        (["Rash"], {"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
    ],
)
def test_respond_refuses(model, params, words, prompts, changes, message):
    config = replace(CONFIG, **changes)
    pattern = message if "\\" in message else re.escape(message)
    with pytest.raises(ValueError, match=rf"\A{pattern}\Z"):
        respond(model, params, words, prompts, jax.random.key(0), config)
    with pytest.raises(ValueError, match=r"^batch_size is 0; it must be at least 1$"):
        respond(model, params, words, PROMPTS, jax.random.key(0), CONFIG, batch_size=0)
