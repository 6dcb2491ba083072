"""Golden numbers of alignment: what TRL's and verl's own code computes of random inputs.

    python -m tests.golden.preferences        # needs torch, trl and verl; writes preferences.npz

A loss that lives inside a trainer's method is computed by calling that method on a stand-in for
the trainer, with no more than the attributes it reads, and on a model that returns the inputs'
log-probabilities. Pairs go through one at a time, so that means over a batch hide nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

FILE = Path(__file__).with_suffix(".npz")
Arrays = dict[str, np.ndarray]

NUM_PAIRS, NUM_GROUPS, GROUP_SIZE, LENGTH = 6, 3, 4, 5
# Of the options that every peer and every function of ours is called with.
BETA, LABEL_SMOOTHING, MARGIN = 0.3, 0.1, 0.7
DESIRABLE_WEIGHT, UNDESIRABLE_WEIGHT = 1.5, 0.6
CLIP_LOW, CLIP_HIGH, DUAL_CLIP, VALUE_CLIP = 0.2, 0.4, 1.8, 0.2
KL_COEFFICIENT, MAX_LENGTH, GAMMA, LAMBDA = 0.05, 8, 0.9, 0.8
KL_TARGET, HORIZON, NUM_SAMPLES = 6.0, 10_000, 1280


def random_inputs(seed: int = 0) -> Arrays:
    """Pairs `[2, pairs, ...]`, the chosen first, and rows of groups `[groups * size, ...]`.

    The last row is empty.
    """
    random = np.random.default_rng(seed)
    num_rows = NUM_GROUPS * GROUP_SIZE
    pair_length = random.integers(1, LENGTH + 1, size=(2, NUM_PAIRS))
    row_length = np.append(random.integers(1, LENGTH + 1, size=num_rows - 1), 0)
    pair_mask, row_mask = (np.arange(LENGTH) < x[..., None] for x in (pair_length, row_length))
    row_log_pi = -random.gamma(2.0, 0.7, size=row_mask.shape)
    inputs = {
        "pair_mask": pair_mask,
        "pair_log_pi": np.where(pair_mask, -random.gamma(2.0, 0.7, size=pair_mask.shape), 0),
        "pair_log_ref": np.where(pair_mask, -random.gamma(2.0, 0.7, size=pair_mask.shape), 0),
        "pair_score": random.normal(size=(2, NUM_PAIRS)),
        "margin": random.gamma(1.0, size=NUM_PAIRS),
        "desirable": random.random(NUM_PAIRS) < 0.5,
        "kl": random.normal(size=NUM_PAIRS),
        "mask": row_mask,
        "score": random.normal(size=(NUM_GROUPS, GROUP_SIZE)),
        "log_pi": row_log_pi,
        "log_old": row_log_pi + random.normal(scale=0.5, size=row_mask.shape),
        "log_ref": row_log_pi + random.normal(scale=0.5, size=row_mask.shape),
        "advantage": random.normal(size=num_rows),
        "value": random.normal(size=row_mask.shape),
        "old_value": random.normal(size=row_mask.shape),
        "return": random.normal(size=row_mask.shape),
        "controller_kl": random.gamma(2.0, 4.0, size=5),
    }
    return {name: x if x.dtype == bool else x.astype(np.float32) for name, x in inputs.items()}


def load() -> tuple[Arrays, Arrays]:
    """The committed inputs and what the peers made of them."""
    with np.load(FILE) as file:
        arrays = dict(file)
    inputs = {name: arrays.pop(name) for name in random_inputs()}
    return inputs, arrays


# TRL


def trl_numbers(inputs: Arrays) -> Arrays:
    """By name; needs trl."""
    torch = import_module("torch")
    tensors = {name: torch.from_numpy(x) for name, x in inputs.items()}
    pairs = defaultdict(list)
    for pair in range(NUM_PAIRS):
        one = {name: tensors[name][pair] for name in ("margin", "desirable", "kl")}
        one |= {name: x[:, pair] for name, x in tensors.items() if name.startswith("pair")}
        for name, loss in _trl_pair(one).items():
            pairs[name].append(loss)
    numbers = {name: torch.stack(losses) for name, losses in pairs.items()}
    for loss_type in ("grpo", "dapo", "dr_grpo"):
        log_pi = tensors["log_pi"].clone().requires_grad_()
        loss = _trl_grpo_loss(log_pi, tensors, loss_type)
        loss.backward()
        numbers |= {f"trl_{loss_type}": loss, f"trl_{loss_type}_gradient": log_pi.grad}
    numbers["trl_grpo_advantage"] = _trl_advantage("grpo", tensors, scale_rewards="group")
    numbers["trl_dr_grpo_advantage"] = _trl_advantage("grpo", tensors, scale_rewards="none")
    numbers["trl_rloo_advantage"] = _trl_advantage("rloo", tensors)
    return {name: x.detach().numpy() for name, x in numbers.items()}


def _trl_pair(pair: Mapping[str, Any]) -> dict[str, Any]:
    torch = import_module("torch")
    cpo = import_module("trl.experimental.cpo").CPOTrainer
    orpo = import_module("trl.experimental.orpo").ORPOTrainer
    averages = pair["pair_log_pi"].sum(-1) / pair["pair_mask"].sum(-1)
    numbers = {f"trl_dpo_{name}": _trl_dpo(pair, name) for name in ("sigmoid", "robust", "ipo")}
    numbers["trl_kto"] = _trl_kto(pair)
    numbers["trl_bradley_terry"] = _trl_reward(pair)
    simpo = _trainer(alpha=0.0, loss_type="simpo", simpo_gamma=MARGIN)
    numbers["trl_simpo"] = cpo.cpo_loss(simpo, averages[0], averages[1])[0]
    numbers["trl_odds_ratio"] = orpo.odds_ratio_loss(_trainer(), averages[0], averages[1])[0]
    return {name: torch.as_tensor(x).reshape(()) for name, x in numbers.items()}


def _trl_dpo(pair: Mapping[str, Any], loss_type: str) -> Any:
    trainer = _trainer(
        precompute_ref_logps=True,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        use_weighting=False,
    )
    reference = pair["pair_log_ref"].sum(-1, keepdim=True)
    inputs = _sequences(pair["pair_mask"])
    inputs |= {"ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}
    trainer_class = import_module("trl.trainer.dpo_trainer").DPOTrainer
    return trainer_class._compute_loss(trainer, _model(pair["pair_log_pi"]), inputs, False)


def _trl_kto(pair: Mapping[str, Any]) -> Any:
    """Of the chosen one, as a single text with a label and the divergence `kl`."""
    torch = import_module("torch")
    trainer = _trainer(
        _compute_kl_logps=lambda model, batch: pair["kl"][None],
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        desirable_weight=DESIRABLE_WEIGHT,
        undesirable_weight=UNDESIRABLE_WEIGHT,
    )
    inputs = _sequences(pair["pair_mask"][:1]) | {
        "label": pair["desirable"][None],
        "ref_logps": pair["pair_log_ref"][:1].sum(-1),
        "ref_KL_logps": torch.zeros(1),
    }
    trainer_class = import_module("trl.trainer.kto_trainer").KTOTrainer
    return trainer_class._compute_loss(trainer, _model(pair["pair_log_pi"][:1]), inputs, False)


def _trl_reward(pair: Mapping[str, Any]) -> Any:
    trainer = _trainer(args=SimpleNamespace(center_rewards_coefficient=None))
    inputs = _sequences(pair["pair_mask"]) | {"margin": pair["margin"][None]}
    output = SimpleNamespace(logits=pair["pair_score"][:, None])
    trainer_class = import_module("trl.trainer.reward_trainer").RewardTrainer
    return trainer_class.compute_loss(trainer, lambda **_: output, inputs)


def _trl_grpo_loss(log_pi: Any, rows: Mapping[str, Any], loss_type: str) -> Any:
    torch = import_module("torch")
    trainer = _trainer(
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            log_pi,
            torch.zeros_like(log_pi),
            None,
        ),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=KL_COEFFICIENT,
        loss_type=loss_type,
        epsilon_low=CLIP_LOW,
        epsilon_high=CLIP_HIGH,
        use_vllm=False,
        max_completion_length=MAX_LENGTH,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
    )
    mask = rows["mask"].long()
    tokens = torch.zeros_like(mask)
    inputs = {
        "prompt_ids": tokens[:, :1],
        "prompt_mask": torch.ones_like(mask[:, :1]),
        "completion_ids": tokens,
        "completion_mask": mask,
        "advantages": rows["advantage"],
        "old_per_token_logps": rows["log_old"],
        "ref_per_token_logps": rows["log_ref"],
        "num_items_in_batch": mask.sum(),
    }
    trainer_class = import_module("trl.trainer.grpo_trainer").GRPOTrainer
    return trainer_class._compute_loss(trainer, None, inputs)


def _trl_advantage(algorithm: str, rows: Mapping[str, Any], **options: Any) -> Any:
    """By the trainer's generation step; RLOO's has the divergence from the reference in it."""
    torch = import_module("torch")
    module = import_module(f"trl.trainer.{algorithm}_trainer")
    model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
    tokens = [[0] * int(length) for length in rows["mask"].sum(-1)]
    prompts, texts = [[0]] * len(tokens), [""] * len(tokens)
    generated = (prompts, tokens, texts)
    if algorithm == "grpo":
        generated = (prompts, tokens, None, texts, None, {}, None, None)

    def log_probabilities(of: Any, *_: Any, **__: Any) -> tuple[Any, None, None]:
        return rows["log_old" if of is model else "log_ref"], None, None

    absent = "environment_factories environments tools pad_to_multiple_of reward_clip_range"
    off = "mask_truncated_completions use_vllm normalize_advantages log_multimodal"
    trainer = _trainer(
        model=model,
        ref_model=None if algorithm == "grpo" else SimpleNamespace(),
        beta=0.0 if algorithm == "grpo" else KL_COEFFICIENT,
        args=SimpleNamespace(
            gradient_checkpointing_kwargs=None,
            per_device_train_batch_size=len(tokens),
            gradient_accumulation_steps=1,
            steps_per_generation=1,
        ),
        num_generations=GROUP_SIZE,
        num_iterations=1,
        multi_objective_aggregation="sum_then_normalize",
        reward_weights=torch.ones(1),
        reward_func_names=["score"],
        _tokenizer=SimpleNamespace(pad_token_id=0),
        _generate=lambda _: generated,
        _get_per_token_logps_and_entropies=log_probabilities,
        _calculate_rewards=lambda *_: rows["score"].reshape(-1, 1),
        _logs={"prompt": [], "completion": [], "rewards": {"score": []}, "advantages": []},
        _pending_extra_logs={},
        _pending_metrics={},
        **dict.fromkeys(absent.split()),
        **dict.fromkeys(off.split(), False),
        **options,
    )
    trainer_class = getattr(module, f"{algorithm.upper()}Trainer")
    examples = [{"prompt": ""} for _ in tokens]
    output = trainer_class._generate_and_score_completions(trainer, examples)
    return output["advantages"].reshape(NUM_GROUPS, GROUP_SIZE)


def _trainer(**attributes: Any) -> Any:
    """A stand-in for a trainer on one CPU; an attribute that is not given raises."""
    accelerator = SimpleNamespace(
        device=import_module("torch").device("cpu"),
        process_index=0,
        num_processes=1,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
    )
    common = {
        "accelerator": accelerator,
        "model": SimpleNamespace(training=True),
        "beta": BETA,
        "label_smoothing": LABEL_SMOOTHING,
        "aux_loss_enabled": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return SimpleNamespace(**common | attributes)


def _sequences(mask: Any) -> dict[str, Any]:
    """A prompt of one token and the responses of `mask`."""
    torch = import_module("torch")
    completion = torch.nn.functional.pad(mask.long(), (1, 0))
    tokens, everything = torch.zeros_like(completion), torch.ones_like(completion)
    return {"input_ids": tokens, "attention_mask": everything, "completion_mask": completion}


def _model(log_probability: Any) -> Any:
    """A model with TRL's fused head, whatever its inputs."""
    zeros = import_module("torch").zeros_like(log_probability)
    output = SimpleNamespace(
        log_probs=log_probability, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )
    return lambda **_: output


