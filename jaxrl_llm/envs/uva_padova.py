"""The UVA/Padova simulator of 2008: thirty virtual people with type 1 diabetes.

Research only, not for clinical use. It stands for `hovorka` in `glucose.make(model="uva_padova")`.
Amounts are per kilogram of body weight, in mg of glucose and pmol of insulin; time is in minutes;
small letters are parameters of the patient, as they are named in the table:

    q1' = -kmax q1 + d                     solid in the stomach, mg
    q2' = kmax q1 - kgut q2                ground in the stomach
    q3' = kgut q2 - kabs q3                in the intestine
    Gp' = EGP + f kabs q3/BW - Fsnc - E - k1 Gp + k2 Gt          glucose in plasma
    Gt' = k1 Gp - k2 Gt - (Vm0 + Vmx X) Gt/(Km0 + Gt)            and in tissue
    Ip' = m1 Il + ka1 s1 + ka2 s2 - (m2 + m4) Ip                 insulin in plasma
    X'  = p2u (Ip/Vi - Ib - X)             its effect on uptake
    Z'  = ki (Ip/Vi - Z),  Y' = ki (Z - Y)                       and, delayed, on production
    Il' = m2 Ip - (m1 + m30) Il            insulin in the liver
    s1' = u - (ka1 + kd) s1,  s2' = kd s1 - ka2 s2               and under the skin
    C'  = ksc (Gp - C)                     glucose under the skin, where a sensor is

EGP = max(kp1 - kp2 Gp - kp3 Y, 0) and E = max(ke1 (Gp - ke2), 0). With M mg eaten since the meal
began, and what the stomach held then, it empties at kgut = kmin + (kmax - kmin)/2 ·
[tanh(a (q1 + q2 - b M)) - tanh(c (q1 + q2 - d M)) + 2], a = 5/(2 M (1 - b)), c = 5/(2 M d), and at
kmax where M is 0. A meal is eaten at 5 g a minute.

The parameters are read from the installed package `simglucose` (MIT), without importing it.

Source: Dalla Man, Rizza & Cobelli (2007), "Meal simulation model of the glucose-insulin system",
  IEEE Transactions on Biomedical Engineering 54, 1740-1749, and Kovatchev et al. (2009), "In silico
  preclinical trials", Journal of Diabetes Science and Technology 3, 44-55: type 1 diabetes; the
  program simglucose, github.com/jxx123/simglucose, for the eating and for M.
"""

from __future__ import annotations

import csv
import dataclasses
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from numpy.typing import NDArray

from jaxrl_llm import checks
from jaxrl_llm.envs.ode import rk4_step
from jaxrl_llm.types import Array, Key

EATING = 5.0  # g/min
_PMOL_PER_UNIT = 6000.0
_NUM_STATES = 13
_CONSTANTS = tuple(
    "BW Gb Ib kabs kmax kmin b d Vg Vi Vmx Km0 k1 k2 p2u m1 m2 m4 m30 ki kp1 kp2 kp3 f ke1 ke2 Fsnc"
    " Vm0 kd ksc ka1 ka2 u2ss".split()
)


@cache
def table() -> dict[str, dict[str, float]]:
    """The parameters of each patient by name, such as `adult#001`, read once.

    Raises:
      ModuleNotFoundError: the package is not installed.
    """
    spec = find_spec("simglucose")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "simglucose is not installed; run: pip install --no-deps simglucose"
        )
    # Importing the package would ask for gym and for a module that setuptools no longer has.
    path = Path(next(iter(spec.submodule_search_locations))) / "params" / "vpatient_params.csv"
    with path.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    return {
        row["Name"]: {name: float(value) for name, value in row.items() if name != "Name"}
        for row in rows
    }


@struct.dataclass(kw_only=True)
class Patient:
    """One person.

    Attributes:
      constants: by the names of the table, `[]` float32 each; `[P]` in a population.
      initial: `[13]`, the state of the equations, in their order, at rest; `[P, 13]`.
      basal: `[]`, insulin that holds it, U/h; `[P]`.
    """

    constants: dict[str, Array]
    initial: Array
    basal: Array

    @property
    def weight(self) -> Array:
        """In kg."""
        return self.constants["BW"]


@struct.dataclass(kw_only=True)
class Body:
    """The state of the equations, `[]` float32 each, and of the meal.

    Attributes:
      amounts: q1, q2, q3, Gp, Gt, Ip, X, Z, Y, Il, s1, s2, C.
      meal: M, mg.
      planned: what is still to be eaten, g.
      is_eating: bool.
    """

    amounts: tuple[Array, ...]
    meal: Array
    planned: Array
    is_eating: Array


def population(names: tuple[str, ...] | None = None) -> Patient:
    """The patients called `names`, all thirty when None, stacked: `[P, ...]`.

    Raises:
      ModuleNotFoundError: simglucose is not installed.
      ValueError: there is nobody of that name, or no name.
    """
    people = table()
    names = tuple(people) if names is None else names
    checks.not_empty("names", names)
    for place, name in enumerate(names):
        checks.one_of(f"names[{place}]", name, people)

    def column(name: str) -> NDArray[np.float64]:
        return np.array([people[person][name] for person in names])

    initial = np.stack([column(f"x0_{index:2d}") for index in range(1, _NUM_STATES + 1)], axis=-1)
    basal = column("u2ss") * column("BW") / _PMOL_PER_UNIT * 60
    return Patient(
        constants={name: jnp.asarray(column(name), float) for name in _CONSTANTS},
        initial=jnp.asarray(initial, float),
        basal=jnp.asarray(basal, float),
    )


