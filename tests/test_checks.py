"""Validators: each fault is reported with its place, its value and the remedy."""

import math
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrl_llm
from jaxrl_llm import checks
from jaxrl_llm.types import MDP, SuccessorMDP

NUM_STATES, NUM_ACTIONS = 4, 3


def valid_arguments() -> dict[str, Any]:
    """A random problem whose last state is terminal, as the arguments of `make_mdp`."""
    rng = np.random.default_rng(0)
    transition = rng.dirichlet(np.ones(NUM_STATES), size=(NUM_STATES, NUM_ACTIONS))
    return {
        "transition": transition,
        "reward": rng.normal(size=transition.shape),
        "discount": 0.9,
        "terminal": np.arange(NUM_STATES) == NUM_STATES - 1,
    }


def successor_mdp(**changes: Any) -> SuccessorMDP:
    """Three states in a line, two actions (stay, advance), the last state terminal."""
    fields: dict[str, Any] = {
        "successor": jnp.array([[0, 0], [1, 0], [1, 0], [2, 0], [2, 0]]),
        "probability": jnp.array([[1.0, 0.0]] * 5),
        "reward": jnp.zeros((5, 2)),
        "row": jnp.array([[0, 1], [2, 3], [4, 4]]),
        "discount": jnp.array(0.9),
        "initial": jnp.array([1.0, 0.0, 0.0]),
        "terminal": jnp.array([False, False, True]),
        "action_mask": jnp.ones((3, 2), bool),
    }
    return SuccessorMDP(**{**fields, **changes})


def changed(name: str, place: Any, value: object) -> dict[str, Any]:
    """`valid_arguments` with one element set, the argument starting from its default if absent."""
    defaults = {
        "initial": np.full(NUM_STATES, 1 / NUM_STATES),
        "action_mask": np.ones((NUM_STATES, NUM_ACTIONS), bool),
    }
    arguments = {**defaults, **valid_arguments()}
    array = np.array(arguments[name])
    array[place] = value
    return {**arguments, name: array}


def test_action_probabilities_of_integers_are_one_hot():
    one_hot = checks.action_probabilities([0, 2, 1], 3, 4)
    np.testing.assert_array_equal(one_hot, np.eye(4)[[0, 2, 1]])
    np.testing.assert_array_equal(checks.action_probabilities(one_hot, 3, 4), one_hot)


def test_not_empty_names_what_is():
    checks.not_empty("problems", ("one",))
    with pytest.raises(ValueError, match=r"^problems is empty; name at least one$"):
        checks.not_empty("problems", ())


