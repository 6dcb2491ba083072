"""PPO, RLOO, GRPO, DPO and best-of-n at an equal budget: gold score against KL from the reference.

    python -m experiments.preference_optimisation [--model DIRECTORY --num-responses 3200]

Every method has the same imitating policy, the same reward model and as many responses to learn
from, for the same SYNTHETIC cases. Expected on 2 CPU cores: about 15 minutes.
Research only, not for clinical use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from experiments import clinical_judges as judges
from experiments import clinical_stages as stages
from jaxrl_llm.lm import dpo, grpo, ppo, rloo
from jaxrl_llm.lm.scores import win_rate
from jaxrl_llm.training import cli, experiment, frontier, plotting, report

GROUPS = replace(stages.ROLLOUT, num_prompts=8, num_samples=4)
PPO = ppo.Config(rollout=stages.ROLLOUT, update=stages.POLICY_STEPS)
RLOO = rloo.Config(rollout=GROUPS, update=stages.POLICY_STEPS)
GRPO = grpo.Config(rollout=GROUPS, update=stages.POLICY_STEPS, kl_estimator="k2")
DPO = dpo.Config(chunk_size=None, optimizer=stages.POLICY_STEPS.optimizer)
METHODS: dict[str, stages.OnPolicy] = {"ppo": ppo, "rloo": rloo, "grpo": grpo}
BEST_OF = (1, 2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class Config(stages.StagesConfig):
    """Methods of alignment side by side on SYNTHETIC text. Research only, not for clinical use."""

    num_responses: int = 1280
    """That each method learns from."""
    ppo: ppo.Config = PPO
    rloo: rloo.Config = RLOO
    grpo: grpo.Config = GRPO
    dpo: dpo.Config = DPO


def main(config: Config) -> dict[str, float]:
    """Aligns by every method; shows what each reached, and draws the frontier."""
    run = experiment.open_run("preference_optimisation", config)
    config = run.config
    best_key, pairs_key = experiment.keys(run, 3)[1:]
    imitator = stages.imitate(run)
    judge = judges.judge(run, imitator)
    aligned = {"sft": imitator}
    for name, method in METHODS.items():
        settings = getattr(config, name)
        num_iterations = config.num_responses // settings.rollout.num_responses
        settings = replace(settings, num_iterations=num_iterations)
        aligned[name] = stages.align(run, name, method, settings, imitator, *judge.goal)
    asked = stages.cases(config, config.num_responses // 2, "train")
    pairs = judges.compared(stages.ROLLOUT, imitator, judge, asked, pairs_key)
    settings = replace(config.dpo, num_steps=len(asked) // config.dpo.batch_size)
    aligned["dpo"] = stages.align_by_pairs(run, "dpo", settings, imitator, pairs)
    examined = stages.examine_all(run, aligned, imitator)
    points = {name.upper(): each.point for name, each in examined.items()}
    unseen = stages.cases(config, config.num_cases, "held_out")
    best = judges.best_of(BEST_OF, imitator, judge, unseen, best_key)
    title, footer = "Gold score of SYNTHETIC answers", report.RESEARCH_ONLY
    report.show_methods(title, {name: each.measures for name, each in examined.items()}, footer)
    figure = frontier.kl_reward_frontier(
        points, best_of_n=best, square_root=True, title=title, footer=footer
    )
    plotting.save_figure(figure, run.directory / "frontier.png")
    result = {}
    for name, each in examined.items():
        result[f"{name}_win_rate"] = win_rate(each.gold, examined["sft"].gold).mean
        result |= {f"{name}_{key}": each.measures[key].mean for key in ("gold_score", "kl")}
    result |= {f"best_of_{n}_gold_score": gold for n, (_, gold) in best.items()}
    return experiment.finish(run, result)


if __name__ == "__main__":
    cli.main(main, Config)
