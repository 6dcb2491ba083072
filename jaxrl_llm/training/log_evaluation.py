"""What policies are worth by a log of clinicians: every estimator, its interval, and a warning.

The policy that acted is estimated from the log, and the model of the doubly robust estimators is
fitted to the records of other patients. Research only, not for clinical use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxrl_llm.data import behaviour_policy, trajectories
from jaxrl_llm.envs import core
from jaxrl_llm.kernels import bellman, concentration, fitted_q_evaluation, sampling
from jaxrl_llm.kernels import off_policy_evaluation as ope
from jaxrl_llm.training import clinical_report, evaluation_picture, plotting, report
from jaxrl_llm.types import MDP, Array, Environment, Key, Solution, Trajectories, Transition

_NOTES = (
    "95 % intervals: bootstrap over patients, with the policy that acted and the model as fitted.\n"
    "FQE is the model alone: its interval leaves out the model's own error."
)
_FEW = 50.0  # effective trajectories, below which no estimate is to be trusted
_COVERED = 0.95  # of the target's probability, below which plain averages are too low


class Plan(NamedTuple):
    """A log, the policies to evaluate by it, and a solved problem to report on.

    Attributes:
      log: to evaluate by.
      targets: action probabilities `[S, A]` by name.
      mdp: the problem as it is known, or was learned from OTHER patients.
      solution: of it.
      state_names: `S` names.
      action_names: `A` names.
    """

    log: Trajectories
    targets: dict[str, Array]
    mdp: MDP
    solution: Solution
    state_names: Sequence[str]
    action_names: Sequence[str]


class LogEvaluation(NamedTuple):
    """What one policy is worth by a log.

    Attributes:
      estimates: by estimator: value, low and high end of its interval.
      effective_sample_size: `[T]`, of the ratios up to each decision.
      covered: how much of the policy's probability, averaged over the states that were met, is on
        actions that the log took there.
    """

    estimates: dict[str, tuple[float, float, float]]
    effective_sample_size: NDArray[np.float64]
    covered: float


def evaluate_policies(
    plan: Plan, key: Key, *, gamma: float, num_folds: int = 5, num_resamples: int = 1000
) -> dict[str, LogEvaluation]:
    """Evaluates every target of a plan by every estimator, on the host.

    Args:
      plan: what to evaluate, by which log.
      key: consumed, for the bootstrap.
      gamma: discount in [0, 1].
      num_folds: of patients; the model of each is fitted to the others.
      num_resamples: of the bootstrap.

    Raises:
      ValueError: naming the step and the trajectory that cannot be used.
    """
    log = plan.log
    fold = jnp.asarray(trajectories.folds(log, num_folds))
    patients, unit = np.unique(np.asarray(log.patient), return_inverse=True)
    met = np.asarray(log.steps.observation)[np.asarray(log.mask)]
    results = {}
    keys = jax.random.split(key, len(plan.targets))
    for (name, target), own_key in zip(plan.targets.items(), keys, strict=True):
        mask = plan.mdp.action_mask[: target.shape[0]]
        evidence, seen = gather(log, fold, target, mask, gamma, num_folds=num_folds)
        ope.check_evidence(evidence)
        result = resample(
            evidence,
            own_key,
            jnp.asarray(unit),
            num_units=len(patients),
            num_resamples=num_resamples,
        )
        values, intervals = result.estimate, concentration.bootstrap_interval(result)
        results[name] = LogEvaluation(
            estimates={
                estimator: (
                    float(values[estimator]),
                    float(intervals[estimator].low),
                    float(intervals[estimator].high),
                )
                for estimator in (*ope.ESTIMATORS, "FQE")
            },
            effective_sample_size=np.asarray(ope.step_effective_sample_size(evidence), np.float64),
            covered=float(np.asarray(seen)[met].mean()),
        )
    return results


def sample_log(
    environment: Environment,
    policy: Array,
    key: Key,
    *,
    num_episodes: int,
    num_steps: int = 200,
) -> Trajectories:
    """One episode of each of `num_episodes` patients, under a table of probabilities.

    Args:
      environment: its observation is the state.
      policy: action probabilities `[S, A]`.
      key: consumed.
      num_episodes: patients.
      num_steps: an episode that is not over by then is truncated.
    """
    start_key, steps_key, noise_key = jax.random.split(key, 3)
    logits = jnp.log(policy)

    def act(noise: Array, state: Array, _: Array | None) -> tuple[Array, dict[str, Array]]:
        return jax.vmap(sampling.sample)(noise, logits[state]), {}

    @jax.jit
    def rollout(key: Key, running: core.Running, noise: Array) -> Transition:
        _, steps = core.rollout(environment, act, key, running, num_steps=num_steps, noise=noise)
        return replace(steps, extras={})

    steps = rollout(
        steps_key,
        core.start_batch(environment, start_key, num_episodes),
        jax.random.uniform(noise_key, (num_steps, num_episodes)),
    )
    return trajectories.from_rollout(steps, incomplete="truncated", episodes="first")


def learn(
    log: Trajectories,
    state_names: Sequence[str],
    action_names: Sequence[str],
    *,
    gamma: float,
    seed: int = 0,
) -> Plan:
    """Learns a policy from half of the patients, to be evaluated by the other half.

    It is the optimum of the process that the first half describes, among actions that were taken
    there at least once; the clinicians' own policy is another target.

    Args:
      log: observations are states.
      state_names: `S` names.
      action_names: `A` names.
      gamma: discount in [0, 1].
      seed: of the split.
    """
    first, second = trajectories.split(log, 0.5, seed=seed)
    num_states, num_actions = len(state_names), len(action_names)
    process = fitted_q_evaluation.empirical_mdp(
        first.steps, first.mask, num_states=num_states, num_actions=num_actions, gamma=gamma
    )
    taken = behaviour_policy.action_counts(
        first, num_states=num_states + 1, num_actions=num_actions
    )
    taken = (taken > 0) | ~jnp.any(taken > 0, axis=1, keepdims=True)
    mdp = replace(process, action_mask=taken)
    solution = bellman.policy_iteration(mdp)
    clinicians = behaviour_policy.estimate_policy(first, taken[:-1], smoothing=1.0)
    learned = 0.9 * jax.nn.one_hot(solution.policy[:-1], num_actions) + 0.1 * clinicians
    return Plan(
        log=second,
        targets={"clinicians": clinicians, "9/10 learned": learned},
        mdp=mdp,
        solution=solution,
        state_names=(*state_names, "end of record"),
        action_names=action_names,
    )


def warnings(name: str, found: LogEvaluation, num_trajectories: int) -> list[str]:
    """What is wrong with an evaluation, and what to do about it; a line each."""
    lines = []
    size = found.effective_sample_size
    if size.min() < _FEW:
        lines.append(
            f"LOW EFFECTIVE SAMPLE SIZE: of {num_trajectories} trajectories {size.min():.1f} count "
            f"for {name} at decision {int(size.argmin()) + 1}. Do not trust its estimates or "
            "intervals: log more patients, or evaluate a policy nearer to the clinicians'."
        )
    if found.covered < _COVERED:
        lines.append(
            f"POOR COVERAGE: the log never took {1 - found.covered:.0%} of what {name} would do. "
            "IS, PDIS and WPDIS are then too low for positive rewards: do not read them."
        )
    return lines


def show(
    directory: Path,
    title: str,
    plan: Plan,
    found: Mapping[str, LogEvaluation],
    *,
    exact: Mapping[str, float] | None = None,
    value_name: str = "value",
) -> None:
    """Every estimate beside the exact value, the warnings, what the plan is, and two pictures.

    Args:
      directory: of the pictures.
      title: of the problem.
      plan: what was evaluated.
      found: by name of the policy.
      exact: value of each policy, where it is known.
      value_name: what is estimated.
    """
    known, num_trajectories = exact or {}, plan.log.num_trajectories
    names = list(next(iter(found.values())).estimates)
    rows = [
        (
            name,
            *("{:.3f} ({:.3f} to {:.3f})".format(*one.estimates[name]) for one in found.values()),
        )
        for name in names
    ]
    rows.append(
        ("effective sample size", *(f"{x.effective_sample_size.min():.1f}" for x in found.values()))
    )
    if known:
        rows.append(("EXACT", *(f"{known[name]:.4f}" for name in found)))
    report.print_table(
        f"{title}: {value_name} by {num_trajectories} logged trajectories",
        ("estimator", *found),
        rows,
        footer=f"{_NOTES}\n{report.RESEARCH_ONLY}",
    )
    for name, one in found.items():
        for line in warnings(name, one, num_trajectories):
            print(f"\n{line}")
    clinical_report.show_recommendations(
        title,
        plan.mdp,
        plan.solution,
        plan.state_names,
        plan.action_names,
        trajectories=plan.log,
        value_name=value_name,
    )
    figure = evaluation_picture.forest(
        {name: one.estimates for name, one in found.items()},
        exact=known,
        title=f"{title}: off-policy estimates with 95 % intervals",
        xlabel=value_name,
        footer=report.RESEARCH_ONLY,
    )
    plotting.save_figure(figure, directory / "estimates.png")
    figure = evaluation_picture.effective_sample_sizes(
        {name: one.effective_sample_size for name, one in found.items()},
        num_trajectories=num_trajectories,
        threshold=_FEW,
        title=f"{title}: how many trajectories still count",
        footer=report.RESEARCH_ONLY,
    )
    plotting.save_figure(figure, directory / "effective_sample_size.png")


@partial(jax.jit, static_argnames="num_folds")
def gather(
    log: Trajectories,
    fold: Array,
    target: Array,
    action_mask: Array,
    gamma: float,
    *,
    num_folds: int,
) -> tuple[ope.Evidence, Array]:
    """The evidence for `target`, and its probability `[S]` on actions that the log took."""
    behaviour = behaviour_policy.estimate_policy(log, action_mask)
    q = fitted_q_evaluation.cross_fitted_q(log, fold, target, num_folds=num_folds, gamma=gamma)
    evidence = ope.tabular_evidence(log, target, behaviour, q, gamma=gamma, fold=fold)
    return evidence, jnp.sum(jnp.where(behaviour > 0, target, 0), axis=1)


@partial(jax.jit, static_argnames=("num_units", "num_resamples"))
def resample(
    evidence: ope.Evidence, key: Key, unit: Array, *, num_units: int, num_resamples: int
) -> concentration.Bootstrap:
    """Resamples of every estimator, with the same patients for all of them."""

    def estimator(weight: Array) -> dict[str, Array]:
        model = jnp.dot(evidence.value[0], weight, precision="highest") / jnp.sum(weight)
        return {**ope.estimates(evidence, weight), "FQE": model}

    return concentration.bootstrap(
        estimator, key, unit, num_units=num_units, num_resamples=num_resamples
    )