def test_mdp_returns_the_same_object():
    mdp = jaxrl_llm.make_mdp(**valid_arguments())
    assert checks.mdp(mdp) is mdp
    sparse = successor_mdp()
    assert checks.mdp(sparse) is sparse


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            changed("transition", (2, 1), [0.27, 0.3, 0.2, 0.2]),
            "transition[2, 1] sums to 0.97; each row must sum to 1",
        ),
        (
            changed("transition", (2, 1, 0), -0.25),
            "transition[2, 1, 0] is -0.25; a probability must be finite and at least 0",
        ),
        (
            changed("transition", (1, 2, 3), np.nan),
            "transition[1, 2, 3] is nan; a probability must be finite and at least 0",
        ),
        (
            changed("transition", (0, 0, 1), np.inf),
            "transition[0, 0, 1] is inf; a probability must be finite and at least 0",
        ),
        (changed("reward", (3, 0, 2), np.nan), "reward[3, 0, 2] is nan; it must be finite"),
        (changed("reward", (0, 2, 1), -np.inf), "reward[0, 2, 1] is -inf; it must be finite"),
        (changed("discount", (), 1.2), "discount is 1.2; it must be in [0, 1]"),
        (changed("discount", (), -0.1), "discount is -0.1; it must be in [0, 1]"),
        (changed("discount", (), np.nan), "discount is nan; it must be in [0, 1]"),
        (
            changed("action_mask", 2, False),
            "action_mask[2] allows no action; allow at least one",
        ),
        (changed("initial", 0, 0.5), "initial sums to 1.25; it must sum to 1"),
        (
            changed("initial", 1, -0.5),
            "initial[1] is -0.5; a probability must be finite and at least 0",
        ),
        (
            {**valid_arguments(), "transition": np.ones((4, 3))},
            "transition has shape (4, 3); it must be [states, actions, states]",
        ),
        (
            {**valid_arguments(), "transition": np.ones((4, 3, 5))},
            "transition has shape (4, 3, 5); it must be [states, actions, states]",
        ),
        (
            {**valid_arguments(), "reward": np.ones((4, 2))},
            "reward has shape (4, 2); it must be (4, 3, 4)",
        ),
        (
            {**valid_arguments(), "discount": [0.9, 0.9]},
            "discount has shape (2,); it must be ()",
        ),
        (
            {**valid_arguments(), "initial": np.ones(3)},
            "initial has shape (3,); it must be (4,)",
        ),
        (
            {**valid_arguments(), "terminal": [3], "initial": np.full(4, 0.25)},
            "terminal has shape (1,); it must be (4,)",
        ),
        (
            {**valid_arguments(), "action_mask": np.ones(3)},
            "action_mask has shape (3,); it must be (4, 3)",
        ),
    ],
)
def test_make_mdp_reports_argument_index_value_and_remedy(arguments, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the whole message is compared)
        jaxrl_llm.make_mdp(**arguments)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"probability": jnp.array([[1.0, 0], [0.5, 0.4], [1, 0], [1, 0], [1, 0]])},
            "probability[1] sums to 0.9; each row must sum to 1",
        ),
        ({"row": jnp.array([[0, 1], [2, 5], [4, 4]])}, "row[1, 1] is 5; it must be in [0, 5)"),
        (
            {"successor": jnp.array([[0, 0], [1, 0], [1, 0], [2, -1], [2, 0]])},
            "successor[3, 1] is -1; it must be in [0, 3)",
        ),
        ({"reward": jnp.zeros((5, 3))}, "reward has shape (5, 3); it must be (5, 2)"),
        (
            {"terminal": jnp.zeros(3)},
            "terminal is float32; it must be bool",
        ),
        (
            {"probability": jnp.ones((5, 2), int)},
            "probability is int32; it must be float32 or float64",
        ),
        (
            {"discount": jnp.array(1.0), "action_mask": jnp.array([[True, False]] * 3)},
            (
                "discount is 1 and state 0 cannot reach a terminal state; "
                "mark a terminal state or use discount < 1"
            ),
        ),
    ],
)
def test_mdp_reports_faults_of_successor_lists(changes, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        checks.mdp(successor_mdp(**changes))
    assert str(error.value) == message


def test_mdp_ignores_what_the_rows_of_terminal_states_sum_to():
    mdp = jaxrl_llm.make_mdp(**changed("transition", 3, 0.0))
    assert not mdp.transition[3].any()
    checks.mdp(successor_mdp(probability=jnp.array([[1.0, 0.0]] * 4 + [[0.0, 0.0]])))
    with pytest.raises(ValueError, match=r"transition\[3, 0, 0\] is nan"):
        jaxrl_llm.make_mdp(**changed("transition", 3, np.nan))


def test_mdp_requires_rows_used_by_any_live_state():
    # Row 4 is the terminal state's; once state 1 uses it too, it must be a distribution.
    probability = jnp.array([[1.0, 0.0]] * 4 + [[0.0, 0.0]])
    shared = successor_mdp(probability=probability, row=jnp.array([[0, 1], [2, 4], [4, 4]]))
    with pytest.raises(ValueError, match=r"probability\[4\] sums to 0;"):
        checks.mdp(shared)


@pytest.mark.parametrize(("x64", "tolerated", "refused"), [(False, 5e-6, 5e-5), (True, 5e-7, 5e-6)])
def test_mdp_tolerates_the_rounding_of_its_dtype(x64, tolerated, refused):
    with jax.enable_x64(x64):
        transition = valid_arguments()["transition"]
        for error, fails in ((tolerated, False), (refused, True)):
            arguments = changed("transition", (1, 0), transition[1, 0] * (1 + error))
            if fails:
                with pytest.raises(ValueError, match=r"transition\[1, 0\] sums to 1\.00000?5;"):
                    jaxrl_llm.make_mdp(**arguments)
            else:
                jaxrl_llm.make_mdp(**arguments)


def test_mdp_undiscounted_walks_back_through_allowed_actions():
    """In a line 0 -> 1 -> 2 -> 3 (terminal) only action 1 advances; action 0 stays."""
    transition = np.zeros((4, 2, 4))
    transition[range(4), 0, range(4)] = 1
    transition[range(4), 1, [1, 2, 3, 3]] = 1
    terminal = np.arange(4) == 3
    mask = np.ones((4, 2), bool)
    jaxrl_llm.make_mdp(transition, -1.0, 1, terminal=terminal, action_mask=mask)
    mask[1, 1] = False
    with pytest.raises(ValueError, match="discount is 1 and state 0 cannot reach a terminal"):
        jaxrl_llm.make_mdp(transition, -1.0, 1, terminal=terminal, action_mask=mask)
    mask[0, 1], mask[1, 1] = False, True
    with pytest.raises(ValueError, match="discount is 1 and state 0 cannot"):
        jaxrl_llm.make_mdp(transition, -1.0, 1, terminal=terminal, action_mask=mask)
    mask[0, 1], mask[2, 1] = True, False
    transition[0, 0] = terminal
    with pytest.raises(ValueError, match="discount is 1 and state 1 cannot"):
        jaxrl_llm.make_mdp(transition, -1.0, 1, terminal=terminal, action_mask=mask)
    with pytest.raises(ValueError, match="discount is 1 and state 0 cannot"):
        jaxrl_llm.make_mdp(transition, -1.0, 1)


def test_mdp_checks_icu_size_within_a_second():
    transition = np.full((716, 25, 716), 1 / 716, np.float32)
    mdp = jaxrl_llm.make_mdp(transition, 0.0, 1.0, terminal=np.arange(716) == 715)
    start = time.perf_counter()
    checks.mdp(mdp)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("axes", [0, 1, 2, 3])
def test_make_mdp_spreads_a_reward_of_any_rank(axes):
    reward = np.random.default_rng(1).normal(size=(NUM_STATES, NUM_ACTIONS, NUM_STATES)[:axes])
    arguments: dict[str, Any] = {**valid_arguments(), "reward": reward}
    mdp = jaxrl_llm.make_mdp(**arguments)
    for index in np.ndindex(NUM_STATES, NUM_ACTIONS, NUM_STATES):
        assert mdp.reward[index] == np.float32(reward[index[:axes]])


def test_make_mdp_defaults():
    arguments = valid_arguments()
    mdp = jaxrl_llm.make_mdp(**arguments)
    assert isinstance(mdp, MDP)
    np.testing.assert_allclose(mdp.initial, [1 / 3, 1 / 3, 1 / 3, 0])
    np.testing.assert_array_equal(mdp.action_mask, np.ones((NUM_STATES, NUM_ACTIONS), bool))
    del arguments["terminal"]
    mdp = jaxrl_llm.make_mdp(**arguments)
    np.testing.assert_allclose(mdp.initial, np.full(4, 0.25))
    np.testing.assert_array_equal(mdp.terminal, np.zeros(4, bool))


def test_make_mdp_dtype_follows_x64():
    arguments = valid_arguments()
    single = jaxrl_llm.make_mdp(**arguments)
    with jax.enable_x64(True):
        double = jaxrl_llm.make_mdp(**arguments)
        assert double.discount == 0.9
        halves: dict[str, Any] = {
            name: np.float32(arguments[name]) for name in ("transition", "reward")
        }
        still_single = jaxrl_llm.make_mdp(**{**arguments, **halves})
    for name in ("transition", "reward", "discount", "initial"):
        assert getattr(single, name).dtype == np.float32
        assert getattr(double, name).dtype == np.float64
        assert getattr(still_single, name).dtype == np.float32


def test_make_mdp_accepts_integers():
    mdp = jaxrl_llm.make_mdp([[[0, 1]], [[0, 1]]], [1, 0], 1, terminal=[0, 1])
    assert mdp.transition.dtype == mdp.reward.dtype == np.float32
    assert mdp.terminal.dtype == bool
    np.testing.assert_allclose(mdp.expected_reward(), [[1], [0]])


@pytest.mark.parametrize(
    ("check", "good", "bad", "message"),
    [
        (checks.finite, (0.0,), (math.nan,), "rate is nan; it must be finite"),
        (checks.positive, (1e-9,), (-1.0,), "rate is -1.0; it must be greater than 0"),
        (checks.positive, (2,), (0,), "rate is 0; it must be greater than 0"),
        (checks.positive, (1,), (math.inf,), "rate is inf; it must be finite"),
        (checks.at_least, (1, 1), (0, 1), "rate is 0; it must be at least 1"),
        (checks.at_least, (1, 0), (math.nan, 0), "rate is nan; it must be finite"),
        (checks.between, (1.0, 0, 1), (1.5, 0, 1), "rate is 1.5; it must be in [0, 1]"),
        (checks.between, (0, 0, 1), (math.nan, 0, 1), "rate is nan; it must be in [0, 1]"),
        (
            checks.one_of,
            ("sgd", ("sgd", "adam")),
            ("adm", ("sgd", "adam")),
            "rate is 'adm'; it must be one of 'sgd', 'adam'",
        ),
        (
            checks.divisible,
            (512, "num_minibatches", 4),
            (500, "num_minibatches", 3),
            "rate is 500; it must be a multiple of num_minibatches, 3",
        ),
    ],
)
def test_field_check_names_the_field_first(check, good, bad, message):
    check("rate", *good)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        check("rate", *bad)
    assert str(error.value) == message


def test_import_stays_light():
    """Without heavy libraries, and hardly longer than that of JAX, on whatever machine."""
    program = (
        "import sys; from time import process_time as now; start = now(); import jax; "
        "jax_seconds = now() - start; import jaxrl_llm; print((now() - start) / jax_seconds, "
        "*{'transformers', 'distrax', 'optax', 'orbax', 'matplotlib'} & set(sys.modules))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    results = [run.stdout.split() for run in runs]
    assert [loaded for _, *loaded in results] == [[], [], []]
    assert min(float(ratio) for ratio, *_ in results) < 2
