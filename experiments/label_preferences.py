"""You compare pairs of responses on the terminal, and a file of preferences grows.

    python -m experiments.label_preferences [--labels FILE --candidates FILE --shows-gold]

Keys: a or b for the better response, t for a tie, s to skip, u to take back, q to quit. Every
answer is on the disk at once, and the next start goes on where this one stopped. By default the
pairs are responses, good and flawed, to SYNTHETIC cases; `--shows-gold` compares you with their
gold scorer. `data.preferences` and TRL read the file. Research only, not for clinical use.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxrl_llm import checks
from jaxrl_llm.data import clinical_preferences
from jaxrl_llm.lm import labeller
from jaxrl_llm.training import cli, report


@dataclass(frozen=True, kw_only=True)
class Config:
    """Preferences of a person. Research only, not for clinical use."""

    labels: Path = Path("preferences.jsonl")
    """The file that grows: JSON lines."""
    candidates: Path | None = None
    """JSON lines of {"prompt": text, "responses": [text, text]}; by default synthetic cases."""
    num_pairs: int = 50
    """Synthetic pairs."""
    annotator: str = "me"
    """The name that the answers are signed with."""
    shows_gold: bool = False
    """Say after each answer how often the gold scorer has agreed, for synthetic pairs."""
    seed: int = 0
    """Of the pairs, and of the order in which their responses are shown."""

    def validate(self) -> None:
        """Raises ValueError, naming the field, unless there is something to ask."""
        checks.at_least("num_pairs", self.num_pairs, 1)
        checks.at_least("seed", self.seed, 0)
        if not self.annotator.strip():
            raise ValueError("annotator is empty; give a name to sign with")


def main(config: Config) -> dict[str, float]:
    """Asks until there is nothing left to ask or the user quits; returns what was done."""
    chosen = config.candidates
    candidates = labeller.read_candidates(chosen) if chosen else list(_synthetic(config))
    print(report.RESEARCH_ONLY if chosen else f"{clinical_preferences.SYNTHETIC}.")
    summary = labeller.label(
        candidates,
        config.labels,
        annotator=config.annotator,
        seed=config.seed,
        shows_gold=config.shows_gold and not chosen,
    )
    result = {
        "num_labelled": float(summary.num_labelled),
        "num_candidates": float(summary.num_candidates),
    }
    if summary.num_comparable:
        result["gold_agreement"] = summary.num_agreeing / summary.num_comparable
    return result


def _synthetic(config: Config) -> Iterator[labeller.Candidate]:
    notice = {"synthetic": True, "notice": clinical_preferences.SYNTHETIC}
    for pair in clinical_preferences.pairs(config.seed, 0, config.num_pairs):
        texts = (pair.preference.chosen, pair.preference.rejected)
        yield labeller.Candidate(
            prompt=pair.preference.prompt, responses=texts, gold=pair.gold, fields=notice
        )


if __name__ == "__main__":
    cli.main(main, Config)
