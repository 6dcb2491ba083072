"""When to act on what cannot be seen: the tiger and a diagnosis, solved over beliefs.

    python -m experiments.pomdp_tiger

Plans bound V* from below, and one exact backup proves how near; QMDP thinks that the state will
show itself, and so never pays to know. Both are tried, with an exact filter.
Expected on 2 CPU cores: under a minute; V* is 19.371368 for the tiger, where QMDP says 189, and
-14.667 for the diagnosis (SYNTHETIC). Research only, not for clinical use.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import jax
import numpy as np

from jaxrl_llm import checks
from jaxrl_llm.envs import diagnosis, tiger
from jaxrl_llm.kernels import belief
from jaxrl_llm.training import belief_evaluation, belief_picture, cli, experiment

Problem = Literal["tiger", "diagnosis"]
PROBLEMS = {  # with the states at the ends of the beliefs, and what grows from one to the other
    "tiger": (tiger, "The tiger", (1, 0), "Probability that the tiger is left"),
    "diagnosis": (diagnosis, "Diagnosis (SYNTHETIC)", (0, 1), "Probability of early disease"),
}


@dataclass(frozen=True, kw_only=True)
class Config(experiment.RunConfig):
    """Planning over beliefs. Research only, not for clinical use."""

    problems: tuple[Problem, ...] = get_args(Problem)
    """What to solve."""
    num_beliefs: int = 201
    """Of the regular grid that plans are made for."""
    num_episodes: int = 20_000
    """That each policy is tried in."""

    def validate(self) -> None:
        if not self.problems:
            raise ValueError("problems is empty; name at least one")
        for name in ("num_beliefs", "num_episodes"):
            checks.at_least(name, getattr(self, name), 2)


def main(config: Config) -> dict[str, float]:
    """Solves, prints tables, draws; returns V*, what may be missing, bounds, sampled returns."""
    run, result = experiment.open_run("pomdp_tiger", config), {}
    settings, keys = run.config, experiment.keys(run, len(PROBLEMS))
    size = {"num_episodes": settings.num_episodes, "max_steps": 200}
    for name, key in zip(settings.problems, keys, strict=False):
        module, title, states, axis = PROBLEMS[name]
        with jax.enable_x64(True):
            pomdp = module.pomdp()
            ends = np.eye(pomdp.mdp.num_states)[list(states)]
            line = np.linspace(ends[0], ends[1], settings.num_beliefs)
            solved = belief_evaluation.solve_beliefs(pomdp, np.vstack([pomdp.mdp.initial, line]))
        policies = {"plans": solved.plans.action, "QMDP": partial(belief.q_action, solved.qmdp)}
        tried, problem = {}, (module.make(), module.pomdp())
        for policy, act in policies.items():
            same = jax.random.clone(key)  # the same luck for both
            tried[policy] = belief_evaluation.belief_return(*problem, act, same, **size)
        known = {bound: float(values[0]) for bound, values in solved.bounds.items()}
        shown = {bound: values[1:] for bound, values in solved.bounds.items() if bound != "plans"}
        belief_picture.show_bounds(title, known, (known["plans"], float(solved.missing)), tried)
        words, path = (module.action_names, title, axis), run.directory / f"{name}.png"
        belief_picture.show_plans(path, solved.plans, ends, shown, *words)
        numbers = {"value": known["plans"], "missing": solved.missing, **known}
        numbers |= {f"{policy} return": found.mean for policy, found in tried.items()}
        result |= {f"{name}_{word.replace(' ', '_')}": value for word, value in numbers.items()}
    return experiment.finish(run, result)


if __name__ == "__main__":
    cli.main(main, Config)
