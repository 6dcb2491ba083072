r"""Tasks whose answer a program can check: arithmetic, walks on a graph, and an answer in tags.

| task | prompt | reference answer |
|---|---|---|
| `Arithmetic` | `12+7=` | `19` |
| `Walk` | `a>b a>c b>d; walk a to d: ` | `a>b>d` |
| `TaggedAnswer` | `Answer inside <answer></answer>. 12+7=` | `<answer>19</answer>` |

`verify` reads the WHOLE response, so a list of all answers that holds the right one earns 0. Space
around an answer is allowed, and an answer in other words is not: see `verify`. Only ASCII digits
and letters count.

Task `index` of `seed` is the same whatever is drawn before it. The splits are disjoint by
construction, as in `clinical_cases`: the content decides by a hash which split a task belongs to.
The content of a sum is the sum, whether in tags or not and in either order of what commutes; that
of a walk is its graph, so that the held-out graphs are all unseen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np

from jaxrl_llm import checks
from jaxrl_llm.data.clinical_cases import SPLITS, Split, choose, split_of

OPERATORS = "+-*"
OPEN_TAG, CLOSE_TAG = "<answer>", "</answer>"
MIN_NODES, MAX_NODES = 4, 26
_MAX_DRAWS = 3000
_INTEGER = re.compile(r"([+-]?)([0-9]+)")
_NODES = "abcdefghijklmnopqrstuvwxyz"

Edges = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Two numbers and what to do with them.

    >>> task = Arithmetic(left=12, operator="+", right=7)
    >>> task.prompt, task.answer, verify(task, " 019"), verify(task, "18 19")
    ('12+7=', '19', 1.0, 0.0)

    Attributes:
      left, right: 0 or more.
      operator: "+", "-" or "*".
    """

    left: int
    operator: str
    right: int

    @property
    def prompt(self) -> str:
        return f"{self.left}{self.operator}{self.right}="

    @property
    def answer(self) -> str:
        match self.operator:
            case "+":
                return str(self.left + self.right)
            case "-":
                return str(self.left - self.right)
            case _:
                return str(self.left * self.right)

    @property
    def split(self) -> Split:
        first, second = self.left, self.right
        if self.operator in "+*":
            first, second = min(first, second), max(first, second)
        return split_of(f"{first}{self.operator}{second}")


@dataclass(frozen=True, kw_only=True)
class Walk:
    """Two nodes of a directed graph, and a way from one to the other to be found.

    >>> edges = (("a", "b"), ("a", "c"), ("b", "d"), ("c", "b"))
    >>> task = Walk(edges=edges, start="a", goal="d")
    >>> task.prompt, task.answer
    ('a>b a>c b>d c>b; walk a to d: ', 'a>b>d')
    >>> [round(verify(task, text), 2) for text in ("a > b > d", "a>c>b>d", "a>d")]
    [1.0, 0.67, 0.0]

    Attributes:
      edges: pairs of single letters, from and to.
      start, goal: nodes, the second within reach of the first.
    """

    edges: Edges
    start: str
    goal: str

    @property
    def prompt(self) -> str:
        listed = " ".join(f"{origin}>{end}" for origin, end in self.edges)
        return f"{listed}; walk {self.start} to {self.goal}: "

    @property
    def answer(self) -> str:
        """The shortest walk, and the first in alphabetical order among several."""
        return ">".join(shortest_walks(self.edges, self.start)[self.goal])

    @property
    def split(self) -> Split:
        return split_of(repr(sorted(self.edges)))


@dataclass(frozen=True, kw_only=True)
class TaggedAnswer:
    """A sum whose answer must stand in tags, after whatever thoughts.

    >>> task = TaggedAnswer(question=Arithmetic(left=12, operator="+", right=7))
    >>> verify(task, "10 and 2 and 7, so <answer> 19 </answer>"), verify(task, "19")
    (1.0, 0.0)
    """

    question: Arithmetic

    @property
    def prompt(self) -> str:
        return f"Answer inside {OPEN_TAG}{CLOSE_TAG}. {self.question.prompt}"

    @property
    def answer(self) -> str:
        return f"{OPEN_TAG}{self.question.answer}{CLOSE_TAG}"

    @property
    def split(self) -> Split:
        return self.question.split


Task = Arithmetic | Walk | TaggedAnswer
AnyTask = TypeVar("AnyTask", Arithmetic, Walk)


def verify(task: Task, text: str) -> float:
    """How right a response is, in [0, 1]; it never raises.

    - `Arithmetic`: 1 if the text is the number and nothing else, else 0. White space around it, a
      plus sign and leading zeros are allowed; digits with commas, points or words are not.
    - `Walk`: the length of the shortest walk divided by that of this one, if the text is one walk
      along the edges from start to goal; 0 if it is none. So 1 is a shortest walk, and `== 1` the
      strict reward. White space around nodes is allowed. The task's start is not its goal.
    - `TaggedAnswer`: 1 if the text has one pair of tags, at its end but for white space, and
      between them what `Arithmetic` takes for the number; else 0. Anything may stand before.

    Args:
      task: what was asked.
      text: the response without the prompt and without the token that ended it.
    """
    match task:
        case Arithmetic():
            return float(_integer(text) == _integer(task.answer))
        case Walk():
            return _walk_score(task, text)
        case TaggedAnswer():
            before, opened, rest = text.partition(OPEN_TAG)
            inside, closed, after = rest.partition(CLOSE_TAG)
            alone = OPEN_TAG not in rest and CLOSE_TAG not in before + after
            if not (opened and closed and alone) or after.strip():
                return 0.0
            return verify(task.question, inside)