# verl


def verl_numbers(inputs: Arrays) -> Arrays:
    """By name; needs the files of verl, and none of what they import but torch."""
    torch = import_module("torch")
    with _verl_core() as core:
        tensors = {name: torch.from_numpy(x) for name, x in inputs.items()}
        numbers = _verl_advantages(core, tensors) | _verl_losses(core, tensors)
    return {name: torch.as_tensor(x).detach().numpy() for name, x in numbers.items()}


def _verl_advantages(core: Any, rows: Mapping[str, Any]) -> dict[str, Any]:
    torch = import_module("torch")
    mask, everywhere = rows["mask"].float(), torch.ones_like(rows["value"])
    at_first = torch.nn.functional.pad(rows["score"].reshape(-1, 1), (0, LENGTH - 1))
    group = np.repeat(np.arange(NUM_GROUPS), GROUP_SIZE)
    numbers = {}
    for name in ("grpo", "rloo"):
        function = getattr(core, f"compute_{name}_outcome_advantage")
        advantage, _ = function(at_first, everywhere, group, epsilon=1e-4)
        numbers[f"verl_{name}_advantage"] = advantage[:, 0].reshape(NUM_GROUPS, GROUP_SIZE)
    kl_reward = core.compute_rewards(at_first, rows["log_old"], rows["log_ref"], KL_COEFFICIENT)
    numbers["verl_rewards"] = kl_reward * mask
    advantage, returns = core.compute_gae_advantage_return(
        kl_reward * mask, rows["value"] * mask, mask, GAMMA, LAMBDA
    )
    numbers |= {"verl_gae_whitened": advantage * mask, "verl_gae_return": returns * mask}
    controller = core.AdaptiveKLController(BETA, KL_TARGET, HORIZON)
    coefficients = torch.zeros_like(rows["controller_kl"])
    for update, kl in enumerate(rows["controller_kl"]):
        controller.update(float(kl), NUM_SAMPLES)
        coefficients[update] = controller.value
    numbers["verl_kl_coefficient"] = coefficients
    return numbers


