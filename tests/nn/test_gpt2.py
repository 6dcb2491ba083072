"""GPT-2 against `transformers`, committed and live, and what padding, caches and keys may change.

Every model here is tiny and has weights drawn at one scale, so that no part is too small to count.
"""

import dataclasses
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict
from safetensors import safe_open

from jaxrl_llm.nn import gpt2
from jaxrl_llm.nn.gpt2 import GPT2, GPT2Config
from tests.golden import gpt2 as golden
from tests.nn.tiny_gpt2 import TINY, TOKENS, apply, fast_key, flat, random_params, run, shapes

MODEL = GPT2(TINY)
RANDOM = np.random.default_rng(0)
LENGTHS = np.array([8, 5, 2])
LEFT = np.arange(8) >= 8 - LENGTHS[:, None]
LEFT_AND_RIGHT = (np.arange(14) > 0) & (np.arange(14) < [[7], [2], [1]])


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(MODEL)


@partial(jax.jit, static_argnums=0)
def run_greedily(model: GPT2, params: Any, tokens: Any, mask: Any) -> tuple[Any, Any]:
    """Logits of `tokens`, and the most likely tokens one after another out of a cache."""
    cache = gpt2.init_cache(model.config, len(tokens), tokens.shape[1] + golden.NUM_GENERATED)
    logits, cache = apply(model, params, tokens, attention_mask=mask, cache=cache)

    def step(carry: Any, _: None) -> tuple[Any, Any]:
        logits, cache = carry
        token = jnp.argmax(logits, axis=-1)
        return apply(model, params, token, cache=cache), token[:, 0]

    _, generated = jax.lax.scan(step, (logits[:, -1:], cache), length=golden.NUM_GENERATED)
    return logits, generated.T


