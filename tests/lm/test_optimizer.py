"""The optimiser against AdamW, its clipping and its schedule written out in NumPy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.lm import optimizer
from jaxrl_llm.nn import adapters
from tests.lm.tiny import as_float64, naive_adamw, naive_rate
from tests.nn.tiny_gpt2 import flat

CONFIG = optimizer.Config(learning_rate=0.05, warmup_fraction=0.25, max_gradient_norm=2.0)
# One leaf of each kind, and a vector that decays nowhere.
SHAPES = {
    "transformer": {"c_fc": {"weight": (3, 2), "bias": (2,), "lora_a": (3, 1), "lora_b": (1, 2)}},
    "adapter": {"up": {"kernel": (2, 2)}},
    "value_head": {"value": {"kernel": (2, 1)}},
}
LEARNING = {
    "all": {"weight", "bias", "lora_a", "lora_b", "adapter", "value_head"},
    "lora": {"lora_a", "lora_b", "value_head"},
    "adapter": {"adapter", "value_head"},
    "heads": {"value_head"},
}


def draw(seed: int, scale: float = 1.0) -> Any:
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(random.normal(0, scale, shape), jnp.float32),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def kind(path: tuple[str, ...]) -> str:
    return path[0] if path[0] != "transformer" else path[-1]


def take_steps(config: optimizer.Config, num_steps: int, params: Any, gradients: list[Any]) -> Any:
    transformation = optimizer.make(config, num_steps)
    state = transformation.init(params)
    step = jax.jit(transformation.update)
    for gradient in gradients:
        updates, state = step(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.slow
def test_make_equals_adamw_by_its_formula_from_warm_up_to_the_end():
    params = draw(0)
    # The first two are clipped, the third is not, and the last is zero but for its momentum.
    gradients = [draw(seed, scale) for seed, scale in ((1, 9.0), (2, 3.0), (3, 0.1), (4, 0.0))]
    actual = take_steps(CONFIG, 4, params, gradients)
    leaves = [as_float64(flat(tree)) for tree in (params, *gradients)]
    # Of a zero gradient the norm is no divisor.
    leaves[-1] = {name: leaf + 1e-30 for name, leaf in leaves[-1].items()}
    expected = naive_adamw(CONFIG, 4, leaves[0], leaves[1:])
    for name, leaf in as_float64(flat(actual)).items():
        np.testing.assert_allclose(leaf, expected[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_first_step_of_a_warm_up_moves_nothing_and_without_one_every_leaf():
    params, gradient = draw(0), draw(1)
    still = take_steps(CONFIG, 4, params, [gradient])
    jax.tree.map(np.testing.assert_array_equal, still, params)
    moved = take_steps(replace(CONFIG, warmup_fraction=0.0), 4, params, [gradient])
    for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(moved), strict=True):
        assert (old != new).all()


def test_weight_decay_shrinks_matrices_and_nothing_else():
    params = draw(0)
    config = replace(CONFIG, warmup_fraction=0.0)
    gradient = jax.tree.map(jnp.zeros_like, params)
    decayed = flat(take_steps(config, 4, params, [gradient]))
    for path, leaf in flat(params).items():
        factor = 1 - config.learning_rate * config.weight_decay if leaf.ndim == 2 else 1
        np.testing.assert_allclose(decayed[path], factor * leaf, rtol=1e-6)


@pytest.mark.parametrize("trainable", LEARNING)
def test_only_what_is_trainable_moves_and_only_it_is_clipped(trainable):
    config = replace(CONFIG, trainable=trainable, warmup_fraction=0.0)
    params, gradient = draw(0), draw(1)
    learns = {path for path in flat(params) if kind(path) in LEARNING[trainable]}
    # A frozen leaf's gradient, however long, is not part of the norm.
    scale = {"train": 1.0, "freeze": 1e6}
    labels = adapters.labels(params, trainable)
    loud = jax.tree.map(lambda leaf, label: scale[label] * leaf, gradient, labels)
    actual = flat(take_steps(config, 4, params, [loud]))
    leaves = [as_float64(flat(tree)) for tree in (params, gradient)]
    part = [{name: tree[name] for name in map(".".join, learns)} for tree in leaves]
    expected = naive_adamw(config, 4, part[0], part[1:])
    for path, leaf in flat(params).items():
        if path in learns:
            np.testing.assert_allclose(actual[path], expected[".".join(path)], atol=1e-6)
        else:
            np.testing.assert_array_equal(actual[path], leaf)


def test_what_is_frozen_has_no_moments():
    state = optimizer.make(replace(CONFIG, trainable="lora"), 4).init(draw(0))
    sizes = [leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim]
    # Two moments of lora_a, lora_b and the value head.
    assert sorted(sizes) == sorted(2 * [3, 2, 2])


@pytest.mark.parametrize(
    ("fraction", "num_steps"), [(0.0, 1), (0.0, 7), (0.25, 8), (0.03, 500), (0.5, 1)]
)
def test_schedule_is_a_line_and_then_half_a_cosine(fraction, num_steps):
    config = replace(CONFIG, warmup_fraction=fraction)
    rate = optimizer.schedule(config, num_steps)
    for step in {0, 1, num_steps // 3, num_steps - 1, num_steps}:
        expected = naive_rate(config, num_steps, step)
        np.testing.assert_allclose(rate(step), expected, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(rate(num_steps), 0.1 * config.learning_rate, rtol=1e-5)


@pytest.mark.parametrize("num_steps", [1, 2, 10])
def test_schedule_may_be_all_warm_up(num_steps):
    rate = optimizer.schedule(replace(CONFIG, warmup_fraction=1.0), num_steps)
    np.testing.assert_allclose(rate(num_steps - 1), CONFIG.learning_rate, rtol=1e-6)
    np.testing.assert_allclose(rate(num_steps), 0.1 * CONFIG.learning_rate, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("trainable", LEARNING)
def test_freeze_changes_no_value_and_stops_the_gradient_of_the_rest(trainable):
    params = draw(0)
    jax.tree.map(np.testing.assert_array_equal, optimizer.freeze(params, trainable), params)

    def squares(params: Any) -> Any:
        return optax.tree.norm(optimizer.freeze(params, trainable), squared=True) / 2

    gradient = flat(jax.grad(squares)(params))
    for path, leaf in flat(params).items():
        learns = kind(path) in LEARNING[trainable]
        np.testing.assert_array_equal(gradient[path], leaf if learns else jnp.zeros_like(leaf))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be greater than 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; it must be finite"),
        ({"epsilon": -1.0}, "epsilon is -1.0; it must be greater than 0"),
        ({"max_gradient_norm": 0}, "max_gradient_norm is 0; it must be greater than 0"),
        ({"warmup_fraction": 1.5}, "warmup_fraction is 1.5; it must be in [0, 1]"),
        ({"final_fraction": -0.1}, "final_fraction is -0.1; it must be in [0, 1]"),
        ({"beta1": 1.0}, "beta1 is 1.0; it must be at least 0 and less than 1"),
        ({"beta2": -0.1}, "beta2 is -0.1; it must be at least 0 and less than 1"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0; it must be at least 0"),
    ],
)
def test_validate_names_the_field(changes, message):
    optimizer.ADAMW.validate()
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        replace(CONFIG, **changes).validate()
    assert str(error.value) == message


def test_make_refuses_parts_that_params_lack():
    params = {"transformer": draw(0)["transformer"]}
    with pytest.raises(ValueError, match="trainable is 'adapter', but params have no such part"):
        optimizer.make(replace(CONFIG, trainable="adapter"), 4).init(params)