def _verl_losses(core: Any, rows: Mapping[str, Any]) -> dict[str, Any]:
    """Without the empty row, which verl leaves out of its means."""
    rows = {name: x[:-1] if len(x) == NUM_GROUPS * GROUP_SIZE else x for name, x in rows.items()}
    mask = rows["mask"].float()
    numbers = {
        f"verl_kl_{name}": core.kl_penalty(rows["log_pi"], rows["log_ref"], name)
        for name in ("k1", "k2", "k3")
    }
    for mode in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean"):
        numbers[f"verl_{mode}"] = core.agg_loss(rows["value"], mask, mode)
    mode, options = "seq-mean-token-sum-norm", {"loss_scale_factor": MAX_LENGTH}
    numbers[f"verl_{mode}"] = core.agg_loss(rows["value"], mask, mode, **options)
    log_pi = rows["log_pi"].clone().requires_grad_()
    loss = core.compute_policy_loss(
        rows["log_old"],
        log_pi,
        rows["advantage"][:, None].expand_as(log_pi),
        mask,
        cliprange_low=CLIP_LOW,
        cliprange_high=CLIP_HIGH,
        clip_ratio_c=DUAL_CLIP,
    )[0]
    loss.backward()
    numbers |= {"verl_policy_loss": loss, "verl_policy_loss_gradient": log_pi.grad}
    numbers["verl_value_loss"] = core.compute_value_loss(
        rows["value"], rows["return"], rows["old_value"], mask, VALUE_CLIP
    )[0]
    return numbers


