"""A labelling session as a program: piped keys, a file that grows, one-line errors."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from experiments import label_preferences
from jaxrl_llm.data import clinical_preferences
from jaxrl_llm.data.preferences import read_preferences
from jaxrl_llm.training import cli


@pytest.fixture
def keys(monkeypatch):
    """Presses keys, one a line, at the next session."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(text) + "\n"))


def test_label_preferences_grows_a_file_of_synthetic_pairs(tmp_path, keys, capsys):
    path = tmp_path / "labels.jsonl"
    config = label_preferences.Config(labels=path, num_pairs=4, seed=2, shows_gold=True)
    keys("abq")
    first = label_preferences.main(config)
    output = capsys.readouterr().out
    assert output.startswith("SYNTHETIC case; research only, not for clinical use.\n")
    assert "2 of 4 labelled; the gold scores agree with" in output
    keys("tb")
    last = label_preferences.main(config)
    assert (first["num_labelled"], last["num_labelled"], last["num_candidates"]) == (2, 4, 4)

    pairs = list(clinical_preferences.pairs(2, 0, 4))
    found = list(read_preferences(path))
    for pair, preference in zip(pairs, found, strict=True):
        assert preference.prompt == pair.preference.prompt
        texts = {pair.preference.chosen, pair.preference.rejected}
        assert {preference.chosen, preference.rejected} == texts
        assert preference.annotator == "me"
    assert all(json.loads(line)["synthetic"] for line in path.read_text().splitlines())
    best = [pair.preference.chosen if pair.gold[0] > pair.gold[1] else "" for pair in pairs[:2]]
    other = [pair.preference.rejected if pair.gold[0] < pair.gold[1] else "" for pair in pairs[:2]]
    agreeing = [each.chosen in texts for each, *texts in zip(found, best, other, strict=False)]
    comparable = sum(pair.gold[0] != pair.gold[1] for pair in pairs[:2])
    assert first["gold_agreement"] == sum(agreeing) / comparable


def test_label_preferences_reads_candidates_of_ones_own(tmp_path, keys, capsys):
    candidates, labels = tmp_path / "candidates.jsonl", tmp_path / "labels.jsonl"
    candidates.write_text('{"prompt": "Dose?", "responses": [" 5 mg.", " Lots."]}\n')
    keys("a")
    config = label_preferences.Config(candidates=candidates, labels=labels, annotator="Al")
    assert label_preferences.main(config) == {"num_labelled": 1.0, "num_candidates": 1.0}
    assert capsys.readouterr().out.startswith("Research only, not for clinical use.\n")
    (preference,) = read_preferences(labels)
    assert (preference.prompt, preference.annotator) == ("Dose?", "Al")
    assert "synthetic" not in json.loads(labels.read_text())


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--num-pairs", "0"], "--num-pairs is 0; it must be at least 1"),
        (["--seed", "-1"], "--seed is -1; it must be at least 0"),
        (["--annotator", " "], "--annotator is empty; give a name to sign with"),
        (["--candidates", "none.jsonl"], "none.jsonl cannot be read: No such file or directory"),
    ],
)
def test_label_preferences_says_what_is_wrong_in_one_line(
    arguments, fault, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["label_preferences", *arguments])
    with pytest.raises(SystemExit, match="2"):
        cli.main(label_preferences.main, label_preferences.Config)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {fault}")
    assert error.count("\n") == 1
    assert list(Path(tmp_path).iterdir()) == []
