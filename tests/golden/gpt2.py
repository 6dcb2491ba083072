"""Golden numbers of GPT-2: three small random checkpoints and what `transformers` computes of them.

    python -m tests.golden.gpt2        # needs torch; writes tests/golden/gpt2_<name>/ anew

Each folder is a checkpoint as `transformers` saves it, in a storage type of its own (bfloat16,
float16, float32), and `numbers.npz`, computed in float32 from the stored weights. Layer
normalisations and biases are random too, so that none can be forgotten unnoticed, and each greedy
token beats the runner-up by at least `MARGIN` logits, so that rounding cannot change it.
"""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
MARGIN = 1e-3
LENGTHS = (10, 7, 1)
NUM_GENERATED = 64


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration, by the names of `config.json`, and how its checkpoint is stored."""

    config: dict[str, Any]
    storage: str
    seed: int


_IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
CASES = {
    "defaults": Case(
        config={"vocab_size": 97, "n_positions": 80, "n_embd": 32, "n_layer": 2, "n_head": 4},
        storage="bfloat16",
        seed=7,
    ),
    "untied": Case(
        config={
            "vocab_size": 61,
            "n_positions": 76,
            "n_embd": 24,
            "n_layer": 2,
            "n_head": 3,
            "n_inner": 48,
            "activation_function": "gelu",
            "scale_attn_by_inverse_layer_idx": True,
            "tie_word_embeddings": False,
        },
        storage="float16",
        seed=6,
    ),
    "relu": Case(
        config={
            "vocab_size": 53,
            "n_positions": 74,
            "n_embd": 16,
            "n_layer": 3,
            "n_head": 2,
            "activation_function": "relu",
            "layer_norm_epsilon": 1e-3,
            "scale_attn_weights": False,
        },
        storage="float32",
        seed=9,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Golden:
    """What a checkpoint must compute.

    Attributes:
      directory: of the checkpoint.
      tokens: `[B, T]` int32, padded on the left with `pad_token_id`.
      attention_mask: `[B, T]` bool, True on real tokens.
      logits: `[B, T, V]` float32; 0 on padding, where nothing is promised.
      generated: `[B, NUM_GENERATED]` int32, the greedy continuation, ends of text ignored.
    """

    directory: Path
    tokens: np.ndarray
    attention_mask: np.ndarray
    logits: np.ndarray
    generated: np.ndarray


def load(name: str) -> Golden:
    """The committed numbers of `CASES[name]`."""
    directory = FOLDER / f"gpt2_{name}"
    with np.load(directory / "numbers.npz") as numbers:
        return Golden(directory=directory, **numbers)


def make(name: str) -> Any:
    """A random `GPT2LMHeadModel` in the storage type of `CASES[name]`; needs torch."""
    torch, transformers = _torch()
    case = CASES[name]
    config = transformers.GPT2Config(**case.config, **_IDS)
    model = transformers.GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            mean = 1.0 if ".ln_" in parameter_name and parameter_name.endswith("weight") else 0.0
            # Strong positions keep the greedy continuation from repeating itself.
            scale = 1.0 if ".wpe." in parameter_name else 0.3
            parameter.copy_(mean + scale * torch.randn(parameter.shape, generator=generator))
    return model.to(getattr(torch, case.storage))


def compute(model: Any, directory: Path, seed: int) -> Golden:
    """What `model`, saved in `directory`, computes in float32; needs torch.

    Raises:
      ValueError: if two tokens nearly tie for greedy, so that another seed is needed.
    """
    torch, _ = _torch()
    model = model.float().eval()
    vocab_size = model.config.vocab_size
    shape = (len(LENGTHS), max(LENGTHS))
    mask = torch.arange(shape[1]) >= shape[1] - torch.tensor(LENGTHS)[:, None]
    tokens = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    tokens = torch.where(mask, tokens, model.config.pad_token_id)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask.long(), position_ids=position).logits
        generation = model.generate(
            tokens,
            attention_mask=mask.long(),
            do_sample=False,
            max_new_tokens=NUM_GENERATED,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = torch.stack(generation.logits).topk(2).values
    margin = float((best[..., 0] - best[..., 1]).min())
    if margin < MARGIN:
        raise ValueError(f"seed {seed} leaves greedy a margin of {margin:.2g}; take another seed")
    return Golden(
        directory=directory,
        tokens=tokens.numpy().astype(np.int32),
        attention_mask=mask.numpy(),
        logits=torch.where(mask[..., None], logits, 0.0).numpy(),
        generated=generation.sequences[:, shape[1] :].numpy().astype(np.int32),
    )


def _torch() -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = importlib.import_module("torch")
        transformers = importlib.import_module("transformers")
    # Models this small lose more by waiting for other threads than they gain.
    torch.set_num_threads(1)
    return torch, transformers


def _write() -> None:
    for name, case in CASES.items():
        directory = FOLDER / f"gpt2_{name}"
        model = make(name)
        model.save_pretrained(directory)
        (directory / "generation_config.json").unlink()
        numbers = dataclasses.asdict(compute(model, directory, case.seed))
        del numbers["directory"]
        np.savez_compressed(directory / "numbers.npz", **numbers)


if __name__ == "__main__":
    _write()
