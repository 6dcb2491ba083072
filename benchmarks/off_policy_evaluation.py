"""Off-policy evaluation of 10,000 ICU-Sepsis episodes with 1,000 bootstrap resamples."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Case, Peer
from jaxrl_llm.data import trajectories
from jaxrl_llm.envs import icu_sepsis
from jaxrl_llm.kernels import bellman, concentration
from jaxrl_llm.kernels import off_policy_evaluation as ope
from jaxrl_llm.training import log_evaluation

NUM_EPISODES, NUM_RESAMPLES, NUM_FOLDS = 10_000, 1_000, 5


def cases() -> Iterable[Case]:
    """The whole evaluation of one policy, and its bootstrap beside a loop in NumPy."""
    plan = _plan(NUM_EPISODES)
    yield Case(
        name=f"icu-sepsis-{NUM_EPISODES}x{NUM_RESAMPLES}-all-estimators",
        function=partial(
            log_evaluation.evaluate_policies, plan, gamma=1.0, num_resamples=NUM_RESAMPLES
        ),
        arguments=lambda: (jax.random.key(1),),
        items=NUM_RESAMPLES,
        unit="resamples",
    )
    ((_, target),) = plan.targets.items()
    fold = jnp.asarray(trajectories.folds(plan.log, NUM_FOLDS))
    mask = plan.mdp.action_mask
    evidence, _ = log_evaluation.gather(plan.log, fold, target, mask, 1.0, num_folds=NUM_FOLDS)
    yield Case(
        name=f"icu-sepsis-{NUM_EPISODES}x{NUM_RESAMPLES}-wdr",
        function=partial(_bootstrap_wdr, evidence),
        arguments=lambda: (jax.random.key(2),),
        items=NUM_RESAMPLES,
        unit="resamples",
        peer=lambda: Peer("NumPy, gathering", partial(_numpy_wdr, jax.device_get(evidence))),
        agree=_same_spread,
    )


def _plan(num_episodes: int) -> log_evaluation.Plan:
    mdp = icu_sepsis.mdp()
    optimum = bellman.inexact_policy_iteration(bellman.successor_form(mdp))
    random, best = bellman.uniform_policy(mdp), jax.nn.one_hot(optimum.policy, mdp.num_actions)
    behaviour = 0.9 * icu_sepsis.expert_policy() + 0.1 * random
    return log_evaluation.Plan(
        log=log_evaluation.sample_log(
            icu_sepsis.make(), behaviour, jax.random.key(0), num_episodes=num_episodes
        ),
        targets={"9/10 optimal": 0.9 * best + 0.1 * random},
        mdp=mdp,
        solution=optimum,
        state_names=icu_sepsis.state_names,
        action_names=icu_sepsis.action_names,
    )


@jax.jit
def _bootstrap_wdr(evidence: ope.Evidence, key: jax.Array) -> jax.Array:
    num = evidence.mask.shape[1]
    return concentration.bootstrap(
        partial(ope.weighted_doubly_robust, evidence),
        key,
        jnp.arange(num),
        num_units=num,
        num_resamples=NUM_RESAMPLES,
    ).resampled


def _numpy_wdr(evidence: ope.Evidence) -> np.ndarray:
    """Every resample gathers its trajectories, as the textbook has it."""
    random = np.random.default_rng(0)
    mask = evidence.mask
    behaviour = np.where(mask, evidence.behaviour, 1)
    ratio = np.where(mask, evidence.target / behaviour, 1).cumprod(axis=0)
    error = evidence.reward + evidence.discount * evidence.next_value - evidence.action_value
    error, start = np.where(mask, error, 0), evidence.value[0]
    estimates = np.empty(NUM_RESAMPLES)
    for resample in range(NUM_RESAMPLES):
        drawn = random.integers(mask.shape[1], size=mask.shape[1])
        weight = ratio[:, drawn]
        correction = (weight * error[:, drawn]).sum(axis=1) / weight.sum(axis=1)
        estimates[resample] = start[drawn].mean() + correction.sum()
    return estimates


def _same_spread(own: jax.Array, peer: np.ndarray) -> None:
    """Other random numbers: the same mean within its error, the same deviation within 15 %."""
    np.testing.assert_allclose(np.mean(own), peer.mean(), atol=0.2 * peer.std())
    np.testing.assert_allclose(np.std(own), peer.std(), rtol=0.15)
