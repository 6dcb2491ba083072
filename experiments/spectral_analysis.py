"""How fast do chains of patients forget their start, and where do they end? Spectra and oracles.

    python -m experiments.spectral_analysis

Expected on 2 CPU cores: about a minute. The patient chain relaxes in 5.683346 steps; a stay on
ICU-Sepsis lasts 9.4623 (random) to 10.9917 (optimal). Research only, not for clinical use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import numpy as np

from jaxrl_llm import checks, make_mdp
from jaxrl_llm.envs import chain, icu_sepsis, treatment
from jaxrl_llm.kernels import bellman, markov_chain
from jaxrl_llm.training import cli, experiment, spectrum

Chain = Literal["patient", "illness", "treatment", "ward_rota", "random", "clinicians", "optimal"]
SHIFTS = [f"{shift}, team {team}" for shift in ("Day", "Evening", "Night") for team in "AB"]
STAYS = {"random": (9.4623, 0.7801), "clinicians": (9.2380, 0.7818), "optimal": (10.9917, 0.8751)}
ORACLES = {
    "patient": {"second eigenvalue": 0.838658, "relaxation time": 5.683346},
    "illness": {"second eigenvalue": 0.6 + 0.02**0.5, "long run Healthy": 9 / 14},
    "treatment": {"absorbed in Recovered": 1.0},
    "ward_rota": {"largest modulus below 1": 0.6, f"long run {SHIFTS[0]}": 1 / 6},
} | {k: {"time to absorption": t, "absorbed in Survival": p} for k, (t, p) in STAYS.items()}


@dataclass(frozen=True, kw_only=True)
class Config(experiment.RunConfig):
    """Spectra of chains of patients. Research only, not for clinical use."""

    chains: tuple[Chain, ...] = get_args(Chain)
    """What to analyse; `random`, `clinicians` and `optimal` are policies on ICU-Sepsis."""

    def validate(self) -> None:
        checks.not_empty("chains", self.chains)


def main(config: Config) -> dict[str, float]:
    """Prints a table a chain and draws pictures; returns what was measured of every chain."""
    run, result, analyses = experiment.open_run("spectral_analysis", config), {}, {}
    with jax.enable_x64(True):
        for name in run.config.chains:
            mdp, policy, names = problem(name)
            matrix = markov_chain.stop_at(mdp.under(policy), mdp.terminal)
            title = name.replace("_", " ").capitalize() + ", ICU-Sepsis" * (name in STAYS)
            analyses[title] = found = spectrum.analyse(matrix, mdp.initial, num_steps=60)
            stem, known = run.directory / name, ORACLES[name]
            for key, number in spectrum.show_chain(stem, title, found, names, known).items():
                result[f"{name}_{key}".replace(" ", "_")] = number
            if name == "clinicians":
                spectrum.show_low_rank(stem, title, mdp, policy, 0.99, range(100, 701, 100))
    spectrum.show_convergence(run.directory / "convergence.png", analyses)
    return experiment.finish(run, result)


def problem(name: Chain) -> tuple[Any, ...]:
    """A process, the policy that makes it a chain, and the names of its states."""
    if name in STAYS or name == "treatment":
        module = treatment if name == "treatment" else icu_sepsis
        mdp, names = module.mdp(), module.state_names
    elif name == "ward_rota":  # 4 times in 5 the same team takes over at the next shift
        rota = np.kron(np.roll(np.eye(3), 1, axis=1), [[0.8, 0.2], [0.2, 0.8]])
        mdp, names = make_mdp(rota[:, None], 0.0, 0.9, initial=np.eye(6)[0]), SHIFTS
    else:
        mdp, names = chain.mdp(name=name), chain.state_names(name=name)
    if name in ("treatment", "optimal"):
        return mdp, bellman.policy_iteration(mdp).policy, names
    expert = name == "clinicians"
    return mdp, icu_sepsis.expert_policy() if expert else bellman.uniform_policy(mdp), names


if __name__ == "__main__":
    cli.main(main, Config)
