"""TRL's trainers, on the weights of a case: the peers of `rlhf`.

Each adaptor raises `PeerMissing` as those of `peers` do, and builds a trainer as fast as TRL has
it: text by the model's own `generate`, a fused optimiser, no gradient checkpointing, logging,
saving, padding or loading processes. A call is one optimiser step and all that it needs, without
the training loop around it. The learning rate is 0: every step starts from the same weights.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import jax
import numpy as np
from jax.typing import ArrayLike

from benchmarks.harness import Peer, PeerMissing
from benchmarks.peers import require
from jaxrl_llm.lm import hf_checkpoint, optimizer
from jaxrl_llm.nn.gpt2 import GPT2, GPT2Config
from jaxrl_llm.types import PyTree

Reward = Callable[[list[list[int]]], list[float]]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every trainer needs.

    Attributes:
      config: of both models, without dropout.
      params: of the policy, in float32.
      reference: of the frozen reference, likewise.
      adamw: of which all but the schedule and what learns counts.
      beta: coefficient of the KL divergence; not 0, which would leave the reference out.
      dtype: "float32", or "bfloat16" for autocast.
    """

    config: GPT2Config
    params: PyTree
    reference: PyTree
    adamw: optimizer.Config
    beta: float
    dtype: str = "float32"


class Step(NamedTuple):
    """What one optimiser step came to.

    Attributes:
      loss: as TRL defines it.
      gradient_norm: before clipping.
    """

    loss: float
    gradient_norm: float


def online(
    algorithm: Literal["GRPO", "RLOO"],
    setting: Setting,
    prompts: ArrayLike,
    reward: Reward,
    *,
    num_samples: int,
    max_new_tokens: int,
) -> Peer:
    """Drawing responses, scoring them, asking the reference and a step of the policy.

    Args:
      algorithm: whose trainer it is.
      setting: of the models.
      prompts: `[G, P]`, without padding; all are answered in every step.
      reward: of responses, each a list of tokens.
      num_samples: responses a prompt.
      max_new_tokens: of every response; none ends earlier.

    Returns:
      A peer whose result is a `Step`, and whose items are new tokens.
    """
    rows = np.asarray(prompts)
    end = setting.config.vocab_size  # a token that the model cannot draw
    with _directory(setting) as directory:
        model = _load(directory / "policy")
        model.generation_config.eos_token_id = None
        trainer = _trainer(
            algorithm,
            setting,
            directory,
            {"prompt": [_text(row) for row in rows]},
            model=model,
            end=end,
            batch_size=len(rows) * num_samples,
            trainer={"reward_funcs": lambda completion_ids, **_: reward(completion_ids)},
            arguments={
                "num_generations": num_samples,
                "max_completion_length": max_new_tokens,
                "steps_per_generation": 1,
            },
        )
        trainer.ref_model.load_state_dict(_load(directory / "reference").state_dict())
    return _peer(trainer, items=len(rows) * num_samples * max_new_tokens)


def dpo(
    setting: Setting,
    prompts: ArrayLike,
    chosen: ArrayLike,
    rejected: ArrayLike,
    *,
    is_precomputed: bool = False,
) -> Peer:
    """A step on all pairs at once, with the sigmoid loss.

    Args:
      setting: of the models.
      prompts: `[G, P]`, without padding.
      chosen: `[G, N]`, each ending in the same token.
      rejected: `[G, N]`, likewise, and in that token.
      is_precomputed: whether the reference was asked before, rather than in every step.

    Returns:
      A peer whose result is a `Step`, and whose items are tokens of responses.
    """
    columns = {"prompt": prompts, "chosen": chosen, "rejected": rejected}
    rows = {name: np.asarray(tokens) for name, tokens in columns.items()}
    with _directory(setting) as directory:
        trainer = _trainer(
            "DPO",
            setting,
            directory,
            {name: [_text(row) for row in tokens] for name, tokens in rows.items()},
            model=_load(directory / "policy"),
            end=int(rows["chosen"][0, -1]),
            batch_size=len(rows["prompt"]),
            trainer={"ref_model": _load(directory / "reference")},
            arguments={"precompute_ref_log_probs": is_precomputed, "max_length": None},
        )
    return _peer(trainer, items=rows["chosen"].size + rows["rejected"].size)


@contextlib.contextmanager
def _directory(setting: Setting) -> Iterator[Path]:
    """A directory that holds both models, within which nothing is said, nor asked of the hub."""
    for module in ("torch", "transformers", "tokenizers", "datasets", "trl"):
        require(module)
    if jax.default_backend() != "cpu" and not require("torch").cuda.is_available():
        raise PeerMissing("peer torch sees no GPU: install its build for CUDA")
    offline = mock.patch.object(require("huggingface_hub").constants, "HF_HUB_OFFLINE", True)
    with tempfile.TemporaryDirectory() as name, offline, _silence():
        for model in ("policy", "reference"):
            params = setting.params if model == "policy" else setting.reference
            hf_checkpoint.save(Path(name, model), GPT2(setting.config), params)
        yield Path(name)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _load(directory: Path) -> Any:
    return require("transformers").GPT2LMHeadModel.from_pretrained(directory)


def _trainer(
    algorithm: str,
    setting: Setting,
    directory: Path,
    columns: Mapping[str, list[str]],
    *,
    model: Any,
    end: int,
    batch_size: int,
    trainer: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> Any:
    """A trainer ready to step, of `columns` in batches of `batch_size` rows."""
    trl, adamw = require("trl"), setting.adamw
    configuration = getattr(trl, f"{algorithm}Config")(
        output_dir=str(directory / "output"),
        use_cpu=jax.default_backend() == "cpu",
        bf16=setting.dtype == "bfloat16",
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        pad_to_multiple_of=None,
        max_steps=1,
        learning_rate=0.0,
        optim="adamw_torch_fused",
        adam_beta1=adamw.beta1,
        adam_beta2=adamw.beta2,
        adam_epsilon=adamw.epsilon,
        weight_decay=adamw.weight_decay,
        max_grad_norm=adamw.max_gradient_norm,
        beta=setting.beta,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_num_workers=0,
        **arguments,
    )
    result = getattr(trl, f"{algorithm}Trainer")(
        model=model,
        args=configuration,
        train_dataset=require("datasets").Dataset.from_dict(columns),
        processing_class=_tokenizer(setting.config, end),
        **trainer,
    )
    # What `train` does before its first step.
    result.model_wrapped, result.optimizer = result.accelerator.prepare(
        result.model, result.create_optimizer()
    )
    result.current_gradient_accumulation_steps = 1
    return result


def _peer(trainer: Any, items: int) -> Peer:
    model, clip = trainer.model_wrapped, trainer.accelerator.clip_grad_norm_
    with _silence():
        batch = next(iter(trainer.get_train_dataloader()))

    def step() -> Step:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = trainer.training_step(model, batch, None)
        norm = clip(model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        model.zero_grad()
        return Step(float(loss), float(norm))  # read, hence waited for

    return Peer("TRL", step, items=items)


def _tokenizer(config: GPT2Config, end: int) -> Any:
    """Reads and writes tokens as `_text` does; `end`, which may have no embedding, also pads."""
    tokenizers, names = require("tokenizers"), [_name(t) for t in range(config.vocab_size + 1)]
    words = {name: token for token, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=names[-1]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return require("transformers").PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=names[end],
        pad_token=names[end],
        padding_side="left",
    )


def _text(tokens: np.ndarray) -> str:
    return "".join(f" {_name(token)}" for token in tokens)


def _name(token: int) -> str:
    # Enclosed, so that no name is a part of another.
    return f"<{token}>"
