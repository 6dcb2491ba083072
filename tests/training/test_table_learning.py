"""Many learners and the exact value of what each has learned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.agents import tabular
from jaxrl_llm.kernels import bellman
from jaxrl_llm.training import learning_curves, table_learning
from tests import oracles

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found():
    study = table_learning.Study(
        make=tabular.make, q_values=tabular.q_values, key=jax.random.key(0)
    )
    configs = {"q_learning": tabular.Config(num_steps=50, epsilon=1.0)}
    return study(oracles.corridor(4, step=-1.0, arrival=0.0), configs, 3, 40, "num_steps")


def test_study_ends_at_the_optimum_and_counts_its_time(found):
    learned = found["q_learning"]
    np.testing.assert_array_equal(learned.time, 200 * np.arange(1, 11))
    assert learned.value.shape == (3, 10)
    # From a first state uniform over 0 to 2: 3, 2 and 1 steps.
    np.testing.assert_allclose(learned.value[:, -1], -2, rtol=1e-5)
    assert learned.state.num_steps.tolist() == [2000] * 3


def test_learn_may_be_told_the_time_of_a_step():
    mdp = oracles.corridor(4, step=-1.0, arrival=0.0)
    learned = table_learning.learn(
        tabular.make(tabular.Config(num_steps=5), mdp),
        mdp,
        jax.random.key(0),
        policy=lambda state: bellman.greedy(tabular.q_values(state)),
        time=7,
        num_learners=2,
        num_steps=6,
        num_points=3,
    )
    np.testing.assert_array_equal(learned.time, [14, 28, 42])


def test_show_prints_and_returns_the_same_numbers(found, capsys):
    result = table_learning.show("Corridor", {"optimum": -2.0}, found)
    assert result == pytest.approx(
        {"q_learning_mean": -2.0, "q_learning_std": 0.0, "q_learning_min": -2.0}, abs=1e-5
    )
    assert capsys.readouterr().out.count("-2.0000") == 3


def test_show_walks_is_exact_for_both_policies(found, capsys):
    mdp = oracles.corridor(4, step=-1.0, arrival=0.0)
    result = table_learning.show_walks("Corridor", mdp, found, tabular.q_values, 0.3)
    greedy = jax.nn.one_hot(jnp.array([1, 1, 1, 0]), 3)
    law = 0.7 * greedy + 0.1
    value = mdp.initial @ bellman.policy_evaluation(mdp, law).value
    np.testing.assert_allclose(result["q_learning_exploring"], value, rtol=1e-5)
    np.testing.assert_allclose(result["q_learning_greedy"], -2, rtol=1e-5)
    assert "epsilon 0.3" in capsys.readouterr().out


def test_curves_are_drawn_and_nothing_is_refused(found, tmp_path):
    panel = learning_curves.Panel("Corridor", found, {"optimum": -2.0}, "Steps", "Value")
    learning_curves.save([panel, panel], tmp_path / "curves.png", "Two panels")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="panels is empty; give at least one"):
        learning_curves.save([], tmp_path / "none.png", "Nothing")
