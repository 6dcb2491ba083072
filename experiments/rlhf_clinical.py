"""A language model is aligned with a clinician's preferences, end to end, beside the known truth.

    python -m experiments.rlhf_clinical [--model DIRECTORY --ppo.kl-coefficient 0.1]

A small GPT-2 imitates demonstrations of which most have a flaw; a reward model learns from noisy
comparisons; PPO maximises it near the imitating policy. All text is SYNTHETIC, so every answer has
a gold score, which no learner sees. Expected on 2 CPU cores: less than 8 minutes; gold score from
0.66 to 0.77, win rate 0.69, KL 1.1 nats; 0.875 of unseen comparisons right, of at most 0.903.
Research only, not for clinical use.
"""

from __future__ import annotations

from dataclasses import dataclass

from experiments import clinical_judges as judges
from experiments import clinical_stages as stages
from jaxrl_llm import checks
from jaxrl_llm.lm import base_model, clinical_exam, ppo, reward_ensemble
from jaxrl_llm.lm.scores import mean_difference, win_rate
from jaxrl_llm.training import cli, experiment, report


@dataclass(frozen=True, kw_only=True)
class Config(stages.StagesConfig):
    """RLHF on SYNTHETIC clinical text. Research only, not for clinical use."""

    num_reward_models: int = 1
    """More make an ensemble."""
    aggregation: reward_ensemble.Aggregation = "worst"
    """What an ensemble's scores become."""
    kl_budget: float = 10.0
    """Nats a response that the policy may be from the one it started as; reported beside it."""
    ppo: ppo.Config = stages.PPO

    def validate(self) -> None:
        super().validate()
        checks.at_least("num_reward_models", self.num_reward_models, 1)


def main(config: Config) -> dict[str, float]:
    """Imitates, judges, aligns; shows every measure before and after; saves both models."""
    run = experiment.open_run("rlhf_clinical", config)
    config, settings = run.config, run.config.ppo
    imitator = stages.imitate(run)
    base_model.export(run.directory / "sft_model", imitator)
    judge = judges.judge(run, imitator, num_members=config.num_reward_models)
    proxy = judge.reward(config.aggregation)
    aligned = stages.align(run, "ppo", ppo, settings, imitator, proxy, judge.params)
    saved = base_model.export(run.directory / "model", aligned)
    print(f"model: {saved or 'in the checkpoints alone; GPT-2 has no place for an adapter'}")
    before, after = stages.examine_all(run, {"sft": imitator, "ppo": aligned}, imitator).values()
    won, gain = win_rate(after.gold, before.gold), mean_difference(after.gold, before.gold)
    title = f"{config.num_cases} unseen SYNTHETIC cases"
    report.show_samples(title, clinical_exam.samples(before.answers, after.answers, 2))
    footer = (
        f"Gold win rate {won.mean:.3f} ({won.low:.3f} to {won.high:.3f}), a tie being half a win; "
        f"gold score {gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f}).\n"
        f"Reward model: {judge.accuracy.mean:.3f} of {config.num_held_out} unseen comparisons "
        f"right, {judge.exact_accuracy:.3f} of all\nthat the annotator could make of these texts; "
        f"its noise allows {judge.ceiling:.3f}.\n{report.RESEARCH_ONLY}"
    )
    report.show_change(title, before.measures, after.measures, footer=footer)
    stages.draw(run, "ppo", before, after, judge.calibration, title)
    result = {
        "gold_score_sft": before.marks["gold_score"].mean,
        "gold_score_policy": after.marks["gold_score"].mean,
        "gold_gain": gain.mean, "gold_gain_low": gain.low,
        "gold_win_rate": won.mean, "gold_win_rate_low": won.low,
        "kl": after.divergence.kl.mean, "kl_budget": config.kl_budget,
        "reward_model_accuracy": judge.accuracy.mean,
        "reward_model_exact_accuracy": judge.exact_accuracy, "annotator_ceiling": judge.ceiling,
    }  # fmt: skip
    return experiment.finish(run, result)


if __name__ == "__main__":
    cli.main(main, Config)
