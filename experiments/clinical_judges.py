"""Reward models of SYNTHETIC answers: learnt from an annotator's comparisons, and what they say.

Research only, not for clinical use.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from experiments import clinical_questions
from experiments.clinical_questions import Examined
from experiments.clinical_stages import ROLLOUT, StagesConfig, cases
from jaxrl_llm.data import clinical_preferences, preference_tokens
from jaxrl_llm.data.clinical_preferences import Pair
from jaxrl_llm.data.clinical_text import Case, Example, prompt
from jaxrl_llm.kernels.alignment import best_of_n_kl_bound
from jaxrl_llm.lm import (
    best_of_n,
    clinical_exam,
    evaluate,
    reward,
    reward_ensemble,
    reward_features,
    reward_heads,
    reward_probes,
    reward_quality,
    rewards,
    rollouts,
)
from jaxrl_llm.lm.base_model import BaseModel
from jaxrl_llm.lm.rewards import Reward
from jaxrl_llm.lm.scores import Estimate
from jaxrl_llm.nn.reward_model import RewardModel
from jaxrl_llm.training import experiment, report
from jaxrl_llm.types import Array, Key, PyTree, Responses

_NUM_NORMALISING = 100
LONGEST_RESPONSE = 96  # tokens; 1 in 15 of those compared is longer


class Judge(NamedTuple):
    """A reward model, or several, and how well it predicts comparisons that it has not seen.

    Attributes:
      model: of each.
      params: normalised to mean 0 and deviation 1 on what the imitating policy says; stacked on a
        leading axis where there are several.
      accuracy: on held-out comparisons; of several, the mean of theirs.
      exact_accuracy: on all comparisons that the annotator, whose law is known, could make of them.
      ceiling: the accuracy that nothing betters, so noisy is the annotator.
      calibration: on held-out comparisons, of the first.
    """

    model: RewardModel
    params: PyTree
    accuracy: Estimate
    exact_accuracy: float
    ceiling: float
    calibration: evaluate.Calibration

    @property
    def members(self) -> list[PyTree]:
        """The parameters of each."""
        if jnp.ndim(self.params["gain"]) == 0:
            return [self.params]
        return [_member(self.params, index) for index in range(len(self.params["gain"]))]

    @property
    def goal(self) -> tuple[Reward, PyTree]:
        """What a policy is to maximise, an ensemble's worst score, and its parameters."""
        return self.reward(), self.params

    def reward(self, how: reward_ensemble.Aggregation = "worst") -> Reward:
        """What a policy is to maximise; `how` is for an ensemble."""
        if len(self.members) == 1:
            return rewards.of_model(self.model)
        return rewards.of_ensemble(self.model, how)


def judge(
    run: experiment.Run[StagesConfig],
    policy: BaseModel,
    *,
    num_members: int = 1,
    num_blocks: int | None = None,
    name: str = "reward",
) -> Judge:
    """Learns to predict the annotator's comparisons.

    Args:
      run: of the experiment.
      policy: whose trunk a reward model starts from, and on whose responses it is normalised.
      num_members: of an ensemble; 1 is a reward model alone.
      num_blocks: of the trunk, the first so many; None for all.
      name: of the stage.
    """
    config, stage = run.config, run.start_stage(name)
    start_key, said_key = experiment.keys(stage, 2)
    compare = partial(clinical_preferences.pairs, config.seed, 0, annotators=(config.annotator,))
    held_out = list(compare(config.num_held_out, "held_out"))
    learnt = [*compare(config.num_pairs, "train"), *own_pairs(run, policy)]
    shape, trunk = policy.model.config, policy.params
    if num_blocks is not None:
        shape, trunk = replace(shape, n_layer=num_blocks), _first_blocks(trunk, num_blocks)
    model = RewardModel(
        shape,
        dtype=policy.model.dtype,
        pooling=config.pooling,
        surprisal=config.surprisal,
    )
    with warnings.catch_warnings(action="ignore"):  # that the longest responses are cut
        seen, unseen = (
            preference_tokens.encode(
                [pair.preference for pair in pairs],
                policy.tokenizer,
                response_length=LONGEST_RESPONSE,
                criteria=model.criteria,
            )
            for pairs in (learnt, held_out)
        )
    if config.reward.optimizer.trainable == "heads":
        solve = replace(config.heads, resample=num_members > 1)
        member, num_steps = reward_heads.make(solve, config.reward, model), solve.num_steps
        start, batch_size = partial(reward_heads.start, config.reward), len(learnt)
    else:
        member, num_steps = reward.make(config.reward, model), config.reward.num_steps
        start, batch_size = partial(reward.start, config.reward), config.reward.batch_size
    state = reward_ensemble.start(start, model, trunk, start_key, num_members)
    if config.reward.optimizer.trainable == "heads":
        read = partial(reward_features.with_features, model, _member(state.train.params, 0))
        seen, unseen = map(read, (seen, unseen))
    state = experiment.train(
        stage,
        reward_ensemble.make(member, num_members),
        num_steps=num_steps,
        items_per_step=batch_size,
        evaluate=lambda state: {},
        state=state,
        data=seen,
        sequential=True,
        unit="pairs",
    )
    stacked = state.train.params
    members = [_member(stacked, index) for index in range(num_members)]
    found = [reward_quality.accuracy(model, member, unseen) for member in members]
    compared = [reward.score_all(model, member, unseen).overall for member in members]
    asked = cases(config, _NUM_NORMALISING, "train")
    (said,) = clinical_questions.respond(ROLLOUT, policy, asked, said_key)
    scores = np.stack([reward.score_all(model, member, said).overall for member in members])
    normal = reward.normalise(stacked, scores)
    return Judge(
        model=model,
        params=normal if num_members > 1 else _member(normal, 0),
        accuracy=Estimate(*(sum(parts) / num_members for parts in zip(*found, strict=True))),
        exact_accuracy=float(np.mean([_exact_accuracy(held_out, scores) for scores in compared])),
        ceiling=clinical_preferences.ceiling(held_out),
        calibration=reward_quality.calibration(model, members[0], unseen),
    )


