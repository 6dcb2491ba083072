"""Problems with known exact answers, shared by the tests, and generators of random problems.

The constants are float64 results of NumPy and SciPy, independent of this library. How each arises
stands beside it. Problems are built in the dtype that is current: float64 under the fixture `x64`.
"""

import numpy as np
from numpy.typing import NDArray

from jaxrl_llm import MDP, make_mdp

# Treatment MDP: states Critical, Serious, Stable, Improving, Recovered (which absorbs, but does not
# end the episode); actions Conservative, Aggressive, Surgery; reward on arrival = that of the next
# state + that of the action; discount .9. V* and its policy by policy iteration; the uniform
# policy's V by solving its linear system.
TREATMENT_TRANSITION = np.array(
    [
        [[0.6, 0.3, 0.1, 0, 0], [0.4, 0.4, 0.2, 0, 0], [0.2, 0.3, 0.3, 0.15, 0.05]],
        [[0.1, 0.5, 0.3, 0.1, 0], [0.05, 0.3, 0.4, 0.2, 0.05], [0.1, 0.2, 0.3, 0.3, 0.1]],
        [[0, 0.1, 0.6, 0.2, 0.1], [0, 0.05, 0.4, 0.4, 0.15], [0.05, 0.1, 0.3, 0.35, 0.2]],
        [[0, 0, 0.1, 0.7, 0.2], [0, 0, 0.05, 0.5, 0.45], [0, 0.05, 0.1, 0.4, 0.45]],
        [[0, 0, 0, 0, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 1]],
    ]
)
TREATMENT_STATE_REWARD = np.array([-20.0, -10, 0, 10, 20])
TREATMENT_ACTION_REWARD = np.array([-2.0, -5, -15])
TREATMENT_DISCOUNT = 0.9
TREATMENT_VALUE = np.array([96.572388, 116.726209, 138.662816, 160.254230, 180.0])
TREATMENT_POLICY = np.array([2, 1, 1, 1, 0])
TREATMENT_UNIFORM_VALUE = np.array([33.081121, 59.648208, 80.802757, 103.695378, 126.666667])


def treatment_mdp() -> MDP:
    reward = TREATMENT_ACTION_REWARD[:, None] + TREATMENT_STATE_REWARD
    reward = np.broadcast_to(reward, TREATMENT_TRANSITION.shape)
    return make_mdp(TREATMENT_TRANSITION, reward, TREATMENT_DISCOUNT)


# Patient chain: the same states without a choice, reward on leaving. V solves (I - .9 P) V = r; the
# mixing time is -1 / ln of the second eigenvalue, in steps.
PATIENT_CHAIN_TRANSITION = np.array(
    [
        [0.7, 0.2, 0.1, 0, 0],
        [0.1, 0.5, 0.3, 0.1, 0],
        [0, 0.1, 0.5, 0.3, 0.1],
        [0, 0, 0.1, 0.6, 0.3],
        [0, 0, 0, 0, 1],
    ]
)
PATIENT_CHAIN_REWARD = np.array([-10.0, -5, 0, 5, 10])
PATIENT_CHAIN_DISCOUNT = 0.9
PATIENT_CHAIN_VALUE = np.array([5.566356, 35.815279, 62.364462, 81.766960, 100.0])
PATIENT_CHAIN_EIGENVALUES = np.array([1, 0.838658, 0.707710, 0.481264, 0.272368])
PATIENT_CHAIN_MIXING_TIME = 5.683346


def patient_chain() -> MDP:
    transition = PATIENT_CHAIN_TRANSITION[:, None]
    return make_mdp(transition, PATIENT_CHAIN_REWARD, PATIENT_CHAIN_DISCOUNT)


