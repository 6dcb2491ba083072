"""Is a policy gradient right? The bias of an estimator on a token MDP, predicted and measured.

    found = bias(estimators.make(mdp)["rloo, K = 2"], mdp, logits, key, num_minibatches=10_000)
    abs(found.z) < 3

The policy is a table of logits. A minibatch is one prompt with a group of K sampled responses, and
an estimate is minus the gradient of the library's own loss of it. What to expect of it is found
another way: by its definition in NumPy, the credit that each token's log-probability gets, summed
over all groups that could be drawn.

Estimators of "objective" aim at the gradient of J = E[r] - beta KL(pi || ref), those of "kl" at
that of -KL(pi || ref), of whole responses. A bias is along the gradient aimed at, as a share of its
length: -0.5 says that half of it is missing, 0 that nothing is.

Shapes use `K` responses a group, `T` tokens and, as `envs.token_mdp`, `Y` responses in all; logits
are `[prompts, prefixes, tokens]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxrl_llm import checks
from jaxrl_llm.envs import token_mdp
from jaxrl_llm.envs.token_mdp import TokenMDP
from jaxrl_llm.nn.gpt2 import GPT2
from jaxrl_llm.types import Array, Key, PyTree, Responses

Host = NDArray[np.float64]
Target = Literal["objective", "kl"]


class Group(NamedTuple):
    """Groups of responses, as definitions read them: `[..., K]` scores, `[..., K, T]` the others.

    Attributes:
      score: of whole responses.
      log_ratio: log pi - log ref of each token, 0 after the end.
      mask: 1 on the tokens of the response, 0 after its end.
    """

    score: Host
    log_ratio: Host
    mask: Host

    @property
    def length(self) -> Host:
        """`[..., K, 1]`."""
        return self.mask.sum(axis=-1, keepdims=True)


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """A way to estimate a gradient from a group of responses.

    Attributes:
      num_samples: K.
      loss: `(model, reference, params, responses [1, K]) -> []`, by the code that trains.
      credit: what each token's log-probability is multiplied by, `Group -> [..., K, T]`.
      target: what it should be the gradient of.
    """

    num_samples: int
    loss: Callable[[GPT2, PyTree, PyTree, Responses], Array]
    credit: Callable[[Group], Host]
    target: Target = "objective"


class Bias(NamedTuple):
    """The expectation of an estimate minus its target, along the target, as a share of its length.

    Attributes:
      predicted: from the definition, over all groups.
      measured: over sampled ones.
      standard_error: of `measured`.
      largest_z: the largest |z| among the coordinates of the gradient.
    """

    predicted: float
    measured: float
    standard_error: float
    largest_z: float

    @property
    def z(self) -> float:
        """(measured - predicted) / standard error."""
        return (self.measured - self.predicted) / self.standard_error

    def cells(self) -> tuple[str, str, str, str]:
        """Predicted, measured and standard error in per cent, and z, for a table."""
        # Adding 0 turns a negative zero into a positive one.
        predicted, measured = (
            f"{round(100 * share, 2) + 0:+.2f}" for share in (self.predicted, self.measured)
        )
        return predicted, measured, f"{100 * self.standard_error:.2f}", f"{self.z:+.2f}"


class Problem(NamedTuple):
    """A token MDP, and a policy that is not its reference, as a table of logits."""

    mdp: TokenMDP
    logits: Array


@dataclass(frozen=True)
class TableModel:
    """What losses ask of a GPT-2, of a table of logits: a hidden state is the logits themselves."""

    mdp: TokenMDP
    value_width: int = 1

    def params(self, logits: Array) -> PyTree:
        """Parameters of the policy that has `logits`; its value is 0 everywhere."""
        identity = jnp.eye(self.mdp.vocab_size)
        return {"table": logits, "value_head": {}, "transformer": {"wte": {"weight": identity}}}

    def apply(self, variables: PyTree, inputs: Array, *, method: str, **options: Any) -> Array:
        """As of a flax module: `method` is states_after, logits or value."""
        if method == "logits":
            return inputs
        if method == "value":
            return jnp.zeros(inputs.shape[:-1])
        rows, mask = (
            leaf.reshape(-1, leaf.shape[-1]) for leaf in (inputs, options["attention_mask"])
        )
        # The last token of a response predicts nothing, and is not among these.
        written = jnp.pad(rows[:, 1:], ((0, 0), (0, 1)))
        real = jnp.concatenate([mask[:, 1:], mask[:, -1:]], axis=1)
        prefix = token_mdp.prefix_index(self.mdp, written, real)
        prefix = jnp.minimum(prefix, self.mdp.num_prefixes - 1)  # what follows an end has none
        return variables["params"]["table"][rows[:, :1], prefix]


def random_problem(seed: int, *, kl_coefficient: float = 0.5, **size: Any) -> Problem:
    """Random rewards, a random reference and a random policy, of 3 tokens and 2 prompts.

    Args:
      seed: of all three.
      kl_coefficient: beta.
      **size: `length`, and `end_token` where responses may be shorter, as in `token_mdp.make`.
    """
    options: Any = {"vocab_size": 3, "num_prompts": 2, "kl_coefficient": kl_coefficient, **size}
    shape = (2, token_mdp.make(**options).num_prefixes, 3)
    reference, policy = np.random.default_rng(seed).normal(size=(2, *shape))
    mdp = token_mdp.make(**options, seed=seed, reference_logits=0.7 * reference)
    return Problem(mdp, jnp.asarray(policy, float))


def bias(
    estimator: Estimator, mdp: TokenMDP, logits: Array, key: Key, *, num_minibatches: int
) -> Bias:
    """What `estimator` misses of its target, predicted and measured.

    Args:
      estimator: of `estimators.make`.
      mdp: the problem.
      logits: of the policy, `[prompts, prefixes, tokens]`.
      key: of the minibatches.
      num_minibatches: independent estimates, at least 2.

    Raises:
      ValueError: for a `num_minibatches` out of range.
    """
    checks.at_least("num_minibatches", num_minibatches, 2)
    wanted = np.asarray(target_gradient(mdp, logits, estimator.target), np.float64).ravel()
    expected = np.asarray(expected_gradient(estimator, mdp, logits), np.float64).ravel()
    sampled = jax.jit(
        partial(sampled_gradients, estimator, num_minibatches=num_minibatches),
        # It runs once, for less time than it would take to compile it well.
        compiler_options={"xla_backend_optimization_level": 0},
    )
    each = np.asarray(sampled(mdp, logits, key), np.float64).reshape(num_minibatches, -1)
    along = wanted / (wanted @ wanted)
    error = each.std(axis=0, ddof=1) / np.sqrt(num_minibatches)
    # Rounding alone parts two numbers that do not vary.
    z = (each.mean(axis=0) - expected) / np.maximum(error, 1e-6)
    projected = each @ along
    return Bias(
        predicted=float(expected @ along - 1),
        measured=float(projected.mean() - 1),
        standard_error=float(projected.std(ddof=1) / np.sqrt(num_minibatches)),
        largest_z=float(np.abs(z).max()),
    )


@partial(jax.jit, static_argnames="target")
def target_gradient(mdp: TokenMDP, logits: Array, target: Target) -> Array:
    """The exact gradient of J, or of -KL(pi || ref), like `logits`."""
    policy = partial(token_mdp.tabular_log_probability, mdp)
    if target == "objective":
        return token_mdp.exact_gradient(mdp, policy, logits)
    return jax.grad(lambda table: -token_mdp.exact_kl(mdp, policy(table)))(logits)


def expected_gradient(estimator: Estimator, mdp: TokenMDP, logits: Array) -> Array:
    """What the estimate is on average, by its definition and the probability of every group."""
    size = estimator.num_samples
    drawn, log_ratio = (np.asarray(each, np.float64) for each in _tokens_and_ratio(mdp, logits))
    groups = np.indices((len(mdp.responses),) * size).reshape(size, -1).T
    group_law = np.exp(drawn.sum(axis=-1))[:, groups].prod(axis=-1)
    group_law *= np.asarray(mdp.prompt_probability, np.float64)[:, None]
    mask = np.broadcast_to(np.asarray(mdp.mask, np.float64), drawn.shape)
    reward = np.asarray(mdp.reward, np.float64)
    group = Group(reward[:, groups], log_ratio[:, groups], mask[:, groups])
    credit = group_law[..., None, None] * estimator.credit(group) * group.mask
    total = np.zeros(drawn.shape)
    everywhere: Any = (slice(None), groups)
    np.add.at(total, everywhere, credit)
    return _credited_gradient(mdp, logits, jnp.asarray(total, logits.dtype))


def sampled_gradients(
    estimator: Estimator, mdp: TokenMDP, logits: Array, key: Key, *, num_minibatches: int
) -> Array:
    """Independent estimates, `[num_minibatches, *logits.shape]`."""
    model = TableModel(mdp)
    reference = model.params(reference_logits(mdp))
    minibatches = draw(mdp, logits, key, num_minibatches, estimator.num_samples)

    def estimate(responses: Responses) -> Array:
        def loss(logits: Array) -> Array:
            params = model.params(logits)
            return estimator.loss(cast(GPT2, model), reference, params, responses)

        return -jax.grad(loss)(logits)

    return jax.vmap(estimate)(minibatches)


def draw(
    mdp: TokenMDP, logits: Array, key: Key, num_minibatches: int, num_samples: int
) -> Responses:
    """As many independent minibatches of one prompt, `[num_minibatches, 1, num_samples, ...]`."""
    prompt_key, response_key = jax.random.split(key)
    log_probability = token_mdp.tabular_token_log_probability(mdp, logits)
    shape = (num_minibatches, 1, num_samples)
    prompt_law = jnp.log(mdp.prompt_probability)
    prompt = jax.random.categorical(prompt_key, prompt_law, shape=(num_minibatches, 1, 1))
    law = jnp.sum(log_probability, axis=-1)[prompt]
    response = jax.random.categorical(response_key, law, shape=shape)
    every = replace(
        token_mdp.all_responses(mdp),
        log_probability=log_probability,
        reference_log_probability=_reference_tokens(mdp),
        value=jnp.zeros_like(log_probability),
    )
    return jax.tree.map(lambda leaf: leaf[prompt, response], every)


def reference_logits(mdp: TokenMDP) -> Array:
    """Of the reference policy, a table like the policy's."""
    return token_mdp.conditional_log_probability(mdp, mdp.reference_log_probability)


@jax.jit
def _tokens_and_ratio(mdp: TokenMDP, logits: Array) -> tuple[Array, Array]:
    """log pi and log(pi / ref) of every token of every response."""
    drawn = token_mdp.tabular_token_log_probability(mdp, logits)
    return drawn, drawn - _reference_tokens(mdp)


@jax.jit
@partial(jax.grad, argnums=1)
def _credited_gradient(mdp: TokenMDP, logits: Array, credit: Array) -> Array:
    """The gradient of the sum of credit log pi over every token of every response."""
    return jnp.sum(credit * token_mdp.tabular_token_log_probability(mdp, logits))


def _reference_tokens(mdp: TokenMDP) -> Array:
    return token_mdp.tabular_token_log_probability(mdp, reference_logits(mdp))
