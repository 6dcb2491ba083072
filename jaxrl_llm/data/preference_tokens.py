"""From preferences and judgements to `Responses`, and from prompts to rows for rollouts.

A text has the same tokens here as in `tokens.encode`, so a reward model, a policy and its reference
read what fine-tuning has taught them: prompt and response are encoded apart, and the end token is
appended to a response that does not end with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxrl_llm import checks
from jaxrl_llm.data import tokens
from jaxrl_llm.data.json_lines import Example, Piece
from jaxrl_llm.data.preferences import Judgement, Preference
from jaxrl_llm.data.tokens import Tokenizer, Tokens
from jaxrl_llm.types import Responses, TokenBatch

_UNLIMITED = 2**31 - 1  # tokens


def criteria_of(preferences: Iterable[Preference]) -> tuple[str, ...]:
    """Every criterion that is rated, in the order of first appearance."""
    return tuple(dict.fromkeys(name for each in preferences for name in each.ratings))


def annotators_of(preferences: Iterable[Preference]) -> tuple[str, ...]:
    """Every annotator that is named, in the order of first appearance."""
    names = (each.annotator for each in preferences)
    return tuple(dict.fromkeys(name for name in names if name is not None))


def encode(
    preferences: Sequence[Preference],
    tokenizer: Tokenizer,
    *,
    prompt_length: int | None = None,
    response_length: int | None = None,
    criteria: Sequence[str] | None = None,
    annotators: Sequence[str] | None = None,
) -> Responses:
    """Preferences as pairs of rows, the chosen response first.

    A prompt that is too long loses its start, a response its end, its end token with it: a model
    must not learn to stop where a text was cut.

    Args:
      preferences: `G` of them.
      tokenizer: with an end token.
      prompt_length: `P`; None for the longest prompt.
      response_length: `N`, end token included; None for the longest response.
      criteria: the `C` columns of `rating`, others being left out; None for `criteria_of`.
      annotators: whose places are the ids in `annotator`; None for `annotators_of`.

    Returns:
      `K` = 2. `score` is (1, 0), and (0.5, 0.5) of a tie. `rating` is NaN where there is none;
      `rating`, `annotator` and `margin` are None where no preference has any, and a margin that is
      missing beside others is 0.

    Raises:
      ValueError: naming a preference whose prompt has no tokens, or whose annotator is missing or
        unknown where there are any; or if there are no preferences.

    Warns:
      UserWarning: if prompts or responses are cut, saying how many.
    """
    names = annotators_of(preferences) if annotators is None else annotators
    return _responses(
        "preferences",
        [(each.prompt, (each.chosen, each.rejected)) for each in preferences],
        tokenizer,
        prompt_length,
        response_length,
        score=np.array([(0.5, 0.5) if each.tie else (1, 0) for each in preferences], np.float32),
        rating=_ratings(preferences, criteria_of(preferences) if criteria is None else criteria),
        annotator=_annotators(preferences, names),
        margin=_margins(preferences),
    )


def encode_judgements(
    judgements: Sequence[Judgement],
    tokenizer: Tokenizer,
    *,
    prompt_length: int | None = None,
    response_length: int | None = None,
) -> Responses:
    """Judgements as rows, `K` = 1, with a `score` of 1 where desirable and 0 elsewhere.

    Arguments, errors and warnings: `encode`.
    """
    return _responses(
        "judgements",
        [(each.prompt, (each.completion,)) for each in judgements],
        tokenizer,
        prompt_length,
        response_length,
        score=np.array([[each.desirable] for each in judgements], np.float32),
    )


def prompts(
    texts: Sequence[str | Example], tokenizer: Tokenizer, length: int | None = None
) -> TokenBatch:
    """Prompts to respond to, padded on the left, for rollouts.

    Args:
      texts: `N_p` texts, or examples, up to their last completion.
      tokenizer: of the model.
      length: `P`; None for the longest prompt. None is cut.

    Returns:
      `[N_p, P]`; no token counts.

    Raises:
      ValueError: naming a prompt that is empty or too long, or if there is none.
    """
    encoded = [tokens.encode_prompt(text, tokenizer) for text in texts]
    if not encoded:
        raise ValueError("texts is empty; give at least one")
    size = _length("length", length, encoded)
    for index, each in enumerate(encoded):
        if not 1 <= len(each.tokens) <= size:
            remedy = f"it must have 1 to {size}"
            raise ValueError(f"texts[{index}] has {len(each.tokens)} tokens; {remedy}")
    return jax.tree.map(jnp.asarray, tokens.pad(encoded, size, side="left"))


def _responses(
    name: str,
    pairs: Sequence[tuple[str, tuple[str, ...]]],
    tokenizer: Tokenizer,
    prompt_length: int | None,
    response_length: int | None,
    **known: NDArray[Any] | None,
) -> Responses:
    """Each prompt beside each of its responses, and what is known of them."""
    if not pairs:
        raise ValueError(f"{name} is empty; give at least one")
    asked: list[Tokens] = []
    answered: list[Tokens] = []
    for index, (prompt, texts) in enumerate(pairs):
        asked.append(tokens.encode_prompt(prompt, tokenizer))
        if not len(asked[-1].tokens):
            remedy = "a response needs a token before it: give a prompt"
            raise ValueError(f"{name}[{index}].prompt has no tokens; {remedy}")
        answered += [
            tokens.encode(Example((Piece(text, True),)), tokenizer, max_length=_UNLIMITED)
            for text in texts
        ]
    size = _length("prompt_length", prompt_length, asked)
    limit = _length("response_length", response_length, answered)
    prompt = tokens.pad([_cut(each, slice(-size, None)) for each in asked], size, side="left")
    response = tokens.pad([_cut(each, slice(limit)) for each in answered], limit)
    _warn_of_cuts(name, asked, size, answered, limit)

    def joined(before: Any, after: Any) -> NDArray[Any]:
        repeated = np.repeat(before, len(pairs[0][1]), axis=0)
        return np.concatenate([repeated, after], axis=1).reshape(len(pairs), -1, size + limit)

    leaves = {
        "tokens": joined(prompt.tokens, response.tokens),
        "attention_mask": joined(prompt.attention_mask, response.attention_mask),
        "response_mask": np.asarray(response.response_mask).reshape(len(pairs), -1, limit),
        **known,
    }
    # Leaves that are None stay None.
    return Responses(**jax.tree.map(jnp.asarray, leaves))


def _cut(sequence: Tokens, part: slice) -> Tokens:
    return Tokens(sequence.tokens[part], sequence.response_mask[part])


def _length(name: str, length: int | None, sequences: Sequence[Tokens]) -> int:
    if length is None:
        return max(len(each.tokens) for each in sequences)
    checks.at_least(name, length, 1)
    return length


def _warn_of_cuts(
    name: str, prompts: Sequence[Tokens], size: int, responses: Sequence[Tokens], limit: int
) -> None:
    cut_prompts = sum(len(each.tokens) > size for each in prompts)
    cut_responses = sum(len(each.tokens) > limit for each in responses)
    if cut_prompts or cut_responses:
        lost = f"{cut_prompts} prompts lose their start and {cut_responses} responses their end"
        remedy = f"longer than prompt_length, {size}, or response_length, {limit}; raise them"
        warnings.warn(f"of {len(prompts)} {name} {lost}, {remedy}", stacklevel=4)


def _ratings(preferences: Sequence[Preference], criteria: Sequence[str]) -> NDArray[Any] | None:
    """`[G, 2, C]`, NaN where there is none."""
    if not criteria:
        return None
    rating = np.full((len(preferences), 2, len(criteria)), np.nan, np.float32)
    for row, each in zip(rating, preferences, strict=True):
        for name, pair in each.ratings.items():
            if name in criteria:
                row[:, criteria.index(name)] = np.array(pair, np.float32)
    return rating


def _annotators(preferences: Sequence[Preference], names: Sequence[str]) -> NDArray[Any] | None:
    """`[G]`, places in `names`."""
    if not names:
        return None
    places = {name: place for place, name in enumerate(names)}
    ids: list[int] = []
    for index, each in enumerate(preferences):
        if each.annotator not in places:
            remedy = f"it must be one of {', '.join(map(repr, names))}, in all of them or in none"
            raise ValueError(f"preferences[{index}].annotator is {each.annotator!r}; {remedy}")
        ids.append(places[each.annotator])
    return np.array(ids, np.int32)


def _margins(preferences: Sequence[Preference]) -> NDArray[Any] | None:
    """`[G]`, 0 where there is none."""
    if all(each.margin is None for each in preferences):
        return None
    return np.array([each.margin or 0.0 for each in preferences], np.float32)
