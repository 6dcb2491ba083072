"""Returns against sums written out in NumPy, golden numbers, and the identities that join them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxrl_llm.kernels import returns

GAMMA, LAMBDA = 0.9, 0.8
# Two episodes end inside this stream, one by death and one by a time limit; the last row is cut.
TERMINATED = np.array([0, 0, 1, 0, 0, 0, 0, 0], bool)
TRUNCATED = np.array([0, 0, 0, 0, 0, 1, 0, 0], bool)


def stream(terminated=TERMINATED, truncated=TRUNCATED, gamma=GAMMA):
    """Random rewards, values and ratios; within an episode the next value is the next row's."""
    length, random = len(terminated), np.random.default_rng(0)
    reset = terminated | truncated
    value = random.normal(size=length)
    before_reset = random.normal(size=length)
    ends = reset | (np.arange(length) == length - 1)
    return {
        "reward": random.normal(size=length),
        "discount": gamma * (1.0 - terminated),
        "value": value,
        "next_value": np.where(ends, before_reset, np.roll(value, -1)),
        "reset": reset,
        "importance_ratio": random.lognormal(sigma=0.7, size=length),
    }


def select(data, *names):
    return [jnp.array(data[name]) for name in names]


RETURN = ("reward", "discount", "next_value", "reset")
GAE = ("reward", "discount", "value", "next_value", "reset")
VTRACE = (*GAE, "importance_ratio")

KERNELS = [
    pytest.param(partial(returns.lambda_returns, lambda_=LAMBDA), RETURN, id="lambda_returns"),
    pytest.param(returns.discounted_returns, RETURN, id="discounted_returns"),
    pytest.param(partial(returns.n_step_returns, n=3), RETURN, id="n_step_returns"),
    pytest.param(partial(returns.gae, lambda_=LAMBDA), GAE, id="gae"),
    pytest.param(partial(returns.vtrace, lambda_=LAMBDA), VTRACE, id="vtrace"),
]
STREAMS = {
    "two episodes": stream(),
    "no end": stream(TERMINATED & False, TRUNCATED & False),
    "each step ends": stream(TERMINATED, ~TERMINATED),
    "gamma 0": stream(gamma=0.0),
    "gamma 1": stream(gamma=1.0),
    "one step": stream(TERMINATED[:1], TRUNCATED[:1]),
    "one step, a time limit": stream(TERMINATED[:1], ~TRUNCATED[:1]),
}
every_stream = pytest.mark.parametrize("data", STREAMS.values(), ids=STREAMS)


# The references: O(T^2) sums, episode by episode


def last_row(data, t):
    """The row on which the episode of row t ends, or the stream is cut."""
    ends = np.flatnonzero(data["reset"][t:])
    return t + ends[0] if len(ends) else len(data["reward"]) - 1


def n_step_reference(data, t, n):
    total, weight = 0.0, 1.0
    stop = min(t + n - 1, last_row(data, t))
    for k in range(t, stop + 1):
        total += weight * data["reward"][k]
        weight *= data["discount"][k]
    return total + weight * data["next_value"][stop]


def lambda_reference(data, t, lambda_):
    steps = last_row(data, t) - t + 1
    mixture = (
        (1 - lambda_) * lambda_ ** (n - 1) * n_step_reference(data, t, n) for n in range(1, steps)
    )
    return sum(mixture) + lambda_ ** (steps - 1) * n_step_reference(data, t, steps)


def trace_reference(data, t, delta, trace):
    """sum_k (prod_{j < k} d_j trace_j) delta_k from t to the end of its episode."""
    total, weight = 0.0, 1.0
    for k in range(t, last_row(data, t) + 1):
        total += weight * delta[k]
        weight *= data["discount"][k] * trace[k]
    return total


def delta_of(data):
    return data["reward"] + data["discount"] * data["next_value"] - data["value"]


def every_step(reference, data, *arguments):
    return [reference(data, t, *arguments) for t in range(len(data["reward"]))]


@every_stream
@pytest.mark.parametrize("lambda_", [0.0, LAMBDA, 1.0])
def test_lambda_returns_match_the_mixture_of_n_step_returns(data, lambda_, x64):
    actual = jax.jit(returns.lambda_returns)(*select(data, *RETURN), lambda_=lambda_)
    np.testing.assert_allclose(actual, every_step(lambda_reference, data, lambda_), atol=1e-12)


@every_stream
def test_n_step_returns_match_the_sum(data, x64):
    for n in (1, 2, 3, 100):
        actual = jax.jit(returns.n_step_returns)(*select(data, *RETURN), n=n)
        np.testing.assert_allclose(actual, every_step(n_step_reference, data, n), atol=1e-12)


