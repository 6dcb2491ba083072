"""Every pytree and protocol shared by two or more parts of the library.

One file a subject: `decision_process`, `experience`, `tokens`, `learning`; import them from here.
"""

from __future__ import annotations

from jaxrl_llm.types.arrays import Array, Key, PyTree
from jaxrl_llm.types.decision_process import MDP, POMDP, Solution, SuccessorMDP
from jaxrl_llm.types.experience import (
    Box,
    Discrete,
    Environment,
    Hybrid,
    HybridAction,
    Policy,
    Space,
    TimeStep,
    Trajectories,
    Transition,
)
from jaxrl_llm.types.learning import Algorithm, Mean, TrainState, hyperparameters
from jaxrl_llm.types.tokens import KVCache, Responses, TokenBatch

__all__ = [
    "MDP",
    "POMDP",
    "Algorithm",
    "Array",
    "Box",
    "Discrete",
    "Environment",
    "Hybrid",
    "HybridAction",
    "KVCache",
    "Key",
    "Mean",
    "Policy",
    "PyTree",
    "Responses",
    "Solution",
    "Space",
    "SuccessorMDP",
    "TimeStep",
    "TokenBatch",
    "TrainState",
    "Trajectories",
    "Transition",
    "hyperparameters",
]
