"""DQN treats monitored patients every hour, beside simple rules and the optimum.

    python -m experiments.dqn_monitoring

Five seeds learn which of four treatments to give on the clinical variant of `envs.monitoring`.
Expected on 2 CPU cores: 3 minutes; 0.24 ± 0.04 an episode, where the best fixed treatment has 0.00
and the optimum 0.32. SYNTHETIC; research only, not for clinical use.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import jax

from experiments import monitoring_chart, trained_policies
from jaxrl_llm.agents import dqn
from jaxrl_llm.envs import monitoring
from jaxrl_llm.nn import policies
from jaxrl_llm.nn.critics import QNetwork
from jaxrl_llm.training import cli, experiment, report
from jaxrl_llm.types import Array, PyTree

EPISODE, NUM_EPISODES, NUM_ITERATIONS = 100, 1024, 240  # hours; to judge a seed; of training
SETTINGS = dqn.Config(
    num_environments=64, num_steps=64, train_interval=2, batch_size=512, buffer_size=131_072,
    warmup_steps=256, learning_rate=1e-3, is_double=True, num_return_steps=3, huber_delta=1.0,
    target_interval=1, tau=0.01, epsilon_steps=400_000, max_gradient_norm=10.0,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config(experiment.SeedsConfig):
    """DQN on patient monitoring. SYNTHETIC; research only, not for clinical use."""

    num_seeds: int = 5
    """Independent learners."""
    dqn: dqn.Config = SETTINGS


def main(config: Config) -> dict[str, float]:
    """Trains, prints a table, draws two pictures; returns mean returns of an episode."""
    run = experiment.open_run("dqn_monitoring", config)
    environment = monitoring.make(variant="clinical", max_steps=EPISODE)
    values = monitoring.reference_values(variant="clinical", max_steps=EPISODE)
    fixed = max(monitoring.action_names, key=values.__getitem__)
    known = {name: values[name] for name in ("random", fixed, "threshold", "optimal")}
    network = QNetwork(len(monitoring.action_names), (64, 64), is_dueling=True)

    def best_action(params: PyTree, observation: Array, **_: None) -> Any:
        return policies.Categorical(logits=cast(Array, network.apply(params, observation))), None

    greedy: Any = SimpleNamespace(apply=best_action)
    returns_key, picture_key = experiment.keys(run, 2)

    @jax.jit
    def learned(state: dqn.State) -> dict[str, Array]:
        judged = environment, greedy, state.train.params, returns_key, EPISODE, NUM_EPISODES
        return {"greedy": trained_policies.mean_returns(*judged)}

    items = run.config.dqn.num_environments * run.config.dqn.num_steps
    size: Any = {"num_steps": NUM_ITERATIONS, "items_per_step": items, "evaluate": learned}
    state = experiment.train_seeds(run, dqn.make(run.config.dqn, environment, network), **size)
    returns = jax.device_get(learned(state))["greedy"]
    path, title = run.directory / "learning_curve.png", "Monitoring: patients treated by DQN"
    steps, curve = experiment.curve(run, "greedy")
    shown = known, {"DQN, greedy": returns}, (steps * items, curve)
    report.show_learning(path, title, *shown, value_name="Return of an episode")
    acting = environment, greedy, state.train.params, picture_key, EPISODE
    info = trained_policies.episode(*acting, seed=int(returns.argmax()))
    monitoring_chart.save(run.directory / "episode.png", f"{title}, one of them", info)
    values |= {f"greedy_{name}": getattr(returns, name)() for name in ("mean", "std", "min")}
    return experiment.finish(run, values)


if __name__ == "__main__":
    cli.main(main, Config)