@every_stream
def test_gae_matches_the_sum_of_td_errors(data, x64):
    actual = jax.jit(returns.gae)(*select(data, *GAE), lambda_=LAMBDA)
    trace = np.full(len(data["reward"]), LAMBDA)
    expected = every_step(trace_reference, data, delta_of(data), trace)
    np.testing.assert_allclose(actual, expected, atol=1e-12)


@every_stream
@pytest.mark.parametrize(("clip_rho", "clip_c"), [(1.0, 1.0), (2.0, 0.5), (np.inf, np.inf)])
def test_vtrace_matches_the_sum(data, clip_rho, clip_c, x64):
    actual = jax.jit(returns.vtrace)(
        *select(data, *VTRACE), lambda_=LAMBDA, clip_rho=clip_rho, clip_c=clip_c
    )
    rho = np.minimum(clip_rho, data["importance_ratio"])
    trace = LAMBDA * np.minimum(clip_c, data["importance_ratio"])
    target = data["value"] + every_step(trace_reference, data, rho * delta_of(data), trace)
    # The target of the next state: of the next row, or the bootstrap where the episode ends.
    cut = np.append(data["reset"][:-1], True)
    following = np.where(cut, data["next_value"], np.roll(target, -1))
    advantage = rho * (data["reward"] + data["discount"] * following - data["value"])
    np.testing.assert_allclose(actual.target, target, atol=1e-12)
    np.testing.assert_allclose(actual.advantage, advantage, atol=1e-12)


# Golden numbers: gamma .9, lambda .8, reward 1; the episode of rows 0 and 1 ends on row 1, in a
# state worth 2.0 before the reset and, after it, the .7 of row 2.

VALUE = np.array([0.5, 0.6, 0.7, 0.8])
BEFORE_RESET = np.array([0.6, 2.0, 0.8, 0.9])
AFTER_RESET = np.array([0.6, 0.7, 0.8, 0.9])
ENDS = np.array([False, True, False, False])
TIMEOUT = np.array([2.624, 2.2, 1.7472, 1.01])
DEATH = np.array([1.328, 0.4, 1.7472, 1.01])


def golden_gae(discount, next_value, reset):
    reward, discount, value, next_value = map(
        jnp.float32, (np.ones(4), discount, VALUE, next_value)
    )
    return returns.gae(reward, discount, value, next_value, jnp.array(reset), lambda_=LAMBDA)


def test_gae_bootstraps_a_timeout_from_the_state_before_the_reset():
    actual = golden_gae(np.full(4, GAMMA), BEFORE_RESET, ENDS)
    np.testing.assert_allclose(actual, TIMEOUT, rtol=1e-6)


@pytest.mark.parametrize("next_value", [BEFORE_RESET, AFTER_RESET], ids=["before", "after"])
def test_gae_does_not_bootstrap_a_death(next_value):
    actual = golden_gae(GAMMA * (1 - ENDS), next_value, ENDS)
    np.testing.assert_allclose(actual, DEATH, rtol=1e-6)


