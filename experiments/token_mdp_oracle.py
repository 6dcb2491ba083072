"""Alignment where every answer is known exactly: the bias of estimators, the gap of learners.

    python -m experiments.token_mdp_oracle

On token MDPs that list all responses, the mean gradient of each estimator is predicted by its
definition and measured by the library's own losses; then a tiny GPT-2 learns by each algorithm,
as far as a gap to the known optimum. Expected on 2 CPU cores: under 2 minutes; all |z| below 3;
learners keep less than 2 % of their gap, but for GRPO with the KL in its loss: about 40 %.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax

from jaxrl_llm import checks
from jaxrl_llm.lm import estimator_bias, estimators, exact
from jaxrl_llm.training import cli, experiment, plotting, report

SIZES = {"one length": {"length": 2}, "several lengths": {"length": 3, "end_token": 0}}
COLUMNS = ("estimator", "predicted\nbias", "measured\nbias", "±", "z")
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
    config, settings = run.config, run.config.learners
    *bias_keys, init_key, order_key = experiment.keys(run, 4)
    problems = {k: estimator_bias.random_problem(config.seed, **v) for k, v in SIZES.items()}
    for (lengths, (mdp, logits)), key in zip(problems.items(), bias_keys, strict=True):
        names = None if mdp.end_token is None else estimators.OF_TOKENS
        found = estimators.biases(mdp, logits, key, config.num_minibatches, names)
        rows = [(name, *bias.cells()) for name, bias in found.items()]
        report.print_table(f"Responses of {lengths}", COLUMNS, rows, footer=FOOTER)
        for name, bias in found.items():
            result |= {f"{lengths}/{name}/{k}": number for k, number in bias._asdict().items()}

    mdp, _ = problems["several lengths"]
    model, params = exact.tiny_model(mdp, init_key)
    mdp = exact.with_reference(model, params, mdp)
    gap = jax.jit(lambda params: exact.gap(model, params, mdp))
    curves, rows, xlabel, first = {}, [], "", float(gap(params))
    for name, learner in exact.learners(settings, model, params, mdp, order_key).items():
        stage = run.start_stage(name)
        state = experiment.train(
            stage, learner.algorithm, state=learner.state, data=learner.data,
            num_steps=settings.num_iterations, items_per_step=1, unit="iterations",
            evaluate=lambda state: {"gap": gap(state.train.params)},
        )  # fmt: skip
        last = result[f"{name}_gap"] = float(gap(state.train.params))
        steps, gaps = experiment.curve(stage, "gap")
        curves[name], xlabel = [first, *gaps], f"Points, {steps[0]} iterations apart"
        rows.append((name, f"{first:.5f}", f"{last:.5f}", f"{100 * last / first:.2f}"))
    title, columns = "Gap of learners to the optimum", ("learner", "at first", "at last", "% left")
    report.print_table(title, columns, rows)
    figure = plotting.convergence(curves, title=title, xlabel=xlabel, ylabel="Gap")
    plotting.save_figure(figure, run.directory / "gap.png")
    return experiment.finish(run, result | {"start_gap": first})


if __name__ == "__main__":
    cli.main(main, Config)
