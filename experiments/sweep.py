"""64 settings of PPO trained side by side in one program, each scored by an exact value.

    python -m experiments.sweep

Eight learning rates by eight entropy coefficients, four seeds each, learn to treat the five-state
treatment problem. The score is no sampled return but the EXACT value of each learned policy, whose
optimum is 138.44. The table ends with the best point as flags.

Expected on 2 CPU cores: a minute; the best point 138.0, the worst 85.5, random 80.8.
SYNTHETIC, research only, not for clinical use.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxrl_llm.agents import ppo
from jaxrl_llm.envs import treatment
from jaxrl_llm.kernels import bellman
from jaxrl_llm.nn import policies
from jaxrl_llm.nn.heads import TabularActorCritic
from jaxrl_llm.training import cli, evaluate, experiment, sweep, sweep_report
from jaxrl_llm.types import Array

SETTINGS = ppo.Config(
    num_environments=16, num_steps=32, num_iterations=300, gamma=0.9, gae_lambda=0.9,
    value_clip_epsilon=None, max_gradient_norm=10.0,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config(experiment.SeedsConfig):
    """A sweep of PPO on the treatment problem. SYNTHETIC, not for clinical use."""

    ppo: ppo.Config = SETTINGS
    """Of every point, but for what is swept."""
    num_seeds: int = 4
    """Of each point."""
    learning_rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    """Swept."""
    entropy_coefficients: tuple[float, ...] = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    """Swept, with each learning rate."""

    def validate(self) -> None:
        super().validate()
        sweep.check_points(self.points(), self.ppo)

    def points(self) -> sweep.Points:
        rates, coefficients = self.learning_rates, self.entropy_coefficients
        return sweep.grid(learning_rate=rates, entropy_coefficient=coefficients)


def main(config: Config) -> dict[str, float]:
    """Trains, prints the ranking, draws it; returns exact values."""
    run = experiment.open_run("sweep", config)
    settings, mdp = run.config.ppo, treatment.mdp()
    network = TabularActorCritic(mdp.num_states, mdp.num_actions)
    known = {"random": bellman.uniform_policy(mdp), "optimum": bellman.value_iteration(mdp).policy}
    exact = {name: float(value) for name, value in evaluate.exact_returns(mdp, known).items()}

    def score(state: ppo.State) -> Array:
        policy, _ = policies.forward(network, state.train.params, jnp.arange(mdp.num_states), None)
        return evaluate.exact_return(mdp, jax.nn.softmax(policy.logits))

    algorithm = ppo.make(settings, treatment.make(), network)
    size = {"num_steps": settings.num_iterations, "items_per_step": settings.batch_size}
    ranking = sweep.train(run, algorithm, run.config.points(), score=score, **size)
    path, title = run.directory / "sweep.png", "PPO on the treatment problem, SYNTHETIC"
    names = {"score_name": "Exact value", "prefix": "ppo"}
    sweep_report.show(path, title, ranking, references=exact, **names)
    first, *_, last = ranking.mean[ranking.order]
    return experiment.finish(run, {**exact, "best": first, "worst": last, **ranking.best})


if __name__ == "__main__":
    cli.main(main, Config)
