"""The frame of an experiment: what a resumed run takes over, and what it refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from jaxrl_llm import make_mdp
from jaxrl_llm.training import evaluate, experiment, logging
from jaxrl_llm.types import Algorithm, Mean


@dataclass(frozen=True, kw_only=True)
class Learner:
    rate: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Config(experiment.SeedsConfig):
    learner: Learner = Learner()
    num_seeds: int = 3
    num_evaluations: int = 5
    num_checkpoints: int = 2


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(output_dir=tmp_path)


def walk() -> Algorithm:
    """A random walk that never repeats itself."""

    def step(key, state):
        state = state + jax.random.normal(key, (2,))
        return state, {"height": Mean.of(state)}

    return Algorithm(init=lambda key: jax.random.normal(key, (2,)), step=step)


def train(run: experiment.Run[Any], evaluate: Callable[..., Any] = lambda state: {}) -> Any:
    return experiment.train_seeds(run, walk(), num_steps=10, items_per_step=1, evaluate=evaluate)


def stop_at(number: int) -> Callable[..., dict[str, Any]]:
    """An evaluation that raises in place of its `number`-th point."""
    points = []

    def evaluate(state):
        points.append(state)
        if len(points) == number:
            raise KeyboardInterrupt
        return {"first": state[:, 0]}

    return evaluate


def test_open_run_writes_the_configuration_in_a_new_folder(config, capsys):
    first, second = (experiment.open_run("walk", config) for _ in range(2))
    assert first.directory != second.directory
    assert first.directory.parent == config.output_dir / "walk"
    assert (first.config, first.resumed) == (config, False)
    assert logging.read_config(first.directory, Config) == config
    assert capsys.readouterr().out.splitlines()[0] == f"walk: writing {first.directory}"


def test_open_run_resumes_the_folder_with_its_own_configuration(config, capsys):
    config = replace(config, seed=7, learner=Learner(rate=0.25))
    started = experiment.open_run("walk", config)
    asked = Config(resume=started.directory)
    run = experiment.open_run("walk", asked)
    assert (run.directory, run.config, run.resumed) == (started.directory, config, True)
    assert capsys.readouterr().out.splitlines()[-1] == f"walk: resuming {started.directory}"
    # A flag may be given again, if it says the same.
    agreeing = replace(asked, learner=Learner(rate=0.25), output_dir=Path("elsewhere"))
    assert experiment.open_run("walk", agreeing).config == config


def test_open_run_resumes_the_latest(config):
    runs = [experiment.open_run("walk", replace(config, seed=seed)) for seed in range(3)]
    # The newest by its configuration's time, whatever the names say.
    for run, seconds in zip(runs, (20, 30, 10), strict=True):
        os.utime(run.directory / "config.json", (seconds, seconds))
    (config.output_dir / "walk" / "99999999-999999").mkdir()
    asked = Config(output_dir=config.output_dir, resume=Path("latest"))
    run = experiment.open_run("walk", asked)
    assert (run.directory, run.config.seed) == (runs[1].directory, 1)


@pytest.mark.parametrize(
    ("change", "flag", "asked", "started"),
    [
        ({"seed": 3}, "--seed", "3", "1"),
        ({"num_seeds": 4}, "--num-seeds", "4", "3"),
        ({"learner": Learner(rate=0.1)}, "--learner.rate", "0.1", "0.5"),
    ],
)
def test_open_run_refuses_another_configuration(config, change, flag, asked, started):
    run = experiment.open_run("walk", replace(config, seed=1))
    with pytest.raises(ValueError, match="was started with") as error:
        experiment.open_run("walk", replace(config, resume=run.directory, **change))
    assert str(error.value) == (
        f"{flag} is {asked}, but {run.directory} was started with {started}; "
        "leave it out, or start a new run"
    )


def test_open_run_error_when_there_is_nothing_to_resume(config):
    latest = replace(config, resume=Path("latest"))
    with pytest.raises(ValueError, match=r"walk has no run to resume; start one without --resume$"):
        experiment.open_run("walk", latest)
    absent = replace(config, resume=config.output_dir / "absent")
    with pytest.raises(ValueError, match=r"absent/config.json cannot be read; resume from the fol"):
        experiment.open_run("walk", absent)
    (config.output_dir / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/config.json cannot be read; resume from the folde"):
        experiment.open_run("walk", replace(config, resume=config.output_dir / "file"))


def test_open_run_error_when_the_configuration_is_damaged(config):
    run = experiment.open_run("walk", config)
    path = run.directory / "config.json"
    resumed = replace(config, resume=run.directory)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "num_seeds": "many"}))
    with pytest.raises(ValueError, match=r"config.json: num_seeds is 'many', not int; resume with"):
        experiment.open_run("walk", resumed)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON; start a new run"):
        experiment.open_run("walk", resumed)


@pytest.mark.parametrize("name", ["num_seeds", "num_evaluations", "num_checkpoints"])
def test_train_config_validate_names_the_field(name):
    Config().validate()
    with pytest.raises(ValueError, match=f"^{name} is 0; it must be at least 1$"):
        replace(Config(), **{name: 0}).validate()


def test_train_gives_each_seed_its_own_walk(config):
    state = train(experiment.open_run("walk", config))
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    for seed in range(config.num_seeds):
        algorithm = walk()
        expected = algorithm.init(jax.random.fold_in(init_key, seed))
        for step in range(10):
            key = jax.random.fold_in(jax.random.fold_in(step_key, step), seed)
            expected, _ = algorithm.step(key, expected)
        np.testing.assert_allclose(state[seed], expected, rtol=1e-5, atol=1e-6)


def test_train_logs_what_evaluate_says_and_curve_reads_it(config):
    run = experiment.open_run("walk", config)
    seen = []

    def evaluate(state):
        seen.append(np.asarray(state[:, 0]))
        return {"first": state[:, 0]}

    state = train(run, evaluate)
    steps, values = experiment.curve(run, "first")
    np.testing.assert_array_equal(steps, [2, 4, 6, 8, 10])
    np.testing.assert_array_equal(values, np.stack(seen, axis=1))
    np.testing.assert_array_equal(values[:, -1], state[:, 0])
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["10", "6"]


@pytest.mark.parametrize("number", [1, 3, 4, 5])
def test_train_resumed_ends_in_the_same_bits(config, number, capsys):
    whole = experiment.open_run("walk", config)
    expected = train(whole, lambda state: {"first": state[:, 0]})
    run = experiment.open_run("walk", config)
    with pytest.raises(KeyboardInterrupt):
        train(run, stop_at(number))
    capsys.readouterr()
    resumed = experiment.open_run("walk", replace(config, resume=run.directory))
    actual = train(resumed, lambda state: {"first": state[:, 0]})
    np.testing.assert_array_equal(actual, expected)
    for metric in ("first", "height"):
        for one, other in zip(
            experiment.curve(run, metric), experiment.curve(whole, metric), strict=True
        ):
            np.testing.assert_array_equal(one, other)
    # The checkpoint of step 6 comes after its line; before it there is none.
    assert ("restored step 6 of 10" in capsys.readouterr().out) == (number > 3)
    again = experiment.open_run("walk", replace(config, resume=run.directory))
    np.testing.assert_array_equal(train(again), expected)


def reader() -> Algorithm:
    """Adds a row of its data at every step, and noise."""

    def step(key, state, data):
        state = state + data["row"] + jax.random.normal(key, (2,))
        return state, {"height": Mean.of(state)}

    return Algorithm(init=lambda key: jnp.zeros((2,)), step=step)


def train_one(run: experiment.Run[Any], evaluate: Callable[..., Any], **options: Any) -> Any:
    data = {"row": np.array([1.0, 2.0], np.float32)}
    return experiment.train(
        run, reader(), num_steps=10, items_per_step=1, evaluate=evaluate, data=data, **options
    )


def test_train_of_one_learner_goes_on_from_its_state_with_its_data(config):
    started = train_one(
        experiment.open_run("walk", config), lambda state: {}, state=jnp.array([100.0, 200.0])
    )
    expected = np.array([100.0, 200.0])
    _, step_key = jax.random.split(jax.random.key(config.seed))
    for step in range(10):
        noise = jax.random.normal(jax.random.fold_in(step_key, step), (2,))
        expected = expected + np.array([1.0, 2.0]) + noise
    np.testing.assert_allclose(started, expected, rtol=1e-5)
    from_nothing = train_one(experiment.open_run("walk", config), lambda state: {})
    np.testing.assert_allclose(started - from_nothing, [100.0, 200.0], rtol=1e-5)


@pytest.mark.slow
def test_train_of_one_learner_prefers_a_checkpoint_to_the_state_it_is_given(config, capsys):
    def first(state):
        return {"first": state[0]}

    whole = experiment.open_run("walk", config)
    expected = train_one(whole, first, state=jnp.ones(2))
    run = experiment.open_run("walk", config)

    def stop_late(state):
        if state[0] == late:
            raise KeyboardInterrupt
        return first(state)

    late = experiment.curve(whole, "first")[1][3]
    with pytest.raises(KeyboardInterrupt):
        train_one(run, stop_late, state=jnp.ones(2))
    capsys.readouterr()
    resumed = experiment.open_run("walk", replace(config, resume=run.directory))
    actual = train_one(resumed, first, state=jnp.ones(2))
    np.testing.assert_array_equal(actual, expected)
    assert "restored step 6 of 10" in capsys.readouterr().out
    for one, other in zip(
        experiment.curve(run, "first"), experiment.curve(whole, "first"), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_keys_are_those_of_the_seed_and_none_that_training_uses(config):
    run = experiment.open_run("walk", config)

    def words(keys: Any) -> set[tuple[int, ...]]:
        return set(map(tuple, np.asarray(jax.random.key_data(keys)).reshape(-1, 2).tolist()))

    keys = words(experiment.keys(run, 3))
    assert len(keys) == 3
    assert keys == words(experiment.keys(run, 3))
    assert words(experiment.keys(run, 1)) < keys
    root = jax.random.key(config.seed)
    loops = jax.random.split(jax.random.key(config.seed))
    assert keys.isdisjoint(words(root) | words(loops))
    other = experiment.open_run("walk", replace(config, seed=1))
    assert keys.isdisjoint(words(experiment.keys(other, 3)))


def test_draw_curve_draws_what_train_logged_beside_what_is_known(config, monkeypatch):
    run = experiment.open_run("walk", config)
    train_one(run, lambda state: {"first_height": state[0]})
    drawn = {}

    def learning_curve(steps, values, **options):
        drawn.update(steps=steps, values=values, **options)
        return original(steps, values, **options)

    original = experiment.plotting.learning_curve
    monkeypatch.setattr(experiment.plotting, "learning_curve", learning_curve)
    experiment.draw_curve(run, "first_height", {"floor": 1.0}, title="A walk", footer="by foot")
    steps, values = experiment.curve(run, "first_height")
    np.testing.assert_array_equal(drawn.pop("steps"), steps)
    np.testing.assert_array_equal(drawn.pop("values"), values[None])
    assert drawn == {
        "references": {"floor": 1.0},
        "title": "A walk",
        "xlabel": "Optimiser steps",
        "ylabel": "First height",
        "footer": "by foot",
    }
    assert imread(run.directory / "first_height.png").ndim == 3


def test_train_starts_over_where_the_first_checkpoint_was_never_whole(config):
    run = experiment.open_run("walk", config)
    (run.checkpoints / "6.orbax-checkpoint-tmp").mkdir(parents=True)
    resumed = experiment.open_run("walk", replace(config, resume=run.directory))
    whole = experiment.open_run("walk", config)
    np.testing.assert_array_equal(train(resumed), train(whole))


def test_train_refuses_checkpoints_it_cannot_read(config):
    run = experiment.open_run("walk", config)
    run.checkpoints.write_text("")
    resumed = experiment.open_run("walk", replace(config, resume=run.directory))
    with pytest.raises(NotADirectoryError) as error:
        train(resumed)
    assert error.value.filename == str(run.checkpoints)


def leave_or_stay(reward: float):
    """Leaving at once is worth `reward`, staying 1 a step: the optimum is max(reward, 10)."""
    law = [[[0.0, 1.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]]
    return make_mdp(
        np.array(law),
        np.array([[reward, 1.0], [0.0, 0.0]]),
        0.9,
        terminal=np.array([False, True]),
    )


@pytest.mark.slow
def test_solve_resumed_restores_the_same_bits_and_solves_the_rest(config, monkeypatch, capsys):
    with jax.enable_x64(True):
        mdps = {"zealous": leave_or_stay(20.0), "patient": leave_or_stay(5.0)}
        run = experiment.open_run("plan", config)
        solver, calls = evaluate.run_solver, []

        def counted(*arguments):
            calls.append(arguments)
            if len(calls) == 6:
                raise KeyboardInterrupt
            return solver(*arguments)

        monkeypatch.setattr(experiment, "run_solver", counted)
        with pytest.raises(KeyboardInterrupt):
            experiment.solve(run, mdps, tolerance=1e-9)
        first_lines = logging.read_metrics(run.directory)
        assert [line["step"] for line in first_lines] == [1, 2, 3, 4, 5]
        resumed = experiment.open_run("plan", replace(config, resume=run.directory))
        solved = experiment.solve(resumed, mdps, tolerance=1e-9)
        assert len(calls) == 6 + 3
        again = experiment.solve(resumed, mdps, tolerance=1e-9)
        assert len(calls) == 6 + 3
    assert "restored step 5 of 8" in capsys.readouterr().out
    assert list(solved) == ["zealous", "patient"]
    for name, optimum in {"zealous": 20.0, "patient": 10.0}.items():
        assert list(solved[name]) == list(evaluate.SOLVERS)
        for found in solved[name].values():
            np.testing.assert_allclose(found.solution.value, [optimum, 0], atol=1e-7)
            assert found.solution.value.dtype == np.float64
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(solved), strict=True):
        np.testing.assert_array_equal(one, other)
    lines = logging.read_metrics(run.directory)
    assert lines[:5] == first_lines
    expected = solved["patient"]["policy_iteration"].start_value
    assert lines[5]["patient/policy_iteration/value"] == expected


def test_finish_writes_and_returns_floats(config, capsys):
    run = experiment.open_run("walk", config)
    result = {"greedy": jnp.float32(0.5), "residual": np.float64(np.inf), "steps": 3}
    assert experiment.finish(run, result) == {"greedy": 0.5, "residual": np.inf, "steps": 3.0}
    content = json.loads((run.directory / "result.json").read_text())
    assert content == {"greedy": 0.5, "residual": None, "steps": 3.0}
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {run.directory}"
