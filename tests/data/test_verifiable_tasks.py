"""Verifiers against brute force and against tricks; draws by seed, index and split."""

from __future__ import annotations

import hashlib
import itertools
import operator
from typing import Any

import numpy as np
import pytest

from jaxrl_llm.data import verifiable_tasks as tasks
from jaxrl_llm.data.clinical_cases import HELD_OUT_SHARE, SPLITS
from jaxrl_llm.data.verifiable_tasks import Arithmetic, TaggedAnswer, Walk, verify

SUM = Arithmetic(left=12, operator="+", right=7)
DIFFERENCE = Arithmetic(left=3, operator="-", right=10)
ZERO = Arithmetic(left=4, operator="-", right=4)
MAKERS = [tasks.arithmetic, tasks.walk, tasks.tagged_answer]
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def drawn_walks(count=12, **options):
    return [tasks.walk(0, index, **options) for index in range(count)]


def brute_force_walks(task, longest):
    """Every walk from start to goal of at most `longest` edges, by trying all node sequences."""
    nodes = sorted(set(itertools.chain.from_iterable(task.edges)))
    return [
        row
        for length in range(1, longest + 1)
        for row in itertools.product(nodes, repeat=length + 1)
        if (row[0], row[-1]) == (task.start, task.goal)
        and all(step in task.edges for step in itertools.pairwise(row))
    ]


# Arithmetic


@pytest.mark.parametrize("sign", "+-*")
def test_verify_arithmetic_accepts_one_number_alone(sign):
    for left, right in [(0, 0), (12, 7), (3, 10), (99, 99)]:
        task = Arithmetic(left=left, operator=sign, right=right)
        right_answer = OPERATIONS[sign](left, right)
        accepted = [n for n in range(-200, 10_000) if verify(task, str(n)) != 0]
        assert accepted == [right_answer]
        assert task.answer == str(right_answer)
        assert task.prompt == f"{left}{sign}{right}="


@pytest.mark.parametrize(
    ("task", "text"),
    [
        (SUM, "19"),
        (SUM, " 19"),
        (SUM, "19\n"),
        (SUM, "\t0019 "),
        (SUM, "+19"),
        (DIFFERENCE, "-7"),
        (DIFFERENCE, "-07"),
        (ZERO, "0"),
        (ZERO, "000"),
        (ZERO, "-0"),
        (SUM, "0" * 10_000 + "19"),
    ],
)
def test_verify_arithmetic_allows_space_signs_and_leading_zeros(task, text):
    assert verify(task, text) == 1


@pytest.mark.parametrize(
    ("task", "text"),
    [
        (SUM, ""),
        (SUM, " "),
        (SUM, "+"),
        (SUM, "18 19"),
        (SUM, "19 20"),
        (SUM, "19."),
        (SUM, "19.0"),
        (SUM, "1 9"),
        (SUM, "1_9"),
        (SUM, "-19"),
        (SUM, "--19"),
        (SUM, "0x13"),
        (SUM, "1.9e1"),
        (SUM, "the answer is 19"),
        (SUM, "12+7=19"),
        (SUM, "nineteen"),
        (SUM, "19\n19"),
        (SUM, "\uff11\uff19"),  # full-width digits
        (SUM, "1" * 10_000),  # too long for `int`
        (SUM, "0" * 100_000 + "x"),
        (DIFFERENCE, "7"),
        (DIFFERENCE, "- 7"),
        (DIFFERENCE, "\u22127"),  # a minus sign that is not ASCII
    ],
)
def test_verify_arithmetic_refuses(task, text):
    assert verify(task, text) == 0


@pytest.mark.parametrize("separator", [" ", ",", "\n", ""])
def test_verify_arithmetic_gives_a_list_of_all_answers_nothing(separator):
    assert verify(SUM, separator.join(map(str, range(-200, 10_000)))) == 0


