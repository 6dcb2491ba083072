"""Insulin by a rule whose aggressiveness somebody else sets, and how well that holds glucose.

Research only, not for clinical use; the patients are SYNTHETIC.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxrl_llm.envs import basal_bolus, core, glucose
from jaxrl_llm.training import plotting, report
from jaxrl_llm.training.episode_picture import FOOTER, Doses, Event, Series, save
from jaxrl_llm.types import Algorithm, Array, Box, Environment, Key, Mean, PyTree, TimeStep

NUM_HELD, MINUTES = 6, 5.0
DECISIONS_A_DAY = 48
LARGEST = 3.0  # times as much insulin as the rule, or as little
MEASURES = ("in_range", "hypoglycaemia", "hyperglycaemia", "glucose", "risk", "insulin")


def adjusted_rule() -> Environment:
    """Glucose under the basal-bolus rule, made stronger or weaker every half an hour.

    The action `[2]` in [-1, 1] multiplies the rule's basal rate, and its boluses, by 3^action until
    the next one: 0 is the published rule. The reward is minus the share of time out of 70 to 180
    mg/dL, time below counted twice; extreme glucose does not end the day. `TimeStep.info` holds
    what `glucose` says of each of the six steps, `[6]`. The observation `[8]` is that of `glucose`,
    but for the readings: the level, in 50 mg/dL beyond 125, and the trend over 20 minutes, in 25
    mg/dL.
    """
    inner, rule = glucose.make(reward="range", minutes=MINUTES, terminate=False), basal_bolus.rule()

    def reset(key: Key, params: PyTree) -> tuple[PyTree, Array]:
        state, observation = inner.reset(key, params)
        return (state, observation), _summary(observation)

    def step(key: Key, state: PyTree, action: Array, params: PyTree) -> tuple[PyTree, TimeStep]:
        basal, bolus = LARGEST ** jnp.clip(action, -1, 1)
        stronger = dataclasses.replace(
            rule,
            carbohydrate_rule=rule.carbohydrate_rule / bolus,
            correction_rule=rule.correction_rule / bolus,
        )

        def five_minutes(state: PyTree, index: Array) -> tuple[PyTree, TimeStep]:
            state, observation = state
            seen = glucose.read(observation)
            hours = basal_bolus.hours_of_insulin(seen, stronger, minutes=MINUTES)
            dose = glucose.to_action(hours + (basal - 1) * MINUTES / 60)[None]
            state, step = inner.step(jax.random.fold_in(key, index), state, dose, params)
            return (state, step.observation), step

        state, steps = jax.lax.scan(five_minutes, state, jnp.arange(NUM_HELD))
        return state, TimeStep(
            observation=_summary(steps.observation[-1]),
            reward=jnp.mean(steps.reward) - 1,
            terminated=jnp.bool_(False),
            truncated=steps.truncated[-1],
            info=steps.info,
        )

    return dataclasses.replace(
        inner,
        reset=reset,
        step=step,
        observation_space=Box(shape=(8,), low=-10.0, high=10.0),
        action_space=Box(shape=(2,), low=-1.0, high=1.0),
    )


def _summary(observation: Array) -> Array:
    """Level and trend for the readings; networks learn slowly from six nearly equal numbers."""
    readings = glucose.read(observation).readings
    first, last = jnp.mean(readings[:2]), jnp.mean(readings[-2:])
    level_and_trend = jnp.stack([(last - 125) / 50, (last - first) / 25])
    return jnp.concatenate([level_and_trend, observation[glucose.NUM_READINGS :]])


def annealed(algorithm: Algorithm, num_updates: int) -> Algorithm:
    """The same, with learning rates that fall linearly to a twentieth after `num_updates`."""

    def step(key: Key, state: PyTree) -> tuple[PyTree, dict[str, Mean]]:
        constant, left = state.hyperparameters, 1 - 0.95 * state.train.step / num_updates
        names = ("actor_learning_rate", "critic_learning_rate")
        lower = {name: getattr(constant, name) * left for name in names}
        now = dataclasses.replace(constant, **lower)
        state, metrics = algorithm.step(key, dataclasses.replace(state, hyperparameters=now))
        return dataclasses.replace(state, hyperparameters=constant), metrics

    return Algorithm(init=algorithm.init, step=step)


def follow(
    environment: Environment, act: Callable[[Array], Array], key: Key, num_patients: int
) -> dict[str, Array]:
    """A day of each patient under `act`, `[B, 8]` -> `[B, 2]`: `TimeStep.info`, `[B, T]` each.

    The same key gives the same patients, meals and errors of the sensor, whatever is done.
    """
    start_key, step_key = jax.random.split(key)
    running = core.start_batch(environment, start_key, num_patients)
    params = environment.default_params
    each = jax.vmap(environment.step, in_axes=(0, 0, 0, None))

    def body(carry: PyTree, index: Array) -> tuple[PyTree, dict[str, Array]]:
        state, observation = carry
        keys = jax.random.split(jax.random.fold_in(step_key, index), num_patients)
        state, step = each(keys, state, act(observation), params)
        return (state, step.observation), step.info

    start = running.state, running.observation
    _, info = jax.lax.scan(body, start, jnp.arange(DECISIONS_A_DAY))
    return {name: jnp.moveaxis(leaf, 0, 1).reshape(num_patients, -1) for name, leaf in info.items()}


def follow_rule(environment: Environment, key: Key, num_patients: int) -> dict[str, Array]:
    """`follow` the published rule as it is."""
    return follow(environment, lambda seen: jnp.zeros((len(seen), 2)), key, num_patients)


def follow_seeds(
    environment: Environment, actor: nn.Module, params: PyTree, key: Key, num_patients: int
) -> dict[str, Array]:
    """`follow` the mode of each seed's actor, `params` `[seeds, ...]`: `[seeds, B, T]` each."""

    def one(params: PyTree) -> dict[str, Array]:
        def act(observation: Array) -> Array:
            policy: Any = actor.apply(params, observation)
            return policy.action(policy.mode())

        return follow(environment, act, key, num_patients)

    return jax.lax.map(one, params)


