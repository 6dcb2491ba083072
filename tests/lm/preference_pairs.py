"""Pairs of responses to learn a reward from, with all that may be known of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxrl_llm.nn.reward_model import RewardModel
from jaxrl_llm.types import Responses
from tests.lm.tiny import SHAPE, VOCABULARY

MODEL: Any = RewardModel(SHAPE, criteria=("safety", "clarity"))
PROMPT, RESPONSE = 3, 4


def random_pairs(num_pairs: int, seed: int = 0) -> Any:
    """Pairs of ragged responses to ragged prompts, with all that may be known of them."""
    random = np.random.default_rng(seed)
    shape = num_pairs, 2
    prompt = np.arange(PROMPT) >= random.integers(0, PROMPT, (num_pairs, 1, 1))
    prompt = np.broadcast_to(prompt, (*shape, PROMPT))
    response = np.arange(RESPONSE) < random.integers(0, RESPONSE + 1, (*shape, 1))
    share = random.choice([0.0, 0.5, 0.8, 1.0], num_pairs).astype(np.float32)
    rating = random.random((*shape, 2)).astype(np.float32)
    rating[random.random(rating.shape) < 0.4] = np.nan
    tokens = random.integers(2, VOCABULARY, (*shape, PROMPT + RESPONSE)).astype(np.int32)
    tokens[..., :PROMPT] = tokens[:, :1, :PROMPT]
    leaves: dict[str, Any] = {
        "tokens": tokens,
        "attention_mask": np.concatenate([prompt, response], axis=-1),
        "response_mask": response,
        "score": np.stack([share, 1 - share], axis=1),
        "rating": rating,
        "annotator": random.integers(3, size=num_pairs).astype(np.int32),
        "margin": random.random(num_pairs).astype(np.float32),
    }
    return Responses(**leaves)


PAIRS = random_pairs(8)
