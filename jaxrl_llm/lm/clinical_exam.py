"""A language model examined on unseen synthetic cases: it answers, and the gold scorer marks.

Research only, not for clinical use.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from jaxrl_llm import checks
from jaxrl_llm.data import clinical_text, tokens
from jaxrl_llm.data.clinical_text import Case, Score
from jaxrl_llm.data.json_lines import Example
from jaxrl_llm.lm import evaluate, generate
from jaxrl_llm.lm.base_model import BaseModel
from jaxrl_llm.lm.scores import Estimate, mean_with_interval
from jaxrl_llm.nn.gpt2 import GPT2
from jaxrl_llm.types import Key, PyTree, TokenBatch

# Name of the mark -> field of the gold scorer.
MARKS = {"gold_score": "total"} | {name: name for name in (*clinical_text.CRITERIA, "grammatical")}


class Exam(NamedTuple):
    """Cases that no training text holds.

    Attributes:
      cases: to be answered.
      batches: a good response to each, for the perplexity.
      perplexity_floor: exp(entropy a token) of good responses given their cases, which the
        perplexity of no model is below, but for the luck of the draw.
    """

    cases: list[Case]
    batches: list[TokenBatch]
    perplexity_floor: float

    def perplexity(self, model: GPT2, params: PyTree) -> float:
        """Of the good responses."""
        return evaluate.perplexity(model, params, self.batches)


class Answer(NamedTuple):
    """What a model said of a case, and what it scored."""

    case: Case
    text: str
    score: Score


class Result(NamedTuple):
    """What an exam showed; `marks` are means in [0, 1] with their 95 % intervals, by `MARKS`."""

    perplexity: float
    answers: list[Answer]
    marks: dict[str, Estimate]

    @property
    def measures(self) -> dict[str, Estimate]:
        """The marks and, without an interval since its corpus is fixed, the perplexity."""
        return {"perplexity": Estimate(*[self.perplexity] * 3), **self.marks}


def make(seed: int, num_cases: int, base: BaseModel, *, batch_size: int) -> Exam:
    """An exam on the first `num_cases` held-out cases of stream `seed`, for `base`'s tokenizer.

    Raises:
      ValueError: if there are too few cases for an interval, or one is longer than the context of
        the model: the floor is of whole responses.
    """
    checks.at_least("num_cases", num_cases, 2)
    examples = list(clinical_text.examples(seed, 0, num_cases, "held_out"))
    length = base.model.config.n_positions
    encoding = tokens.encode_all(pairs(examples), base.tokenizer, max_length=length)
    if num_cut := encoding.num_cut + encoding.num_dropped:
        fault = f"{num_cut} of {num_cases} cases have more tokens than the model's context"
        raise ValueError(f"{fault}, {length}; take a model with a longer one")
    corpus = tokens.pack(encoding.sequences, length)
    _, counted = tokens.next_token_targets(corpus)
    entropy = sum(clinical_text.response_entropy(example.case) for example in examples)
    return Exam(
        cases=[example.case for example in examples],
        batches=list(tokens.batches(corpus, batch_size=batch_size)),
        perplexity_floor=math.exp(entropy / int(counted.sum())),
    )


def pairs(examples: Iterable[clinical_text.Example]) -> list[Example]:
    """Clinical examples as prompts and completions to train on."""
    return [Example.of(example.prompt, example.completion) for example in examples]


def sit(exam: Exam, base: BaseModel, key: Key, config: generate.Config) -> Result:
    """`config.num_samples` answers to every case, drawn and marked, and the perplexity.

    Args:
      exam: from `make`.
      base: who sits it.
      key: of the answers.
      config: how they are drawn.
    """
    prompts = [clinical_text.prompt(case) for case in exam.cases]
    responses = generate.respond(base.model, base.params, base.tokenizer, prompts, key, config)
    cases = [case for case in exam.cases for _ in range(config.num_samples)]
    answers = mark(cases, [response.text for response in responses])
    return Result(exam.perplexity(base.model, base.params), answers, means(answers))


def mark(cases: Iterable[Case], texts: Iterable[str]) -> list[Answer]:
    """The text about each case with its score."""
    return [
        Answer(case, text, clinical_text.score(case, text))
        for case, text in zip(cases, texts, strict=True)
    ]


def means(answers: Sequence[Answer]) -> dict[str, Estimate]:
    """The mean of every mark, by `MARKS`, with its interval."""
    return {
        name: mean_with_interval([float(getattr(answer.score, field)) for answer in answers])
        for name, field in MARKS.items()
    }


def gold(cases: Iterable[Case], criterion: str = "total") -> Callable[[str, str], float]:
    """The gold scorer as a reward `(prompt, response) -> score`, for the prompts of these cases.

    Args:
      cases: of all prompts that will be asked.
      criterion: `total`, or one of `clinical_text.CRITERIA`.
    """
    asked = {clinical_text.prompt(case): case for case in cases}

    def score(prompt: str, response: str) -> float:
        return float(getattr(clinical_text.score(asked[prompt], response), criterion))

    return score


def samples(before: Sequence[Answer], after: Sequence[Answer], count: int) -> list[dict[str, str]]:
    """The first answers before and after training, each with its score and what it was for."""

    def judged(answer: Answer) -> str:
        reasons = "; ".join(answer.score.reasons) or "nothing to mark down"
        return f"{answer.text.strip()}\n[{answer.score.total:.2f}] {reasons}"

    both = zip(before, after, strict=True)
    return [
        {"prompt": clinical_text.prompt(old.case), "before": judged(old), "after": judged(new)}
        for old, new in itertools.islice(both, count)
    ]


def change(exam: Exam, before: Result, after: Result) -> dict[str, float]:
    """The floor, and every measure as `<name>_before` and `<name>_after`."""
    both = {"before": before, "after": after}
    return {"perplexity_floor": exam.perplexity_floor} | {
        f"{name}_{when}": measure.mean
        for when, result in both.items()
        for name, measure in result.measures.items()
    }
