"""Four deep learners treat sepsis on ICU-Sepsis, beside the exact optimum.

    python -m experiments.deep_icu_sepsis

DQN, A2C, PPO and discrete SAC learn tables over 716 patient states, ten seeds each. What is
reported is no sampled return but the EXACT probability of survival of each greedy policy: DQN
0.865, A2C 0.868, PPO 0.869, SAC 0.873, all ± 0.001, where the optimum has 0.875. Expected: 11
minutes of CPU time. Research only, not for clinical use.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax

from experiments import sepsis_learners
from jaxrl_llm import checks
from jaxrl_llm.envs import icu_sepsis
from jaxrl_llm.kernels import bellman
from jaxrl_llm.training import cli, evaluate, experiment, learning_curves, table_learning


@dataclass(frozen=True, kw_only=True)
class Config(experiment.RunConfig):
    """Deep learners on ICU-Sepsis. Research only, not for clinical use."""

    num_steps: int = 4_096_000
    """Environment steps of each learner."""
    num_seeds: int = 10
    """Learners of each kind."""
    learners: sepsis_learners.Settings = sepsis_learners.DEFAULTS

    def validate(self) -> None:
        for name in ("num_steps", "num_seeds"):
            checks.at_least(name, getattr(self, name), 1)


def main(config: Config) -> dict[str, float]:
    """Trains, prints a table, draws a picture; returns survival probabilities in [0, 1]."""
    run, found = experiment.open_run("deep_icu_sepsis", config), {}
    config, mdp = run.config, icu_sepsis.mdp()
    known = {
        "random": bellman.uniform_policy(mdp),
        "clinicians": icu_sepsis.expert_policy(),
        "optimum": bellman.inexact_policy_iteration(bellman.successor_form(mdp)).policy,
    }
    exact = {name: float(x) for name, x in evaluate.exact_returns(mdp, known).items()}
    kinds = sepsis_learners.learners(config.learners, mdp)
    for index, (name, learner) in enumerate(kinds.items()):
        found[name] = table_learning.learn(
            learner.algorithm,
            mdp,
            jax.random.fold_in(run.key, index),
            policy=partial(learner.greedy, mdp),
            time=learner.batch_steps,
            num_learners=config.num_seeds,
            num_steps=-(-config.num_steps // learner.batch_steps),
            label=name,
        )
    result = exact | table_learning.show("ICU-Sepsis: survival, greedy policies", exact, found)
    panel = learning_curves.Panel(
        "ICU-Sepsis", found, exact, "Environment steps", "Exact survival", 0.77
    )
    learning_curves.save([panel], run.directory / "learning_curves.png", "")
    return experiment.finish(run, result)


if __name__ == "__main__":
    cli.main(main, Config)