def own_pairs(run: experiment.Run[StagesConfig], policy: BaseModel) -> list[Pair]:
    """Comparisons of what the policy says itself, twice of each case; equal answers are left out.

    They show a reward model what the grammar of the other comparisons never says. Every judge of a
    run learns from the same.
    """
    config = run.config
    if config.num_own_pairs == 0:
        return []
    _, key = experiment.keys(run, 2)  # the other one is that of the examination
    asked = cases(config, config.num_own_pairs, "train")
    batches = clinical_questions.respond(replace(ROLLOUT, num_samples=2), policy, asked, key)
    texts = [
        text.strip() for batch in batches for text in clinical_questions.texts_of(policy, batch)
    ]
    said = zip(asked, texts[::2], texts[1::2], strict=False)  # the last batch is filled up
    return [
        clinical_preferences.compare(
            case, (first, second), (config.annotator,), np.random.default_rng((config.seed, index))
        )
        for index, (case, first, second) in enumerate(said)
        if first != second
    ]


def _exact_accuracy(held_out: Sequence[Pair], scores: Array) -> float:
    return clinical_preferences.exact_accuracy(held_out, (scores[:, 0] > scores[:, 1]).tolist())


def _member(stacked: PyTree, index: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def _first_blocks(params: PyTree, count: int) -> PyTree:
    transformer = params["transformer"]
    blocks = {str(block): transformer["h"][str(block)] for block in range(count)}
    return {**params, "transformer": {**transformer, "h": blocks}}


def compared(
    config: rollouts.Config, policy: BaseModel, judge: Judge, asked: Sequence[Case], key: Key
) -> Responses:
    """Two responses of a policy to each case, and how probably the judge thinks each the better."""
    batches = clinical_questions.respond(replace(config, num_samples=2), policy, asked, key)
    pairs = jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[: len(asked)], *batches)
    scores = reward.score_all(judge.model, judge.params, pairs).overall
    preferred = jax.nn.sigmoid((scores[:, 0] - scores[:, 1]) / judge.params["gain"])
    return replace(pairs, score=jnp.stack([preferred, 1 - preferred], axis=1))


def best_of(
    counts: Sequence[int], policy: BaseModel, judge: Judge, unseen: Sequence[Case], key: Key
) -> dict[int, tuple[float, float]]:
    """For each n the bound of its KL, and the gold score of the one of n that the judge likes best.

    All n share the same draws, `max(counts)` a case, over all subsets of which the mean is exact.
    """
    config = replace(ROLLOUT, num_samples=max(counts))
    batches = clinical_questions.respond(config, policy, unseen, key)
    said = jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[: len(unseen)], *batches)
    scores = reward.score_all(judge.model, judge.params, said).overall
    texts = clinical_questions.texts_of(policy, said)
    answers = clinical_exam.mark(np.repeat(np.array(unseen, object), max(counts)).tolist(), texts)
    gold = np.reshape([answer.score.total for answer in answers], scores.shape)
    return {
        n: (
            float(best_of_n_kl_bound(n)),
            float(best_of_n.expected_score(jnp.asarray(scores), n, gold=jnp.asarray(gold)).mean()),
        )
        for n in counts
    }


def score_texts(policy: BaseModel, judge: Judge) -> Callable[..., NDArray[np.float64]]:
    """The judge, or the mean of several, as a function of `(prompt, response)` texts."""

    def score(pairs: Sequence[tuple[str, str]]) -> NDArray[np.float64]:
        said = clinical_questions.as_responses(policy, pairs, LONGEST_RESPONSE)
        scores = [reward.score_all(judge.model, each, said).overall for each in judge.members]
        return np.stack(scores).mean(axis=0, dtype=np.float64)[:, 0]

    return score


def show_hacking(
    learnt: Mapping[str, Judge], policy: BaseModel, said: Examined, footer: str
) -> dict[str, float]:
    """How often each judge prefers what is no better, and how its scores go along with length.

    Args:
      learnt: judges by name.
      policy: whose tokenizer they read with.
      said: by a policy, to correlate scores with lengths in words.
      footer: below the table.

    Returns:
      The numbers shown, by the names of judge and probe.
    """
    examples = [Example(prompt(each.case), each.text, each.case) for each in said.answers]
    lengths = [len(each.text.split()) for each in said.answers]
    numbers: dict[str, float] = {}
    rows: list[tuple[str, ...]] = []
    for name, judge in learnt.items():
        score = score_texts(policy, judge)
        audits = reward_probes.audit(score, examples)
        scores = score([(each.prompt, each.completion) for each in examples])
        found = {f"fooled by {probe}": each.fooled for probe, each in audits.items()}
        found["correlation with length"] = reward_probes.length_correlation(scores, lengths).pearson
        rows += [(name, what, f"{each.mean:.3f}") for what, each in found.items()]
        numbers |= {f"{name}: {what}": each.mean for what, each in found.items()}
    columns = ("judge", "probe", "share")
    report.print_table("Probes of the reward models", columns, rows, footer=footer)
    return numbers