# Ill, Recovering, Healthy: V of the untreated chain, discount .9, and one look-ahead on that V for
# the actions Medication and Surgery.
ILLNESS_TRANSITION = np.array([[[0.6, 0.3, 0.1]], [[0.1, 0.7, 0.2]], [[0, 0.1, 0.9]]])
ILLNESS_REWARD = np.array([[-5.0], [0], [10]])
ILLNESS_DISCOUNT = 0.9
ILLNESS_VALUE = np.array([28.070624, 42.144319, 72.594678])
ILLNESS_TREATMENT_TRANSITION = np.array(
    [
        [[0.5, 0.4, 0.1], [0.3, 0.5, 0.2]],
        [[0.1, 0.6, 0.3], [0.2, 0.3, 0.5]],
        [[0, 0.1, 0.9], [0, 0.1, 0.9]],
    ]
)
ILLNESS_TREATMENT_REWARD = np.array([[-3.0, -8], [0, -2], [10, 10]])
ILLNESS_TREATMENT_Q = np.array(
    [[31.337257, 31.611054], [44.884852, 47.099284], [72.594678, 72.594678]]
)


def illness_chain() -> MDP:
    return make_mdp(ILLNESS_TRANSITION, ILLNESS_REWARD, ILLNESS_DISCOUNT)


def illness_treatment_mdp() -> MDP:
    return make_mdp(ILLNESS_TREATMENT_TRANSITION, ILLNESS_TREATMENT_REWARD, ILLNESS_DISCOUNT)


# M2: two states, two actions, discount .9, start in state 0. Q* by policy iteration; the values of
# the behaviour policy and of a second, evaluated one, by solving their linear systems.
M2_TRANSITION = np.array([[[0.9, 0.1], [0.2, 0.8]], [[0.7, 0.3], [0.05, 0.95]]])
M2_REWARD = np.array([[0.0, 1], [2, 0]])
M2_COST = np.array([[0.0, 1], [1, 0]])
M2_DISCOUNT = 0.9
M2_Q = np.array([[13.5310, 14.9655], [15.6552, 14.0586]])
M2_BEHAVIOUR = np.array([[0.75, 0.25], [0.4, 0.6]])
M2_BEHAVIOUR_VALUE = np.array([4.6728, 5.5507])
M2_EVALUATED = np.array([[0.2, 0.8], [0.9, 0.1]])
M2_EVALUATED_VALUE = np.array([12.6938, 13.4840])
# Fixed points on M2, by sweeps in NumPy: expected SARSA that explores with probability .1; soft Q
# at temperature 1, its V, and its probabilities of the greedy action in each state.
M2_EXPECTED_SARSA_Q = np.array([[12.8488, 14.2797], [14.9719, 13.3720]])
M2_SOFT_Q = np.array([[15.3243, 16.7438], [17.4442, 15.8337]])
M2_SOFT_VALUE = np.array([16.9604, 17.6263])
M2_SOFT_GREEDY_PROBABILITY = np.array([0.80526, 0.83347])
# Offline, with data of the behaviour policy and half the mean squared error: conservative (CQL)
# values of the evaluated policy at penalty .5 and Q of control at penalty 1; values of implicit
# Q-learning by expectile level; its policy at level .7, inverse temperature 3, weights up to 100.
M2_CONSERVATIVE_VALUE = np.array([5.9688, 6.9848])
M2_CONSERVATIVE_Q = np.array([[6.3258, 6.4865], [7.6102, 7.1527]])
M2_IMPLICIT_VALUE = {
    0.5: np.array([4.6728, 5.5507]),
    0.7: np.array([7.6650, 8.5648]),
    0.9: np.array([11.9867, 12.7843]),
    0.999: np.array([14.9320, 15.6230]),
}
M2_ADVANTAGE_WEIGHTED = np.array([[0.02654, 0.97346], [0.98228, 0.01772]])
# The best return with a discounted cost of at most 5, by linear programming over occupancies.
M2_BUDGET = 5.0
M2_CONSTRAINED_RETURN = 7.7931
M2_MULTIPLIER = 1.43448
M2_CONSTRAINED = np.array([[0.69378, 0.30622], [1, 0]])


def two_state_mdp() -> MDP:
    return make_mdp(M2_TRANSITION, M2_REWARD, M2_DISCOUNT, initial=np.array([1.0, 0]))


# Diabetes and sepsis management: 9 states x 4 actions, the tables of `envs.diabetes` and
# `envs.sepsis_management`, discounts .95 and .9. V* and its policy by policy iteration.
DIABETES_DISCOUNT = 0.95
DIABETES_VALUE = np.array(
    [210.308, 110.308, 10.308, 215.170, 115.170, 15.170, 205.911, 105.911, 5.911]
)
DIABETES_POLICY = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2])
SEPSIS_MANAGEMENT_DISCOUNT = 0.9
SEPSIS_MANAGEMENT_VALUE = np.array(
    [154.488, 68.299, 174.314, 126.751, -12.008, 177.114, 25.219, -82.948, 110.655]
)
SEPSIS_MANAGEMENT_POLICY = np.array([1, 2, 0, 2, 3, 0, 3, 3, 0])

