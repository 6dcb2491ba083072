"""What becomes of the gold score when a policy goes on maximising a reward model: Goodhart's law.

    python -m experiments.reward_overoptimisation [--model DIRECTORY --ppo.num-iterations 200]

Reward models of several sizes learn from few comparisons; PPO maximises each without a KL penalty.
Two guards follow: the worst score of an ensemble, and a KL penalty. All text is SYNTHETIC, so the
gold score of every answer is known. Expected on 2 CPU cores: EXPECTED.
Research only, not for clinical use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from experiments import clinical_questions as questions
from experiments import clinical_stages as stages
from jaxrl_llm.lm import ppo
from jaxrl_llm.lm.scores import mean_difference
from jaxrl_llm.training import cli, experiment, frontier, plotting, report

UPDATE = replace(
    stages.POLICY_STEPS, optimizer=replace(stages.POLICY_STEPS.optimizer, learning_rate=1e-3)
)
UNGUARDED = ppo.Config(rollout=stages.ROLLOUT, update=UPDATE, kl_coefficient=0.0, num_iterations=50)


@dataclass(frozen=True, kw_only=True)
class Config(stages.StagesConfig):
    """Over-optimisation of SYNTHETIC rewards. Research only, not for clinical use."""

    num_pairs: int = 400
    surprisal: bool = False
    num_blocks: tuple[int, ...] = (1, 4)
    """Blocks of the trunk that a reward model has, of one after another."""
    num_members: int = 3
    """Of the ensemble, each as large as the last."""
    kl_coefficient: float = 0.2
    """Of the guard by a KL penalty, with the last reward model."""
    ppo: ppo.Config = UNGUARDED


def main(config: Config) -> dict[str, float]:
    """Maximises every reward; shows gains of proxy and gold, probes and the length correlation."""
    run = experiment.open_run("reward_overoptimisation", config)
    config = run.config
    (exam_key,) = experiment.keys(run, 1)
    imitator = stages.imitate(run)
    unseen = stages.cases(config, config.num_cases, "held_out")
    before = questions.examine(stages.ROLLOUT, imitator, imitator, unseen, exam_key)
    judges = {
        f"{count} blocks": stages.judge(run, imitator, num_blocks=count, name=f"reward_{count}")
        for count in config.num_blocks
    }
    largest = f"{config.num_blocks[-1]} blocks"
    judges["ensemble"] = stages.judge(
        run, imitator, num_members=config.num_members, num_blocks=config.num_blocks[-1],
        name="reward_ensemble",
    )  # fmt: skip
    guarded = replace(config.ppo, kl_coefficient=config.kl_coefficient)
    trials = {name: (judge, config.ppo) for name, judge in judges.items()}
    trials[f"{largest}, KL penalty"] = (judges[largest], guarded)
    curves, examined, result = {}, {"before": before}, {}
    for name, (judge, settings) in trials.items():
        stage = "ppo_" + name.replace(", ", "_").replace(" ", "_")
        policy = stages.align(run, stage, ppo, settings, imitator, judge.reward(), judge.params)
        examined[name] = questions.examine(stages.ROLLOUT, policy, imitator, unseen, exam_key)
        curves[name] = gain = stages.gains(run, stage, before)
        lost = mean_difference(examined[name].gold, before.gold)
        result[f"{stage}_gold_gain"], result[f"{stage}_gold_gain_high"] = lost.mean, lost.high
        result[f"{stage}_proxy_gain"] = float(gain[1][-1])
        result[f"{stage}_gold_peak_to_end"] = float(gain[2].max() - gain[2][-1])
    title, footer = "Maximising a reward model of SYNTHETIC answers", report.RESEARCH_ONLY
    report.show_methods(title, {name: each.measures for name, each in examined.items()}, footer)
    stages.show_hacking(title, judges, imitator, examined["before"], footer)
    figure = frontier.gold_against_proxy(
        curves, title=title, ylabel="Gain (deviations of the imitator's scores)", footer=footer
    )
    plotting.save_figure(figure, run.directory / "gold_and_proxy.png")
    return experiment.finish(run, result)


if __name__ == "__main__":
    cli.main(main, Config)