# Tags


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<answer>19</answer>", 1),
        ("<answer> 019\n</answer>\n", 1),
        ("Twelve and seven. Not 18.\n<answer>19</answer>", 1),
        ("19", 0),
        ("<answer>18</answer>", 0),
        ("<answer></answer>", 0),
        ("<answer>19", 0),
        ("19</answer>", 0),
        ("</answer>19<answer>", 0),
        ("<Answer>19</Answer>", 0),
        ("<answer>19</answer> or 18", 0),
        ("<answer>18, 19</answer>", 0),
        ("<answer><answer>19</answer></answer>", 0),
        ("<answer>19</answer></answer>", 0),
        ("</answer><answer>19</answer>", 0),
        ("<answer>19</answer><answer>19</answer>", 0),
        ("", 0),
    ],
)
def test_verify_tagged_answer(text, score):
    assert verify(TaggedAnswer(question=SUM), text) == score


def test_verify_tagged_answer_gives_a_list_of_all_answers_nothing():
    task = TaggedAnswer(question=SUM)
    listed = [f"<answer>{n}</answer>" for n in range(100)]
    assert verify(task, "".join(listed)) == 0
    assert verify(task, f"<answer>{' '.join(map(str, range(100)))}</answer>") == 0
    assert sum(verify(task, text) for text in listed) == 1


# Walks


def test_shortest_walks_equal_brute_force():
    for task in drawn_walks(num_nodes=5):
        walks = brute_force_walks(task, 4)
        expected = min(walks, key=lambda walk: (len(walk), walk))
        assert tuple(task.answer.split(">")) == expected
        reached = tasks.shortest_walks(task.edges[::-1], task.start)
        for node, found in reached.items():
            if node != task.start:
                to_node = Walk(edges=task.edges, start=task.start, goal=node)
                best = min(brute_force_walks(to_node, 4), key=lambda walk: (len(walk), walk))
                assert found == best


def test_verify_walk_scores_every_sequence_of_nodes_as_brute_force_does():
    for task in drawn_walks(4, num_nodes=4):
        valid = set(brute_force_walks(task, 4))
        shortest = min(map(len, valid)) - 1
        for length in range(1, 6):
            for row in itertools.product("abcd", repeat=length):
                expected = shortest / (length - 1) if row in valid else 0
                assert verify(task, ">".join(row)) == expected


def test_verify_walk_allows_space_around_nodes():
    for task in drawn_walks():
        assert verify(task, task.answer) == 1
        assert verify(task, "  " + task.answer.replace(">", " > ") + "\n") == 1


def test_verify_walk_refuses():
    edges = (("a", "b"), ("b", "c"), ("c", "b"), ("b", "a"))
    task = Walk(edges=edges, start="a", goal="c")
    assert verify(task, "a>b>c") == 1
    refused = ["", "a", "c", ">", "a>c", "b>c", "a>b", "a>b>c>", ">a>b>c", "a>>b>c", "abc"]
    refused += ["a,b,c", "A>B>C", "a>b>c.", "walk a>b>c", "a>b>c a>b>c", "a>b>c\na>b>c", "a->b->c"]
    refused += [" ".join("abcdef"), ">".join("abcdef"), "a>b b>c"]
    assert [text for text in refused if verify(task, text) != 0] == []


def test_verify_walk_gives_a_list_of_all_walks_nothing():
    for task in drawn_walks(4, num_nodes=4):
        walks = [">".join(walk) for walk in brute_force_walks(task, 4)]
        for separator in (" ", "\n", ",", ";"):
            assert len(walks) == 1 or verify(task, separator.join(walks)) == 0
        assert verify(task, task.prompt) == 0
        assert verify(task, task.prompt + task.answer) == 0


def test_walk_wants_two_edges_at_least():
    for task in drawn_walks(200):
        assert (task.start, task.goal) not in task.edges
        assert task.start != task.goal
        assert len(task.answer.split(">")) >= 3


def test_walk_draws_edges_with_their_probability():
    """In graphs so large that the wish for a distant goal says little about them."""
    number = [len(task.edges) for task in drawn_walks(300, num_nodes=12, edge_probability=0.25)]
    mean, deviation = 132 * 0.25, np.sqrt(132 * 0.25 * 0.75 / 300)
    assert abs(np.mean(number) - mean) < 4 * deviation


# Draws


@pytest.mark.parametrize("make", MAKERS)
def test_draw_depends_on_seed_and_index_alone(make):
    drawn = [make(3, index) for index in range(20)]
    assert [make(3, index) for index in reversed(range(20))][::-1] == drawn
    assert len({task.prompt for task in drawn}) > 15
    assert make(4, 0) != drawn[0]


