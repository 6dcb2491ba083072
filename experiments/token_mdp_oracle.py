"""Alignment where every answer is known exactly: the bias of estimators, the gap of learners.

    python -m experiments.token_mdp_oracle

On token MDPs so small that all responses are listed, the expected gradient of each estimator is
predicted by its definition and measured by sampling the library's own losses. Then a tiny GPT-2
learns by each algorithm; its gap is what it falls short of the closed-form optimum. Expected on 2
CPU cores: under 2 minutes; every bias as predicted, that of REINFORCE, RLOO and PPO without
whitening 0; every learner below 2 % of its first gap, but for GRPO with its KL in the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import checks
from jaxrl_llm.envs import token_mdp
from jaxrl_llm.lm import estimator_bias, estimators, exact
from jaxrl_llm.nn.gpt2 import GPT2
from jaxrl_llm.training import cli, experiment, plotting, report

SHAPE: dict[str, Any] = {"vocab_size": 3, "num_prompts": 2}
PROBLEMS = {"fixed": {"length": 2}, "ragged": {"length": 3, "end_token": 0}}
BY_LENGTH = ("ppo, lambda 1", "grpo, k2", "dapo", "dr_grpo, k2")
NOTE = "Along the exact gradient, in % of its length; z = (measured - predicted) / error."


@dataclass(frozen=True, kw_only=True)
class Config(experiment.TrainConfig):
    """Every estimator and learner of alignment on token MDPs, beside exact answers."""

    num_checkpoints: int = 1
    num_minibatches: int = 20_000
    """Groups of responses that each bias is measured by."""
    learners: exact.LearnersConfig = exact.LearnersConfig()

    def validate(self) -> None:
        super().validate()
        checks.at_least("num_minibatches", self.num_minibatches, 2)


def main(config: Config) -> dict[str, float]:
    """Prints what estimators miss and learners lack, draws the gap; returns all numbers."""
    run, result = experiment.open_run("token_mdp_oracle", config), {}
    for name, size in PROBLEMS.items():
        result |= show_biases(run.config, name, **size)
    return experiment.finish(run, result | show_gaps(run))


def show_biases(config: Config, problem: str, **size: Any) -> dict[str, float]:
    """The bias of each estimator; where lengths differ, of those for which they matter."""
    mdp, logits = estimator_bias.random_problem(config.seed, **SHAPE, **size)
    rows, result, key = [], {}, jax.random.key(config.seed)
    for index, (name, estimator) in enumerate(estimators.make(mdp, logits).items()):
        if mdp.end_token is None or name.startswith(BY_LENGTH):
            number = config.num_minibatches
            each = jax.random.fold_in(key, index)
            found = estimator_bias.bias(estimator, mdp, logits, each, num_minibatches=number)
            percents = [100 * share for share in found[:3]]
            cells = [f"{percents[0]:+.2f}", f"{percents[1]:+.2f}", f"{percents[2]:.2f}"]
            rows.append((name, estimator.target, *cells, f"{found.z:+.2f}"))
            result |= {f"{problem}: {name}: {k}": v for k, v in found._asdict().items()}
    title = f"Bias of estimators, responses of {'one length' if problem == 'fixed' else 'any length'}"
    columns = ("estimator", "gradient of", "predicted", "measured", "error", "z")
    report.print_table(title, columns, rows, footer=NOTE)
    return result


def show_gaps(run: experiment.Run[Config]) -> dict[str, float]:
    ...