# ICU-Sepsis (PyPI `icu-sepsis`, its `dynamics.npz`): 716 states x 25 actions, +1 on surviving. The
# initial law times V, and the expected number of steps, by solving the linear system of each
# policy: uniform, the clinicians', optimal.
ICU_SEPSIS_ADMISSIBLE_PAIRS = 2238
ICU_SEPSIS_RETURN = {"random": 0.7801, "expert": 0.7818, "optimal": 0.8751}
ICU_SEPSIS_LENGTH = {"random": 9.4623, "expert": 9.2380, "optimal": 10.9917}
ICU_SEPSIS_DISCOUNTED_RETURN = {"random": 0.7191, "expert": 0.7222, "optimal": 0.8013}  # at .99


# Random problems


def random_mdp(
    seed: int, num_states: int, num_actions: int, discount: float, *, masked: bool = False
) -> MDP:
    """Every row uniform on the simplex, rewards standard normal for each next state.

    `masked` forbids about half of the actions, never the last one a state has.
    """
    random = np.random.default_rng(seed)
    transition = random.dirichlet(np.ones(num_states), size=(num_states, num_actions))
    mask = np.ones((num_states, num_actions), bool)
    if masked:
        mask = random.random(mask.shape) < 0.5
        mask[np.arange(num_states), random.integers(num_actions, size=num_states)] = True
    return make_mdp(transition, random.normal(size=transition.shape), discount, action_mask=mask)


def garnet_mdp(
    seed: int, num_states: int, num_actions: int, discount: float, *, branching: int = 2
) -> MDP:
    """Garnet: each row leads to `branching` random states; one reward in four is not 0.

    Source: Archibald, McKinnon & Thomas (1995), "On the generation of Markov decision processes".
    """
    random = np.random.default_rng(seed)
    reward = random.normal(size=(num_states, num_actions, num_states))
    reward *= random.random(reward.shape) < 0.25
    transition = _sparse_rows(random, num_states, num_actions, branching)
    return make_mdp(transition, reward, discount)


def terminal_mdp(seed: int, num_states: int, num_actions: int, discount: float = 1.0) -> MDP:
    """Costs until the last state, which ends it; action 0 leads there from everywhere.

    The other actions may circle for ever, at a cost. The terminal state's rows are 0.
    """
    random = np.random.default_rng(seed)
    transition = _sparse_rows(random, num_states, num_actions, branching=2)
    onward = np.eye(num_states, k=1)
    transition[:, 0] = 0.6 * transition[:, 0] + 0.4 * onward
    transition[-1] = 0
    reward = -random.exponential(size=transition.shape)
    terminal = np.arange(num_states) == num_states - 1
    return make_mdp(transition, reward, discount, terminal=terminal)


def corridor(num_states: int, *, step: float, arrival: float, discount: float = 1.0) -> MDP:
    """Left, right, stay; `step` is received at each step and `arrival` on reaching the last state.

    V*(s) = step (S - 1 - s) + arrival at discount 1. With step 0 every move ties, and a policy that
    breaks ties carelessly never ends.
    """
    states, end = np.arange(num_states), num_states - 1
    successor = np.stack([np.maximum(states - 1, 0), np.minimum(states + 1, end), states], axis=1)
    transition = np.eye(num_states)[successor]
    reward = np.full(transition.shape, step)
    reward[:, :, end] += arrival
    return make_mdp(transition, reward, discount, terminal=states == end)


def _sparse_rows(
    random: np.random.Generator, num_states: int, num_actions: int, branching: int
) -> NDArray[np.float64]:
    transition = np.zeros((num_states, num_actions, num_states))
    for state in range(num_states):
        for action in range(num_actions):
            successors = random.choice(num_states, branching, replace=False)
            transition[state, action, successors] = random.dirichlet(np.ones(branching))
    return transition
