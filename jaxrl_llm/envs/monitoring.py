"""Patient monitoring: ten vital signs and four intensities of treatment.

SYNTHETIC; research only, not for clinical use. The two variants share the actions, and the first
ten observations are the vital signs:

- `"guide"` (`envs.monitoring_guide`): deviations from normal that grow unless they are treated;
- `"clinical"` (`envs.monitoring_clinical`): severity, a drug that lags and lingers, side effects,
  patients that differ, death and discharge.

In both, the part of the state that matters has few dimensions, so that the optimum is known:
`reference_values`.
"""

from __future__ import annotations

import itertools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import checks
from jaxrl_llm.envs import core, monitoring_clinical, monitoring_guide
from jaxrl_llm.kernels import bellman, finite_horizon
from jaxrl_llm.types import MDP, Array, Environment, SuccessorMDP

Variant = Literal["guide", "clinical"]

action_names = ("no treatment", "mild", "moderate", "intensive")
vital_names = monitoring_clinical.vital_names
observation_names = monitoring_clinical.observation_names


def make(
    *, variant: Variant = "guide", is_hidden: bool = False, max_steps: int | None = 100
) -> Environment:
    """The environment: a `Box` of scaled vital signs, and `Discrete(num=4)`.

    The observation of the guide's variant, and of the clinical one if `is_hidden`, is the first
    ten of `observation_names`.

    Args:
      variant: see the module.
      is_hidden: of the clinical variant, whether only the vital signs are seen.
      max_steps: truncate an episode after this many steps; never when None.
    """
    checks.one_of("variant", variant, ("guide", "clinical"))
    if variant == "clinical":
        environment = monitoring_clinical.make(is_hidden=is_hidden)
    elif is_hidden:
        raise ValueError("is_hidden is True; the guide's variant hides nothing, use 'clinical'")
    else:
        environment = monitoring_guide.make()
    return environment if max_steps is None else core.time_limit(environment, max_steps)


def reference_values(
    *, variant: Variant = "guide", discount: float = 1.0, max_steps: int = 100
) -> dict[str, float]:
    """Mean returns of an episode of `max_steps` steps, each by backward induction on a grid.

    The policies are the best of all, which sees the whole state and knows the patient's kind;
    random actions; each action alone; and `"threshold"`, the best of the rules that give one action
    up to some severity and the same or a stronger one above it.

    Args:
      variant: see the module.
      discount: in [0, 1].
      max_steps: the time limit.
    """
    checks.one_of("variant", variant, ("guide", "clinical"))
    checks.between("discount", discount, 0, 1)
    checks.at_least("max_steps", max_steps, 1)
    if variant == "guide":
        problems = [monitoring_guide.latent_mdp(discount=discount)]
        severity = monitoring_guide.latent_severity()
    else:
        problems = [
            monitoring_clinical.latent_mdp(*kind, discount=discount)
            for kind in monitoring_clinical.kinds()
        ]
        severity = monitoring_clinical.latent_severity()
    actions = range(len(action_names))
    rules = [
        (low, high, threshold)
        for low, high in itertools.combinations(actions, 2)
        for threshold in np.linspace(0, severity.max(), 11)[1:-1]
    ]
    policies = [jnp.full(len(severity), action) for action in actions]
    policies += [jnp.where(severity > threshold, high, low) for low, high, threshold in rules]

    @jax.jit
    def optimum(mdp: MDP | SuccessorMDP) -> Array:
        return mdp.initial @ finite_horizon.backward_induction(mdp, max_steps).value[0]

    @jax.jit
    def value(mdp: MDP | SuccessorMDP, policy: Array) -> Array:
        return mdp.initial @ finite_horizon.horizon_evaluation(mdp, policy, max_steps)[0]

    @jax.jit
    def fixed_value(mdp: MDP | SuccessorMDP, policy: Array) -> Array:
        # With no other action left in the problem there is less to look ahead.
        return value(mdp.restrict(policy), jnp.zeros_like(policy))

    def mean(values: list[Array]) -> float:
        return float(np.mean([float(value) for value in values]))

    fixed = [mean([fixed_value(mdp, policy) for mdp in problems]) for policy in policies]
    return {
        "optimal": mean([optimum(mdp) for mdp in problems]),
        "random": mean([value(mdp, bellman.uniform_policy(mdp)) for mdp in problems]),
        **dict(zip(action_names, fixed[: len(actions)], strict=True)),
        "threshold": max(fixed),
    }
