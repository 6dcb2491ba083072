"""Safety as a hard constraint beside safety as one more term of a sum, with what each policy does.

    python -m experiments.safety_constraint [--model DIRECTORY --at-least 0.8]

An annotator who likes confident answers teaches a reward model that rewards them; false certainty
is unsafe. One policy maximises that reward and a little of the safety criterion; the other
maximises it subject to E[safety] >= a limit, by a Lagrange multiplier. All text is SYNTHETIC, and
the gold scorer says how safe it is. Expected on 2 CPU cores: about 10 minutes.
Research only, not for clinical use.
"""

from __future__ import annotations

from dataclasses import dataclass

from experiments import clinical_judges as judges
from experiments import clinical_stages as stages
from jaxrl_llm import checks
from jaxrl_llm.data.clinical_preferences import Annotator
from jaxrl_llm.lm import objective, ppo, rewards
from jaxrl_llm.training import cli, experiment, report

IMPRESSED = Annotator(name="impressed", confidence_bias=0.5)


@dataclass(frozen=True, kw_only=True)
class Config(stages.StagesConfig):
    """Constrained RLHF on SYNTHETIC text. Research only, not for clinical use."""

    annotator: Annotator = IMPRESSED
    safety_weight: float = 0.2
    """Of the safety criterion in the weighted sum, beside the overall score."""
    at_least: float = 0.7
    """Mean safety that the constrained policy is to have, in [0, 1]."""
    margin: float = 0.1
    """By which the reward model's safety is held higher, since it errs."""
    multiplier_rate: float = 5.0
    """Of the multiplier, a unit of safety missing and iteration."""
    ppo: ppo.Config = stages.PPO

    def validate(self) -> None:
        super().validate()
        checks.between("at_least", self.at_least, 0, 1)


def main(config: Config) -> dict[str, float]:
    """Aligns with the sum, then with the constraint; shows the gold safety of both."""
    run = experiment.open_run("safety_constraint", config)
    config = run.config
    imitator = stages.imitate(run)
    judge = judges.judge(run, imitator)
    mixes = {
        "weighted": objective.weighted((1.0, config.safety_weight)),
        "constrained": objective.constrained(
            (1.0, 0.0), 1, at_least=config.at_least + config.margin, rate=config.multiplier_rate
        ),
    }
    policies = {"sft": imitator} | {
        name: stages.align(
            run, name, ppo, config.ppo, imitator,
            rewards.of_model(judge.model, ("overall", "safety"), mix=mix), judge.params,
        )
        for name, mix in mixes.items()
    }  # fmt: skip
    examined = stages.examine_all(run, policies, imitator)
    footer = f"The constraint is a mean safety of {config.at_least}. {report.RESEARCH_ONLY}"
    shown = {name: each.measures for name, each in examined.items()}
    report.show_methods("Gold marks of unseen SYNTHETIC cases", shown, footer)
    result = {"at_least": config.at_least}
    for name, each in examined.items():
        for mark in ("gold_score", "safety"):
            known = each.marks[mark]._asdict().items()
            result |= {f"{name}_{mark}_{key}": value for key, value in known}
    return experiment.finish(run, result)


if __name__ == "__main__":
    cli.main(main, Config)
