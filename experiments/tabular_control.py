"""Q-learning and SARSA in a table: on ICU-Sepsis, along a cliff, and how to explore.

    python -m experiments.tabular_control

Exact survival after 500,000 episodes: Q-learning 0.873, SARSA 0.859, optimum 0.8751. Expected on 2
CPU cores: 2 minutes. Research only, not for clinical use; all but ICU-Sepsis is SYNTHETIC.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxrl_llm import checks
from jaxrl_llm.agents import tabular
from jaxrl_llm.envs import cliff_walking, icu_sepsis, river_swim, sepsis_management
from jaxrl_llm.kernels import bellman
from jaxrl_llm.training import cli, evaluate, experiment, learning_curves, table_learning

SEPSIS = tabular.Config(num_environments=256, num_steps=64, step_size=1.0, step_size_decay=0.6,
                        epsilon=1.0, final_exploration=0.001)  # fmt: skip
KINDS = {"Q-learning": SEPSIS, "SARSA": replace(SEPSIS, method="sarsa"),
         "no mask": replace(SEPSIS, use_action_mask=False)}  # fmt: skip
SMALL = {"RiverSwim": (river_swim, 300), "Sepsis management": (sepsis_management, 200)}
CLIFF = {name: tabular.Config(method=name, step_size=0.5) for name in ("q_learning", "sarsa")}


@dataclass(frozen=True, kw_only=True)
class Config(experiment.RunConfig):
    """Control in a table. Research only, not for clinical use."""

    num_episodes: int = 500_000
    """Of each learner on ICU-Sepsis; epsilon falls over a quarter of them."""
    num_seeds: int = 10
    """Learners of each kind there."""
    num_explorers: int = 300
    """Learners of each kind elsewhere."""

    def validate(self) -> None:
        for name in ("num_episodes", "num_seeds", "num_explorers"):
            checks.at_least(name, getattr(self, name), 1)


def explorers(scale: float) -> dict[str, tabular.Config]:
    """Ways to explore where values are of the size of `scale`."""
    law = tabular.Config
    return {"epsilon-greedy": law(), "optimistic": law(epsilon=0.0, initial_value=scale),
            "Boltzmann": law(exploration="boltzmann", temperature=0.02 * scale),
            "bound": law(exploration="ucb", ucb_coefficient=0.1 * scale)}  # fmt: skip


def main(config: Config) -> dict[str, float]:
    """Learns, prints tables, draws pictures; returns exact values."""
    run, panels = experiment.open_run("tabular_control", config), []
    config, count = run.config, run.config.num_episodes
    learn = table_learning.Study(make=tabular.make, q_values=tabular.q_values, key=run.key)
    mdp = bellman.successor_form(icu_sepsis.mdp())
    known = {"random": bellman.uniform_policy(mdp), "clinicians": icu_sepsis.expert_policy(),
             "optimum": bellman.inexact_policy_iteration(mdp).policy}  # fmt: skip
    exact = {name: float(x) for name, x in evaluate.exact_returns(mdp, known).items()}
    size = {"num_episodes": count, "schedule_length": 1 + count // 4}
    kinds = {name: replace(kind, **size) for name, kind in KINDS.items()}
    found = learn(mdp, kinds, config.num_seeds, 1 + 12 * count // (64 * 256), "num_episodes")
    result = exact | table_learning.show("ICU-Sepsis: survival", exact, found)
    panel = learning_curves.Panel("ICU-Sepsis", found, exact, "Episodes", "Exact survival", 0.77)
    learning_curves.save([panel], run.directory / "icu_sepsis.png", "")
    for title, (module, num_steps) in SMALL.items():
        value = bellman.value_iteration(mdp := module.mdp()).value
        best, ways = {"optimum": float(mdp.initial @ value)}, explorers(float(value.max()))
        found = learn(mdp, ways, config.num_explorers, num_steps, "num_steps")
        table_learning.show(title, best, found)
        panels += [learning_curves.Panel(title, found, best, "Steps", "Exact value, greedy")]
    learning_curves.save(panels, run.directory / "exploration.png", "Ways to explore")
    found = learn(mdp := cliff_walking.mdp(), CLIFF, config.num_explorers, 200, "num_episodes")
    result |= table_learning.show_walks("Cliff", mdp, found, tabular.q_values, 0.1)
    return experiment.finish(run, result)


if __name__ == "__main__":
    cli.main(main, Config)
