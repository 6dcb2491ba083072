"""A small GPT-2 learns to assess patients from SYNTHETIC clinical text, beside the exact floor.

    python -m experiments.sft_clinical [--model DIRECTORY --sft.optimizer.trainable lora]

A model of 1.4 million parameters, and its tokenizer, are trained from nothing, or any Hugging Face
GPT-2 is fine-tuned. The law of the text is known, and with it the lowest perplexity there can be;
a gold scorer marks what the model writes about unseen patients. Expected on 2 CPU cores: 2 minutes;
perplexity of good responses from 1100 to 1.12 (floor 1.11), gold score from 0 to 0.95 in [0, 1].
Research only, not for clinical use.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxrl_llm.data import clinical_text, tokens
from jaxrl_llm.data.json_lines import read_json_lines
from jaxrl_llm.lm import base_model, clinical_exam, generate, optimizer, sft
from jaxrl_llm.training import cli, experiment, report

ADAMW = optimizer.Config(learning_rate=3e-3)
SETTINGS = sft.Config(num_steps=1000, batch_size=8, chunk_size=None, optimizer=ADAMW)
SAMPLING = generate.Config(max_new_tokens=96)


@dataclass(frozen=True, kw_only=True)
class Config(experiment.TrainConfig):
    """Supervised fine-tuning on SYNTHETIC clinical text. Research only, not for clinical use."""

    num_evaluations: int = 10
    num_checkpoints: int = 2
    model: Path | None = None
    """Directory of a GPT-2 to fine-tune; by default a small one is trained from nothing."""
    data: Path | None = None
    """JSON lines to train on (prompt and completion, or messages), in place of synthetic text."""
    num_examples: int = 16_000
    """Synthetic cases to train on."""
    num_cases: int = 200
    """Unseen synthetic cases to be examined on."""
    base: base_model.Config = base_model.SMALL
    sft: sft.Config = SETTINGS
    sampling: generate.Config = SAMPLING


def main(config: Config) -> dict[str, float]:
    """Trains; shows perplexity, marks and samples before and after; saves the model."""
    run = experiment.open_run("sft_clinical", config)
    config, settings = run.config, run.config.sft
    init_key, order_key, answer_key = experiment.keys(run, 3)
    data, trainable = config.data, settings.optimizer.trainable
    synthetic = clinical_text.examples(config.seed, 0, config.num_examples)
    examples = list(read_json_lines(data)) if data else clinical_exam.pairs(synthetic)
    base = base_model.make(config.base, config.model, examples, init_key, trainable=trainable)
    length = min(settings.row_length, base.model.config.n_positions)
    corpus = tokens.corpus(examples, base.tokenizer, length=length)
    exam = clinical_exam.make(config.seed, config.num_cases, base, batch_size=settings.batch_size)
    before = clinical_exam.sit(exam, base, answer_key, config.sampling)
    state = sft.start(settings, base.params, order_key)
    state = experiment.train(
        run, sft.make(settings, base.model), state=state, data=corpus, sequential=True,
        num_steps=settings.num_steps, items_per_step=settings.batch_size * length, unit="tokens",
        evaluate=lambda state: {"perplexity": exam.perplexity(base.model, state.train.params)},
    )  # fmt: skip
    learnt = base._replace(params=state.train.params)
    after = clinical_exam.sit(exam, learnt, answer_key, config.sampling)
    saved = base_model.export(run.directory / "model", learnt)
    print(f"model: {saved or 'in the checkpoints alone; GPT-2 has no place for an adapter'}")
    title, floor = f"{config.num_cases} unseen SYNTHETIC cases", exam.perplexity_floor
    report.show_samples(title, clinical_exam.samples(before.answers, after.answers, 2))
    footer = f"Perplexity cannot be below {floor:.3f}. {report.RESEARCH_ONLY}"
    report.show_change(title, before.measures, after.measures, footer=footer)
    experiment.draw_curve(run, "perplexity", {"floor": floor}, title=title, footer=footer)
    return experiment.finish(run, clinical_exam.change(exam, before, after))


if __name__ == "__main__":
    cli.main(main, Config)