def test_draw_is_the_same_in_every_version():
    text = repr(
        [make(0, index, split) for make in MAKERS for split in SPLITS for index in range(20)]
    )
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "cdf4052bda1bc8cf"


@pytest.mark.parametrize("make", MAKERS)
def test_splits_share_no_content(make):
    train = [make(0, index) for index in range(300)]
    held_out = [make(seed, index, "held_out") for seed in (0, 5) for index in range(100)]
    assert {task.split for task in train} == {"train"}
    assert {task.split for task in held_out} == {"held_out"}
    if make is tasks.walk:
        assert {task.edges for task in train}.isdisjoint(task.edges for task in held_out)
    assert {task.prompt for task in train}.isdisjoint(task.prompt for task in held_out)


def test_split_is_that_of_the_sum_in_tags_or_not_and_in_either_order():
    for left, right in itertools.product(range(20), repeat=2):
        task = Arithmetic(left=left, operator="+", right=right)
        assert TaggedAnswer(question=task).split == task.split
        assert Arithmetic(left=right, operator="+", right=left).split == task.split
    differences = {
        (left, right): Arithmetic(left=left, operator="-", right=right).split
        for left, right in itertools.product(range(20), repeat=2)
    }
    assert any(differences[right, left] != split for (left, right), split in differences.items())


def test_split_of_a_walk_is_that_of_its_graph():
    for task in drawn_walks():
        other = Walk(edges=task.edges[::-1], start=task.goal, goal=task.start)
        assert other.split == task.split


def test_split_holds_out_its_share():
    number = 40_000
    pairs = itertools.product(range(200), repeat=2)
    drawn = [Arithmetic(left=left, operator="-", right=right) for left, right in pairs]
    share = np.mean([task.split == "held_out" for task in drawn])
    assert abs(share - HELD_OUT_SHARE) < 4 * np.sqrt(HELD_OUT_SHARE * 0.9 / number)


def test_arithmetic_keeps_to_its_settings():
    drawn = [tasks.arithmetic(1, index, operators="-*", max_operand=9) for index in range(500)]
    assert {task.operator for task in drawn} == {"-", "*"}
    assert {task.left for task in drawn} == {task.right for task in drawn} == set(range(10))
    tagged = tasks.tagged_answer(1, 7, operators="-*", max_operand=9)
    assert tagged.question == drawn[7]


@pytest.mark.parametrize("make", MAKERS)
def test_answer_of_every_draw_is_right(make):
    for task in (make(2, index) for index in range(100)):
        assert verify(task, task.answer) == 1


@pytest.mark.parametrize(
    ("make", "arguments", "options", "message"),
    [
        (tasks.arithmetic, (-1, 0), {}, "seed is -1; it must be at least 0"),
        (tasks.walk, (0, -1), {}, "index is -1; it must be at least 0"),
        (tasks.tagged_answer, (0, 0, "test"), {}, "split is 'test'; it must be one of 'train'"),
        (tasks.arithmetic, (0, 0), {"operators": "+/"}, r"operators is '\+/'; it must be some of"),
        (tasks.arithmetic, (0, 0), {"operators": ""}, "operators is ''; it must be some of"),
        (tasks.arithmetic, (0, 0), {"max_operand": 0}, "max_operand is 0; it must be at least 1"),
        (tasks.walk, (0, 0), {"num_nodes": 3}, r"num_nodes is 3; it must be in \[4, 26\]"),
        (tasks.walk, (0, 0), {"num_nodes": 27}, r"num_nodes is 27; it must be in \[4, 26\]"),
        (tasks.walk, (0, 0), {"edge_probability": 1.1}, "edge_probability is 1.1; it must be in"),
        (tasks.walk, (0, 0), {"edge_probability": 0}, "'train', for which these settings leave no"),
    ],
)
def test_draw_refuses(make: Any, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        make(*arguments, **options)


# As a reward


def test_scorer_looks_the_task_up_by_its_prompt():
    pool = [make(0, index) for make in MAKERS for index in range(10)]
    score = tasks.scorer(pool)
    for asked, answered in itertools.product(pool, repeat=2):
        assert score(asked.prompt, answered.answer) == verify(asked, answered.answer)
    with pytest.raises(ValueError, match="prompt is '1"):
        score("1+1= ", "2")
