"""The policy gradients of the library for `estimator_bias`: what trains, and what it should give.

Each has the loss by which an algorithm of `lm` learns, and its definition in NumPy: the credit that
the log-probability of each token gets. Losses that are means over tokens are multiplied by the mean
length of a response, to have the size of J. A minibatch is one group, where a mean over its tokens
depends most on their number: with responses of different lengths that is a bias of its own.

Source: the papers named by `lm.reinforce`, `lm.rloo`, `lm.ppo` and `lm.grpo`; Schulman (2020),
"Approximating KL Divergence", for k1, k2 and k3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.envs import token_mdp
from jaxrl_llm.envs.token_mdp import TokenMDP
from jaxrl_llm.kernels import policy_gradient
from jaxrl_llm.lm import exact, grpo, ppo, reinforce, rloo
from jaxrl_llm.lm.estimator_bias import Bias, Estimator, Group, Host, bias
from jaxrl_llm.lm.likelihood import kl_to_reference, response_likelihood
from jaxrl_llm.nn.gpt2 import GPT2
from jaxrl_llm.types import Array, Key, Mean, PyTree, Responses

# Those that are a mean over tokens, and RLOO, which is none.
OF_TOKENS = (
    "rloo, K = 2",
    "ppo, lambda 1",
    "grpo, k2 in the loss, K = 2",
    "dapo, k2 in the loss, K = 2",
    "dr_grpo, k2 in the loss, K = 2",
)


def make(mdp: TokenMDP, logits: Array) -> dict[str, Estimator]:
    """Each estimator by name, charging the beta of `mdp`, for the policy that has `logits`."""
    length = float(_mean_length(mdp, logits))
    families = (_reinforce(mdp), _rloo(mdp), _ppo(mdp, length), _grpo(mdp, length))
    return {name: found for family in (*families, _kl()) for name, found in family}


def biases(
    mdp: TokenMDP,
    logits: Array,
    key: Key,
    num_minibatches: int,
    names: tuple[str, ...] | None = None,
) -> dict[str, Bias]:
    """What each estimator misses; arguments as of `estimator_bias.bias`, `names` None for all."""
    made = make(mdp, logits)
    keys = dict(zip(made, jax.random.split(key, len(made)), strict=True))
    return {
        name: bias(made[name], mdp, logits, keys[name], num_minibatches=num_minibatches)
        for name in (made if names is None else names)
    }


@jax.jit
def _mean_length(mdp: TokenMDP, logits: Array) -> Array:
    policy = token_mdp.tabular_log_probability(mdp, logits)
    lengths = jnp.sum(mdp.mask, axis=-1, dtype=policy.dtype)
    return token_mdp.expectation(mdp, policy, jnp.broadcast_to(lengths, policy.shape))


Family = Iterator[tuple[str, Estimator]]


def _reinforce(mdp: TokenMDP) -> Family:
    beta, constant = float(mdp.kl_coefficient), 0.7
    # With a moving average, the first response of two is the iteration before.
    baselines: tuple[tuple[reinforce.Baseline, int], ...] = (
        ("none", 1), ("constant", 1), ("moving_average", 2),
    )  # fmt: skip
    for baseline, size in baselines:
        config = reinforce.Config(
            rollout=exact.rollout(mdp, num_prompts=1, num_samples=size),
            kl_coefficient=beta,
            baseline=baseline,
            constant_baseline=constant,
        )
        yield (
            f"reinforce, baseline {baseline.replace('_', ' ')}",
            Estimator(
                num_samples=size,
                loss=partial(_reinforce_loss, config),
                credit=partial(
                    _reinforce_credit, beta, constant if baseline == "constant" else 0.0
                ),
            ),
        )


def _rloo(mdp: TokenMDP) -> Family:
    beta = float(mdp.kl_coefficient)
    for size in (2, 4):
        rollout = exact.rollout(mdp, num_prompts=1, num_samples=size)
        config = rloo.Config(rollout=rollout, kl_coefficient=beta)
        yield (
            f"rloo, K = {size}",
            Estimator(
                num_samples=size,
                loss=partial(_rloo_loss, config),
                credit=partial(_rloo_credit, beta),
            ),
        )


def _ppo(mdp: TokenMDP, length: float) -> Family:
    beta = float(mdp.kl_coefficient)
    for name, lambda_, whitens in (
        ("ppo, lambda 1", 1.0, False),
        ("ppo, lambda 0.8 without values", 0.8, False),
        ("ppo, whitened advantages", 1.0, True),
    ):
        config = ppo.Config(
            rollout=exact.rollout(mdp, num_prompts=1, num_samples=2),
            kl_coefficient=beta,
            gae_lambda=lambda_,
            whiten_advantages=whitens,
        )
        yield (
            name,
            Estimator(
                num_samples=2,
                loss=partial(_ppo_loss, config, length),
                credit=partial(_ppo_credit, beta, lambda_, whitens, length),
            ),
        )


def _grpo(mdp: TokenMDP, length: float) -> Family:
    beta = float(mdp.kl_coefficient)
    variants: tuple[tuple[grpo.LossType, grpo.KLEstimator, int], ...] = (
        ("grpo", "k3", 2), ("grpo", "k3", 4), ("grpo", "k2", 2), ("dapo", "k2", 2),
        ("dr_grpo", "k2", 2), ("dr_grpo", "exact", 4),
    )  # fmt: skip
    for loss_type, kl, size in variants:
        config = grpo.Config(
            rollout=exact.rollout(mdp, num_prompts=1, num_samples=size),
            loss_type=loss_type,
            kl_coefficient=beta,
            kl_estimator=kl,
        )
        # Dr. GRPO divides by the length that was allowed, not by that of the responses.
        scale = float(mdp.length) if loss_type == "dr_grpo" else length
        yield (
            f"{loss_type}, {kl} in the loss, K = {size}",
            Estimator(
                num_samples=size,
                loss=partial(_grpo_loss, config, scale),
                credit=partial(_grpo_credit, beta, loss_type, kl, length),
            ),
        )


def _kl() -> Family:
    k1, k2, k3 = policy_gradient.kl_k1, policy_gradient.kl_k2, policy_gradient.kl_k3
    for name, loss, slope in (
        ("k1 of tokens", partial(_kernel_kl, k1, False), np.ones_like),
        ("k2 of tokens", partial(_ppo_kl, "k2"), np.positive),
        ("k2 of responses", partial(_kernel_kl, k2, True), _total),
        ("k3 of tokens", partial(_ppo_kl, "k3"), _k3_slope),
        ("k3 of responses", partial(_kernel_kl, k3, True), lambda ratio: _k3_slope(_total(ratio))),
        ("exact KL of states", partial(_ppo_kl, "exact"), np.positive),
    ):
        yield (
            f"{name} as a loss",
            Estimator(num_samples=1, loss=loss, credit=partial(_kl_credit, slope), target="kl"),
        )


# What trains: losses of the library, of responses `[1, K]`.


def _reinforce_loss(
    config: reinforce.Config, model: GPT2, _: PyTree, params: PyTree, responses: Responses
) -> Array:
    average = Mean(total=jnp.zeros(()), weight=jnp.zeros(()))
    if config.baseline == "moving_average":
        before, responses = (
            jax.tree.map(lambda leaf, k=k: leaf[:, k : k + 1], responses) for k in (0, 1)
        )
        average = reinforce.next_average(config, average, reinforce.returns_to_go(config, before))
    batch = reinforce.Batch(
        responses=responses,
        return_=reinforce.returns_to_go(config, responses),
        baseline=reinforce.baseline(config, responses, average),
        weight=responses.response_mask,
    )
    return reinforce.loss(config, model, params, reinforce.weigh(batch))[0]


def _rloo_loss(
    config: rloo.Config, model: GPT2, _: PyTree, params: PyTree, responses: Responses
) -> Array:
    advantage = rloo.advantage(config, responses)
    batch = rloo.Batch(responses=responses, advantage=advantage, weight=advantage)
    return rloo.loss(config, model, params, rloo.weigh(batch))[0]


def _ppo_loss(
    config: ppo.Config,
    scale: float,
    model: GPT2,
    reference: PyTree,
    params: PyTree,
    responses: Responses,
) -> Array:
    price = jnp.float32(config.kl_coefficient)
    batch = ppo.weigh(ppo.as_batch(config, responses, price, None))
    return scale * ppo.loss(config, model, reference, price, params, batch)[0]


def _grpo_loss(
    config: grpo.Config,
    scale: float,
    model: GPT2,
    reference: PyTree,
    params: PyTree,
    responses: Responses,
) -> Array:
    batch = grpo.weigh(config, grpo.as_batch(config, model, responses))
    return scale * grpo.loss(config, model, reference, params, batch)[0]


def _ppo_kl(
    how: grpo.KLEstimator, model: GPT2, reference: PyTree, params: PyTree, responses: Responses
) -> Array:
    new = response_likelihood(model, params, responses).log_probability
    return jnp.sum(kl_to_reference(how, model, params, reference, responses, new))


def _kernel_kl(
    kernel: Callable[[Array, Array], Array],
    of_responses: bool,
    model: GPT2,
    _: PyTree,
    params: PyTree,
    responses: Responses,
) -> Array:
    """Of tokens, or of whole responses: the trainers do not offer these."""
    new = response_likelihood(model, params, responses).log_probability
    reference = responses.reference_log_probability
    assert reference is not None
    if of_responses:
        new, reference = jnp.sum(new, axis=-1), jnp.sum(reference, axis=-1)
    return jnp.sum(kernel(new, reference))


# What should come of it: definitions, without JAX. Masked tokens get no credit, whatever is here.


def _total(values: Host) -> Host:
    """The sum over the tokens of each response, `[..., K, 1]`."""
    return values.sum(axis=-1, keepdims=True)


def _to_go(values: Host, decay: float = 1.0) -> Host:
    """sum_{s >= t} decay^(s - t) values_s."""
    place = np.arange(values.shape[-1])
    ahead = place[:, None] - place[None]
    return values @ np.where(ahead >= 0, decay ** np.maximum(ahead, 0.0), 0)


def _rewards(beta: float, group: Group) -> Host:
    """-beta k1 at each token, and the score at the last one."""
    is_last = group.mask * (group.mask.cumsum(axis=-1) == group.length)
    return group.score[..., None] * is_last - beta * group.log_ratio


def _reinforce_credit(beta: float, constant: float, group: Group) -> Host:
    worth = _to_go(_rewards(beta, group))
    if worth.shape[-2] == 1:
        return worth - constant
    earlier, later = worth[..., :1, :1], worth[..., 1:, :]
    return np.concatenate([np.zeros_like(later), later - earlier], axis=-2)


def _rloo_credit(beta: float, group: Group) -> Host:
    worth = _total(_rewards(beta, group))
    size = worth.shape[-2]
    others = (worth.sum(axis=-2, keepdims=True) - worth) / (size - 1)
    return (worth - others) / size


def _ppo_credit(beta: float, lambda_: float, whitens: bool, length: float, group: Group) -> Host:
    advantage = _to_go(_rewards(beta, group), lambda_)
    number = group.length.sum(axis=-2, keepdims=True)
    if whitens:

        def mean(values: Host) -> Host:
            return (values * group.mask).sum(axis=(-2, -1), keepdims=True) / number

        centred = advantage - mean(advantage)
        advantage = centred / (np.sqrt(mean(centred**2)) + 1e-8)
    return length * advantage / number


def _grpo_credit(beta: float, loss_type: str, kl: str, length: float, group: Group) -> Host:
    score = group.score[..., None]
    size = score.shape[-2]
    advantage = score - score.mean(axis=-2, keepdims=True)
    if loss_type != "dr_grpo":
        advantage = advantage / (score.std(axis=-2, ddof=1, keepdims=True) + 1e-4)
    weight = {
        "grpo": length / (size * group.length),
        "dapo": length / group.length.sum(axis=-2, keepdims=True),
        "dr_grpo": np.full_like(score, 1 / size),
    }[loss_type]
    # Over what follows a state, the exact KL is what k2 is on average.
    slope = _k3_slope(group.log_ratio) if kl == "k3" else group.log_ratio
    return weight * (advantage - beta * slope)


def _k3_slope(log_ratio: Host) -> Host:
    return 1 - np.exp(-log_ratio)


def _kl_credit(slope: Callable[[Host], Host], group: Group) -> Host:
    """Down a function of log(pi / ref) whose derivative is `slope`."""
    return -slope(group.log_ratio)
