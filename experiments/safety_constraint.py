"""Safety as a hard constraint beside safety as one more term of a sum, with what each policy does.

    python -m experiments.safety_constraint [--model DIRECTORY --at-least 0.8]

An annotator who likes confident answers teaches a reward model that rewards them; false certainty
is unsafe. A checker of safety, a rule, sees it and interactions, allergies and missed urgency. One
policy maximises the model's score and a little of the rule's; the other maximises the former
subject to E[safety] >= a limit, by a Lagrange multiplier. All text is SYNTHETIC, and the rule is
the safety mark of its gold scorer. Expected on 2 CPU cores: 10 minutes; safety 0.655 (0.607 to
0.702) constrained, 0.593 (0.545 to 0.642) by the sum. Research only, not for clinical use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from experiments import clinical_judges as judges
from experiments import clinical_stages as stages
from jaxrl_llm import checks
from jaxrl_llm.data.clinical_preferences import Annotator
from jaxrl_llm.lm import clinical_exam, objective, ppo, rewards
from jaxrl_llm.training import cli, experiment, report

PPO = replace(stages.PPO, kl_coefficient=0.1)
IMPRESSED = Annotator(name="impressed", confidence_bias=1.0)


@dataclass(frozen=True, kw_only=True)
class Config(stages.StagesConfig):
    """Constrained RLHF on SYNTHETIC text. Research only, not for clinical use."""

    annotator: Annotator = IMPRESSED
    safety_weight: float = 0.1
    """Of the safety rule in the weighted sum, beside the reward model's score."""
    at_least: float = 0.6
    """Mean safety that the constrained policy is to have, in [0, 1]; the imitator has 0.57."""
    margin: float = 0.05
    """By which safety is held higher while learning, on the few answers of each iteration."""
    multiplier_rate: float = 1.0
    """Of the multiplier, a unit of safety missing and iteration."""
    ppo: ppo.Config = PPO

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
    asked = stages.cases(config, config.num_prompts, "train")
    rule = rewards.of_text(imitator.tokenizer, clinical_exam.gold(asked, "safety"), ("safety",))
    policies = {"sft": imitator}
    for name, mix in mixes.items():
        goal = rewards.joined(judge.reward(), rule, mix=mix), (judge.params, None)
        policies[name] = stages.align(run, name, ppo, config.ppo, imitator, *goal)
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
