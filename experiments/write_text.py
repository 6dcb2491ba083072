"""A GPT-2 directory writes to the terminal, token by token; a clinical answer is marked.

    python -m experiments.write_text [--model DIRECTORY --prompt "..." --sampling.top-p 0.9]

By default it is the model that `experiments.sft_clinical` wrote last, on an unseen SYNTHETIC case,
and the gold scorer says what is wrong with the answer. Expected on 2 CPU cores: a few seconds.
Research only, not for clinical use.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxrl_llm import checks
from jaxrl_llm.data import clinical_text, tokens
from jaxrl_llm.lm import generate, hf_checkpoint, terminal, tokenizer
from jaxrl_llm.training import cli, report

SAMPLING = generate.Config(max_new_tokens=96)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Text from a language model. Research only, not for clinical use."""

    seed: int = 0
    """Root of every random number."""
    model: Path | None = None
    """A Hugging Face GPT-2; by default the newest in `runs`."""
    runs: Path = Path("runs")
    """Where `experiments.sft_clinical` wrote."""
    prompt: str | None = None
    """What to go on from; by default a synthetic case."""
    case: int = 0
    """Which of the unseen cases, without a prompt."""
    sampling: generate.Config = SAMPLING

    def validate(self) -> None:
        for name in ("seed", "case"):
            checks.at_least(name, getattr(self, name), 0)


def main(config: Config) -> dict[str, float]:
    """Streams the prompt and what follows; returns its length and, of a case, its marks."""
    directory = config.model or _newest_model(config.runs)
    words: Any = tokenizer.load(directory)
    model, params = hf_checkpoint.load(directory)
    case = clinical_text.case(config.seed, config.case, "held_out")
    prompt = clinical_text.prompt(case) if config.prompt is None else config.prompt
    ids = tokens.encode_prompt(prompt, words).tokens[None]
    key = jax.random.key(config.seed)
    print(terminal.printable(prompt), end="", flush=True)
    chunks = generate.stream(model, params, ids, None, key, config.sampling)
    texts = terminal.write_stream(chunks, words)
    if config.prompt is not None:
        return {"num_characters": float(sum(map(len, texts)))}
    scores = [clinical_text.score(case, text) for text in texts]
    for score in scores:
        print(
            f"\ngold score {score.total:.2f}: {'; '.join(score.reasons) or 'nothing to mark down'}"
        )
    print(f"{clinical_text.SYNTHETIC.split(';')[0]}. {report.RESEARCH_ONLY}")
    return {"gold_score": sum(score.total for score in scores) / len(scores)}


def _newest_model(runs: Path) -> Path:
    found = sorted((runs / "sft_clinical").glob("*/model"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"{runs} has no model; run experiments.sft_clinical, or give --model")
    return found[-1]


if __name__ == "__main__":
    cli.main(main, Config)
