"""What the experiments of alignment share: a policy that imitates, a judge, a task, an exam.

Everything is about SYNTHETIC cases, whose gold score is known. Research only, not for clinical use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from experiments import clinical_questions
from experiments.clinical_questions import Examined
from jaxrl_llm import checks
from jaxrl_llm.data import clinical_preferences, clinical_text, tokens
from jaxrl_llm.data.clinical_preferences import Annotator
from jaxrl_llm.data.clinical_text import Case
from jaxrl_llm.lm import (
    base_model,
    clinical_exam,
    dpo,
    evaluate,
    hf_checkpoint,
    optimizer,
    policy_step,
    ppo,
    reward,
    reward_heads,
    rewards,
    rollouts,
    sft,
    tokenizer,
)
from jaxrl_llm.lm.base_model import BaseModel
from jaxrl_llm.lm.objective import Mix
from jaxrl_llm.lm.rewards import Reward
from jaxrl_llm.nn.gpt2 import GPT2
from jaxrl_llm.training import experiment, frontier, plotting, report
from jaxrl_llm.types import Algorithm, Array, Key, Mean, PyTree, Responses

SMALLER = replace(base_model.SMALL, n_embd=128, n_head=4)
IMITATION = sft.Config(
    num_steps=500, batch_size=8, chunk_size=None, optimizer=optimizer.Config(learning_rate=3e-3)
)
# The trunk stays that of the imitating policy, so that every comparison is read once.
HEADS = optimizer.Config(learning_rate=1e-3, weight_decay=0.01, trainable="heads")
JUDGEMENT = reward.Config(num_steps=250, batch_size=16, centring_coefficient=1e-4, optimizer=HEADS)
SOLVED = reward_heads.Config()
ROLLOUT = rollouts.Config(num_prompts=32, max_new_tokens=96)
POLICY_STEPS = policy_step.Config(
    num_epochs=2, num_minibatches=2, optimizer=replace(optimizer.ADAM, learning_rate=3e-4)
)
PPO = ppo.Config(rollout=ROLLOUT, update=POLICY_STEPS, num_iterations=60, kl_coefficient=0.2)
ANNOTATOR = Annotator()
VALUE_WIDTH = 256


@dataclass(frozen=True, kw_only=True)
class StagesConfig(experiment.TrainConfig):
    """What every experiment of alignment takes."""

    num_evaluations: int = 20
    num_checkpoints: int = 2
    model: Path | None = None
    """Directory of a fine-tuned GPT-2 to align; by default a small one is trained from nothing."""
    base: base_model.Config = SMALLER
    num_demonstrations: int = 12_000
    """SYNTHETIC responses to imitate."""
    share_flawed: float = 0.6
    """Of the demonstrations that have one flaw: what alignment is to find out, and to avoid."""
    sft: sft.Config = IMITATION
    num_pairs: int = 4000
    """Comparisons by the annotator to learn the reward from."""
    num_own_pairs: int = 500
    """Further ones, of what the imitating policy says itself."""
    num_held_out: int = 1000
    """Further comparisons, to test the reward model on."""
    annotator: Annotator = ANNOTATOR
    reward: reward.Config = JUDGEMENT
    """With --reward.optimizer.trainable all, the trunk learns too."""
    heads: reward_heads.Config = SOLVED
    """Of the reward model, where they alone learn."""
    pooling: Literal["last", "mean"] = "mean"
    """What the reward model reads of a response: its last token, or the mean of all."""
    surprisal: bool = True
    """Whether it also reads how unlikely its trunk, a language model, finds the response."""
    num_prompts: int = 8000
    """SYNTHETIC cases that the policy is asked about while it learns."""
    num_cases: int = 300
    """Unseen SYNTHETIC cases of the examination."""

    def validate(self) -> None:
        super().validate()
        checks.between("share_flawed", self.share_flawed, 0, 1)
        for name in ("num_demonstrations", "num_pairs", "num_held_out", "num_prompts"):
            checks.at_least(name, getattr(self, name), 1)
        checks.at_least("num_own_pairs", self.num_own_pairs, 0)
        checks.at_least("num_cases", self.num_cases, 2)


def imitate(run: experiment.Run[StagesConfig]) -> BaseModel:
    """The policy to align: a user's, or one fine-tuned on demonstrations of mixed quality."""
    config = run.config
    if config.model is not None:
        model, params = hf_checkpoint.load(config.model)
        return BaseModel(model, params, tokenizer.load(config.model))
    stage = run.start_stage("sft")
    init_key, order_key = experiment.keys(stage, 2)
    shown = clinical_preferences.demonstrations(
        config.seed, 0, config.num_demonstrations, share_flawed=config.share_flawed
    )
    examples = clinical_exam.pairs(shown)
    base = base_model.make(config.base, None, examples, init_key)
    length = min(config.sft.row_length, base.model.config.n_positions)
    state = experiment.train(
        stage,
        sft.make(config.sft, base.model),
        num_steps=config.sft.num_steps,
        items_per_step=config.sft.batch_size * length,
        evaluate=lambda state: {},
        state=sft.start(config.sft, base.params, order_key),
        data=tokens.corpus(examples, base.tokenizer, length=length),
        sequential=True,
        unit="tokens",
    )
    return base._replace(params=state.train.params)


