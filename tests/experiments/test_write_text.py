"""A saved model on the terminal: what is streamed is what `generate` draws, and it is marked."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments import write_text
from jaxrl_llm.data import clinical_text
from jaxrl_llm.lm import base_model, clinical_exam, generate, hf_checkpoint, terminal, tokenizer
from jaxrl_llm.training import cli
from tests.lm import tiny

pytestmark = pytest.mark.slow

quick_compilation = pytest.fixture(scope="module", autouse=True)(tiny.quick_compilation)
SHAPE = base_model.Config(vocab_size=300, n_positions=320, n_embd=16, n_layer=1, n_head=2)
SAMPLING = generate.Config(max_new_tokens=6, num_samples=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with two models, the later one under the earlier name."""
    folder = tmp_path_factory.mktemp("runs")
    examples = clinical_exam.pairs(clinical_text.examples(0, 0, 30))
    for age, name in enumerate(("b", "a")):
        base = base_model.make(SHAPE, None, examples, jax.random.key(age))
        saved = base_model.export(folder / "sft_clinical" / name / "model", base)
        assert saved is not None
        os.utime(saved, (age, age))
    return folder


def drawn(directory: Path, prompt: str, seed: int) -> list[str]:
    """What `generate` draws, as text."""
    model, params = hf_checkpoint.load(directory)
    words: Any = tokenizer.load(directory)
    ids = np.array([words.encode(prompt)])
    batch = generate.generate(model, params, ids, None, jax.random.key(seed), SAMPLING)
    rows = zip(np.array(batch.tokens), np.array(batch.response_mask), strict=True)
    return [words.decode(ids[mask].tolist(), skip_special_tokens=True) for ids, mask in rows]


@pytest.mark.slow
def test_write_text_streams_what_generate_draws_for_a_case_and_marks_it(runs, capsys):
    config = write_text.Config(runs=runs, seed=3, case=2, sampling=SAMPLING)
    result = write_text.main(config)
    case = clinical_text.case(3, 2, "held_out")
    prompt = clinical_text.prompt(case)
    texts = drawn(runs / "sft_clinical" / "a" / "model", prompt, 3)
    scores = [clinical_text.score(case, text) for text in texts]
    output = capsys.readouterr().out
    assert output.startswith(prompt)
    assert all(terminal.printable(text) in output for text in texts)
    assert output.count("\ngold score") == 2
    assert "SYNTHETIC case. Research only, not for clinical use." in output
    assert result == {"gold_score": sum(score.total for score in scores) / 2}


def test_write_text_goes_on_from_a_prompt_of_the_users(runs, capsys):
    directory = runs / "sft_clinical" / "b" / "model"
    prompt = "Patient presents with \x1b[2Jchest pain."
    config = write_text.Config(model=directory, prompt=prompt, sampling=SAMPLING)
    result = write_text.main(config)
    texts = drawn(directory, prompt, 0)
    output = capsys.readouterr().out
    assert output.startswith("Patient presents with [2Jchest pain.")
    assert "gold score" not in output
    assert result == {"num_characters": float(sum(map(len, texts)))}


def test_write_text_refuses_in_one_line(runs, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"has no model; run experiments.sft_clinical, or give"):
        write_text.main(write_text.Config(runs=tmp_path))
    long = write_text.Config(runs=runs, sampling=replace(SAMPLING, max_new_tokens=319))
    with pytest.raises(ValueError, match=r"tokens\[0\] has \d+ tokens; with max_new_tokens 319"):
        write_text.main(long)
    with pytest.raises(SystemExit):
        cli.parse(write_text.Config, ["--case=-1"])
    assert "--case is -1; it must be at least 0" in capsys.readouterr().err


def test_write_text_parses_without_arguments():
    assert cli.parse(write_text.Config, []) == write_text.Config()
