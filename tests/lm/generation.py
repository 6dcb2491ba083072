"""What the tests of generation share: a tiny model, and its exact law by naive NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.nn.gpt2 import GPT2, GPT2Config

VOCABULARY = 11
END, PADDING = 0, 1
TINY = GPT2Config(
    vocab_size=VOCABULARY,
    n_positions=48,
    n_embd=16,
    n_layer=1,
    n_head=2,
    bos_token_id=END,
    eos_token_id=END,
    pad_token_id=PADDING,
)


def random_params(model: GPT2, seed: int = 0, scale: float = 0.4):
    """Every leaf random, so that no bias or adapter is at rest and no token is certain."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(0, scale, leaf.shape), leaf.dtype), shapes
    )


@partial(jax.jit, static_argnames="model", compiler_options={"xla_backend_optimization_level": 0})
def next_logits(model: GPT2, params, tokens, mask=None):
    """Logits of the token after each, without a cache."""
    return model.apply({"params": params}, tokens, attention_mask=mask)


def law(
    logits,
    *,
    seen=(),
    forbidden=(),
    repetition_penalty=1.0,
    temperature=1.0,
    top_k=None,
    top_p=None,
    min_p=None,
    typical_p=None,
):
    """The probability of each token, `[V]` float64, cut by sorting the vocabulary."""
    logits = np.array(logits, np.float64)
    for token in seen:
        logits[token] *= repetition_penalty if logits[token] < 0 else 1 / repetition_penalty
    logits[list(forbidden)] = -np.inf
    logits /= temperature
    if top_k is not None:
        logits[np.argsort(-logits)[top_k:]] = -np.inf
    if top_p is not None:
        logits = _nucleus(logits, -softmax(logits), top_p)
    if min_p is not None:
        pi = softmax(logits)
        logits = np.where(pi >= min_p * pi.max(), logits, -np.inf)
    if typical_p is not None:
        pi = softmax(logits)
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy = -np.nansum(pi * np.log(pi))
            distance = np.abs(-np.log(pi) - entropy)
        logits = _nucleus(logits, distance, typical_p)
    return softmax(logits)


def softmax(logits):
    weight = np.exp(logits - logits.max())
    return weight / weight.sum()


def _nucleus(logits, order, p):
    """The first tokens of `order` that together have probability `p`."""
    first = np.argsort(order)
    mass = np.cumsum(softmax(logits)[first])
    kept = first[: int(np.searchsorted(mass, p - 1e-9)) + 1]
    cut = np.full_like(logits, -np.inf)
    cut[kept] = logits[kept]
    return cut