def examine_all(
    run: experiment.Run[StagesConfig], policies: Mapping[str, BaseModel], imitator: BaseModel
) -> dict[str, Examined]:
    """Puts the same unseen cases to every policy; each is compared with `imitator`."""
    key, _ = experiment.keys(run, 2)  # the other one is that of the policy's own pairs
    unseen = cases(run.config, run.config.num_cases, "held_out")
    return {
        name: clinical_questions.examine(ROLLOUT, policy, imitator, unseen, key)
        for name, policy in policies.items()
    }


def cases(config: StagesConfig, count: int, split: clinical_text.Split) -> list[Case]:
    """The first cases of the run's stream."""
    return [clinical_text.case(config.seed, index, split) for index in range(count)]


def beside_gold(proxy: Reward, policy: BaseModel, asked: list[Case]) -> Reward:
    """The reward that a policy maximises, with the gold score of the same responses beside it.

    Its criteria are those of `proxy`, mixed as there, then `gold`, which counts for nothing.
    """
    gold = rewards.of_text(policy.tokenizer, clinical_exam.gold(asked), ("gold",))

    def combine(state: PyTree, scores: Array) -> tuple[Array, PyTree, dict[str, Mean]]:
        return proxy.mix.combine(state, scores[..., :-1])

    return rewards.joined(proxy, gold, mix=Mix(init=proxy.mix.init, combine=combine))


class OnPolicy(Protocol):
    """A file of `jaxrl_llm.lm` that learns from what its own policy says, such as `ppo`."""

    make: Callable[[Any, GPT2, Reward], Algorithm]
    start: Callable[[Any, PyTree, Key, Reward], PyTree]


def align(
    run: experiment.Run[StagesConfig],
    name: str,
    method: OnPolicy,
    settings: Any,
    imitator: BaseModel,
    proxy: Reward,
    params: PyTree,
) -> BaseModel:
    """A policy that starts as `imitator` and learns from what it says of the run's own cases.

    Its log has the gold score of the same responses, which it does not learn from.

    Args:
      run: of the experiment.
      name: of the stage.
      method: the algorithm.
      settings: its configuration.
      imitator: where the policy starts, and the reference that it stays near.
      proxy: the reward.
      params: of the reward.
    """
    config, stage = run.config, run.start_stage(name)
    head_key, order_key = experiment.keys(stage, 2)
    trainable = settings.update.optimizer.trainable
    value_width = VALUE_WIDTH if method is ppo else None
    learner = base_model.extend(
        config.base, imitator, head_key, trainable=trainable, value_width=value_width
    )
    asked = cases(config, config.num_prompts, "train")
    reward = beside_gold(proxy, imitator, asked)
    task = rollouts.make_task(
        settings.rollout,
        learner.model,
        clinical_questions.as_prompts(imitator, asked),
        # Adapters leave the trunk alone, which is the reference then.
        reference=imitator.params if trainable == "all" else None,
        reward=(params, None),
    )
    # A run donates its first state, and these arrays are those of the reference too.
    copied = jax.tree.map(jnp.copy, learner.params)
    state = experiment.train(
        stage,
        method.make(settings, learner.model, reward),
        num_steps=settings.num_iterations,
        items_per_step=settings.rollout.num_responses,
        evaluate=lambda state: {},
        state=method.start(settings, copied, order_key, reward),
        data=task,
        sequential=True,
        unit="responses",
    )
    return learner._replace(params=state.train.params)


