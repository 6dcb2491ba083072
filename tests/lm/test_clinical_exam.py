"""The exam: a floor counted by hand, marks of known answers, and what is shown of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from jaxrl_llm.data import clinical_grammar, clinical_text, tokens
from jaxrl_llm.data.clinical_text import Score
from jaxrl_llm.lm import base_model, clinical_exam, evaluate, generate
from jaxrl_llm.lm.base_model import SMALL, BaseModel
from jaxrl_llm.lm.clinical_exam import MARKS, Answer, Exam, Result
from jaxrl_llm.lm.generate import Response
from jaxrl_llm.lm.scores import Estimate
from tests.nn.tiny_gpt2 import fast_key

pytestmark = pytest.mark.slow

SHAPE = replace(SMALL, vocab_size=400, n_positions=384, n_embd=16, n_layer=1, n_head=2)
TRAINING = clinical_exam.pairs(clinical_text.examples(3, 0, 60))
NUM_CASES = 7


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return base_model.make(SHAPE, None, TRAINING, fast_key(0))


@pytest.fixture(scope="module")
def exam(base) -> Exam:
    return clinical_exam.make(3, NUM_CASES, base, batch_size=2)


def held_out() -> list[clinical_text.Example]:
    return list(clinical_text.examples(3, 0, NUM_CASES, "held_out"))


def test_pairs_are_the_prompt_and_what_is_learnt_of_it():
    example = next(clinical_text.examples(3, 0, 1))
    (pair,) = clinical_exam.pairs([example])
    assert [tuple(piece) for piece in pair.pieces] == [
        (example.prompt, False),
        (example.completion, True),
    ]


def test_make_examines_held_out_cases_and_every_token_of_their_responses(exam, base):
    assert exam.cases == [example.case for example in held_out()]
    prompts = {clinical_text.prompt(case) for case in exam.cases}
    assert prompts.isdisjoint(pair.prompt for pair in TRAINING)
    counted = sum(int(np.asarray(batch.response_mask).sum()) for batch in exam.batches)
    encode = base.tokenizer.encode
    assert counted == sum(len(encode(example.completion)) + 1 for example in held_out())
    assert {batch.tokens.shape for batch in exam.batches} == {(2, SHAPE.n_positions)}


def test_perplexity_floor_is_the_entropy_of_the_phrasings_spread_over_the_tokens(exam, base):
    entropy, num_tokens = 0.0, 0
    for example in held_out():
        for statement in clinical_grammar.parse(example.completion).statements:
            entropy += math.log(len(clinical_grammar.PHRASES[statement.kind]))
        num_tokens += len(base.tokenizer.encode(example.completion)) + 1
    np.testing.assert_allclose(exam.perplexity_floor, math.exp(entropy / num_tokens), rtol=1e-12)


def test_perplexity_is_that_of_the_responses_one_a_row(exam, base):
    sequences = [
        tokens.encode(pair, base.tokenizer, max_length=SHAPE.n_positions)
        for pair in clinical_exam.pairs(held_out())
    ]
    rows = tokens.pad(sequences, SHAPE.n_positions)
    expected = evaluate.perplexity(base.model, base.params, [rows])
    found = exam.perplexity(base.model, base.params)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    # A model that has learnt nothing is about uniform.
    np.testing.assert_allclose(found, len(base.tokenizer), rtol=0.1)


def test_make_refuses_an_exam_that_is_too_small_or_too_long(base):
    with pytest.raises(ValueError, match=r"^num_cases is 1; it must be at least 2$"):
        clinical_exam.make(3, 1, base, batch_size=2)
    with pytest.raises(ValueError, match="none of 7 examples has a response within max_length, 9"):
        clinical_exam.make(3, NUM_CASES, with_context(base, 9), batch_size=2)
    longest = max_length(base)
    message = f"1 of 7 cases have more tokens than the model's context, {longest - 1}; take a model"
    with pytest.raises(ValueError, match=f"^{message} with a longer one$"):
        clinical_exam.make(3, NUM_CASES, with_context(base, longest - 1), batch_size=2)
    assert clinical_exam.make(3, NUM_CASES, with_context(base, longest), batch_size=2).batches


def with_context(base: BaseModel, length: int) -> BaseModel:
    config = replace(base.model.config, n_positions=length)
    return base._replace(model=base.model.clone(config=config))


def max_length(base: BaseModel) -> int:
    pairs = clinical_exam.pairs(held_out())
    return max(len(tokens.encode(pair, base.tokenizer, max_length=999).tokens) for pair in pairs)


def sit_with(monkeypatch, exam: Exam, base: Any, say: Any) -> Result:
    """Sits the exam with `say(case, sample)` for the answers, two samples a case."""
    config = generate.Config(num_samples=2)

    def respond(model, params, tokenizer, prompts, key, asked):
        assert (model, params, tokenizer, asked) == (*base, config)
        assert prompts == [clinical_text.prompt(case) for case in exam.cases]
        return [Response(say(case, sample), True) for case in exam.cases for sample in range(2)]

    monkeypatch.setattr(generate, "respond", respond)
    return clinical_exam.sit(exam, base, fast_key(0), config)


def test_sit_gives_full_marks_to_good_responses(monkeypatch, exam, base):
    random = np.random.default_rng(0)
    result = sit_with(
        monkeypatch, exam, base, lambda case, _: clinical_text.good_response(case, random)
    )
    assert result.marks == {name: Estimate(1.0, 1.0, 1.0) for name in MARKS}
    assert result.perplexity == exam.perplexity(base.model, base.params)
    assert [answer.case for answer in result.answers] == [c for c in exam.cases for _ in range(2)]


def test_sit_marks_each_answer_by_its_own_case(monkeypatch, exam, base):
    """The first sample of a case is good, the second nonsense: every mark is a half."""
    random = np.random.default_rng(0)

    def say(case, sample):
        return clinical_text.good_response(case, random) if sample == 0 else "colourless green"

    result = sit_with(monkeypatch, exam, base, say)
    nonsense = clinical_text.score(exam.cases[0], "colourless green")
    for name, field in MARKS.items():
        expected = (1 + float(getattr(nonsense, field))) / 2
        np.testing.assert_allclose(result.marks[name].mean, expected)
    low, high = result.marks["gold_score"][1:]
    assert low < result.marks["gold_score"].mean < high
    assert result.measures == {"perplexity": Estimate(*[result.perplexity] * 3), **result.marks}


def result_of(exam: Exam, perplexity: float, total: float, *reasons: str) -> Result:
    case = exam.cases[0]
    score = clinical_text.score(case, "")
    values: dict[str, Any] = {**vars(score), "reasons": reasons}
    answers = [Answer(case, f" Text {index}.\n", Score(**values)) for index in range(3)]
    return Result(perplexity, answers, {"gold_score": Estimate(total, total, total)})


def test_samples_and_change_set_before_beside_after(exam):
    before, after = result_of(exam, 9.0, 0.25, "no drug", "vague"), result_of(exam, 1.5, 0.75)
    total = before.answers[0].score.total
    samples = clinical_exam.samples(before.answers, after.answers, 2)
    assert samples == [
        {
            "prompt": clinical_text.prompt(exam.cases[0]),
            "before": f"Text {index}.\n[{total:.2f}] no drug; vague",
            "after": f"Text {index}.\n[{total:.2f}] nothing to mark down",
        }
        for index in range(2)
    ]
    assert clinical_exam.change(exam, before, after) == {
        "perplexity_floor": exam.perplexity_floor,
        "perplexity_before": 9.0,
        "gold_score_before": 0.25,
        "perplexity_after": 1.5,
        "gold_score_after": 0.75,
    }
