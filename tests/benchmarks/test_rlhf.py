"""The cases of aligning a model, on one of a few thousand weights: same job as the peer."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import harness, rlhf, trl_peers
from tests.lm import tiny

# It compiles whole iterations.
pytestmark = pytest.mark.slow

MICRO = dataclasses.replace(rlhf.CONFIG, vocab_size=61, n_positions=48, n_embd=16, n_layer=1)
STEPS = 2
NUM_TOKENS = rlhf.NUM_PROMPTS * rlhf.NUM_SAMPLES * rlhf.NUM_NEW
ONLINE = ("grpo-step-tiny", "rloo-step-tiny")
PRECOMPUTED = "dpo-step-tiny-precomputed"
PAIRS = ("dpo-step-tiny", PRECOMPUTED)
PHASES = ("generate", "score", "reference", "update")
QUICK = (PRECOMPUTED, "reference")  # to compile

quick_compilation = pytest.fixture(autouse=True, scope="module")(tiny.quick_compilation)


def each(*names):
    """Parametrises by the name of a case; those that compile for long are slow tests."""
    slow = pytest.mark.slow
    params = [name if name in QUICK else pytest.param(name, marks=slow) for name in names]
    return pytest.mark.parametrize("name", params)


@pytest.fixture(scope="module")
def cases():
    """The cases by name, of a small model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlhf, "CONFIG", MICRO)
        patch.setattr(rlhf, "STEPS", STEPS)
        yield {case.name: case for case in rlhf.cases()}


@pytest.fixture(scope="module")
def results(cases):
    """What each case returns, asked once."""
    known = {}

    def of(name):
        if name not in known:
            known[name] = harness.call(cases[name])
        return known[name]

    return of


@pytest.fixture
def torch():
    pytest.importorskip("trl")
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # models this small lose more by waiting for other threads
    return torch


def test_cases_are_named(cases):
    assert set(cases) == {*ONLINE, *PAIRS, "ppo-step-tiny", *PHASES}


@each(*ONLINE, *PAIRS, "generate", "reference")
def test_case_agrees_with_its_peer(cases, results, torch, name):
    case = cases[name]
    peer = case.peer()
    case.agree(results(name), harness.call(peer))
    if "step" in name:
        assert case.items == STEPS * peer.items


@each(*ONLINE, *PAIRS)
def test_agree_notices_another_gradient(cases, results, name):
    metrics = {key: float(value.mean) for key, value in results(name)[1].items()}
    step = trl_peers.Step(metrics.get("loss", 0.0), metrics["gradient_norm"])
    cases[name].agree(results(name), step)
    with pytest.raises(AssertionError):
        cases[name].agree(results(name), step._replace(gradient_norm=3 * step.gradient_norm))


@each(*ONLINE, "ppo-step-tiny")
def test_steps_draw_as_many_tokens_as_they_count(cases, results, name):
    state, metrics = results(name)
    assert cases[name].items == STEPS * NUM_TOKENS == metrics["response_length"].total
    assert metrics["ended"].mean == 0
    assert metrics["gradient_norm"].weight == STEPS
    assert state.iteration == STEPS


@each(*ONLINE, *PAIRS, "ppo-step-tiny", "update")
def test_steps_leave_the_weights(cases, results, name):
    _, before, _ = cases[name].arguments()
    after = results(name)[0]
    assert after.train.step == STEPS
    same = partial(np.testing.assert_allclose, rtol=0, atol=1e-25)  # a bias of 0 shows the rate
    jax.tree.map(same, after.train.params, before.train.params)
    assert results(name)[1]["gradient_norm"].mean > 1e-3


@pytest.mark.slow
def test_dpo_is_the_same_wherever_the_reference_is_asked(results):
    in_step, before = (results(name)[1] for name in PAIRS)
    np.testing.assert_allclose(in_step["loss"].mean, before["loss"].mean, rtol=1e-5)
    assert abs(in_step["loss"].mean - jnp.log(2)) > 1e-3  # the reference is another policy


@pytest.mark.slow
def test_phases_process_what_they_count(cases, results):
    for name in ("generate", "score", "reference"):
        assert cases[name].items == NUM_TOKENS
    shape = (rlhf.NUM_PROMPTS, rlhf.NUM_SAMPLES, rlhf.NUM_NEW)
    assert results("reference").shape == shape
    assert results("generate").shape == (*shape[:2], rlhf.PROMPT + rlhf.NUM_NEW)
    assert results("score").shape == shape[:2]
    assert cases["update"].items == STEPS * NUM_TOKENS


def test_accelerators_compute_in_bfloat16(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    seen = []
    monkeypatch.setattr(rlhf, "_phases", lambda subject: seen.append(subject.dtype) or ())
    list(rlhf.cases())
    assert seen == ["bfloat16"]
