"""GPT-2 at two sizes, with random weights, beside `transformers` on the same weights.

Everything is float32 on a CPU and bfloat16 (with float32 master weights) on an accelerator, without
dropout. The share of the FLOP limit is the model FLOP utilisation: what is computed twice, such as
logits that the backward pass makes again, counts once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import torch_peers
from benchmarks.harness import Case, Peer
from benchmarks.returns import CACHED_BYTES
from jaxrl_llm.lm import continuous_batching, decoding, generate, optimizer, sft
from jaxrl_llm.lm.likelihood import token_likelihood
from jaxrl_llm.nn.gpt2 import GPT2, GPT2Config, init_cache
from jaxrl_llm.numerics import token_log_probabilities
from jaxrl_llm.training import loop
from jaxrl_llm.types import Array, Key, KVCache, Mean, PyTree, TokenBatch

# Weights that start larger than GPT-2's own make a greedy continuation depend on all that went
# before; with those it soon repeats one token, which would hide most mistakes.
SHARED_FIELDS: dict[str, Any] = {
    "initializer_range": 0.1,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
SIZES = {
    "small": GPT2Config(**SHARED_FIELDS),
    "tiny": GPT2Config(
        vocab_size=512,
        n_positions=256,
        n_embd=128,
        n_layer=4,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        **SHARED_FIELDS,
    ),
}

PROMPT = 32
GREEDY = decoding.Config(max_new_tokens=64, stop_tokens=(), temperature=0.0)
NUCLEUS = decoding.Config(max_new_tokens=64, stop_tokens=(), temperature=0.7, top_p=0.9)
# Untrained, a model draws one of 20 stop tokens in 512 after some 26 tokens, more or less.
RAGGED = decoding.Config(max_new_tokens=128, stop_tokens=tuple(range(20)))
RAGGED_PROMPTS = 256
BATCHES = (1, 8, 32)
LARGE_BATCH = 256  # for accelerators, with caches that fill up to these lengths
LARGE_CACHES = (256, 512)

ROWS = (8, 128)  # [B, L]
TRAINING_STEPS = {"small": 2, "tiny": 16}  # of a call; the peer takes one
MORE_TRAINING_ROWS = {"small": (), "tiny": ((16, 32),)}
LARGE_ROWS = (32, 1024)  # for accelerators
KEPT_LOGITS_BYTES = 2**30  # beyond this, logits are made a chunk at a time, and made twice

# Of greedy rows: where two tokens nearly tie, rounding decides, and what follows differs.
DIFFERING_ROWS = 0.05
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}

GRADIENT_ROWS = (4, 1024)


def cases() -> Iterable[Case]:
    """What serving and training are made of, one size after the other; the memory of a gradient."""
    on_accelerator = jax.default_backend() != "cpu"
    dtype = jnp.bfloat16 if on_accelerator else jnp.float32
    for size, config in SIZES.items():
        model = GPT2(config, dtype)
        for batch in BATCHES:
            yield _decode(f"decode-{size}-{batch}", model, batch, GREEDY)
        if size == "tiny":
            yield _decode(f"decode-{size}-32-top-p", model, 32, NUCLEUS)
            yield _ragged(f"ragged-{size}-{RAGGED_PROMPTS}", model)
        yield from _dense(size, model, *ROWS)
        for rows, length in MORE_TRAINING_ROWS[size]:
            yield _train(size, model, rows, length)
        if on_accelerator and size == "small":
            for length in LARGE_CACHES:
                sampling = dataclasses.replace(GREEDY, max_new_tokens=length - PROMPT)
                name = f"decode-{size}-{LARGE_BATCH}-cache-{length}"
                yield _decode(name, model, LARGE_BATCH, sampling)
            yield from _dense(size, model, *LARGE_ROWS)
    yield _gradient_memory()


def _decode(name: str, model: GPT2, batch: int, sampling: decoding.Config) -> Case:
    tokens = _tokens(model, batch, PROMPT)
    is_comparable = sampling.temperature == 0 and model.dtype == jnp.float32
    return Case(
        name=name,
        function=partial(decode, model, sampling),
        arguments=lambda: (_weights(model.config, model.dtype), tokens, jax.random.key(0)),
        items=batch * sampling.max_new_tokens,
        unit="tokens",
        peer=partial(_peer, torch_peers.decode, model, tokens, sampling),
        agree=_same_tokens if is_comparable else _same_lengths,
        work=lambda _: decode_work(model, batch, sampling.max_new_tokens),
    )


def _ragged(name: str, model: GPT2) -> Case:
    """Responses of very unequal length through 32 slots, beside batches of 32 that wait for all."""
    tokens, keys = _tokens(model, RAGGED_PROMPTS, PROMPT), jax.random.key(0)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(keys, jnp.arange(RAGGED_PROMPTS))

    def in_slots(params: PyTree) -> Array:
        return continuous_batching.generate(model, params, tokens, None, keys, RAGGED).tokens

    def in_batches(params: PyTree) -> Array:
        parts = [
            generate.generate(model, params, tokens[rows], None, keys[rows], RAGGED).tokens
            for rows in np.split(np.arange(RAGGED_PROMPTS), RAGGED_PROMPTS // 32)
        ]
        return jnp.concatenate(parts)

    def arguments() -> tuple[PyTree]:
        return (_weights(model.config, model.dtype),)

    return Case(
        name=name,
        function=in_slots,
        arguments=arguments,
        items=RAGGED_PROMPTS,
        unit="responses",
        peer=lambda: Peer("generate, batch after batch", in_batches, arguments),
        agree=_same_tokens,
    )


def _dense(size: str, model: GPT2, rows: int, length: int) -> Iterable[Case]:
    """What reads whole rows at once."""
    tokens = _tokens(model, rows, length)
    common: dict[str, Any] = {"items": rows * length, "unit": "tokens"}
    yield Case(
        name=f"prefill-{size}-{rows}x{length}",
        function=jax.jit(partial(prefill, model)),
        arguments=lambda: (_weights(model.config, model.dtype), tokens),
        peer=partial(_peer, torch_peers.prefill, model, tokens),
        agree=lambda ours, theirs: _close(model, ours[0], theirs[0]),
        work=lambda _: _flops(model, rows, length, scored=1),
        **common,
    )
    yield Case(
        name=f"forward-{size}-{rows}x{length}",
        function=jax.jit(partial(forward, model)),
        arguments=lambda: (_weights(model.config, model.dtype), tokens),
        peer=partial(_peer, torch_peers.forward, model, tokens),
        agree=partial(_close, model),
        work=lambda _: _flops(model, rows, length),
        **common,
    )
    yield _train(size, model, rows, length)
    yield Case(
        name=f"score-{size}-{rows}x{length}",
        function=jax.jit(partial(score, model)),
        arguments=lambda: (_weights(model.config, model.dtype), tokens),
        peer=partial(_peer, torch_peers.score, model, tokens),
        agree=lambda ours, theirs: _close(model, ours[:, 1:], theirs),
        work=lambda _: _flops(model, rows, length),
        **common,
    )


def _train(size: str, model: GPT2, rows: int, length: int) -> Case:
    tokens = _tokens(model, rows, length)
    num_steps = TRAINING_STEPS[size]
    # So small a rate that the weights stay, hence every step, and the peer's, is the same one.
    adamw = optimizer.Config(learning_rate=1e-30)
    config = sft.Config(
        num_steps=num_steps,
        batch_size=rows,
        row_length=length,
        chunk_size=_chunk_size(model, tokens),
        optimizer=adamw,
    )

    def arguments() -> tuple:
        params = jax.tree.map(jnp.copy, _parameters(model.config))  # donated
        return jax.random.key(0), sft.start(config, params, jax.random.key(1)), _batch(tokens)

    def train(key: Key, state: sft.State, batch: TokenBatch) -> tuple[sft.State, dict[str, Mean]]:
        """As `loop.run` does it: some steps in one program, so that memory is touched once."""
        step = partial(sft.update, config, model)
        first = step(key, state, batch)
        return jax.lax.fori_loop(1, num_steps, lambda _, carry: step(key, carry[0], batch), first)

    on_cpu = jax.default_backend() == "cpu"
    return Case(
        name=f"train-{size}-{rows}x{length}",
        function=jax.jit(
            train, donate_argnums=1, compiler_options=loop.SEQUENTIAL if on_cpu else None
        ),
        arguments=arguments,
        items=num_steps * rows * length,
        unit="tokens",
        peer=partial(_peer, torch_peers.train, model, tokens, adamw),
        agree=partial(_same_step, model),
        # Forward, and twice as much backward.
        work=lambda _: _flops(model, 3 * num_steps * rows, length),
    )


def _gradient_memory() -> Case:
    """Times two compilations; what counts is the memory that the two programs ask for."""
    chunked = partial(temporary_bytes, _chunked_log_probabilities)
    naive = partial(temporary_bytes, _naive_log_probabilities)

    def peer() -> Peer:
        figures = f"{naive() / 2**20:.0f} MiB of temporaries against {chunked() / 2**20:.0f}"
        return Peer(f"gradient with all logits at once, {figures}", naive)

    return Case(
        name=f"memory-log-probability-gradient-{'x'.join(map(str, GRADIENT_ROWS))}",
        function=chunked,
        arguments=(),
        items=1,
        unit="compilations",
        peer=peer,
        agree=_at_most_a_quarter,
    )


def decode(
    model: GPT2, sampling: decoding.Config, params: PyTree, tokens: Array, key: Key
) -> Array:
    """Prompts `[B, P]` and their responses, `[B, P + N]`."""
    return generate.generate(model, params, tokens, None, key, sampling).tokens


def prefill(model: GPT2, params: PyTree, tokens: Array) -> tuple[Array, KVCache]:
    """Logits `[B, V]` of the token after `tokens` `[B, L]`, and the cache that holds these."""
    rows, length = tokens.shape
    cache = init_cache(model.config, rows, length, model.dtype)
    return decoding.read(model, params, tokens, jnp.ones(tokens.shape, bool), cache)


def forward(model: GPT2, params: PyTree, tokens: Array) -> Any:
    """Logits `[B, L, V]`."""
    return model.apply({"params": params}, tokens)


def score(model: GPT2, params: PyTree, tokens: Array) -> Array:
    """Log-probabilities `[B, L]` of `tokens`, 0 for the first."""
    chunk_size = _chunk_size(model, tokens)
    batch = _batch(tokens)
    return token_likelihood(model, params, batch, chunk_size=chunk_size).log_probability


def temporary_bytes(log_probabilities: Callable[[Array, Array, Array], Array]) -> int:
    """That the compiled gradient of `log_probabilities` needs beside its inputs and outputs."""
    config, num_tokens = SIZES["small"], GRADIENT_ROWS[0] * GRADIENT_ROWS[1]
    gradient = jax.grad(lambda *inputs: jnp.sum(log_probabilities(*inputs)), argnums=(0, 1))
    inputs = (
        jax.ShapeDtypeStruct((num_tokens, config.n_embd), jnp.float32),
        jax.ShapeDtypeStruct((config.vocab_size, config.n_embd), jnp.float32),
        jax.ShapeDtypeStruct((num_tokens,), jnp.int32),
    )
    analysis = jax.jit(gradient).lower(*inputs).compile().memory_analysis()
    assert analysis is not None, "this backend does not say what memory a program needs"
    return analysis.temp_size_in_bytes


def _chunked_log_probabilities(hidden: Array, embedding: Array, targets: Array) -> Array:
    return token_log_probabilities(hidden, embedding, targets)[0]


def _naive_log_probabilities(hidden: Array, embedding: Array, targets: Array) -> Array:
    log_pi = jax.nn.log_softmax(hidden @ embedding.T)
    return jnp.take_along_axis(log_pi, targets[:, None], axis=-1)[:, 0]


def decode_work(model: GPT2, batch: int, num_new: int) -> Mapping[str, float]:
    """What decoding `num_new` tokens after `PROMPT` ones must at least read and compute.

    Every pass reads all weights but the table of positions, and the keys and values of the tokens
    before: one pass for the prompt, and one for every new token but the last.
    """
    config, dtype = model.config, jnp.dtype(model.dtype)
    weights = config.num_parameters - config.n_positions * config.n_embd
    moved = num_new * weights * dtype.itemsize
    moved += sum(config.cache_bytes(batch, PROMPT + step, dtype) for step in range(num_new - 1))
    is_cached = config.num_parameters * dtype.itemsize < CACHED_BYTES
    limit = "cached_bytes" if is_cached else "streamed_bytes"
    return {limit: moved, **_flops(model, batch, PROMPT + num_new - 1, scored=num_new)}


def _flops(model: GPT2, rows: int, length: int, scored: int | None = None) -> Mapping[str, float]:
    """Of a forward pass over whole rows, of which the last `scored` tokens (all) get logits."""
    config = model.config
    unscored = 0 if scored is None else length - scored
    row = length * config.forward_flops((length + 1) / 2)
    flops = rows * (row - unscored * 2 * config.n_embd * config.vocab_size)
    return {f"{jnp.dtype(model.dtype).name}_flops": flops}


@functools.lru_cache(maxsize=1)
def _parameters(config: GPT2Config) -> PyTree:
    """Random weights in float32, drawn when first asked for and dropped for the next model's."""
    return jax.jit(GPT2(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


@functools.lru_cache(maxsize=1)
def _weights(config: GPT2Config, dtype: Any) -> PyTree:
    """The same for inference, its matrices in the model's own `dtype`."""
    return decoding.cast(_parameters(config), dtype)


def _tokens(model: GPT2, rows: int, length: int) -> Array:
    random = np.random.default_rng(0)
    return jnp.asarray(random.integers(model.config.vocab_size, size=(rows, length)), jnp.int32)


def _batch(tokens: Array) -> TokenBatch:
    """Rows without padding, of which every token counts."""
    every = jnp.ones(tokens.shape, bool)
    return TokenBatch(tokens=tokens, attention_mask=every, response_mask=every)


def _chunk_size(model: GPT2, tokens: Array) -> int | None:
    fits = 4 * tokens.size * model.config.vocab_size <= KEPT_LOGITS_BYTES
    return None if fits else sft.Config().chunk_size


def _peer(adaptor: Callable[..., Peer], model: GPT2, *arguments: Any) -> Peer:
    return adaptor(model.config, _parameters(model.config), jnp.dtype(model.dtype).name, *arguments)


def _close(model: GPT2, ours: Array, theirs: Any) -> None:
    tolerance = TOLERANCE[jnp.dtype(model.dtype).name]
    expected = torch_peers.to_numpy(theirs)
    np.testing.assert_allclose(np.asarray(ours), expected, rtol=tolerance, atol=tolerance)


def _same_tokens(ours: Array, theirs: Any) -> None:
    _same_lengths(ours, theirs)
    theirs = theirs if isinstance(theirs, jax.Array) else torch_peers.to_numpy(theirs)
    differing = np.mean(np.any(np.asarray(ours) != np.asarray(theirs), axis=1))
    assert differing <= DIFFERING_ROWS, f"{differing:.0%} of the rows differ"


def _same_lengths(ours: Array, theirs: Any) -> None:
    """All that other random numbers, or the ties of bfloat16, leave the same."""
    assert ours.shape == tuple(theirs.shape), f"{ours.shape} is not {tuple(theirs.shape)}"


def _same_step(model: GPT2, ours: tuple, theirs: tuple) -> None:
    """The same loss and gradient: the first update, at learning rate 0, changes no weight."""
    metrics = ours[1]
    for name, expected in zip(("loss", "gradient_norm"), theirs, strict=True):
        _close(model, metrics[name].mean, expected)


def _at_most_a_quarter(chunked: int, naive: int) -> None:
    assert 4 * chunked <= naive, f"{chunked} bytes are more than a quarter of {naive}"