def show(rule: dict[str, Array], learned: dict[str, Array]) -> dict[str, float]:
    """A table of both on the same patients' days; the shares of time, and what was gained.

    Args:
      rule: `[patients, T]` of each measure.
      learned: `[seeds, patients, T]` of each.

    Returns:
      Shares of time in range, below 70 and above 180 mg/dL of either, the gain of time in range,
      averaged over seeds, with its 95 % interval over patients, and that of the worst seed.
    """
    rule, learned = jax.device_get((rule, learned))
    gain = np.mean(learned["in_range"], axis=2) - np.mean(rule["in_range"], axis=1)[None]
    of_patient = gain.mean(axis=0)
    margin = 1.96 * of_patient.std(ddof=1) / len(of_patient) ** 0.5
    deviation = np.mean(learned["in_range"], axis=(1, 2)).std()
    result = {"gain": of_patient.mean(), "gain_low": of_patient.mean() - margin}
    result |= {"gain_high": of_patient.mean() + margin, "worst_seed_gain": gain.mean(axis=1).min()}
    rows = []
    for name, found in (("published rule", rule), ("SAC", learned)):
        shares = [np.mean(found[measure]) for measure in MEASURES[:3]]
        glucose_, risk, insulin = (np.mean(found[measure]) for measure in MEASURES[3:])
        daily = insulin * DECISIONS_A_DAY * NUM_HELD
        numbers = (f"{glucose_:.1f}", f"{10 * 10 * risk:.2f}", f"{daily:.1f}")
        rows.append((name, *(f"{100 * share:.2f}" for share in shares), *numbers))
        short = "rule" if found is rule else "sac"
        result |= {f"{short}_{m}": s for m, s in zip(MEASURES[:3], shares, strict=True)}
    columns = ("dosed by", "70-180\n% of time", "below 70\n%", "above 180\n%", "mean\nmg/dL")
    footer = (
        f"{rule['in_range'].shape[0]} patients' days, the same for both; SAC is the mean of "
        f"{len(gain)} seeds (± {100 * deviation:.2f} % in range).\nGain of time in range: "
        f"{100 * result['gain']:+.2f} % ({100 * result['gain_low']:+.2f} to "
        f"{100 * result['gain_high']:+.2f}, paired 95 %), worst seed "
        f"{100 * result['worst_seed_gain']:+.2f} %.\n{FOOTER}"
    )
    title = "Glucose: the published rule, and SAC that adjusts it"
    report.print_table(title, (*columns, "risk\nindex", "insulin\nU/day"), rows, footer=footer)
    return {name: float(value) for name, value in result.items()}


def draw_curve(
    folder: Path, decisions: NDArray[Any], values: NDArray[Any], rule: dict[str, Array]
) -> None:
    """Time in range `[seeds, T]`, in percent, while it is learned; `rule` has the same patients."""
    figure = plotting.learning_curve(
        decisions,
        values,
        references={"published rule": 100 * float(jnp.mean(rule["in_range"]))},
        title="Glucose: a rule adjusted by SAC",
        xlabel="Decisions, half an hour each",
        ylabel="Time in 70-180 mg/dL (%)",
        footer=FOOTER,
    )
    plotting.save_figure(figure, folder / "learning_curve.png")


def draw_day(folder: Path, rule: dict[str, Array], learned: dict[str, Array]) -> None:
    """The first patient's day, lived twice: glucose and insulin under either, and the meals.

    SAC is the first seed; the arrays are those of `show`.
    """
    rule, learned = jax.device_get((rule, learned))
    hours = MINUTES / 60 * (1 + np.arange(rule["glucose"].shape[1]))
    first = {name: leaf[0] for name, leaf in learned.items()}
    both = {"SAC": first, "the published rule": rule}
    series = [
        Series(f"Glucose under {name}", "mg/dL", found["glucose"][0], normal=(70, 180))
        for name, found in both.items()
    ]
    doses = [
        Doses(f"Insulin under {name}", "U in 5 min", found["insulin"][0])
        for name, found in both.items()
    ]
    eaten = rule["carbohydrates"][0]
    meals = [Event(hours[at], "Meal") for at in np.flatnonzero(eaten > 0)]
    title, path = "Glucose: one day under SAC and under the rule", folder / "episode.png"
    save(path, title, hours, series, doses, meals)