def sample_patient(key: Key, population: Patient) -> Patient:
    """One of the `population`, each as likely as another."""
    chosen = jax.random.randint(key, (), 0, population.basal.shape[0])
    return jax.tree.map(lambda leaf: leaf[chosen], population)


def rest(patient: Patient, glucose: Array) -> Body:
    """The body after a long time of basal insulin and no meal, but with `glucose`, mg/dL."""
    ratio = glucose / patient.constants["Gb"]
    amounts = list(patient.initial)
    for place in (3, 4, 12):  # Gp, Gt, C
        amounts[place] = amounts[place] * ratio
    nothing = jnp.zeros_like(ratio)
    return Body(
        amounts=tuple(amounts),
        meal=nothing,
        planned=nothing,
        is_eating=jnp.zeros_like(nothing, bool),
    )


def derivative(
    amounts: tuple[Array, ...], meal: Array, insulin: Array | float, eaten: Array, patient: Patient
) -> tuple[Array, ...]:
    """The right-hand sides of the module's equations.

    Args:
      amounts: as in `Body`.
      meal: M, mg.
      insulin: u, pmol/kg/min.
      eaten: d, mg/min.
      patient: whose body it is.

    Returns:
      Changes a minute.
    """
    q1, q2, q3, Gp, Gt, Ip, X, Z, Y, Il, s1, s2, C = amounts
    p = patient.constants
    emptied = _emptying(q1 + q2, meal, p) * q2
    appearing = p["f"] * p["kabs"] * q3 / p["BW"]
    produced = jnp.maximum(p["kp1"] - p["kp2"] * Gp - p["kp3"] * Y, 0)
    excreted = jnp.maximum(p["ke1"] * (Gp - p["ke2"]), 0)
    used = (p["Vm0"] + p["Vmx"] * X) * Gt / (p["Km0"] + Gt)
    level = Ip / p["Vi"]
    return (
        eaten - p["kmax"] * q1,
        p["kmax"] * q1 - emptied,
        emptied - p["kabs"] * q3,
        produced + appearing - p["Fsnc"] - excreted - p["k1"] * Gp + p["k2"] * Gt,
        p["k1"] * Gp - p["k2"] * Gt - used,
        p["m1"] * Il + p["ka1"] * s1 + p["ka2"] * s2 - (p["m2"] + p["m4"]) * Ip,
        p["p2u"] * (level - p["Ib"] - X),
        p["ki"] * (level - Z),
        p["ki"] * (Z - Y),
        p["m2"] * Ip - (p["m1"] + p["m30"]) * Il,
        insulin - (p["ka1"] + p["kd"]) * s1,
        p["kd"] * s1 - p["ka2"] * s2,
        p["ksc"] * (Gp - C),
    )


def _emptying(stomach: Array, meal: Array, p: dict[str, Array]) -> Array:
    """kgut, 1/min, with `stomach` mg in it since a meal that came to `meal` mg."""
    some = jnp.maximum(meal, 1e-3)
    a = 5 / (2 * some * (1 - p["b"]))
    c = 5 / (2 * some * p["d"])
    shape = jnp.tanh(a * (stomach - p["b"] * some)) - jnp.tanh(c * (stomach - p["d"] * some)) + 2
    return jnp.where(meal > 0, p["kmin"] + (p["kmax"] - p["kmin"]) / 2 * shape, p["kmax"])


def advance(
    body: Body,
    insulin: Array | float,
    carbohydrates: Array | float,
    minutes: float,
    patient: Patient,
) -> Body:
    """The body `minutes` later, minute by minute.

    Args:
      body: now.
      insulin: `[]`, U, given evenly over that time.
      carbohydrates: `[]`, g, of a meal that begins now.
      minutes: to pass; a whole number.
      patient: whose body it is.
    """
    rate = insulin / minutes * _PMOL_PER_UNIT / patient.weight

    def minute(_: int, body: Body) -> Body:
        grams = jnp.minimum(body.planned, EATING)
        is_eating = grams > 0
        begins = is_eating & ~body.is_eating
        meal = jnp.where(begins, body.amounts[0] + body.amounts[1], body.meal) + 1000 * grams
        amounts = rk4_step(
            lambda amounts: derivative(amounts, meal, rate, 1000 * grams, patient),
            body.amounts,
            1.0,
        )
        # The effect on uptake, X, is a difference and may be negative; no amount is.
        amounts = tuple(
            amount if place == 6 else jnp.maximum(amount, 0) for place, amount in enumerate(amounts)
        )
        return Body(amounts=amounts, meal=meal, planned=body.planned - grams, is_eating=is_eating)

    start = dataclasses.replace(body, planned=body.planned + carbohydrates)
    return jax.lax.fori_loop(0, round(minutes), minute, start)


def plasma_glucose(body: Body, patient: Patient) -> Array:
    """In mg/dL."""
    return body.amounts[3] / patient.constants["Vg"]


def interstitial_glucose(body: Body, patient: Patient) -> Array:
    """In mg/dL, where a sensor is."""
    return body.amounts[12] / patient.constants["Vg"]
