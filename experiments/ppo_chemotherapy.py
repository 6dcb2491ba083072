"""PPO doses a chemotherapy every 6 hours, beside the best constant dose.

    python -m experiments.ppo_chemotherapy

Five seeds learn a dose in [0, 1] from the state of the patient. What is reported is the
undiscounted return of 600 steps, 150 days, of the policy's mode and of the policy itself. Expected
on 2 CPU cores: 2 minutes; 398 ± 1, the best constant 67.8. Research only, not for clinical use.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from experiments import trained_policies
from jaxrl_llm.agents import ppo
from jaxrl_llm.envs import chemotherapy, core
from jaxrl_llm.nn.heads import ActorCritic
from jaxrl_llm.training import cli, episode_picture, experiment
from jaxrl_llm.training.episode_picture import Doses, Series
from jaxrl_llm.types import Array

EPISODE, NUM_DOSES = 600, 1001  # steps; constant doses to compare with
SETTINGS = ppo.Config(
    num_environments=16, num_steps=EPISODE, num_iterations=150, num_minibatches=8, gamma=0.999,
    gae_lambda=0.998, learning_rate=2e-3, entropy_coefficient=0.0, value_clip_epsilon=None,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config(experiment.SeedsConfig):
    """PPO on chemotherapy. Research only, not for clinical use."""

    num_seeds: int = 5
    """Independent learners, trained side by side in one program."""
    reward_scale: float = 0.05
    """The learner sees rewards times this; what is reported is not scaled."""
    ppo: ppo.Config = SETTINGS


def main(config: Config) -> dict[str, float]:
    """Trains, prints a table, draws two pictures; returns undiscounted returns of 600 steps."""
    run = experiment.open_run("ppo_chemotherapy", config)
    settings, environment = run.config.ppo, chemotherapy.make(max_steps=EPISODE)
    network = ActorCritic(environment.action_space, hidden_sizes=(32, 32))
    constant_key, returns_key, picture_key = experiment.keys(run, 3)

    doses = jnp.linspace(0, 1, NUM_DOSES)
    constant = trained_policies.constant_returns(environment, doses, constant_key, EPISODE)
    best = f"constant {doses[constant.argmax()]:.3f}"
    known = {"constant 0.500": constant[NUM_DOSES // 2], best: constant.max()}

    @jax.jit
    def learned(state: ppo.State) -> dict[str, Array]:
        learner = environment, network, state.train.params, returns_key, EPISODE
        mean = trained_policies.mean_returns
        return {"mode": mean(*learner, 1), "stochastic": mean(*learner, 32, is_greedy=False)}

    scaled = core.scale_rewards(environment, run.config.reward_scale)
    algorithm = ppo.make(settings, scaled, network)
    size = {"num_steps": settings.num_iterations, "items_per_step": settings.batch_size}
    state = experiment.train_seeds(run, algorithm, **size, evaluate=learned)

    found, title = learned(state), "Chemotherapy: dosed by PPO"
    result = trained_policies.show(run, title, known, found, settings.batch_size)
    learner, best = (environment, network, state.train.params), int(found["mode"].argmax())
    info = trained_policies.episode(*learner, picture_key, EPISODE, seed=best)
    days = chemotherapy.STEP * (1 + np.arange(len(info["dose"])))
    cells = [Series(f"{k} cells", "", info[f"{k}_cells"]) for k in ("normal", "tumour", "immune")]
    drug, path = [Doses("infusion", "1/day", info["dose"].round(2))], run.directory / "episode.png"
    episode_picture.save(path, f"{title}, best seed", days, cells, drug, time_unit="days")
    return experiment.finish(run, {"best_constant": constant.max(), **result})


if __name__ == "__main__":
    cli.main(main, Config)
