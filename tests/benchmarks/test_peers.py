"""The adaptors ask the peers the question that we answer: known answers, nothing timed."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import harness, peers
from benchmarks.harness import PeerMissing
from jaxrl_llm.types import MDP, SuccessorMDP

DISCOUNT = 0.9
METHODS = ("value_iteration", "policy_iteration", "modified_policy_iteration")


def chain():
    """State 0 stays for reward 1 or leaves for 5; the 2 of the forbidden action must not count.

    State 1 is terminal although its row says otherwise. Staying is worth 1 / (1 - .9) = 10.
    """
    transition = np.zeros((2, 3, 2), np.float32)
    transition[0, 0, 0] = transition[0, 1, 1] = transition[0, 2, 0] = 1
    transition[1, :, 0] = 1
    reward = np.broadcast_to(np.array([[1.0], [5.0], [2.0]], np.float32), (2, 3, 2))
    return MDP(
        transition=jnp.asarray(transition),
        reward=jnp.asarray(reward),
        discount=jnp.float32(DISCOUNT),
        initial=jnp.array([1.0, 0.0]),
        terminal=jnp.array([False, True]),
        action_mask=jnp.array([[True, True, False], [False, False, False]]),
    )


def sparse(problem):
    num_states, num_actions = problem.action_mask.shape
    rows = num_states * num_actions
    return SuccessorMDP(
        successor=jnp.tile(jnp.arange(num_states), (rows, 1)),
        probability=problem.transition.reshape(rows, num_states),
        reward=problem.reward.reshape(rows, num_states),
        row=jnp.arange(rows).reshape(num_states, num_actions),
        discount=problem.discount,
        initial=problem.initial,
        terminal=problem.terminal,
        action_mask=problem.action_mask,
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", [lambda problem: problem, sparse], ids=["dense", "sparse"])
def test_quantecon_solves_the_chain(form, method):
    pytest.importorskip("quantecon")
    peer = peers.quantecon([form(chain())], method=method, tolerance=1e-6)
    (result,) = harness.call(peer)
    # The discount is .9 rounded to float32: 1 / (1 - .9f) is 10 within 3e-6.
    np.testing.assert_allclose(result.v, [10.0, 0.0], atol=1e-5)
    assert result.sigma[0] == 0


def test_quantecon_solves_problems_in_turn():
    pytest.importorskip("quantecon")
    first = chain()
    second = dataclasses.replace(
        first, discount=jnp.float32(0.5)
    )  # leaving, worth 5, beats staying, worth 2
    peer = peers.quantecon([first, second], method="policy_iteration", tolerance=1e-6)
    results = harness.call(peer)
    np.testing.assert_allclose([result.v[0] for result in results], [10.0, 5.0], atol=1e-5)
    assert [result.sigma[0] for result in results] == [0, 1]


@pytest.mark.parametrize("solver", ["ValueIteration", "PolicyIterationModified"])
def test_mdptoolbox_finds_the_policy_and_starts_afresh(solver):
    pytest.importorskip("mdptoolbox")
    problem = dataclasses.replace(chain(), action_mask=jnp.ones((2, 3), bool))
    peer = peers.mdptoolbox(problem, solver=solver, tolerance=1e-6)
    results = [harness.call(peer) for _ in range(2)]
    assert [result.policy[0] for result in results] == [2, 2]
    assert results[0].iter == results[1].iter > 1


def test_mdptoolbox_refuses_masks():
    pytest.importorskip("mdptoolbox")
    with pytest.raises(ValueError, match=r"action_mask\[0, 2\] is False; .* every action"):
        peers.mdptoolbox(chain(), solver="ValueIteration", tolerance=1e-6)


def test_rlax_gae_is_the_sum_of_discounted_errors():
    pytest.importorskip("rlax")
    generator = np.random.default_rng(0)
    reward = generator.normal(size=(4, 3)).astype(np.float32)
    discount = (0.9 * (generator.random((4, 3)) > 0.3)).astype(np.float32)
    values = generator.normal(size=(5, 3)).astype(np.float32)
    expected, advantage = np.zeros((4, 3)), np.zeros(3)
    for t in reversed(range(4)):
        error = reward[t] + discount[t] * values[t + 1] - values[t]
        advantage = error + discount[t] * 0.8 * advantage
        expected[t] = advantage
    peer = peers.rlax_gae(jnp.asarray(reward), jnp.asarray(discount), jnp.asarray(values), 0.8)
    np.testing.assert_allclose(harness.call(peer), expected, rtol=1e-5, atol=1e-6)


def test_gymnax_cartpole_counts_every_step():
    pytest.importorskip("gymnax")
    peer = peers.gymnax_cartpole(3, 40)
    observation, total = harness.call(peer)
    assert observation.shape == (3, 4)
    assert peer.items == total == 120


@pytest.mark.parametrize("vectorization", ["sync", "vector_entry_point"])
def test_gymnasium_cartpole_counts_every_step(vectorization):
    peer = peers.gymnasium_cartpole(3, 40, vectorization=vectorization)
    total = harness.call(peer)
    assert peer.items == 120
    # A reward of 1 a step, but for the steps that Gymnasium spends on resetting.
    assert 100 <= total < 120


def test_icu_sepsis_steps_through_patients():
    peer = peers.icu_sepsis(300)
    # Reward 1 for each survivor: most survive, and a stay lasts about 10 steps.
    assert 10 <= harness.call(peer) <= 60
    assert peer.items == 300


def test_require_says_how_to_install_what_is_missing():
    with pytest.raises(
        PeerMissing, match=r'^peer absent not installed: pip .*jaxrl-llm\[peers\]"$'
    ):
        peers.require("absent.module")


@pytest.mark.parametrize("peer", [peers.purejaxrl_ppo, peers.purejaxrl_dqn], ids=["ppo", "dqn"])
def test_purejaxrl_says_how_to_get_it(monkeypatch, tmp_path, peer):
    monkeypatch.delenv("PUREJAXRL", raising=False)
    with pytest.raises(PeerMissing, match="peer purejaxrl not found: set PUREJAXRL to a clone"):
        peer()
    monkeypatch.setenv("PUREJAXRL", str(tmp_path))
    with pytest.raises(PeerMissing, match="set PUREJAXRL"):
        peer()


CLONE_PPO = """
import jax
from wrappers import wrapped