def align_by_pairs(
    run: experiment.Run[StagesConfig],
    name: str,
    settings: dpo.Config,
    imitator: BaseModel,
    pairs: Responses,
) -> BaseModel:
    """A policy that starts as `imitator` and learns from pairs of responses; else as `align`."""
    stage = run.start_stage(name)
    (order_key,) = experiment.keys(stage, 1)
    pairs = dpo.with_reference(settings, imitator.model, imitator.params, pairs)
    copied = jax.tree.map(jnp.copy, imitator.params)
    state = experiment.train(
        stage,
        dpo.make(settings, imitator.model),
        num_steps=settings.num_steps,
        items_per_step=settings.batch_size,
        evaluate=lambda state: {},
        state=dpo.start(settings, copied, order_key),
        data=pairs,
        sequential=True,
        unit="pairs",
    )
    return imitator._replace(params=state.train.params)


def on_the_way(run: experiment.Run[Any], name: str, *metrics: str) -> list[NDArray[np.float64]]:
    """What the stage `name` logged of each metric, `[T]`."""
    stage = run.start_stage(name)
    return [experiment.curve(stage, metric)[1] for metric in metrics]


def gains(
    run: experiment.Run[Any], name: str, before: Examined
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The square root of the KL, and the gains of proxy and gold score in deviations, `[T]` each.

    Args:
      run: of the experiment.
      name: of the policy's stage.
      before: the imitating policy, whose deviation is the unit of the gold score.
    """
    kl, proxy, gold = on_the_way(run, name, "kl", "score", "score_gold")
    # An imitator whose answers are all worth the same has no deviation: gains are in scores then.
    gold = (gold - np.mean(before.gold)) / (np.std(before.gold) or 1.0)
    return np.sqrt(np.maximum(kl, 0)), proxy, gold


def draw(
    run: experiment.Run[Any],
    name: str,
    before: Examined,
    after: Examined,
    calibration: evaluate.Calibration,
    title: str,
) -> None:
    """Pictures of a run: gold and proxy on the way, marks, and the judge's calibration.

    Args:
      run: whose folder they are written to.
      name: of the policy's stage.
      before: the imitating policy.
      after: the aligned one.
      calibration: of the reward model.
      title: of the pictures.
    """
    bars = {
        mark.replace("_", " "): (before.marks[mark], after.marks[mark]) for mark in before.marks
    }
    figures = {
        "gold_and_proxy": frontier.gold_against_proxy(
            {name.upper(): gains(run, name, before)},
            title="Gains on SYNTHETIC cases while it learns",
            ylabel="Gain (deviations of the imitator's scores)",
            footer=report.RESEARCH_ONLY,
        ),
        "marks": frontier.before_after_bars(
            bars, names=("imitating", "aligned"), title=title, footer=report.RESEARCH_ONLY
        ),
        "calibration": frontier.calibration_picture(
            confidence=np.asarray(calibration.confidence.mean),
            accuracy=np.asarray(calibration.accuracy.mean),
            weight=np.asarray(calibration.accuracy.weight),
            title="Reward model on unseen SYNTHETIC comparisons",
            footer=report.RESEARCH_ONLY,
        ),
    }
    for picture, figure in figures.items():
        plotting.save_figure(figure, run.directory / f"{picture}.png")