def assert_matches_transformers(config: GPT2Config, state: dict[str, Any], numbers: Any) -> None:
    """Names, shapes, logits and 64 greedy tokens are those of the reference implementation."""
    model, params = GPT2(config), unflatten_dict(state, sep=".")
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes(model))
    assert sum(leaf.size for leaf in state.values()) == config.num_parameters
    tokens, mask = numbers.tokens, numbers.attention_mask
    with jax.default_matmul_precision("float32"):
        prefilled, generated = jax.device_get(run_greedily(model, params, tokens, mask))
        logits = run(model, params, tokens, attention_mask=mask)
    np.testing.assert_allclose(logits[mask], numbers.logits[mask], atol=3e-5)
    np.testing.assert_allclose(prefilled[mask], numbers.logits[mask], atol=3e-5)
    np.testing.assert_array_equal(generated, numbers.generated)


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.CASES)
def test_gpt2_matches_committed_transformers(name):
    numbers = golden.load(name)
    with safe_open(numbers.directory / "model.safetensors", "numpy") as file:
        state = {key: file.get_tensor(key).astype(np.float32) for key in file.keys()}  # noqa: SIM118
    assert_matches_transformers(GPT2Config(**golden.CASES[name].config), state, numbers)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"n_layer": 1, "n_head": 1, "activation_function": "silu", "n_inner": 20},
        {"n_layer": 3, "n_head": 4, "activation_function": "tanh", "scale_attn_weights": False},
        {"n_layer": 2, "n_head": 2, "tie_word_embeddings": False, "layer_norm_epsilon": 0.1},
    ],
)
def test_gpt2_matches_live_transformers(tmp_path, options):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = GPT2Config(
        vocab_size=37,
        n_positions=80,
        n_embd=24,
        initializer_range=0.4,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=0,
        **options,
    )
    torch.manual_seed(0)
    peer = transformers.GPT2LMHeadModel(transformers.GPT2Config(**dataclasses.asdict(config)))
    numbers = golden.compute(peer, tmp_path, seed=0)
    state = {name: leaf.detach().numpy() for name, leaf in peer.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert_matches_transformers(config, state, numbers)


@pytest.mark.slow
@pytest.mark.parametrize("width", [8, 14])  # 14 is beyond the last position
def test_padding_changes_no_logit_of_a_real_token(params, width):
    alone = run(MODEL, params, TOKENS)
    for right in (np.arange(width) < LENGTHS[:, None], LEFT_AND_RIGHT[:, :width]):
        for mask in (right, right[:, ::-1]):
            tokens = np.full((3, width), 10**6)  # padding may be any number
            tokens[:, ::2] = -100
            tokens[mask] = TOKENS[np.arange(8) < mask.sum(1, keepdims=True)]
            logits = run(MODEL, params, tokens, attention_mask=mask)
            assert np.isfinite(logits).all()
            expected = alone[np.arange(8) < mask.sum(1, keepdims=True)]
            np.testing.assert_allclose(logits[mask], expected, atol=2e-5)


@pytest.mark.slow
def test_padding_after_a_full_context_stays_finite(params):
    tokens = RANDOM.integers(TINY.vocab_size, size=(3, 14))
    full, cache = run(MODEL, params, tokens[:, :12], cache=gpt2.init_cache(TINY, 3, 14))
    is_real = np.arange(14) < np.full((3, 1), 12)
    padded = run(MODEL, params, tokens, attention_mask=is_real)
    np.testing.assert_allclose(padded[:, :12], full, atol=2e-5)
    new, is_real = tokens[:, :1], np.array([[True], [False], [False]])
    logits, _ = run(MODEL, params, new, attention_mask=is_real, cache=cache)
    assert np.isfinite(logits[1:]).all()
    assert np.isnan(logits[0]).all()  # position 12, which the model has not


@pytest.mark.parametrize("split", [(8,), (3, 1, 1, 1, 1, 1), (1, 4, 3), (4, 1, 3)])
def test_prefill_and_decode_match_the_full_forward_pass(params, split):
    full = run(MODEL, params, TOKENS, attention_mask=LEFT)
    cache = gpt2.init_cache(TINY, 3, 14)
    for tokens, mask in zip(_split(TOKENS, split), _split(LEFT, split), strict=True):
        start = int(cache.length)
        logits, cache = run(MODEL, params, tokens, attention_mask=mask, cache=cache)
        expected = full[:, start : start + tokens.shape[1]]
        np.testing.assert_allclose(logits[mask], expected[mask], atol=2e-5)
    assert cache.length == 8
    np.testing.assert_array_equal(cache.mask, np.pad(LEFT, ((0, 0), (0, 6))))
    np.testing.assert_array_equal(cache.keys[1][:, :, 8:], np.zeros((3, 2, 6, 8)))


def _split(array: np.ndarray, widths: tuple[int, ...]) -> list[np.ndarray]:
    return np.split(array, np.cumsum(widths)[:-1], axis=1)


def test_decode_continues_prompts_that_are_padded_on_the_right(params):
    prompts, continuation = TOKENS[:, :4], RANDOM.integers(TINY.vocab_size, size=(3, 2))
    lengths = (4, 3, 1)
    cache = gpt2.init_cache(TINY, 3, 14)
    right = np.arange(4) < np.array(lengths)[:, None]
    _, cache = run(MODEL, params, prompts, attention_mask=right, cache=cache)
    for step in range(2):
        new, ones = continuation[:, step : step + 1], np.ones((3, 1), bool)
        logits, cache = run(MODEL, params, new, attention_mask=ones, cache=cache)
        for row, length in enumerate(lengths):
            row_alone = np.concatenate([prompts[row, :length], continuation[row, : step + 1]])
            padded = np.pad(row_alone, (8 - len(row_alone), 0))
            mask = np.arange(8) >= 8 - len(row_alone)
            batch, masks = np.stack([padded] * 3), np.stack([mask] * 3)
            alone = run(MODEL, params, batch, attention_mask=masks)[0]
            np.testing.assert_allclose(logits[row, 0], alone[-1], atol=2e-5)


def test_packed_segments_match_separate_rows(params):
    lengths = ((4, 3), (2, 5, 1))
    segment = np.array([[1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 2, 2, 2, 2, 2, 3]])
    packed = run(MODEL, params, TOKENS[:2], segment=segment)
    for row in range(2):
        for number, length in enumerate(lengths[row], start=1):
            here = segment[row] == number
            alone = np.zeros((3, 8), int)
            alone[0, :length] = TOKENS[row, here]
            expected = run(MODEL, params, alone)[0, :length]
            np.testing.assert_allclose(packed[row, here], expected, atol=2e-5)


def test_segments_with_a_cache_are_refused(params):
    cache = gpt2.init_cache(TINY, 3, 8)
    with pytest.raises(ValueError, match="segment is given with a cache; read packed rows without"):
        run(MODEL, params, TOKENS, segment=np.ones_like(TOKENS), cache=cache)


def test_logits_depend_on_no_later_token_and_on_every_earlier_one(params):
    logits = run(MODEL, params, TOKENS)
    for position in (0, 3, 7):
        changed = TOKENS.copy()
        changed[:, position] = (changed[:, position] + 1) % TINY.vocab_size
        other = run(MODEL, params, changed)
        np.testing.assert_array_equal(other[:, :position], logits[:, :position])
        assert (np.abs(other - logits)[:, position:].max(-1) > 1e-4).all()


@pytest.mark.parametrize("token", [TINY.vocab_size, -1])
def test_a_token_out_of_range_gives_nan(params, token):
    tokens = TOKENS.copy()
    tokens[1, 7] = token
    logits = run(MODEL, params, tokens)
    assert np.isnan(logits[1, 7]).all()
    assert np.isfinite(logits[[0, 2]]).all()


# Dropout


def test_dropout_is_off_unless_asked_for_and_drawn_from_its_key(params):
    off = run(MODEL, params, TOKENS)
    keys = [fast_key(seed) for seed in (1, 2, 1)]
    for key in keys[:2]:
        np.testing.assert_array_equal(run(MODEL, params, TOKENS, key=key), off)
    first, second, again = (
        run(MODEL, params, TOKENS, key=jax.random.clone(key), deterministic=False) for key in keys
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 0.1
    assert np.abs(first - off).max() > 0.1


@pytest.mark.parametrize("field", ["embd_pdrop", "resid_pdrop", "attn_pdrop"])
def test_dropout_of_everything_is_a_model_whose_weights_there_are_zero(field):
    config = dataclasses.replace(TINY, tie_word_embeddings=False, embd_pdrop=0, resid_pdrop=0)
    config = dataclasses.replace(config, attn_pdrop=0)
    model, dropped = GPT2(config), GPT2(dataclasses.replace(config, **{field: 1.0}))
    params = random_params(model)

    def without(path: tuple[str, ...], leaf: Any) -> Any:
        if field == "attn_pdrop":
            is_value = np.arange(leaf.shape[-1]) >= 2 * config.n_embd
            return jnp.where(is_value & ("c_attn" in path), 0, leaf)
        names = {"wte", "wpe"} if field == "embd_pdrop" else {"c_proj"}
        return 0 * leaf if names & {*path} else leaf

    emptied = {path: without(path, leaf) for path, leaf in flat(params).items()}
    expected = run(model, unflatten_dict(emptied), TOKENS)
    actual = run(dropped, params, TOKENS, key=fast_key(0), deterministic=False)
    np.testing.assert_allclose(actual, expected, atol=2e-5)


@pytest.mark.slow
def test_dropout_of_attention_keeps_its_mean_and_its_masks():
    config = dataclasses.replace(TINY, attn_pdrop=0.3, scale_attn_by_inverse_layer_idx=True)
    often = gpt2.Attention(config, layer=1, dtype=jnp.float32, lora=None)
    rarely = often.clone(config=dataclasses.replace(config, attn_pdrop=1e-9))
    params = random_params(MODEL)["transformer"]["h"]["1"]["attn"]
    x = RANDOM.normal(size=(1, 4, TINY.n_embd)).astype(np.float32)
    mask = np.tril(np.ones((1, 1, 4, 4), bool))
    mask[..., 1:, 0] = False

    @jax.jit
    def attend(mask: Any, key: Any, other_key: Any) -> tuple[Any, Any, Any]:
        def draw(module: nn.Module, x: Any, key: Any) -> Any:
            return apply(module, params, x, mask, None, False, rngs={"dropout": key})[0]

        exact, _ = apply(often, params, x, mask, None, True)
        # Every row drops out on its own.
        return exact, draw(rarely, x, key), draw(often, jnp.tile(x, (4000, 1, 1)), other_key)

    for allowed in (mask, None):
        exact, almost, samples = jax.device_get(attend(allowed, fast_key(0), fast_key(1)))
        np.testing.assert_allclose(almost, exact, atol=1e-5)
        error = samples.std(0) / np.sqrt(len(samples))
        assert error.max() > 0.001
        assert (np.abs(samples.mean(0) - exact[0]) < 5 * error).all()


# Precision, memory, compilation


@pytest.mark.slow
def test_remat_recomputes_each_block_and_changes_nothing(params):
    plain, again = MODEL, MODEL.clone(remat=True)
    for model, num_recomputed in ((plain, 0), (again, TINY.n_layer)):
        program = jax.make_jaxpr(partial(apply, model))(params, TOKENS)
        names = [equation.primitive.name for equation in program.eqns]
        assert sum("remat" in name for name in names) == num_recomputed
    mask = LEFT.copy()
    mask[2] = False  # a row of padding only

    @partial(jax.jit, static_argnums=0)
    def logits_and_gradient(model: GPT2, params: Any, key: Any) -> tuple[Any, Any]:
        def loss(params: Any) -> tuple[Any, Any]:
            options = {"attention_mask": mask, "deterministic": False, "rngs": {"dropout": key}}
            logits = apply(model, params, TOKENS, **options)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:])
            return jnp.sum(losses * mask[:, 1:]), logits

        gradient, logits = jax.grad(loss, has_aux=True)(params)
        return logits, gradient

    expected = logits_and_gradient(plain, params, fast_key(0))
    actual = logits_and_gradient(again, params, fast_key(0))
    chex.assert_trees_all_close(actual, expected, atol=1e-5, rtol=1e-4)
    chex.assert_tree_all_finite(expected)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(expected))


