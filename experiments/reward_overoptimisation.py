"""What becomes of the gold score when a policy goes on maximising a reward model: Goodhart's law.

    python -m experiments.reward_overoptimisation [--model DIRECTORY --ppo.num-iterations 200]

Reward models of several sizes learn from few comparisons; PPO maximises each without a KL penalty.
Two guards follow: the worst score of an ensemble, and a KL penalty. All text is SYNTHETIC, so the
gold score of every answer is known. Expected on 2 CPU cores: 17 minutes; without a guard the proxy
gains several deviations while the gold score falls from 0.66 to 0.00 and 0.38; the worst of three
heads on one trunk is hardly a guard (0.39), the KL penalty is (0.76).
Research only, not for clinical use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from experiments import clinical_judges as judges
from experiments import clinical_stages as stages
from jaxrl_llm.lm import ppo
from jaxrl_llm.lm.scores import mean_difference
from jaxrl_llm.training import cli, experiment, frontier, plotting, report

UNGUARDED = replace(stages.PPO, kl_coefficient=0.0)


@dataclass(frozen=True, kw_only=True)
class Config(stages.StagesConfig):
    """Over-optimisation of SYNTHETIC rewards. Research only, not for clinical use."""

    num_pairs: int = 400
    num_own_pairs: int = 0
    num_held_out: int = 500
    num_blocks: tuple[int, ...] = (1, 4)
    """Blocks of the trunk that a reward model has, of one after another."""
    num_members: int = 3
    """Of the ensemble, each with the whole trunk."""
    kl_coefficient: float = 0.2
    """Of the guard by a KL penalty, with the last reward model."""
    ppo: ppo.Config = UNGUARDED


def main(config: Config) -> dict[str, float]:
    """Maximises every reward; shows gains of proxy and gold, probes and the length correlation."""
    run = experiment.open_run("reward_overoptimisation", config)
    config = run.config
    imitator = stages.imitate(run)
    learnt = {
        f"{count} blocks": judges.judge(run, imitator, num_blocks=count, name=f"reward_{count}")
        for count in config.num_blocks
    }
    largest = f"{config.num_blocks[-1]} blocks"
    members = config.num_members
    learnt["ensemble"] = judges.judge(run, imitator, num_members=members, name="reward_ensemble")
    guarded = replace(config.ppo, kl_coefficient=config.kl_coefficient)
    trials = {name: (judge, config.ppo) for name, judge in learnt.items()}
    trials[f"{largest}, KL penalty"] = (learnt[largest], guarded)
    policies = {
        name: stages.align(run, f"ppo {name}", ppo, settings, imitator, *judge.goal)
        for name, (judge, settings) in trials.items()
    }
    examined = stages.examine_all(run, {"before": imitator, **policies}, imitator)
    before, curves, result = examined["before"], {}, {}
    for name in policies:
        curves[name] = gain = stages.gains(run, f"ppo {name}", before)
        change = mean_difference(examined[name].gold, before.gold)
        result |= {f"{name}: gold {key}": value for key, value in change._asdict().items()}
        result[f"{name}: proxy"] = float(gain[1][-1])
    title, footer = "Maximising a reward model of SYNTHETIC answers", report.RESEARCH_ONLY
    report.show_methods(title, {name: each.measures for name, each in examined.items()}, footer)
    result |= judges.show_hacking(learnt, imitator, examined["before"], footer)
    figure = frontier.gold_against_proxy(
        curves, title=title, ylabel="Gain (deviations of the imitator's scores)", footer=footer
    )
    plotting.save_figure(figure, run.directory / "gold_and_proxy.png")
    return experiment.finish(run, result)


if __name__ == "__main__":
    cli.main(main, Config)