def make_train(config):
    assert not config["DEBUG"] and wrapped
    return lambda key: jax.random.uniform(key, (int(config["NUM_ENVS"]),))
"""
CLONE_WRAPPERS = """
from brax import envs
from brax.envs.wrappers.training import EpisodeWrapper
import navix
wrapped = True
"""


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_purejaxrl_ppo_imports_a_clone_and_leaves_no_trace(monkeypatch, tmp_path, num_seeds):
    pytest.importorskip("gymnax")
    folder = tmp_path / "purejaxrl"
    folder.mkdir()
    (folder / "ppo.py").write_text(CLONE_PPO)
    (folder / "wrappers.py").write_text(CLONE_WRAPPERS)
    monkeypatch.setenv("PUREJAXRL", str(tmp_path))
    peer = peers.purejaxrl_ppo(num_seeds)
    result = harness.call(peer)
    assert result.shape == ((4,) if num_seeds == 1 else (3, 4))
    assert peer.items == num_seeds * 976 * 512  # whole updates in 5e5 steps
    assert not {"brax", "navix", "ppo", "wrappers"} & set(sys.modules)
    assert str(folder) not in sys.path


CLONE_DQN = """
import jax
import wandb

def make_train(config):
    jax.tree_map(lambda leaf: leaf, config)
    return lambda key: jax.random.uniform(key, (int(config["NUM_ENVS"]),))
"""


def test_purejaxrl_dqn_imports_a_clone_and_leaves_no_trace(monkeypatch, tmp_path):
    for package in ("gymnax", "flashbax"):
        pytest.importorskip(package)
    folder = tmp_path / "purejaxrl"
    folder.mkdir()
    (folder / "dqn.py").write_text(CLONE_DQN)
    monkeypatch.setenv("PUREJAXRL", str(tmp_path))
    monkeypatch.setattr(jax, "tree_map", jax.tree.map, raising=False)
    peer = peers.purejaxrl_dqn()
    assert harness.call(peer).shape == (10,)
    assert peer.items == 500_000
    assert not {"wandb", "dqn"} & set(sys.modules)
    assert str(folder) not in sys.path
