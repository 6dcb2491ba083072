"""Sampling from a vocabulary: transformations of the logits, and the draw itself.

Everything takes ONE row of logits `[V]`, in nats: batch it with `jax.vmap`. A transformation
returns the logits in float32 with -inf outside the support it keeps, so that transformations
compose and the log-probability of a token under the law actually sampled from is
`policy_gradient.log_probability` of the result. Every `k`, `p` and `penalty` may be traced: one
compiled program serves all settings. The customary order is

    repetition_penalty, banned, division by the temperature, top_k, top_p, min_p, typical, sample

No vocabulary is sorted. A cut is a threshold, found by bisection on the bit patterns of the
floats, which are ordered as the floats are: about 15 passes over the row, 32 at worst, where a
sort of 50,257 logits takes 40 times as long on a CPU (8 times for `typical`). Hence one difference
from samplers that sort: tokens TIED at the threshold are all kept, wherever in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.kernels import policy_gradient
from jaxrl_llm.types import Array


def repetition_penalty(logits: Array, seen: Array, penalty: Array | float) -> Array:
    """Positive logits of the tokens seen are divided by `penalty`, negative ones multiplied.

    Args:
      logits: `[V]`.
      seen: `[V]` bool, True where the token is in the prompt or in what was generated so far.
      penalty: `[]`, positive; above 1 discourages repetition, 1 changes nothing.

    Returns:
      `[V]` float32.

    Source: Keskar et al. (2019), "CTRL", section 4.1, with the division by the penalty turned into
      a product where the logit is negative, which there would be raised by it.
    """
    logits = _float32(logits)
    chex.assert_equal_shape((logits, seen))
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def banned(logits: Array, banned: Array) -> Array:
    """-inf where `banned` (`[V]` bool), which must leave a token; to force one, ban all others."""
    logits = _float32(logits)
    chex.assert_equal_shape((logits, banned))
    return jnp.where(banned, -jnp.inf, logits)


def top_k(logits: Array, k: Array | int) -> Array:
    """Keeps the `k` most likely tokens, and whichever tie with the last of them.

    Args:
      logits: `[V]`.
      k: `[]` integer, at least 1; V or more keeps all.

    Returns:
      `[V]` float32.

    Source: Fan, Lewis & Dauphin (2018), "Hierarchical Neural Story Generation", section 5.3.
    """
    logits = _float32(logits)
    # A CPU counts twice as fast in float32, which is exact up to 2^24 tokens.
    one, size = jnp.ones(()), jnp.float32(logits.size)
    kept = _above(logits, jnp.ones_like(logits), size, size - k, least=lambda _: one)
    return jnp.where(kept, logits, -jnp.inf)


def top_p(logits: Array, p: Array | float) -> Array:
    """Keeps the smallest set of most likely tokens whose probability is at least `p`.

    The token that crosses `p` is kept, hence always one at least.

    Args:
      logits: `[V]`.
      p: `[]`, in [0, 1]; 1 keeps every token whose probability is not 0 in float32.

    Returns:
      `[V]` float32.

    Source: Holtzman et al. (2020), "The Curious Case of Neural Text Degeneration", eq. 2 and 3.
    """
    logits = _float32(logits)
    mass = _mass(logits)
    total = jnp.sum(mass)
    # A token above the threshold weighs more than the threshold does: both are its mass.
    kept = _above(mass, mass, total, (1 - p) * total, least=lambda threshold: threshold)
    return jnp.where(kept, logits, -jnp.inf)


def min_p(logits: Array, p: Array | float) -> Array:
    """Keeps the tokens at least `p` times as likely as the most likely one.

    Args:
      logits: `[V]`.
      p: `[]`, in [0, 1]; 0 keeps all.

    Returns:
      `[V]` float32.

    Source: Nguyen et al. (2024), "Turning Up the Heat: Min-p Sampling", section 3.
    """
    logits = _float32(logits)
    return jnp.where(logits - jnp.max(logits) >= jnp.log(p), logits, -jnp.inf)


def typical(logits: Array, p: Array | float) -> Array:
    """Keeps the tokens whose surprise is nearest the entropy, as few as have probability `p`.

    Those with the smallest |-log pi(token) - H(pi)|; the token that crosses `p` is kept.

    Args:
      logits: `[V]`.
      p: `[]`, in [0, 1]; 1 keeps every token whose probability is not 0 in float32.

    Returns:
      `[V]` float32.

    Source: Meister et al. (2023), "Locally Typical Sampling", eq. 10.
    """
    logits = _float32(logits)
    support = logits > -jnp.inf
    log_pi = policy_gradient.log_policy(logits, support)
    entropy = policy_gradient.entropy(logits, support)
    closeness = -jnp.abs(-log_pi - entropy)
    probability = jnp.exp(log_pi)
    total = jnp.sum(probability)
    kept = _above(
        closeness,
        probability,
        total,
        (1 - p) * total,
        # The rarest token that is this close to the entropy.
        least=lambda threshold: jnp.exp(threshold - entropy),
    )
    return jnp.where(kept & support, logits, -jnp.inf)


def greedy(logits: Array) -> Array:
    """The most likely token, the first of those that tie, `[]` int32.

    As `jnp.argmax`, which takes 2 to 4 times as long over a vocabulary on a CPU.
    """
    place = jnp.arange(logits.size, dtype=jnp.int32)
    return jnp.min(jnp.where(logits == jnp.max(logits), place, logits.size - 1))


def sample(uniform: Array, logits: Array) -> Array:
    """The token that a uniform number draws by inversion of the cumulative probability.

    One random number a token, where the Gumbel trick takes one for each of its V logits, and two
    short cumulative sums, over blocks of tokens and inside one block, where one sum over the
    vocabulary would take several times as long. A float32 number is a multiple of 2^-23, so that
    tokens rarer than that come out right only together.

    Args:
      uniform: `[]` float32, in [0, 1).
      logits: `[V]`; not all of them -inf.

    Returns:
      `[]` int32, a token of positive probability whatever the rounding.
    """
    logits = _float32(logits)
    width = 1 << (((logits.size - 1).bit_length() + 1) // 2)
    blocks = jnp.pad(_mass(logits), (0, -logits.size % width)).reshape(-1, width)
    block_mass = jnp.sum(blocks, axis=1)
    running = jnp.cumsum(block_mass)
    target = uniform * running[-1]
    block = _first_above(running, block_mass, target)
    mass = blocks[block]
    token = _first_above(jnp.cumsum(mass), mass, target - (running - block_mass)[block])
    return block * width + token


def _first_above(running: Array, mass: Array, target: Array) -> Array:
    """The first index of positive mass whose running sum tops `target`; the last of them if none.

    A running sum computed as a tree may rise where the mass is 0, and end below the sum that
    `target` was measured against: neither may lead to a token that cannot be drawn.
    """
    running = jnp.where(mass > 0, running, -jnp.inf)
    target = jnp.minimum(target, jnp.nextafter(jnp.max(running), -jnp.inf))
    return jnp.argmax(running > target).astype(jnp.int32)


def _float32(logits: Array) -> Array:
    chex.assert_rank(logits, 1)
    return logits.astype(jnp.float32)


def _mass(logits: Array) -> Array:
    """Probabilities up to a common factor, the greatest 1."""
    return jnp.exp(logits - jnp.max(logits))


def _above(
    keys: Array, weights: Array, total: Array, spare: Array, least: Callable[[Array], Array]
) -> Array:
    """Which keys stay when the lowest are cut while their weight is at most `spare`.

    Equal keys stay or go together, and the greatest always stays. What is searched for is a
    threshold t, a float32 held as its place in the order of all of them, with

        weight(keys <= t) <= spare < weight(keys <= the next greater key).

    Args:
      keys: `[V]` float32.
      weights: `[V]`, not negative; 0 where the key is -inf, unless that key may be cut anyway.
      total: `[]`, the sum of the weights.
      spare: `[]`, the weight that may go.
      least: for a key, a lower bound on the weights of the greater keys that are not 0. The search
        ends when the undecided keys together weigh less than two such weights, rounding allowed
        for, and hence are one.

    Returns:
      `[V]` bool.
    """
    return jax.lax.platform_dependent(
        keys,
        weights,
        total,
        spare,
        # Two comparisons an element take a CPU twice as long as one; an accelerator waits for
        # memory and for the launch of each pass, so it learns three bits of t in each.
        cpu=partial(_bisect, least=least, num_probes=1),
        default=partial(_bisect, least=least, num_probes=7),
    )


def _bisect(
    keys: Array,
    weights: Array,
    total: Array,
    spare: Array,
    *,
    least: Callable[[Array], Array],
    num_probes: int,
) -> Array:
    """`_above` with `num_probes` thresholds tried in each pass over the keys."""

    def undecided(state: tuple[Array, ...]) -> Array:
        low, high, below_low, below_high = state
        return (high - low > 1) & (below_high - below_low >= 1.5 * least(_float_at(low)))

    def narrow(state: tuple[Array, ...]) -> tuple[Array, ...]:
        low, high, below_low, below_high = state
        gap = high - low
        # Quotient and remainder apart: their product with the index would overflow together.
        quotient, remainder = gap // (num_probes + 1), gap % (num_probes + 1)
        for index in range(1, num_probes + 1):
            place = state[0] + quotient * index + remainder * index // (num_probes + 1)
            below = jnp.sum(jnp.where(keys <= _float_at(place), weights, 0), dtype=weights.dtype)
            fits, tighter = below <= spare, place < high
            low, below_low = jnp.where(fits, place, low), jnp.where(fits, below, below_low)
            tighter &= ~fits
            high = jnp.where(tighter, place, high)
            below_high = jnp.where(tighter, below, below_high)
        return low, high, below_low, below_high

    lowest = jnp.min(keys, where=keys > -jnp.inf, initial=jnp.inf)
    # Below it by more than a subnormal number, which a processor may take for 0.
    margin = jnp.maximum(1e-6 * jnp.abs(lowest), 2 * jnp.finfo(jnp.float32).tiny)
    zero = jnp.zeros_like(total)
    state = _place(lowest - margin), _place(jnp.max(keys)), zero, total
    return keys > _float_at(jax.lax.while_loop(undecided, narrow, state)[0])


_SIGN = np.uint32(1 << 31)


def _place(x: Array) -> Array:
    """The place of a float32 in the order of all of them, uint32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits < _SIGN, bits | _SIGN, ~bits)


def _float_at(place: Array) -> Array:
    """The inverse of `_place`."""
    bits = jnp.where(place < _SIGN, ~place, place ^ _SIGN)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
