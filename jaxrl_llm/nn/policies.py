"""What a policy network returns: a law over actions, as a pytree of arrays with methods.

    network.apply(params, observation, action_mask=mask) -> (policy, value)

There is one for each kind of action space, and a learner sees only what they share:

- `sample(noise)` draws a LATENT, from noise made by `draw_noise` (for all steps of a rollout at
  once: a draw inside a scan costs more than most steps). What a learner stores is the latent.
- `action(latent)` is what the environment gets: the latent itself where it is discrete, squashed
  into its bounds where it is continuous.
- `log_probability(latent)`, of that action, and `entropy()`, both in nats.
- `mode()`, the latent of the likeliest choice, at the median of its amount.
- `distribution()`, the same law as distrax has it, whose events are actions.

Every method accepts any leading dimensions, written `[...]`, without `vmap`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxrl_llm.kernels import policy_gradient, squashed_gaussian
from jaxrl_llm.types import Array, Box, Discrete, Hybrid, HybridAction, Key, PyTree, Space

if TYPE_CHECKING:
    import distrax
    import flax.linen as nn

Bound = float | tuple[float, ...]


@struct.dataclass(kw_only=True)
class Categorical:
    """One of `A` actions; the latent is the action, `[...]` int32, and the noise uniform `[...]`.

    Attributes:
      logits: `[..., A]`, masked already where actions are not allowed.
    """

    logits: Array

    def sample(self, noise: Array) -> Array:
        return _each(policy_gradient.sample_action, noise.ndim)(self.logits, noise)

    def action(self, latent: Array) -> Array:
        return latent

    def log_probability(self, latent: Array) -> Array:
        return _each(policy_gradient.log_probability, latent.ndim)(self.logits, latent)

    def entropy(self) -> Array:
        return _each(policy_gradient.entropy, self.logits.ndim - 1)(self.logits)

    def mode(self) -> Array:
        return jnp.argmax(self.logits, axis=-1).astype(jnp.int32)

    def distribution(self) -> distrax.Categorical:
        import distrax

        return distrax.Categorical(logits=self.logits)


@struct.dataclass(kw_only=True)
class SquashedGaussian:
    """A vector in a box; the latent is u before the squashing, `[..., D]`, the noise normal.

    Attributes:
      mean: of u, `[..., D]`.
      log_deviation: of u, `[..., D]`.
      low: of the action, a number or one a dimension.
      high: of the action, likewise.
    """

    mean: Array
    log_deviation: Array
    low: Bound = struct.field(pytree_node=False)
    high: Bound = struct.field(pytree_node=False)

    def sample(self, noise: Array) -> Array:
        return self.mean + jnp.exp(self.log_deviation) * noise

    def action(self, latent: Array) -> Array:
        return squashed_gaussian.squash(latent, *_bounds(self, latent))

    def log_probability(self, latent: Array) -> Array:
        bounds = _bounds(self, latent)
        density = _each(squashed_gaussian.log_probability, latent.ndim - 1)
        return density(latent, self.mean, self.log_deviation, *bounds)

    def entropy(self) -> Array:
        bounds = _bounds(self, self.mean)
        return _each(squashed_gaussian.entropy, self.mean.ndim - 1)(
            self.mean, self.log_deviation, *bounds
        )

    def mode(self) -> Array:
        return self.mean

    def distribution(self) -> distrax.Transformed:
        return _distribution(self.mean, self.log_deviation, *_bounds(self, self.mean))


@struct.dataclass(kw_only=True)
class HybridPolicy:
    """A choice, then an amount given the choice; the latent is `HybridAction(choice, u)`.

    The noise is a pair: uniform `[...]` and normal `[..., D]`. Where a choice has no amount, u is
    drawn all the same, and counts neither in the log-probability nor in the entropy.

    Attributes:
      logits: of the choice, `[..., A]`, masked already.
      mean: of u given each choice, `[..., A, D]`.
      log_deviation: of u given each choice, `[..., A, D]`.
      low: of the amount, a number or one a dimension.
      high: of the amount, likewise.
      has_amount: `[A]`.
    """

    logits: Array
    mean: Array
    log_deviation: Array
    low: Bound = struct.field(pytree_node=False)
    high: Bound = struct.field(pytree_node=False)
    has_amount: tuple[bool, ...] = struct.field(pytree_node=False)

    def sample(self, noise: tuple[Array, Array]) -> HybridAction:
        uniform, normal = noise
        choice = self._choice().sample(uniform)
        return HybridAction(choice=choice, amount=self._amount(choice).sample(normal))

    def action(self, latent: HybridAction) -> HybridAction:
        squashed = squashed_gaussian.squash(latent.amount, *_bounds(self, latent.amount))
        return HybridAction(choice=latent.choice, amount=squashed)

    def log_probability(self, latent: HybridAction) -> Array:
        density = self._amount(latent.choice).log_probability(latent.amount)
        counted = jnp.asarray(self.has_amount)[latent.choice]
        return self._choice().log_probability(latent.choice) + jnp.where(counted, density, 0)

    def entropy(self) -> Array:
        probability = jax.nn.softmax(self.logits)
        given_choice = self._gaussian(self.mean, self.log_deviation).entropy()
        counted = jnp.broadcast_to(jnp.asarray(self.has_amount), probability.shape)
        amount = jnp.sum(jnp.where(counted, probability * given_choice, 0), axis=-1)
        return self._choice().entropy() + amount

    def mode(self) -> HybridAction:
        choice = self._choice().mode()
        return HybridAction(choice=choice, amount=self._amount(choice).mode())

    def distribution(self) -> tuple[distrax.Categorical, distrax.Transformed]:
        """Of the choice, and of the amount given each choice, `[..., A]` of them."""
        bounds = _bounds(self, self.mean)
        return (
            self._choice().distribution(),
            _distribution(self.mean, self.log_deviation, *bounds),
        )

    def _choice(self) -> Categorical:
        return Categorical(logits=self.logits)

    def _gaussian(self, mean: Array, log_deviation: Array) -> SquashedGaussian:
        return SquashedGaussian(
            mean=mean, log_deviation=log_deviation, low=self.low, high=self.high
        )

    def _amount(self, choice: Array) -> SquashedGaussian:
        """Of the amount given `choice` `[...]`."""
        of_choice = _each(lambda rows, index: rows[index], choice.ndim)
        return self._gaussian(of_choice(self.mean, choice), of_choice(self.log_deviation, choice))


ActionPolicy = Categorical | SquashedGaussian | HybridPolicy


def forward(
    network: nn.Module, params: PyTree, observation: PyTree, action_mask: Array | None
) -> tuple[Any, Array]:
    """The policy, one of those above and masked, and the value `[...]` that a network returns.

    Args:
      network: a Flax module `(observation, *, action_mask) -> (policy, value)`.
      params: its parameters.
      observation: leaves `[..., features]`.
      action_mask: `[..., A]` bool, True where the action is allowed; None allows all.
    """
    outputs: Any = network.apply(params, observation, action_mask=action_mask)
    return outputs


def act(network: nn.Module, params: PyTree) -> Callable[..., tuple[PyTree, dict[str, PyTree]]]:
    """`(noise, observation, action_mask) -> (action, {"latent": latent})` at `params`.

    It is what a rollout follows; the noise is that of `draw_noise`.
    """

    def policy(
        noise: PyTree, observation: PyTree, action_mask: Array | None
    ) -> tuple[PyTree, dict[str, PyTree]]:
        policy, _ = forward(network, params, observation, action_mask)
        latent = policy.sample(noise)
        return policy.action(latent), {"latent": latent}

    return policy


def draw_noise(space: Space, key: Key, shape: tuple[int, ...]) -> PyTree:
    """What `sample` of a policy over `space` draws from, leading dimensions `shape`."""
    if isinstance(space, Discrete):
        return jax.random.uniform(key, shape)
    if isinstance(space, Box):
        return jax.random.normal(key, (*shape, *space.shape))
    choice_key, amount_key = jax.random.split(key)
    uniform = jax.random.uniform(choice_key, shape)
    return uniform, draw_noise(space.amount, amount_key, shape)


def check_action_space(name: str, space: Space) -> None:
    """Raises ValueError unless a policy over `space` exists: bounded vectors, or integers."""
    if isinstance(space, Discrete):
        return
    if isinstance(space, Hybrid):
        check_action_space(f"{name}.amount", space.amount)
        if len(space.has_amount) != space.num:
            raise ValueError(
                f"{name}.has_amount has {len(space.has_amount)} entries; give one to each of "
                f"{space.num} choices"
            )
        return
    if len(space.shape) != 1:
        raise ValueError(f"{name} has shape {space.shape}; flatten it to one dimension")
    low, high = np.broadcast_to(space.low, space.shape), np.broadcast_to(space.high, space.shape)
    for place in range(space.shape[0]):
        if not (np.isfinite([low[place], high[place]]).all() and low[place] < high[place]):
            raise ValueError(
                f"{name} is [{low[place]}, {high[place]}] in dimension {place}; give finite "
                "bounds, the low one below the high one"
            )


def _each(function: Callable[..., Any], num_leading: int) -> Callable[..., Any]:
    """`function` of one example over `num_leading` leading dimensions."""
    for _ in range(num_leading):
        function = jax.vmap(function)
    return function


def _bounds(policy: SquashedGaussian | HybridPolicy, like: Array) -> tuple[Array, Array]:
    """The bounds of each element of `like`, `[..., D]`."""

    def full(bound: Bound) -> Array:
        return jnp.broadcast_to(jnp.asarray(bound, like.dtype), like.shape)

    return full(policy.low), full(policy.high)


def _distribution(mean: Array, log_deviation: Array, low: Array, high: Array) -> Any:
    import distrax

    half = 0.5 * (high - low)
    squash = distrax.Chain([distrax.ScalarAffine(shift=low + half, scale=half), distrax.Tanh()])
    gaussian = distrax.MultivariateNormalDiag(mean, jnp.exp(log_deviation))
    return distrax.Transformed(gaussian, distrax.Block(squash, 1))
