"""Adapters: off they are the reference, at the start they change nothing, and they alone learn."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict

from jaxrl_llm.nn import adapters, gpt2
from jaxrl_llm.nn.adapters import LoRA
from tests.nn.tiny_gpt2 import TINY, TOKENS, apply, fast_key, flat, random_params, run, shapes

CONFIG = dataclasses.replace(TINY, n_layer=1)
EVERYWHERE = LoRA(rank=3, alpha=6.0, targets=adapters.PROJECTIONS)
MODEL = gpt2.GPT2(CONFIG, lora=EVERYWHERE, adapter_width=8, value_width=5)
PLAIN = gpt2.GPT2(CONFIG)


@pytest.fixture(scope="module")
def initial() -> Any:
    return jax.jit(MODEL.init)(fast_key(0), TOKENS)["params"]


@pytest.fixture(scope="module")
def trained() -> Any:
    return random_params(MODEL)


@pytest.mark.slow
def test_adapters_start_as_the_identity_and_the_value_at_zero(initial):
    np.testing.assert_array_equal(run(MODEL, initial, TOKENS), run(PLAIN, initial, TOKENS))
    hidden = run(MODEL, initial, TOKENS, method="hidden_states")
    np.testing.assert_array_equal(
        run(MODEL, initial, hidden, method="value"), np.zeros((3, 8), np.float32)
    )


@pytest.mark.slow
def test_adapters_start_random_where_the_first_gradient_needs_it(initial):
    leaves = flat(initial)
    zero = {path for path, leaf in leaves.items() if not leaf.any()}
    block = ("transformer", "h", "0")
    down = {(*block, *name.split("."), "lora_a") for name in adapters.PROJECTIONS}
    down |= {("adapter", "down", "kernel"), ("value_head", "hidden", "kernel")}
    up = {(*path[:-1], "lora_b") for path in down if path[-1] == "lora_a"}
    up |= {("adapter", "up", "kernel"), ("value_head", "value", "kernel")}
    assert down | up <= leaves.keys()
    assert not down & zero
    assert up <= zero


def test_trunk_is_the_reference_without_a_copy(trained):
    reference = adapters.trunk(trained)
    names = flat(reference).keys()
    assert names == flat(shapes(PLAIN)).keys()
    leaves = flat(trained)
    assert all(leaf is leaves[path] for path, leaf in flat(reference).items())
    logits = run(PLAIN, reference, TOKENS)
    np.testing.assert_array_equal(run(MODEL, reference, TOKENS), logits)
    assert np.abs(run(MODEL, trained, TOKENS) - logits).max() > 1
    assert "adapter" in trained  # and the policy's own tree is as before


def test_trunk_of_a_model_without_adapters_is_all_of_it(trained):
    plain = adapters.trunk(trained)
    assert jax.tree.structure(adapters.trunk(plain)) == jax.tree.structure(plain)


@pytest.mark.parametrize("part", ["adapter", "lora"])
def test_each_adapter_is_off_without_its_leaves_alone(trained, part):
    leaves = flat(trained)
    names = {"adapter"} if part == "adapter" else {"lora_a", "lora_b"}
    kept = unflatten_dict({path: leaf for path, leaf in leaves.items() if not names & {*path}})
    lora, adapter_width = (EVERYWHERE, None) if part == "adapter" else (None, 8)
    other = PLAIN.clone(lora=lora, adapter_width=adapter_width)
    actual = run(MODEL, kept, TOKENS)
    np.testing.assert_allclose(actual, run(other, trained, TOKENS), atol=1e-5)
    assert np.abs(actual - run(MODEL, trained, TOKENS)).max() > 0.1


def test_adapter_and_value_head_match_their_equations(trained):
    hidden = run(PLAIN, trained, TOKENS, method="hidden_states")
    without_lora = PLAIN.clone(adapter_width=8, value_width=5)
    adapted = run(without_lora, trained, TOKENS, method="hidden_states")
    down, up = trained["adapter"]["down"], trained["adapter"]["up"]
    inner = hidden @ down["kernel"] + down["bias"]
    inner = inner / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
    expected = hidden + inner @ up["kernel"] + up["bias"]
    np.testing.assert_allclose(adapted, expected, atol=1e-5)
    first, last = trained["value_head"]["hidden"], trained["value_head"]["value"]
    inner = np.maximum(adapted @ first["kernel"] + first["bias"], 0)
    expected = (inner @ last["kernel"] + last["bias"])[..., 0]
    value = run(without_lora, trained, adapted, method="value")
    np.testing.assert_allclose(value, expected, atol=1e-5)


@pytest.mark.parametrize("target", adapters.PROJECTIONS)
def test_lora_starts_as_the_identity_and_merges_on_every_projection(target):
    lora = LoRA(rank=2, alpha=3.0, targets=(target,))
    model = PLAIN.clone(lora=lora)
    params = random_params(model)
    assert sum("lora_a" in path for path in flat(params)) == 1
    start = {
        path: 0 * leaf if path[-1] == "lora_b" else leaf for path, leaf in flat(params).items()
    }
    start = run(model, unflatten_dict(start), TOKENS)
    np.testing.assert_allclose(start, run(PLAIN, params, TOKENS), atol=1e-6)
    merged = adapters.merge_lora(params, lora)
    assert flat(merged).keys() == flat(adapters.trunk(params)).keys()
    block, name = merged["transformer"]["h"]["0"], target.split(".")
    stored = params["transformer"]["h"]["0"][name[0]][name[1]]
    expected = stored["weight"] + 1.5 * stored["lora_a"] @ stored["lora_b"]
    np.testing.assert_allclose(block[name[0]][name[1]]["weight"], expected, atol=1e-6)
    actual = run(model, params, TOKENS)
    np.testing.assert_allclose(run(PLAIN, merged, TOKENS), actual, atol=1e-4)
    assert np.abs(actual - start).max() > 0.1


def test_lora_is_only_where_it_is_asked_for():
    names = flat(shapes(PLAIN.clone(lora=LoRA())))
    have = {path[-3:-1] for path in names if path[-1] == "lora_b"}
    assert have == {("attn", "c_attn"), ("attn", "c_proj")}


def test_merge_lora_leaves_its_argument_and_the_rest_as_they_were(trained):
    before = jax.tree.map(np.copy, trained)
    merged = adapters.merge_lora(trained, EVERYWHERE)
    jax.tree.map(np.testing.assert_array_equal, trained, before)
    assert merged["adapter"]["up"]["bias"] is trained["adapter"]["up"]["bias"]
    logits = run(MODEL, trained, TOKENS)
    np.testing.assert_allclose(run(MODEL, merged, TOKENS), logits, atol=1e-4)


@pytest.mark.parametrize(
    ("trainable", "parts"),
    [
        ("all", {"trunk", "adapter", "lora", "heads"}),
        ("adapter", {"adapter", "heads"}),
        ("lora", {"lora", "heads"}),
        ("heads", {"heads"}),
    ],
)
def test_labels_let_the_trainable_leaves_alone_move(initial, trainable, parts):
    def part(path: tuple[str, ...]) -> str:
        if path[0] == "value_head":
            return "heads"
        if path[0] == "adapter":
            return "adapter"
        return "lora" if path[-1].startswith("lora") else "trunk"

    labels = adapters.labels(initial, trainable)
    assert flat(labels) == {
        path: "train" if part(path) in parts else "freeze" for path in flat(initial)
    }
    optimiser = optax.partition({"train": optax.sgd(0.1), "freeze": optax.set_to_zero()}, labels)
    updates, _ = optimiser.update(jax.tree.map(np.ones_like, initial), optimiser.init(initial))
    for path, update in flat(updates).items():
        np.testing.assert_array_equal(update, np.float32(-0.1 if part(path) in parts else 0))


@pytest.mark.slow
def test_first_gradient_moves_the_adapters_from_their_start(initial):
    @jax.jit
    def gradient(params: Any) -> Any:
        def loss(params: Any) -> Any:
            hidden = apply(MODEL, params, TOKENS, method="hidden_states")
            logits = apply(MODEL, params, hidden, method="logits")
            value = apply(MODEL, params, hidden, method="value")
            losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:])
            return losses.mean() + jnp.mean(jnp.square(value - 1))

        return jax.grad(loss)(params)

    leaves = flat(jax.device_get(gradient(initial)))
    lora_a = {path for path in leaves if path[-1] == "lora_a"}
    assert not any(leaves[path].any() for path in lora_a)
    waiting = lora_a | {("adapter", "down", "kernel"), ("adapter", "down", "bias")}
    waiting |= {("value_head", "hidden", "kernel"), ("value_head", "hidden", "bias")}
    for path, leaf in leaves.items():
        assert leaf.any() != (path in waiting), path


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        ("head", "trainable is 'head'; it must be one of 'all', 'adapter', 'lora', 'heads'"),
        *(
            (
                name,
                f"trainable is '{name}', but params have no such part; build the model with one",
            )
            for name in ("adapter", "lora", "heads")
        ),
    ],
)
def test_labels_refuse_what_params_lack(initial, trainable, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        adapters.labels(adapters.trunk(initial), trainable)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"alpha": 0.0}, "alpha is 0.0; it must be greater than 0"),
        ({"targets": ()}, "targets is empty; name at least one projection"),
        (
            {"targets": ("mlp.c_fc", "c_attn")},
            (
                "targets is 'c_attn'; it must be one of "
                "'attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj'"
            ),
        ),
    ],
)
def test_lora_names_the_field_that_is_wrong(options, message):
    EVERYWHERE.validate()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LoRA(**options).validate()


@pytest.mark.slow
def test_adapters_in_bfloat16_stay_near_float32_and_values_are_float32(trained):
    half = MODEL.clone(dtype=jnp.bfloat16, remat=True)
    hidden = run(half, trained, TOKENS, method="hidden_states")
    assert hidden.dtype == jnp.bfloat16
    value = run(half, trained, hidden, method="value")
    assert value.dtype == np.float32
    full = run(MODEL, trained, TOKENS, method="hidden_states")
    expected = run(MODEL, trained, full, method="value")
    assert np.abs(value - expected).max() < 0.05 * np.abs(expected).max()
