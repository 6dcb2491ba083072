"""What would a policy be worth, by the records of clinicians who followed another one?

    python -m experiments.off_policy_evaluation
    python -m experiments.off_policy_evaluation --csv log.csv --gamma 0.99

Clinicians treat 1000 SYNTHETIC patients of ICU-Sepsis, one time in ten at random. From that log
alone every estimator evaluates three policies, beside their exact survival. A log of yours has the
columns patient, time, state, action, reward: half of its patients teach a policy, the others judge
it. Expected on 2 CPU cores: under a minute; DR covers the clinicians' .7818, and warnings fire for
the optimal policy (.8751). Research only, not for clinical use.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax

from jaxrl_llm import checks
from jaxrl_llm.data import trajectory_csv
from jaxrl_llm.envs import icu_sepsis
from jaxrl_llm.kernels import bellman
from jaxrl_llm.training import cli, evaluate, experiment, log_evaluation
from jaxrl_llm.types import Key


@dataclass(frozen=True, kw_only=True)
class Config(experiment.RunConfig):
    """Off-policy evaluation of treatment. Research only, not for clinical use."""

    num_episodes: int = 1000
    """Patients whose treatment is logged."""
    num_resamples: int = 1000
    """Of the bootstrap."""
    csv: Path | None = None
    """A log to read instead of ICU-Sepsis, see above."""
    gamma: float = 1.0
    """Discount."""

    def validate(self) -> None:
        checks.at_least("num_episodes", self.num_episodes, 10)
        checks.at_least("num_resamples", self.num_resamples, 100)
        checks.between("gamma", self.gamma, 0, 1)


def main(config: Config) -> dict[str, float]:
    """Prints estimates, warnings and a plan, draws pictures; returns every estimate."""
    run, exact = experiment.open_run("off_policy_evaluation", config), {}
    (log_key, key), csv, gamma = experiment.keys(run, 2), run.config.csv, run.config.gamma
    if csv is None:
        title, value_name = "ICU-Sepsis", "survival" if gamma == 1 else "discounted survival"
        plan = icu_sepsis_plan(log_key, run.config.num_episodes, gamma)
        exact = {k: float(v) for k, v in evaluate.exact_returns(plan.mdp, plan.targets).items()}
    else:
        title, value_name = csv.stem, "value"
        log, *names = trajectory_csv.read_named(csv)
        plan = log_evaluation.learn(log, *names, gamma=gamma, seed=run.config.seed)
    num_resamples = run.config.num_resamples
    found = log_evaluation.evaluate_policies(plan, key, gamma=gamma, num_resamples=num_resamples)
    log_evaluation.show(run.directory, title, plan, found, exact=exact, value_name=value_name)
    result = {f"{p} {name}": v[0] for p, one in found.items() for name, v in one.estimates.items()}
    return experiment.finish(run, result | {f"{name} exact": v for name, v in exact.items()})


def icu_sepsis_plan(key: Key, num_episodes: int, gamma: float) -> log_evaluation.Plan:
    """A log of ICU-Sepsis, and policies of which the exact value is known."""
    mdp, expert = icu_sepsis.mdp(discount=gamma), icu_sepsis.expert_policy()
    optimum = bellman.inexact_policy_iteration(bellman.successor_form(mdp))
    best, random = jax.nn.one_hot(optimum.policy, mdp.num_actions), bellman.uniform_policy(mdp)
    behaviour = 0.9 * expert + 0.1 * random
    log = log_evaluation.sample_log(icu_sepsis.make(), behaviour, key, num_episodes=num_episodes)
    targets = {"clinicians": expert, "9/10 optimal": 0.9 * best + 0.1 * random, "optimal": best}
    names = icu_sepsis.state_names, icu_sepsis.action_names
    return log_evaluation.Plan(log, targets, mdp, optimum, *names)


if __name__ == "__main__":
    cli.main(main, Config)
