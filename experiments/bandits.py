"""Bandit strategies beside what theory and exact computation say they must lose.

    python -m experiments.bandits

SYNTHETIC treatments: three of success .9, .8 and .5; two, where the expected regret is computed
exactly; three that trade places halfway; five whose merits a patient's features tell. Expected on
2 CPU cores: under a minute; UCB1 loses 63.2 ± 0.3. Research only, not for clinical use.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxrl_llm import checks
from jaxrl_llm.agents import bandits
from jaxrl_llm.envs import bandits as problems
from jaxrl_llm.kernels.bandits import exp3_mixing, thompson_law
from jaxrl_llm.training import cli, experiment, plotting, regret_report

MEANS, TWO_MEANS = (0.9, 0.8, 0.5), (0.8, 0.5)
EXACT = "Two treatments, exactly"


@dataclass(frozen=True, kw_only=True)
class Config(experiment.RunConfig):
    """Bandits on SYNTHETIC treatments. Research only, not for clinical use."""

    num_runs: int = 1000
    """Independent runs of each strategy."""
    horizon: int = 2000
    """Rounds of a run."""
    exact_horizon: int = 50
    """Rounds of the problem with exact answers, which take its fourth power in time."""

    def validate(self) -> None:
        for name in ("num_runs", "horizon", "exact_horizon"):
            checks.at_least(name, getattr(self, name), 2)


def main(config: Config) -> dict[str, float]:
    """Plays, prints a table a problem, draws all curves; returns regrets and standard errors."""
    run, result = experiment.open_run("bandits", config), {}
    config, (problem_key, *keys) = run.config, experiment.keys(run, 5)
    runs, rounds = config.num_runs, config.exact_horizon
    known = {
        "epsilon-greedy .1": bandits.epsilon_greedy(0.1), "Boltzmann .1": bandits.boltzmann(0.1),
        "UCB1": bandits.ucb1(), "Thompson": bandits.thompson_bernoulli(),
    }  # fmt: skip
    exp3 = {"EXP3": bandits.exp3(exp3_mixing(len(MEANS), config.horizon))}
    linear = {"LinUCB": bandits.linucb(), "Thompson": bandits.thompson_gaussian(noise=0.25)}
    suite = {
        "Three treatments": (problems.bernoulli(MEANS, config.horizon), known | exp3),
        EXACT: (problems.bernoulli(TWO_MEANS, rounds), known),
        "Trading places halfway": (problems.swapping(MEANS, config.horizon), known | exp3),
        "Patients with features": (problems.linear(problem_key, config.horizon), linear),
    }
    regret = {
        title: {
            name: bandits.play_many(each, jax.random.fold_in(key, i), problem, runs).regret
            for i, (name, each) in enumerate(strategies.items())
        }
        for key, (title, (problem, strategies)) in zip(keys, suite.items(), strict=True)
    }
    with jax.enable_x64(True):
        means = jnp.array(TWO_MEANS)
        certain = known | {"Thompson": bandits.by_arms(thompson_law(rounds))}
        exact = {EXACT: {k: bandits.expected_regret(v, means, rounds) for k, v in certain.items()}}
    for title, (problem, _) in suite.items():
        result |= regret_report.show(title, problem, regret[title], exact.get(title))
    plotting.save_figure(regret_report.regret_curves(regret, exact), run.directory / "regret.png")
    return experiment.finish(run, result)


if __name__ == "__main__":
    cli.main(main, Config)
