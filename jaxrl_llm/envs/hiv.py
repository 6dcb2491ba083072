"""HIV: when to give and when to interrupt two antiretroviral drugs, in six differential equations.

Research only, not for clinical use. Cells and virions are per millilitre, time is in days, a step
is 5 days, and 200 steps are 1000 days. T1 are CD4+ T-lymphocytes, T2 macrophages, a star marks the
infected ones, V is free virus and E are cytotoxic T-lymphocytes:

    T1'  = lambda1 - d1 T1 - (1 - e1) k1 V T1
    T1*' = (1 - e1) k1 V T1 - delta T1* - m1 E T1*
    T2'  = lambda2 - d2 T2 - (1 - f e1) k2 V T2
    T2*' = (1 - f e1) k2 V T2 - delta T2* - m2 E T2*
    V'   = (1 - e2) N_T delta (T1* + T2*) - c V - [(1 - e1) rho1 k1 T1 + (1 - f e1) rho2 k2 T2] V
    E'   = lambda_E + b_E I / (I + K_b) E - d_E I / (I + K_d) E - delta_E E,   I = T1* + T2*

The four actions give no drug, a reverse transcriptase inhibitor (e1 = .7), a protease inhibitor
(e2 = .3) or both. The reward after a step, of the state AFTER it, is
-Q V - R1 e1^2 - R2 e2^2 + S E with Q = .1, R1 = 20000, R2 = 2000, S = 1000: drugs have side
effects, and an immune response that holds the virus without them is worth the most. It reaches
3.5e8 a step; `reward_scale` makes it fit for learning. Nobody dies in this model.

Without drugs there are two stable equilibria, unhealthy and healthy. An episode starts at the
unhealthy one.

Source: Adams, Banks, Kwon & Tran (2004), "Dynamic multidrug therapies for HIV: optimal and STI
  control approaches", Mathematical Biosciences and Engineering 1 (model, constants, equilibria);
  Ernst, Stan, Goncalves & Wehenkel (2006), "Clinical data based optimal STI strategies for HIV: a
  reinforcement learning approach", CDC (decisions every 5 days, reward).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import struct

from jaxrl_llm import checks
from jaxrl_llm.envs import core
from jaxrl_llm.envs.ode import rk4_step
from jaxrl_llm.envs.patient_variation import constants, log_normal_patient
from jaxrl_llm.types import Array, Box, Discrete, Environment, Key, TimeStep

STEP = 5.0
"""Days."""

observation_names = (
    "log CD4+ cells",
    "log infected CD4+ cells",
    "log macrophages",
    "log infected macrophages",
    "log virus",
    "log cytotoxic cells",
)
action_names = ("no drug", "RTI", "PI", "RTI and PI")

# (e1, e2) of each action.
_EFFICACY = ((0.0, 0.0), (0.7, 0.0), (0.0, 0.3), (0.7, 0.3))

# Base-10 logarithms that an observation of -1 and of 1 stand for.
_LOG_LOW = (3.5, -3.0, -2.0, -3.0, -2.0, 0.0)
_LOG_HIGH = (6.5, 6.5, 4.0, 4.0, 7.0, 6.5)


@struct.dataclass(kw_only=True)
class Cells:
    """What the equations move, `[]` each, per ml.

    Attributes:
      cd4: T1, target cells of type 1.
      infected_cd4: T1*.
      macrophages: T2, target cells of type 2.
      infected_macrophages: T2*.
      virus: V, free virions.
      cytotoxic: E, the immune response.
    """

    cd4: Array
    infected_cd4: Array
    macrophages: Array
    infected_macrophages: Array
    virus: Array
    cytotoxic: Array


@struct.dataclass(kw_only=True)
class Rates:
    """Constants of a patient, `[]` each, named as in the paper's table; per day unless said.

    Attributes:
      lambda1, lambda2: production of the two target cells, per ml and day.
      d1, d2: death of the target cells.
      k1, k2: infection, ml per virion and day.
      delta: death of infected cells.
      m1, m2: clearance of infected cells by the immune response, ml per cell and day.
      f: the drug's efficacy in macrophages, as a fraction of that in CD4+ cells.
      n_t: virions that an infected cell sets free.
      c: clearance of virus.
      rho1, rho2: virions that infect a cell.
      lambda_e: production of cytotoxic cells, per ml and day.
      b_e, k_b: most birth of cytotoxic cells, and infected cells per ml at half of it.
      d_e, k_d: most death of them, and infected cells per ml at half of it.
      delta_e: natural death of them.
    """

    lambda1: Array
    lambda2: Array
    d1: Array
    d2: Array
    k1: Array
    k2: Array
    delta: Array
    m1: Array
    m2: Array
    f: Array
    n_t: Array
    c: Array
    rho1: Array
    rho2: Array
    lambda_e: Array
    b_e: Array
    k_b: Array
    d_e: Array
    k_d: Array
    delta_e: Array


@struct.dataclass(kw_only=True)
class Params:
    """What `reset` and `step` read, `[]` each.

    Attributes:
      rates: of the typical patient.
      start: cells at the beginning.
      virus_cost: Q, per virion per ml.
      rti_cost, pi_cost: R1 and R2, of the squared efficacy.
      cytotoxic_worth: S, per cell per ml.
      reward_scale: all rewards are multiplied by it.
    """

    rates: Rates
    start: Cells
    virus_cost: Array
    rti_cost: Array
    pi_cost: Array
    cytotoxic_worth: Array
    reward_scale: Array


@struct.dataclass(kw_only=True)
class State:
    """One patient: `cells`, and the `rates` drawn at the start of the episode."""

    cells: Cells
    rates: Rates


def default_rates() -> Rates:
    """Of Adams et al. (2004), table 1."""
    return Rates(
        **constants(
            lambda1=1e4,
            lambda2=31.98,
            d1=0.01,
            d2=0.01,
            k1=8e-7,
            k2=1e-4,
            delta=0.7,
            m1=1e-5,
            m2=1e-5,
            f=0.34,
            n_t=100.0,
            c=13.0,
            rho1=1.0,
            rho2=1.0,
            lambda_e=1.0,
            b_e=0.3,
            k_b=100.0,
            d_e=0.25,
            k_d=500.0,
            delta_e=0.1,
        )
    )


def equilibrium(which: Literal["unhealthy", "healthy"]) -> Cells:
    """Where the typical patient stays without drugs, to 8 digits."""
    checks.one_of("which", which, ("unhealthy", "healthy"))
    values = {
        "unhealthy": (163572.75, 11944.943, 4.9954235, 45.599014, 63918.596, 23.543978),
        "healthy": (967838.67, 76.012098, 620.51826, 6.0917816, 415.37565, 353108.04),
    }[which]
    names = [field.name for field in dataclasses.fields(Cells)]
    return Cells(**constants(**dict(zip(names, values, strict=True))))


def derivative(
    cells: Cells, rti: Array, pi: Array, rates: Rates, *, fastest_infection: float = jnp.inf
) -> Cells:
    """The six equations of the module, per ml and day.

    Virus infects macrophages at up to 200 per cell and day when it rebounds, 15 times as fast as
    anything else moves, and they are then so few that only what is newly produced is infected.
    Above `fastest_infection`, the loss L of macrophages per day is slowed to it, which leaves where
    they settle as it is: with a = min(1, fastest_infection / L), a share a of the infection follows
    the equation and 1 - a infects what is produced, lambda2 - d2 T2.

    Args:
      cells: now.
      rti: e1, the efficacy of the reverse transcriptase inhibitor, in [0, 1].
      pi: e2, that of the protease inhibitor, in [0, 1].
      rates: of the patient.
      fastest_infection: per day; infinity for the equations as they stand.
    """
    entry1 = (1 - rti) * rates.k1 * cells.virus
    entry2 = (1 - rates.f * rti) * rates.k2 * cells.virus
    infection1 = entry1 * cells.cd4
    produced2 = rates.lambda2 - rates.d2 * cells.macrophages
    share = 1 / jnp.maximum(1, (rates.d2 + entry2) / fastest_infection)
    infection2 = share * entry2 * cells.macrophages + (1 - share) * produced2
    infected = cells.infected_cd4 + cells.infected_macrophages
    birth = rates.b_e * infected / (infected + rates.k_b)
    death = rates.d_e * infected / (infected + rates.k_d)
    immune = cells.cytotoxic
    return Cells(
        cd4=rates.lambda1 - rates.d1 * cells.cd4 - infection1,
        infected_cd4=infection1 - (rates.delta + rates.m1 * immune) * cells.infected_cd4,
        macrophages=produced2 - infection2,
        infected_macrophages=infection2
        - (rates.delta + rates.m2 * immune) * cells.infected_macrophages,
        virus=(1 - pi) * rates.n_t * rates.delta * infected
        - rates.c * cells.virus
        - rates.rho1 * infection1
        - rates.rho2 * infection2,
        cytotoxic=rates.lambda_e + (birth - death - rates.delta_e) * immune,
    )


def make(
    *,
    start: Literal["unhealthy", "healthy"] = "unhealthy",
    max_steps: int = 200,
    patient_variation: float = 0.0,
    reward_scale: float = 1.0,
    num_substeps: int = 100,
) -> Environment:
    """The problem as an environment; the observation is `[6]`, see `observation_names`.

    Observations are base-10 logarithms of the cells per ml, mapped to [-1, 1] and clipped there.
    `TimeStep.info` holds the cells themselves, named as in `Cells`, and the efficacies `rti` and
    `pi`, `[]` each.

    Args:
      start: the equilibrium (of the typical patient) at which an episode begins.
      max_steps: truncate after this many steps of 5 days.
      patient_variation: standard deviation of the logarithm of each rate: 0 for the published
        patient, .1 for rates that differ by about 10%.
      reward_scale: multiplies the reward, which is of the order of 1e4 to 1e8.
      num_substeps: of the integrator a step, 50 or more. With 100 the base-10 logarithms stay
        within 2e-4 of an adaptive solver's over 200 steps in float32, and that of T2 within .004;
        200 bring T2 within 4e-4.

    Raises:
      ValueError: for an option out of range.
    """
    checks.one_of("start", start, ("unhealthy", "healthy"))
    checks.at_least("num_substeps", num_substeps, 50)
    checks.between("patient_variation", patient_variation, 0, 0.5)
    checks.positive("reward_scale", reward_scale)
    # Well inside the region where the integrator is stable.
    fastest_infection = 2.5 * num_substeps / STEP

    def reset(key: Key, params: Params) -> tuple[State, Array]:
        rates = params.rates
        if patient_variation:
            rates = log_normal_patient(key, rates, patient_variation)
        return State(cells=params.start, rates=rates), observe(params.start)

    def step(key: Key, state: State, action: Array, params: Params) -> tuple[State, TimeStep]:
        del key
        rti, pi = jnp.asarray(_EFFICACY, state.cells.virus.dtype)[action]
        cells = rk4_step(
            lambda cells: derivative(
                cells, rti, pi, state.rates, fastest_infection=fastest_infection
            ),
            state.cells,
            STEP,
            num_substeps,
        )
        reward = (
            params.cytotoxic_worth * cells.cytotoxic
            - params.virus_cost * cells.virus
            - params.rti_cost * rti**2
            - params.pi_cost * pi**2
        )
        return dataclasses.replace(state, cells=cells), TimeStep(
            observation=observe(cells),
            reward=params.reward_scale * reward,
            terminated=jnp.bool_(False),
            truncated=jnp.bool_(False),
            info={
                **{field.name: getattr(cells, field.name) for field in dataclasses.fields(cells)},
                "rti": rti,
                "pi": pi,
            },
        )

    environment = Environment(
        name="hiv",
        reset=reset,
        step=step,
        default_params=Params(
            rates=default_rates(),
            start=equilibrium(start),
            **constants(
                virus_cost=0.1,
                rti_cost=20000.0,
                pi_cost=2000.0,
                cytotoxic_worth=1000.0,
                reward_scale=reward_scale,
            ),
        ),
        observation_space=Box(shape=(6,), low=-1.0, high=1.0),
        action_space=Discrete(num=len(action_names)),
    )
    return core.time_limit(environment, max_steps)


def observe(cells: Cells) -> Array:
    """Logarithms of the cells per ml, `[6]`, scaled to [-1, 1] and clipped there."""
    values = jnp.stack([getattr(cells, field.name) for field in dataclasses.fields(cells)])
    low, high = (jnp.asarray(bound, values.dtype) for bound in (_LOG_LOW, _LOG_HIGH))
    # Far below any bound, and never 0 or, by rounding, negative.
    logarithm = jnp.log10(jnp.maximum(values, 1e-6))
    return jnp.clip(2 * (logarithm - low) / (high - low) - 1, -1, 1)
