"""The sizes that batches of tokens know of themselves."""

import jax.numpy as jnp

from jaxrl_llm.types import Responses


def test_responses_know_the_length_of_their_prompts():
    tokens = jnp.zeros((2, 3, 7), jnp.int32)
    responses = Responses(
        tokens=tokens, attention_mask=tokens == 0, response_mask=jnp.ones((2, 3, 4), bool)
    )
    assert responses.prompt_length == 3
