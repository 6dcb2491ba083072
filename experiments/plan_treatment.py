"""Four exact solvers plan four treatment problems: what to do in each state, and by what margin.

    python -m experiments.plan_treatment

Expected on 2 CPU cores: under a minute. All solvers agree; from the law of the first state the
optimum is 138.443 (treatment), 110.463 (diabetes) and 82.431 (sepsis management); on ICU-Sepsis it
is 0.8751 survival, clinicians 0.7818, random 0.7801. Research only, not for clinical use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import jax

from jaxrl_llm import checks
from jaxrl_llm.envs import diabetes, icu_sepsis, sepsis_management, treatment
from jaxrl_llm.kernels import bellman
from jaxrl_llm.training import cli, evaluate, experiment, report
from jaxrl_llm.types import SuccessorMDP

Problem = Literal["treatment", "diabetes", "sepsis_management", "icu_sepsis"]
PROBLEMS = {
    "treatment": (treatment, "Five-state treatment", "value"),
    "diabetes": (diabetes, "Diabetes management", "value"),
    "sepsis_management": (sepsis_management, "Sepsis management", "value"),
    "icu_sepsis": (icu_sepsis, "ICU-Sepsis", "survival"),
}


@dataclass(frozen=True, kw_only=True)
class Config(experiment.RunConfig):
    """Exact planning of treatment. Research only, not for clinical use."""

    problems: tuple[Problem, ...] = get_args(Problem)
    """What to solve."""
    tolerance: float = 1e-9
    """Solvers stop at this Bellman residual, or at the rounding error if that is larger."""
    precision: Literal["float64", "float32"] = "float64"
    """Of all arithmetic."""

    def validate(self) -> None:
        checks.not_empty("problems", self.problems)
        checks.at_least("tolerance", self.tolerance, 0)


def main(config: Config) -> dict[str, float]:
    """Solves, prints tables, draws pictures; returns the value and largest residual of each."""
    run, result = experiment.open_run("plan_treatment", config), {}
    with jax.enable_x64(run.config.precision == "float64"):
        mdps = {name: PROBLEMS[name][0].mdp() for name in run.config.problems}
        if "icu_sepsis" in mdps:
            mdps["icu_sepsis"] = bellman.successor_form(mdps["icu_sepsis"])
        solved = experiment.solve(run, mdps, tolerance=run.config.tolerance)
        for name, runs in solved.items():
            (module, title, value_name), stem = PROBLEMS[name], run.directory / name
            plan, names = runs["policy_iteration"], (module.state_names, module.action_names)
            report.show_solvers(stem, title, mdps[name], runs)
            report.show_plan(stem, title, mdps[name], plan.solution, *names, value_name=value_name)
            result[f"{name}_value"] = plan.start_value
            result[f"{name}_residual"] = max(found.solution.residual for found in runs.values())
        if "icu_sepsis" in solved:
            result |= survival(mdps["icu_sepsis"], solved["icu_sepsis"]["policy_iteration"])
    return experiment.finish(run, result)


def survival(mdp: SuccessorMDP, plan: evaluate.SolverRun) -> dict[str, float]:
    """The exact probability of survival on ICU-Sepsis: the optimum, and what it improves on."""
    known = {"random": bellman.uniform_policy(mdp), "clinicians": icu_sepsis.expert_policy()}
    exact = evaluate.exact_returns(mdp, known | {"optimum": plan.solution.policy})
    rows, columns = [(k, f"{v:.6f}") for k, v in exact.items()], ("policy", "exact survival")
    report.print_table("ICU-Sepsis: survival", columns, rows, footer=report.RESEARCH_ONLY)
    return {f"icu_sepsis_{name}": float(value) for name, value in exact.items()}


if __name__ == "__main__":
    cli.main(main, Config)