_NOT_NEEDED = (
    "omegaconf tensordict verl.trainer.config verl.workers verl.workers.config verl.utils.device"
).split()


class _Stub(types.ModuleType):
    """A module of which only its submodules are real."""

    def __getattr__(self, name: str) -> Any:
        return sys.modules.get(f"{self.__name__}.{name}", object)


@contextmanager
def _verl_core() -> Iterator[Any]:
    """verl's `core_algos` alone: its packages' own imports ask for ray, vllm and more."""
    # Before the patch, which forgets every module that is first imported under it.
    _ = import_module("torch.distributed"), import_module("transformers").PreTrainedTokenizer
    stubs = {name: _Stub(name) for name in _NOT_NEEDED}
    for name in ("verl", "verl.utils", "verl.trainer", "verl.trainer.ppo"):
        stubs[name] = _Stub(name)
        folder = Path(verl_folder() or "", *name.split(".")[1:])
        stubs[name].__path__ = [str(folder)]
    with mock.patch.dict(sys.modules, stubs), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield importlib.import_module("verl.trainer.ppo.core_algos")


def verl_folder() -> Path | None:
    """Of the package, without importing it; None where it is not installed."""
    spec = importlib.util.find_spec("verl")
    locations = spec.submodule_search_locations if spec else None
    return Path(locations[0]) if locations else None


def import_module(name: str) -> Any:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


if __name__ == "__main__":
    drawn = random_inputs()
    numbers: dict[str, Any] = drawn | trl_numbers(drawn) | verl_numbers(drawn)
    np.savez_compressed(FILE, **numbers)
