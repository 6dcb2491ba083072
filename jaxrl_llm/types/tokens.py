"""Batches of tokens and the cache of a decoder, batch-major: leaves are `[B, L, ...]`."""

from __future__ import annotations

from flax import struct

from jaxrl_llm.types.arrays import Array


@struct.dataclass(kw_only=True)
class TokenBatch:
    """Rows of tokens, batch-major, with what is real and what counts. Masks are True = keep.

    Attributes:
      tokens: `[B, L]` int32.
      attention_mask: `[B, L]` bool, False on padding.
      response_mask: `[B, L]` bool, the tokens that a loss counts: those of the response, its end
        token included and nothing after it.
      segment: `[B, L]` int32, which sequence of a packed row a token belongs to, counted from 1,
        and 0 on padding. None where a row is one sequence.
      log_probability: `[B, L]` float32, of each response token under the law that drew it, and 0
        elsewhere. None where the tokens were not drawn.
    """

    tokens: Array
    attention_mask: Array
    response_mask: Array
    segment: Array | None = None
    log_probability: Array | None = None


@struct.dataclass(kw_only=True)
class Responses:
    """Responses to prompts, and what is known of them: what every alignment algorithm learns from.

    There are `G` prompts with `K` responses each, a group: samples of a policy, or a preference
    pair with the chosen one first. A row is the prompt of `P` tokens, padded on the left, and one
    response of `N` tokens, padded on the right; `L` = `P` + `N`. What is not known is None.

    Attributes:
      tokens, attention_mask: `[G, K, L]` int32 and bool, False on padding.
      response_mask: `[G, K, N]` bool, the tokens of the response, its end token included.
      score: `[G, K]` float32, of whole responses; of a pair, how probably each is the better one.
      log_probability: `[G, K, N]` float32, of each token under the law that drew it.
      reference_log_probability: the same under the reference policy.
      value: `[G, K, N]` float32, of the state before each token, as it was at the rollout.
      rating: `[G, K, C]` float32, by criterion; NaN where there is none.
      features: `[G, K, F]` float32, what the heads of one reward model read.
      annotator, margin: `[G]`, who compared the pair, and by how much the chosen one should win.
    """

    tokens: Array
    attention_mask: Array
    response_mask: Array
    score: Array | None = None
    log_probability: Array | None = None
    reference_log_probability: Array | None = None
    value: Array | None = None
    rating: Array | None = None
    features: Array | None = None
    annotator: Array | None = None
    margin: Array | None = None

    @property
    def prompt_length(self) -> int:
        return self.tokens.shape[-1] - self.response_mask.shape[-1]


@struct.dataclass(kw_only=True)
class KVCache:
    """The keys and values of the tokens that a decoder has read, in `S` slots a row.

    All rows write the same slot at once, so rows of unequal length are padded on the left.

    Attributes:
      keys, values: one `[B, head, S, dim]` a layer. Not one array for all layers, whose parts
        would be copied out of it at every token, and heads before slots, so that what one head
        reads is contiguous: with slots first, a CPU transposed the whole cache at every token.
      mask: `[B, S]` bool.
      length: `[]` int32, slots written.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    mask: Array
    length: Array
