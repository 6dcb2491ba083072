"""What the tests of fine-tuning share: a tiny model, ragged sequences and AdamW by its formula."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from jaxrl_llm.data.tokens import Tokens
from jaxrl_llm.lm import optimizer
from jaxrl_llm.nn.gpt2 import GPT2, GPT2Config

VOCABULARY, CONTEXT = 29, 12
END, PADDING = 0, 1
SHAPE = GPT2Config(
    vocab_size=VOCABULARY,
    n_positions=CONTEXT,
    n_embd=16,
    n_layer=1,
    n_head=2,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=END,
    eos_token_id=END,
    pad_token_id=PADDING,
)
MODEL = GPT2(SHAPE)

Leaves = dict[str, NDArray[np.float64]]


def quick_compilation() -> Iterator[None]:
    """A fixture: programs compile in half the time, and are slower and no less exact."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def random_sequences(count: int, longest: int = CONTEXT, *, seed: int = 0) -> list[Tokens]:
    """Sequences of 1 token and more, some of which count, all ending in the end token."""
    random = np.random.default_rng(seed)
    sequences = []
    for length in random.integers(1, longest + 1, size=count):
        ids = random.integers(2, VOCABULARY, size=length).astype(np.int32)
        ids[-1] = END
        sequences.append(Tokens(ids, random.random(length) < 0.6))
    return sequences


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    logits = logits.astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def naive_likelihood(
    params: Any, sequences: list[Tokens], *, temperature: float = 1.0
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Log-probability, entropy and mask of all tokens, one sequence after another.

    Every sequence is read alone from the start of a row: what follows it, a causal model ignores.
    """
    alone = np.zeros((len(sequences), CONTEXT), np.int32)
    for row, sequence in zip(alone, sequences, strict=True):
        row[: len(sequence.tokens)] = sequence.tokens
    log_pi = log_softmax(np.asarray(_logits(params, alone)) / temperature)
    chosen, entropy, mask = [], [], []
    for row, sequence in zip(log_pi, sequences, strict=True):
        counted = sequence.response_mask.copy()
        counted[0] = False
        mask.append(counted)
        for t, (token, counts) in enumerate(zip(sequence.tokens, counted, strict=True)):
            law = row[t - 1]
            chosen.append(law[token] if counts else 0)
            entropy.append(-(np.exp(law) * law).sum() if counts else 0)
    return np.array(chosen), np.array(entropy), np.concatenate(mask)


@jax.jit
def _logits(params: Any, tokens: Any) -> Any:
    return MODEL.apply({"params": params}, tokens)


def naive_adamw(
    config: optimizer.Config, num_steps: int, params: Leaves, gradients: list[Leaves]
) -> Leaves:
    """The parameters after a step on each of `gradients`, by the formulas, in float64."""
    params = dict(params)
    first, second = ({name: np.zeros_like(leaf) for name, leaf in params.items()} for _ in "mv")
    for step, gradient in enumerate(gradients):
        norm = math.sqrt(sum((leaf**2).sum() for leaf in gradient.values()))
        scale = min(1.0, config.max_gradient_norm / norm)
        rate = naive_rate(config, num_steps, step)
        for name, leaf in gradient.items():
            g = scale * leaf
            first[name] = config.beta1 * first[name] + (1 - config.beta1) * g
            second[name] = config.beta2 * second[name] + (1 - config.beta2) * g**2
            m = first[name] / (1 - config.beta1 ** (step + 1))
            v = second[name] / (1 - config.beta2 ** (step + 1))
            decay = config.weight_decay * params[name] if leaf.ndim == 2 else 0
            params[name] = params[name] - rate * (m / (np.sqrt(v) + config.epsilon) + decay)
    return params


def naive_rate(config: optimizer.Config, num_steps: int, step: int) -> float:
    warmup = round(config.warmup_fraction * num_steps)
    if step < warmup:
        return config.learning_rate * step / warmup
    cosine = (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup))) / 2
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * cosine)


def as_float64(leaves: Mapping[Any, Any]) -> Leaves:
    """Flat leaves by their dotted names, in float64."""
    return {".".join(path): np.asarray(leaf, np.float64) for path, leaf in leaves.items()}
