"""The mathematics of SAC on tables and by hand, and what `make` refuses."""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from jaxrl_llm.agents import sac
from jaxrl_llm.nn.critics import TwinQ
from jaxrl_llm.nn.heads import TabularActor, TabularEmbedding
from jaxrl_llm.nn.policies import SquashedGaussian
from jaxrl_llm.types import Box, Discrete, TrainState, Transition
from tests.agents import probes

NUM_STATES, NUM_ACTIONS, NUM_ROWS = 3, 4, 7
CONFIG = sac.Config(
    actor_learning_rate=0.01,
    critic_learning_rate=0.02,
    temperature_learning_rate=0.03,
    gamma=0.9,
    tau=0.25,
    temperature=0.3,
    target_entropy_share=0.4,
)
LEARNER = sac.Learner(
    CONFIG,
    Discrete(num=NUM_ACTIONS),
    TabularActor(NUM_STATES, NUM_ACTIONS),
    TwinQ(TabularEmbedding(NUM_STATES, NUM_ACTIONS)),
)
RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(size=(NUM_STATES, NUM_ACTIONS)).astype(np.float32)
TWINS, TARGETS = RANDOM.normal(size=(2, 2, NUM_STATES, NUM_ACTIONS)).astype(np.float32)
ALLOWED = np.array([[1, 1, 0, 1], [0, 1, 0, 0], [1, 1, 1, 1]], bool)
STATE = np.array([0, 1, 2, 0, 2, 2, 0])
ACTION = np.array([0, 1, 2, 3, 3, 2, 0])
NEXT_STATE = np.array([1, 2, 0, 0, 1, 2, 1])
REWARD = RANDOM.normal(size=NUM_ROWS).astype(np.float32)
TERMINATED = np.array([0, 0, 1, 0, 0, 0, 1], bool)
TRUNCATED = np.array([0, 1, 0, 0, 1, 0, 0], bool)
LOG_TEMPERATURE = np.float32(0.5)


def critics(twins):
    first, second = ({"table": jnp.array(table)} for table in twins)
    return {"params": {"first": first, "second": second}}


PARAMS = sac.Parameters(
    actor={"params": {"policy": {"table": jnp.array(LOGITS)}}},
    critic=critics(TWINS),
    log_temperature=jnp.array(LOG_TEMPERATURE),
)
BATCH = Transition(
    observation=sac.Seen(observation=jnp.array(STATE), action_mask=jnp.array(ALLOWED[STATE])),
    action=jnp.array(ACTION),
    reward=jnp.array(REWARD),
    terminated=jnp.array(TERMINATED),
    truncated=jnp.array(TRUNCATED),
    next_observation=sac.Seen(
        observation=jnp.array(NEXT_STATE), action_mask=jnp.array(ALLOWED[NEXT_STATE])
    ),
    extras={},
)


def reference(logits, twins, log_temperature):
    """The losses of `BATCH` in NumPy: critic, actor, temperature and the mean entropy."""
    temperature = 0.3 * np.exp(0.5)

    def policy(logits):
        mass = np.where(ALLOWED, np.exp(logits), 0)
        pi = mass / mass.sum(axis=1, keepdims=True)
        return pi, -np.sum(np.where(pi > 0, pi * np.log(np.where(pi > 0, pi, 1)), 0), axis=1)

    pi, entropy = policy(LOGITS)
    value = np.sum(pi * TARGETS.min(axis=0), axis=1) + temperature * entropy
    target = REWARD + 0.9 * (1 - TERMINATED) * value[NEXT_STATE]
    critic = np.mean(np.sum(0.5 * (twins[:, STATE, ACTION] - target) ** 2, axis=0))
    new_pi, new_entropy = policy(logits)
    climbed = np.sum(new_pi * TWINS.min(axis=0), axis=1) + temperature * new_entropy
    wanted = 0.4 * np.log(ALLOWED.sum(axis=1))
    excess = np.mean((entropy - wanted)[STATE])
    return critic, -np.mean(climbed[STATE]), np.exp(log_temperature) * excess, entropy[STATE].mean()


@pytest.fixture(scope="module")
def evaluated():
    """Sum of the losses, what is logged, and the gradient."""
    noise = jnp.zeros((2, NUM_ROWS))
    loss = partial(sac.losses, LEARNER, CONFIG.hyperparameters())
    arguments = (PARAMS, critics(TARGETS), BATCH, noise)
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(*arguments)


def test_losses_are_those_of_a_loop_in_numpy(evaluated):
    (total, metrics), _ = evaluated
    critic, actor, temperature, entropy = reference(LOGITS, TWINS, LOG_TEMPERATURE)
    np.testing.assert_allclose(metrics["critic_loss"], critic, rtol=1e-5)
    np.testing.assert_allclose(metrics["actor_loss"], actor, rtol=1e-5)
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-5)
    np.testing.assert_allclose(metrics["temperature"], 0.3 * np.exp(0.5), rtol=1e-6)
    np.testing.assert_allclose(total, critic + actor + temperature, rtol=1e-5)


