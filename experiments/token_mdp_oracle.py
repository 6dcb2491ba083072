"""Alignment where every answer is known exactly: the bias of estimators, the gap of learners.

    python -m experiments.token_mdp_oracle

On token MDPs so small that all responses are listed, the expected gradient of each estimator is
predicted by its definition, and measured by sampling the library's own losses. Then a tiny GPT-2
learns by each algorithm; its gap is what it falls short of the closed-form optimum. Expected on 2
CPU cores: under 2 minutes; every bias as predicted, that of REINFORCE, RLOO and PPO without
whitening 0; every learner below 2 % of its first gap, but for GRPO with its KL in the loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax

from jaxrl_llm import checks
from jaxrl_llm.lm import estimator_bias, estimators, exact
from jaxrl_llm.training import cli, experiment, plotting, report

# Where responses differ in length, a mean over the tokens of a minibatch is another estimator.
PROBLEMS = {
    "one length": ({"length": 2}, None),
    "several lengths": ({"length": 3, "end_token": 0}, estimators.OF_TOKENS),
}
FOOTER = "Along the exact gradient, in % of its length; z = (measured - predicted) / ±."


@dataclass(frozen=True, kw_only=True)
class Config(experiment.TrainConfig):
    """Every estimator and learner of alignment on token MDPs, beside exact answers."""

    num_checkpoints: int = 1
    num_minibatches: int = 20_000
    """Groups of responses that each bias is measured by."""
    learners: exact.LearnersConfig = field(default_factory=exact.LearnersConfig)

    def validate(self) -> None:
        super().validate()
        checks.at_least("num_minibatches", self.num_minibatches, 2)
        self.learners.validate()


def main(config: Config) -> dict[str, float]:
    """Prints what estimators and learners miss, draws how gaps close; returns all numbers."""
    run, result = experiment.open_run("token_mdp_oracle", config), {}
    config, settings, mdp = run.config, run.config.learners, None
    *bias_keys, init_key, order_key = experiment.keys(run, 2 + len(PROBLEMS))
    for (lengths, (size, names)), key in zip(PROBLEMS.items(), bias_keys, strict=True):
        mdp, logits = estimator_bias.random_problem(config.seed, **size)
        found = estimators.biases(mdp, logits, key, config.num_minibatches, names)
        columns = ("estimator", "predicted\nbias", "measured\nbias", "±", "z")
        rows = [(name, *bias.cells()) for name, bias in found.items()]
        report.print_table(f"Estimators, responses of {lengths}", columns, rows, footer=FOOTER)
        for name, bias in found.items():
            result |= {f"{lengths}/{name}/{k}": number for k, number in bias._asdict().items()}

    model, params = exact.tiny_model(mdp, init_key)
    mdp = exact.with_reference(model, params, mdp)
    gap, curves, rows = jax.jit(lambda params: exact.gap(model, params, mdp)), {}, []
    first = result["gap_at_start"] = float(gap(params))
    for name, learner in exact.learners(settings, model, params, mdp, order_key).items():
        stage = run.start_stage(name)
        state = experiment.train(
            stage, learner.algorithm, state=learner.state, data=learner.data,
            num_steps=settings.num_iterations, items_per_step=1, unit="iterations",
            evaluate=lambda state: {"gap": gap(state.train.params)},
        )  # fmt: skip
        last = result[f"{name}_gap"] = float(gap(state.train.params))
        result[f"{name}_share"] = share = last / first
        curves[name] = [first, *experiment.curve(stage, "gap")[1]]
        rows.append((name, f"{first:.5f}", f"{last:.5f}", f"{100 * share:.2f}"))
    title, columns = "Gap of learners to the optimum", ("learner", "at first", "at last", "% left")
    report.print_table(title, columns, rows)
    figure = plotting.convergence(curves, title=title, xlabel="Point of the curve", ylabel="Gap")
    plotting.save_figure(figure, run.directory / "gap.png")
    return experiment.finish(run, result)


if __name__ == "__main__":
    cli.main(main, Config)