def scorer(tasks: Iterable[Task]) -> Callable[[str, str], float]:
    """`(prompt, response) -> verify(task, response)` for the task that has this prompt.

    Raises:
      ValueError: from the function, for a prompt that belongs to none of the tasks.
    """
    by_prompt = {task.prompt: task for task in tasks}

    def score(prompt: str, response: str) -> float:
        if prompt not in by_prompt:
            raise ValueError(f"prompt is {prompt!r}; it must be that of one of the tasks")
        return verify(by_prompt[prompt], response)

    return score


def arithmetic(
    seed: int,
    index: int,
    split: Split = "train",
    *,
    operators: str = OPERATORS,
    max_operand: int = 99,
) -> Arithmetic:
    """The task number `index` of the stream `seed`; operands are uniform in 0 .. `max_operand`.

    Raises:
      ValueError: for an argument out of range, or if the settings leave `split` without a task.
    """
    checks.at_least("max_operand", max_operand, 1)
    if not operators or not set(operators) <= set(OPERATORS):
        raise ValueError(f"operators is {operators!r}; it must be some of {OPERATORS!r}")

    def draw(rng: np.random.Generator) -> Arithmetic:
        left, right = rng.integers(max_operand + 1, size=2).tolist()
        return Arithmetic(left=left, operator=choose(rng, operators), right=right)

    return _of_split(draw, seed, index, split)


def walk(
    seed: int,
    index: int,
    split: Split = "train",
    *,
    num_nodes: int = 6,
    edge_probability: float = 0.3,
) -> Walk:
    """The task number `index` of the stream `seed`, in a random directed graph.

    Every edge is there with the same probability; the goal is at least two edges from the start.

    Raises:
      ValueError: for an argument out of range, or if the settings leave `split` without a task.

    Source: after the random walks of Chen et al. (2021), "Decision transformer",
      arXiv:2106.01345, where one graph serves all tasks.
    """
    checks.between("num_nodes", num_nodes, MIN_NODES, MAX_NODES)
    checks.between("edge_probability", edge_probability, 0, 1)
    nodes = _NODES[:num_nodes]

    def draw(rng: np.random.Generator) -> Walk | None:
        there = (rng.random((num_nodes, num_nodes)) < edge_probability) & ~np.eye(
            num_nodes, dtype=bool
        )
        edges = tuple((nodes[origin], nodes[end]) for origin, end in np.argwhere(there))
        start = choose(rng, nodes)
        reached = shortest_walks(edges, start)
        far = [node for node in nodes if len(reached.get(node, ())) > 2]
        return Walk(edges=edges, start=start, goal=choose(rng, far)) if far else None

    return _of_split(draw, seed, index, split)


def tagged_answer(
    seed: int,
    index: int,
    split: Split = "train",
    *,
    operators: str = OPERATORS,
    max_operand: int = 99,
) -> TaggedAnswer:
    """The sum that `arithmetic` gives for the same arguments, with its answer wanted in tags."""
    question = arithmetic(seed, index, split, operators=operators, max_operand=max_operand)
    return TaggedAnswer(question=question)


def shortest_walks(edges: Edges, start: str) -> dict[str, tuple[str, ...]]:
    """For each node within reach, the nodes of the shortest walk to it, both ends included.

    Among several shortest ones, the first in alphabetical order.
    """
    ordered = sorted(edges)
    walks: dict[str, tuple[str, ...]] = {start: (start,)}
    breadth = [start]
    while breadth:
        reached = []
        for node in breadth:
            for origin, end in ordered:
                if origin == node and end not in walks:
                    walks[end] = (*walks[node], end)
                    reached.append(end)
        breadth = reached
    return walks


def _walk_score(task: Walk, text: str) -> float:
    nodes = [node.strip() for node in text.split(">")]
    steps = list(pairwise(nodes))
    valid = nodes[0] == task.start and nodes[-1] == task.goal and set(steps) <= set(task.edges)
    if not (steps and valid):
        return 0.0
    return (len(shortest_walks(task.edges, task.start)[task.goal]) - 1) / len(steps)


def _integer(text: str) -> tuple[str, str] | None:
    """Sign and digits; text, not a number, because `int` refuses to read thousands of digits."""
    match = _INTEGER.fullmatch(text.strip())
    if match is None:
        return None
    digits = match[2].lstrip("0")
    return ("-" if match[1] == "-" and digits else ""), digits


def _of_split(
    draw: Callable[[np.random.Generator], AnyTask | None], seed: int, index: int, split: Split
) -> AnyTask:
    """Draws until a task belongs to the split."""
    checks.at_least("seed", seed, 0)
    checks.at_least("index", index, 0)
    checks.one_of("split", split, SPLITS)
    rng = np.random.default_rng((seed, index))
    for _ in range(_MAX_DRAWS):
        drawn = draw(rng)
        if drawn is not None and drawn.split == split:
            return drawn
    raise ValueError(f"split is {split!r}, for which these settings leave no task; widen them")