def test_losses_give_each_parameter_the_gradient_of_its_own_loss(evaluated):
    """Central differences in float64 of one loss while the others' parameters stay."""
    _, gradient = evaluated
    start: list[Any] = [LOGITS.astype(float), TWINS.astype(float), float(LOG_TEMPERATURE)]
    for part, found in (
        (0, gradient.actor["params"]["policy"]["table"]),
        (1, np.stack([gradient.critic["params"][name]["table"] for name in ("first", "second")])),
        (2, gradient.log_temperature),
    ):
        own = {0: 1, 1: 0, 2: 2}[part]
        value = np.asarray(start[part])
        expected = np.zeros(value.shape)
        for place in np.ndindex(value.shape):
            shift = np.zeros(value.shape)
            shift[place] = 1e-5
            ends = [[*start[:part], value + step, *start[part + 1 :]] for step in (shift, -shift)]
            high, low = (reference(*end)[own] for end in ends)
            expected[place] = (high - low) / 2e-5
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    table = np.array(gradient.actor["params"]["policy"]["table"])
    assert not table[~ALLOWED].any()


def test_update_moves_by_adam_at_each_rate_and_the_target_by_tau(evaluated):
    """Adam's first step is the sign of the gradient times the rate."""
    state = sac.State(
        train=TrainState(
            params=PARAMS,
            opt_state=optax.scale_by_adam().init(ravel_pytree(PARAMS)[0]),
            step=jnp.int32(5),
        ),
        target=dataclasses.replace(PARAMS, critic=critics(TARGETS)),
        replay=None,
        running=None,  # type: ignore[arg-type]
        hyperparameters=CONFIG.hyperparameters(),
    )
    batches = jax.tree.map(lambda leaf: leaf[None], BATCH)
    after, metrics = jax.jit(partial(sac.update, LEARNER))(jax.random.key(0), state, batches)
    (_, logged), gradient = evaluated
    rates = {"actor": 0.01, "critic": 0.02, "log_temperature": 0.03}
    for name, rate in rates.items():
        old, new, slope = (
            ravel_pytree(getattr(tree, name))[0] for tree in (PARAMS, after.train.params, gradient)
        )
        moved = np.where(np.abs(slope) > 1e-4, -rate * np.sign(slope), new - old)
        np.testing.assert_allclose(new - old, moved, atol=1e-5)
    assert after.train.step == 6
    for name, old in zip(("first", "second"), TARGETS, strict=True):
        online = after.train.params.critic["params"][name]["table"]
        found = after.target.critic["params"][name]["table"]
        np.testing.assert_allclose(found, 0.75 * old + 0.25 * online, atol=1e-6)
    for name, value in metrics.items():
        np.testing.assert_allclose(value.mean, logged[name], rtol=1e-5)


class Centred(nn.Module):
    """A standard normal latent, whatever is observed; doses in [0, 10]."""

    @nn.compact
    def __call__(self, observation, *, action_mask=None):
        zero = jnp.zeros((*observation.shape[:-1], 1))
        return SquashedGaussian(mean=zero, log_deviation=zero, low=0.0, high=10.0)


class Echo(nn.Module):
    """Twins whose value is the action itself, and less."""

    @nn.compact
    def __call__(self, observation, action):
        return jnp.stack([action[..., 0], action[..., 0] - 1])


def test_soft_values_of_a_dose_are_of_the_action_scaled_to_the_unit_box():
    """Densities of tanh(u) at u = 0, 1, 2; the critics see tanh(u), and the lesser one counts."""
    learner = sac.Learner(CONFIG, Box(shape=(1,), low=0.0, high=10.0), Centred(), Echo())
    seen = sac.Seen(observation=jnp.zeros((3, 1)), action_mask=None)
    latent = np.array([0.0, 1.0, 2.0])
    log_probability = np.array([-0.918939, -0.551377, -0.268933])
    evaluate = jax.jit(partial(sac.soft_values, learner))
    noise = jnp.array(latent, jnp.float32)[:, None]
    value, entropy = evaluate({}, {}, seen, noise, jnp.float32(0.5))
    np.testing.assert_allclose(entropy, -log_probability, atol=2e-6)
    np.testing.assert_allclose(value, np.tanh(latent) - 1 - 0.5 * log_probability, atol=2e-6)


INVALID = [
    ("num_environments", 0),
    ("num_steps", 0),
    ("num_updates", 0),
    ("batch_size", 0),
    ("warmup_steps", 0),
    ("buffer_size", 100),
    ("actor_learning_rate", 0.0),
    ("critic_learning_rate", -1.0),
    ("temperature_learning_rate", float("nan")),
    ("gamma", 1.01),
    ("tau", -0.1),
    ("temperature", 0.0),
    ("target_entropy", float("inf")),
    ("target_entropy_share", 1.5),
]


@pytest.mark.parametrize(("field", "value"), INVALID)
def test_make_refuses_a_setting_in_one_line_that_starts_with_its_name(field, value):
    config = dataclasses.replace(CONFIG, **{field: value})
    environment = probes.CONSTANT.environment
    with pytest.raises(ValueError, match=rf"\A{field} is {value}; it must [^\n]+\Z"):
        sac.make(config, environment, LEARNER.actor, LEARNER.critic)


def test_make_refuses_hybrid_actions():
    environment = probes.HYBRID_CONSTANT.environment
    with pytest.raises(ValueError, match=r"\Aenvironment\.action_space is Hybrid; [^\n]+\Z"):
        sac.make(CONFIG, environment, LEARNER.actor, LEARNER.critic)