MISTAKES = {
    "the timeout as a death": (GAMMA * (1 - ENDS), BEFORE_RESET, ENDS, [1.328, 0.4]),
    "the state after the reset": (np.full(4, GAMMA), AFTER_RESET, ENDS, [1.7816, 1.03]),
    "the trace not cut": (np.full(4, GAMMA), BEFORE_RESET, ENDS & False, [3.5297, 3.458]),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_gae_given_a_mistake_gives_its_well_known_wrong_numbers(mistake):
    """What to look for in a program whose advantages are not `TIMEOUT`."""
    discount, next_value, reset, wrong = mistake
    actual = golden_gae(discount, next_value, reset)
    np.testing.assert_allclose(actual[:2], wrong, rtol=2e-5)
    np.testing.assert_allclose(actual[2:], TIMEOUT[2:], rtol=1e-6)
    assert not np.allclose(actual[:2], TIMEOUT[:2])


@pytest.mark.parametrize("lambda_", [0.0, LAMBDA, 1.0])
def test_one_state_truncated_at_every_step_is_worth_ten(lambda_):
    """V = 1 + .9 V; a timeout taken for a death gives 1."""
    truncated = jnp.ones(3, bool)

    def improve(_, value):
        state_value = jnp.full(3, value)
        target = returns.lambda_returns(
            jnp.ones(3), jnp.full(3, GAMMA), state_value, truncated, lambda_=lambda_
        )
        return jnp.mean(target)

    np.testing.assert_allclose(jax.lax.fori_loop(0, 200, improve, 0.0), 10.0, rtol=1e-5)


# Identities


def test_lambda_zero_and_one_step_are_the_td_target(x64):
    data = stream()
    target = data["reward"] + data["discount"] * data["next_value"]
    arguments = select(data, *RETURN)
    td_lambda = returns.lambda_returns(*arguments, lambda_=0.0)
    np.testing.assert_allclose(td_lambda, target, rtol=1e-12)
    np.testing.assert_allclose(returns.n_step_returns(*arguments, n=1), target, rtol=1e-12)
    advantage = returns.gae(*select(data, *GAE), lambda_=0.0)
    np.testing.assert_allclose(advantage, target - data["value"], rtol=1e-12)


def test_lambda_one_and_many_steps_are_the_discounted_return(x64):
    data = stream()
    arguments = select(data, *RETURN)
    discounted = returns.discounted_returns(*arguments)
    td_lambda = returns.lambda_returns(*arguments, lambda_=1.0)
    np.testing.assert_allclose(td_lambda, discounted, rtol=1e-12)
    for n in (8, 50):
        n_step = returns.n_step_returns(*arguments, n=n)
        np.testing.assert_allclose(n_step, discounted, rtol=1e-12)
    advantage = returns.gae(*select(data, *GAE), lambda_=1.0)
    np.testing.assert_allclose(advantage, discounted - data["value"], rtol=1e-10)


def test_gae_is_the_lambda_return_minus_the_value(x64):
    data = stream()
    target = returns.lambda_returns(*select(data, *RETURN), lambda_=LAMBDA)
    advantage = returns.gae(*select(data, *GAE), lambda_=LAMBDA)
    np.testing.assert_allclose(advantage, target - data["value"], rtol=1e-10)


@pytest.mark.parametrize("lambda_", [0.0, LAMBDA, 1.0])
def test_vtrace_on_policy_is_gae(lambda_, x64):
    data = stream() | {"importance_ratio": np.ones(8)}
    vtrace = returns.vtrace(*select(data, *VTRACE), lambda_=lambda_)
    advantage = returns.gae(*select(data, *GAE), lambda_=lambda_)
    np.testing.assert_allclose(vtrace.target - data["value"], advantage, atol=1e-12)


def test_vtrace_with_ratio_zero_keeps_the_value(x64):
    data = stream() | {"importance_ratio": np.zeros(8)}
    vtrace = returns.vtrace(*select(data, *VTRACE))
    np.testing.assert_array_equal(vtrace.target, data["value"])
    np.testing.assert_array_equal(vtrace.advantage, np.zeros(8))


@pytest.mark.parametrize(("kernel", "names"), KERNELS)
def test_returns_do_not_look_past_a_reset(kernel, names):
    data, boundary = stream(), 5
    changed = {name: array.copy() for name, array in data.items()}
    for name in ("reward", "value", "importance_ratio"):
        changed[name][boundary + 1 :] += 1.0
    changed["next_value"][boundary + 1 :] += 1.0
    before = kernel(*map(jnp.float32, select(data, *names)))
    after = kernel(*map(jnp.float32, select(changed, *names)))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old[: boundary + 1], new[: boundary + 1])
        assert not np.allclose(old[boundary + 1 :], new[boundary + 1 :])


# Transformations


@pytest.mark.parametrize(("kernel", "names"), KERNELS)
def test_returns_jit_equals_eager_and_time_major_vmap_equals_a_loop(kernel, names):
    columns = [STREAMS[name] for name in ("two episodes", "no end", "each step ends")]
    rows = [select(data, *names) for data in columns]
    stacked = [jnp.stack(leaves, axis=1) for leaves in zip(*rows, strict=True)]
    batched = jax.jit(jax.vmap(kernel, in_axes=1, out_axes=1))(*stacked)
    loop = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *(kernel(*row) for row in rows))
    for actual, expected in zip(jax.tree.leaves(batched), jax.tree.leaves(loop), strict=True):
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "names"), KERNELS)
def test_returns_have_correct_gradients(kernel, names, x64):
    arguments = select(stream(), *names)
    place = names.index("reset")
    reset = arguments.pop(place)

    def differentiable(*arrays):
        return kernel(*arrays[:place], reset, *arrays[place:])

    check_grads(differentiable, arguments, order=1)


@pytest.mark.parametrize(("kernel", "names"), KERNELS)
def test_returns_refuse_a_batch_and_unequal_lengths(kernel, names):
    arguments = select(stream(), *names)
    with pytest.raises(AssertionError):
        kernel(*(array[:, None] for array in arguments))
    with pytest.raises(AssertionError):
        kernel(arguments[0][:-1], *arguments[1:])