@pytest.mark.slow
def test_bfloat16_computes_near_float32_and_keeps_float32_at_both_ends(params):
    half = GPT2(TINY, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes(half))} == {np.dtype("float32")}
    cache = gpt2.init_cache(TINY, 3, 14, jnp.bfloat16)
    options = {"attention_mask": LEFT, "method": "hidden_states"}
    hidden, cache = run(half, params, TOKENS, cache=cache, **options)
    logits = run(half, params, hidden, method="logits")
    assert hidden.dtype == cache.keys[1].dtype == jnp.bfloat16
    assert logits.dtype == np.float32
    head = np.float32(gpt2.output_embedding(params).astype(jnp.bfloat16))
    np.testing.assert_allclose(logits, hidden.astype(np.float32) @ head.T, atol=1e-5)
    full = run(MODEL, params, TOKENS, attention_mask=LEFT)
    assert np.abs(logits - full)[LEFT].max() < 0.05 * full.std()


def test_layer_norm_takes_its_moments_in_float32():
    x = jnp.asarray(100 + RANDOM.normal(size=(3, 16)), jnp.bfloat16)
    weight, bias = RANDOM.normal(size=(2, 16)).astype(np.float32)
    module = gpt2.LayerNorm(1e-5, jnp.float32)
    actual = run(module, {"weight": weight, "bias": bias}, x)
    exact = np.array(x, np.float64)
    centred = exact - exact.mean(-1, keepdims=True)
    expected = centred / np.sqrt(exact.var(-1, keepdims=True) + 1e-5) * weight + bias
    np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.slow
