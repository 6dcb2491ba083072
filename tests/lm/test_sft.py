"""Fine-tuning: the gradient of one global mean, AdamW upon it, and an order without repetition."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data.tokens import Tokens, pack, pad
from jaxrl_llm.lm import optimizer, sft
from jaxrl_llm.lm.order import next_batch
from jaxrl_llm.nn.adapters import LoRA
from jaxrl_llm.nn.gpt2 import GPT2
from jaxrl_llm.types import TokenBatch
from tests.lm import tiny
from tests.lm.tiny import CONTEXT, END, MODEL, PADDING, SHAPE
from tests.nn.tiny_gpt2 import fast_key, flat, random_params

pytestmark = pytest.mark.slow

ADAMW = optimizer.Config(learning_rate=0.01, warmup_fraction=0.25)
CONFIG = sft.Config(num_steps=4, batch_size=8, row_length=CONTEXT, chunk_size=None, optimizer=ADAMW)
# As many counted tokens as a short and a long response have: parts of a batch weigh differently.
SEQUENCES = [
    Tokens(sequence.tokens, np.arange(len(sequence.tokens)) > row % 3)
    for row, sequence in enumerate(tiny.random_sequences(17, 9))
]
BATCH = pack(SEQUENCES, CONTEXT)
gradient_of_mean = jax.jit(sft.gradient_of_mean, static_argnums=(0, 1))


def loss_and_gradient(params: Any, batch: TokenBatch) -> Any:
    return gradient_of_mean(CONFIG, MODEL, fast_key(0), params, batch)


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(MODEL)


@pytest.fixture(scope="module")
def update(params) -> Any:
    """A step that trains everything, compiled."""
    return compiled_update(CONFIG, MODEL, params)


def compiled_update(config: sft.Config, model: GPT2, params: Any) -> Any:
    state = sft.start(config, params, fast_key(0))
    jitted = jax.jit(sft.update, static_argnums=(0, 1))
    return jitted.lower(config, model, fast_key(0), state, BATCH).compile()


def assert_close(tree: Any, expected: Any, atol: float) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=atol), tree, expected)


def assert_same(tree: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


def test_gradient_of_mean_is_that_of_the_naive_mean_one_sequence_a_row(params):
    rows = pad(SEQUENCES, CONTEXT)

    def naive(params: Any) -> Any:
        logits: Any = MODEL.apply({"params": params}, rows.tokens)
        log_pi = jax.nn.log_softmax(logits[:, :-1])
        chosen = jnp.take_along_axis(log_pi, rows.tokens[:, 1:, None], axis=-1)[..., 0]
        counted = rows.response_mask[:, 1:]
        return -jnp.sum(jnp.where(counted, chosen, 0)) / counted.sum()

    loss, expected = jax.jit(jax.value_and_grad(naive))(params)
    gradient, mean = loss_and_gradient(params, BATCH)
    np.testing.assert_allclose(mean.mean, loss, rtol=1e-5)
    assert int(mean.weight) == sum(sequence.num_targets for sequence in SEQUENCES)
    assert_close(gradient, expected, atol=1e-6)


def test_gradient_does_not_depend_on_the_micro_batches(params):
    counts = np.asarray(BATCH.response_mask).reshape(4, -1).sum(axis=1)
    assert len(set(counts.tolist())) > 1
    whole, mean = gradient_of_mean(CONFIG, MODEL, fast_key(0), params, BATCH)
    in_parts = replace(CONFIG, num_micro_batches=4)
    gradient, same_mean = gradient_of_mean(in_parts, MODEL, fast_key(0), params, BATCH)
    assert_close(gradient, whole, atol=1e-6)
    np.testing.assert_allclose(same_mean.mean, mean.mean, rtol=1e-6)
    np.testing.assert_array_equal(same_mean.weight, mean.weight)


def test_what_follows_the_end_token_changes_no_bit_of_loss_or_gradient(params):
    padding = ~np.asarray(BATCH.attention_mask)
    assert padding.sum() > 3
    expected = loss_and_gradient(params, BATCH)
    noise = np.random.default_rng(0).integers(2, tiny.VOCABULARY, padding.shape)
    for filler in (noise, END, PADDING):
        tokens = np.where(padding, filler, BATCH.tokens).astype(np.int32)
        assert_same(loss_and_gradient(params, replace(BATCH, tokens=tokens)), expected)


def test_tokens_after_the_response_change_no_bit_even_where_they_are_read(params):
    rows = pad(SEQUENCES[:8], CONTEXT)
    lengths = np.array([len(sequence.tokens) for sequence in SEQUENCES[:8]])
    tail = np.arange(CONTEXT) >= lengths[:, None]
    rows = replace(rows, attention_mask=np.ones_like(tail), segment=np.int32(np.ones(tail.shape)))
    noise = np.random.default_rng(0).integers(2, tiny.VOCABULARY, tail.shape)
    tokens = np.where(tail, noise, rows.tokens).astype(np.int32)
    scrambled = loss_and_gradient(params, replace(rows, tokens=tokens))
    assert_same(scrambled, loss_and_gradient(params, rows))


def test_update_equals_adamw_by_its_formula_over_three_steps(params, update):
    state = sft.start(CONFIG, params, fast_key(0))
    gradients = []
    for step in range(3):
        gradient, mean = loss_and_gradient(state.train.params, BATCH)
        gradients.append(tiny.as_float64(flat(gradient)))
        state, metrics = update(fast_key(step), state, BATCH)
        norm = np.sqrt(sum((leaf**2).sum() for leaf in gradients[-1].values()))
        np.testing.assert_allclose(metrics["loss"].mean, mean.mean, rtol=1e-6)
        np.testing.assert_allclose(metrics["gradient_norm"].mean, norm, rtol=1e-5)
        assert int(state.train.step) == step + 1
    before = tiny.as_float64(flat(params))
    expected = tiny.naive_adamw(ADAMW, CONFIG.num_steps, before, gradients)
    for name, leaf in tiny.as_float64(flat(state.train.params)).items():
        # Adam divides by the root of v: where a gradient is all rounding, so is its step. Attention
        # does not feel a bias of its keys.
        if not name.endswith("c_attn.bias"):
            np.testing.assert_allclose(leaf, expected[name], rtol=0, atol=2e-6, err_msg=name)


@pytest.mark.slow
def test_dropout_is_drawn_anew_for_every_key_and_micro_batch(params):
    model = GPT2(replace(SHAPE, resid_pdrop=0.3))
    halves = replace(CONFIG, num_micro_batches=2)
    nothing = np.zeros((4, CONTEXT), bool)

    def total(seed: int, *response_masks: Any) -> float:
        rows = jax.tree.map(lambda leaf: np.concatenate([leaf[:4], leaf[:4]]), BATCH)
        rows = replace(rows, response_mask=np.concatenate(response_masks))
        return float(gradient_of_mean(halves, model, fast_key(seed), params, rows)[1].total)

    counted = np.asarray(BATCH.response_mask)[:4]
    first, second = total(0, counted, nothing), total(0, nothing, counted)
    # The same rows, in one part or the other.
    assert not np.isclose(first, second)
    np.testing.assert_allclose(total(0, counted, counted), first + second, rtol=1e-6)
    assert not np.isclose(total(1, counted, nothing), first)


@pytest.mark.parametrize(
    ("trainable", "part", "options"),
    [
        ("lora", "lora_", {"lora": LoRA(rank=2)}),
        ("adapter", "adapter", {"adapter_width": 3}),
    ],
)
def test_only_the_trainable_part_moves_and_no_gradient_of_the_trunk_is_computed(
    trainable, part, options, update
):
    model = GPT2(SHAPE, **options)
    adamw = optimizer.Config(trainable=trainable, warmup_fraction=0.0)
    config = replace(CONFIG, optimizer=adamw)
    state = sft.start(config, random_params(model), fast_key(0))
    program = compiled_update(config, model, state.train.params)
    # A step has three parts: forward, and backward to activations and to weights.
    assert program.cost_analysis()["flops"] < 0.75 * update.cost_analysis()["flops"]
    stepped, _ = program(fast_key(0), state, BATCH)
    after = flat(stepped.train.params)
    moved = set()
    for path, leaf in flat(state.train.params).items():
        if any(name.startswith(part) for name in path):
            assert (np.asarray(after[path]) != leaf).any()
            moved.add(path)
        else:
            np.testing.assert_array_equal(after[path], leaf)
    assert len(moved) == 4


def numbered(num_rows: int) -> TokenBatch:
    """Rows that hold their own number."""
    tokens = jnp.broadcast_to(jnp.arange(num_rows)[:, None], (num_rows, 3))
    mask = jnp.ones(tokens.shape, bool)
    return TokenBatch(tokens=tokens, attention_mask=mask, response_mask=mask)


def rows_by_step(num_rows: int, batch_size: int, num_steps: int, seed: int = 0) -> np.ndarray:
    config = replace(CONFIG, batch_size=batch_size)
    state = sft.start(config, {"transformer": {"weight": jnp.zeros(2)}}, fast_key(seed))

    @jax.jit
    def at(step: Any) -> Any:
        now = replace(state, train=replace(state.train, step=step))
        return next_batch(now, config.batch_size, numbered(num_rows)).tokens

    rows = np.stack([at(jnp.int32(step)) for step in range(num_steps)])
    assert (rows == rows[..., :1]).all()
    return rows[..., 0]


@pytest.mark.parametrize(("num_rows", "batch_size"), [(12, 4), (13, 4), (5, 5), (7, 1)])
def test_next_batch_takes_every_row_once_an_epoch_in_an_order_of_its_own(num_rows, batch_size):
    steps = num_rows // batch_size
    epochs = rows_by_step(num_rows, batch_size, 6 * steps).reshape(6, -1)
    for epoch in epochs:
        assert len(set(epoch.tolist())) == steps * batch_size
        assert set(epoch.tolist()) <= set(range(num_rows))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 6
    # What one epoch leaves over, another has.
    assert set(epochs.flatten().tolist()) == set(range(num_rows))


def test_next_batch_depends_on_key_and_step_alone():
    first, again, other = (rows_by_step(12, 4, 6, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_next_batch_repeats_a_corpus_smaller_than_a_batch():
    rows = rows_by_step(3, 8, 4)
    assert rows.shape == (4, 8)
    for batch in rows:
        counts = np.bincount(batch, minlength=3)
        assert (counts.min(), counts.max()) == (2, 3)
    assert len({tuple(batch) for batch in rows.tolist()}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_training_learns_eight_sequences_by_heart(dtype):
    adamw = optimizer.Config(learning_rate=0.02, weight_decay=0.0)
    config = replace(CONFIG, num_steps=150, optimizer=adamw)
    model = GPT2(SHAPE, dtype=dtype)
    sequences = [
        Tokens(np.array([row + 2, *tail, END], np.int32), np.arange(8) > 0)
        for row, tail in enumerate(np.random.default_rng(0).integers(2, 29, size=(8, 6)))
    ]
    algorithm = sft.make(config, model)
    state = jax.jit(algorithm.init)(fast_key(0))
    step, corpus, losses = jax.jit(algorithm.step), pad(sequences, CONTEXT), []
    for index in range(config.num_steps):
        state, metrics = step(fast_key(index), state, corpus)
        losses.append(float(metrics["loss"].mean))
    # The first model knows nothing.
    np.testing.assert_allclose(losses[0], np.log(tiny.VOCABULARY), atol=0.05)
    assert losses[-1] < 0.05
    assert int(state.train.step) == config.num_steps
    leaves = jax.tree.leaves((state.train.params, state.train.opt_state))
    assert {leaf.dtype.name for leaf in leaves} == {"float32", "int32"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0; it must be at least 1"),
        ({"row_length": 0}, "row_length is 0; it must be at least 1"),
        ({"chunk_size": 0}, "chunk_size is 0; it must be at least 1"),
        (
            {"num_micro_batches": 3},
            "batch_size is 8; it must be a multiple of num_micro_batches, 3",
        ),
        (
            {"optimizer": optimizer.Config(trainable="heads")},
            (
                "optimizer.trainable is heads; text has no values to learn from: "
                "train all, adapter or lora"
            ),
        ),
    ],
)
def test_validate_names_the_field(changes, message):
    CONFIG.validate()
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        replace(CONFIG, **changes).validate()
    assert str(error.value) == message
