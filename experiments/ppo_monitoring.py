"""PPO treats monitored patients every hour, beside the optimum of who sees everything.

    python -m experiments.ppo_monitoring [--vital-signs-only] [--recurrent]

Five seeds learn which of four treatments to give on the clinical variant of `envs.monitoring`, from
the whole state of the patient or from ten noisy vital signs, without or with a memory. Expected on
2 CPU cores by default: 2 minutes; 0.27 ± 0.01, where the best fixed action has 0.00 and the optimum
0.32. SYNTHETIC; research only, not for clinical use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from experiments import monitoring_chart, trained_policies
from jaxrl_llm.agents import ppo, recurrent_ppo
from jaxrl_llm.envs import monitoring
from jaxrl_llm.nn.heads import ActorCritic
from jaxrl_llm.nn.recurrent import RecurrentActorCritic
from jaxrl_llm.training import cli, experiment
from jaxrl_llm.types import Array, Discrete, PyTree

EPISODE, NUM_EPISODES = 100, 1024  # the time limit in hours; judges each seed
SPACE = Discrete(num=len(monitoring.action_names))
SIZE: dict[str, Any] = {"num_environments": 64, "num_steps": 64, "num_iterations": 150}
FEED_FORWARD = ppo.Config(**SIZE, learning_rate=2e-3, value_clip_epsilon=None)
RECURRENT = recurrent_ppo.Config(**SIZE, learning_rate=2e-3)


@dataclass(frozen=True, kw_only=True)
class Config(experiment.SeedsConfig):
    """PPO on patient monitoring. SYNTHETIC; research only, not for clinical use."""

    num_seeds: int = 5
    """Independent learners, trained side by side in one program."""
    vital_signs_only: bool = False
    """Hide severity, drug, side effects and the kind of patient."""
    recurrent: bool = False
    """Learn with a memory."""
    ppo: ppo.Config = FEED_FORWARD
    recurrent_ppo: recurrent_ppo.Config = RECURRENT


def main(config: Config) -> dict[str, float]:
    """Trains, prints a table, draws two pictures; returns mean returns of an episode."""
    run = experiment.open_run("ppo_monitoring", config)
    config, hidden = run.config, run.config.vital_signs_only
    environment = monitoring.make(variant="clinical", is_hidden=hidden, max_steps=EPISODE)
    values = monitoring.reference_values(variant="clinical", max_steps=EPISODE)
    fixed = max(monitoring.action_names, key=lambda name: values[name])
    known = {name: values[name] for name in ("random", fixed, "threshold", "optimal")}
    if config.recurrent:
        settings, network = config.recurrent_ppo, RecurrentActorCritic(SPACE, (32,), 32)
        algorithm = recurrent_ppo.make(settings, environment, network)
    else:
        settings, network = config.ppo, ActorCritic(SPACE, (32, 32))
        algorithm = ppo.make(settings, environment, network)
    returns_key, picture_key = experiment.keys(run, 2)

    @jax.jit
    def learned(state: PyTree) -> dict[str, Array]:
        learner = environment, network, state.train.params, returns_key
        return {"mode": trained_policies.mean_returns(*learner, EPISODE, NUM_EPISODES)}

    size = {"num_steps": settings.num_iterations, "items_per_step": settings.batch_size}
    state = experiment.train_seeds(run, algorithm, **size, evaluate=learned)
    found, title = learned(state), "Monitoring: patients treated by PPO"
    result = trained_policies.show(run, title, known, found, settings.batch_size)
    learner, best = (environment, network, state.train.params), int(found["mode"].argmax())
    info = trained_policies.episode(*learner, picture_key, EPISODE, seed=best)
    monitoring_chart.save(run.directory / "episode.png", f"{title}, one of them", info)
    return experiment.finish(run, {**values, **result})


if __name__ == "__main__":
    cli.main(main, Config)