def test_logits_are_alike_jitted_eager_vmapped_and_in_two_steps(params):
    logits = run(MODEL, params, TOKENS)
    eager = apply(MODEL, params, TOKENS)
    np.testing.assert_allclose(eager, logits, atol=1e-5)
    rows = jax.jit(jax.vmap(lambda row: apply(MODEL, params, row[None])[0]))(TOKENS)
    np.testing.assert_allclose(rows, logits, atol=1e-5)
    hidden = run(MODEL, params, TOKENS, method="hidden_states")
    np.testing.assert_allclose(apply(MODEL, params, hidden, method="logits"), logits, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_output_embedding_scores_the_hidden_states(tied):
    model = GPT2(dataclasses.replace(TINY, tie_word_embeddings=tied))
    params = random_params(model)
    hidden = run(model, params, TOKENS, method="hidden_states")
    embedding = gpt2.output_embedding(params)
    assert embedding is (params["transformer"]["wte"] if tied else params["lm_head"])["weight"]
    np.testing.assert_allclose(run(model, params, TOKENS), hidden @ embedding.T, atol=1e-5)


@pytest.mark.slow
def test_init_draws_each_weight_at_its_scale():
    config = dataclasses.replace(TINY, n_embd=64, n_layer=2, initializer_range=0.1)
    config = dataclasses.replace(config, tie_word_embeddings=False, vocab_size=64, n_positions=64)
    params = jax.jit(GPT2(config).init)(fast_key(0), TOKENS)["params"]
    for path, leaf in flat(jax.device_get(params)).items():
        expected = {"bias": 0, "weight": 1}[path[-1]], 0
        if path[-1] == "weight" and "ln" not in path[-2]:
            expected = 0, 0.1 / 2 if path[-2] == "c_proj" else 0.1
        # 64 x 64 normal draws: five standard errors of a mean and of a standard deviation.
        np.testing.assert_allclose((leaf.mean(), leaf.std()), expected, atol=5 * 0.1 / 64)
