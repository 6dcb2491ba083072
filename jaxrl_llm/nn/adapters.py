"""Small trainable parts of a frozen language model: LoRA, a residual adapter, a value head.

The leaves of an adapter are leaves of the model's own parameter tree. Without them the model runs
without the adapter, which makes the frozen reference policy of RLHF free: the same model, given
`trunk(params)`, whose arrays are the policy's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from jaxrl_llm import checks
from jaxrl_llm.types import Array, PyTree

PROJECTIONS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
Trainable = Literal["all", "adapter", "lora", "heads"]
TRAINABLE: tuple[Trainable, ...] = get_args(Trainable)

_LORA_LEAVES = ("lora_a", "lora_b")
_PARTS = {
    "adapter": "adapter",
    "value_head": "heads",
    # Of a reward model, what it says and what it thinks of who compared.
    "overall": "heads",
    "by_criterion": "heads",
    "annotator_logit": "heads",
    "tie_logit": "heads",
}


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank updates: a projection of weight W computes x · (W + alpha / rank · A · B).

    A starts random and B at 0, so the first policy is the reference.

    Source: Hu et al. (2022), section 4.1.

    Attributes:
      rank: columns of A.
      alpha: of the scale; with it fixed, the rank may change without the learning rate.
      targets: which projections of every block, of `PROJECTIONS`.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("attn.c_attn", "attn.c_proj")

    def validate(self) -> None:
        """Raises ValueError, naming the field, unless the updates can be built."""
        checks.at_least("rank", self.rank, 1)
        checks.positive("alpha", self.alpha)
        for target in self.targets:
            checks.one_of("targets", target, PROJECTIONS)
        if not self.targets:
            raise ValueError("targets is empty; name at least one projection")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Adapter(nn.Module):
    """x + up(gelu(down(x))): a residual bottleneck that starts as the identity.

    Source: Houlsby et al. (2019), section 2.1.

    Attributes:
      width: of the bottleneck; the healthcare adapter's is 512.
      dtype: of the computation.
    """

    width: int = 512
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `x` `[..., E]` to `[..., E]`."""
        inner = jax.nn.gelu(nn.Dense(self.width, dtype=self.dtype, name="down")(x))
        zeros = nn.initializers.zeros
        return x + nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=zeros, name="up")(inner)


class TokenValueHead(nn.Module):
    """The value of every token's state: a hidden layer and a linear one, which starts at 0.

    Attributes:
      width: of the hidden layer.
      dtype: of the hidden layer; values are float32.
    """

    width: int = 256
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        """Maps hidden states `[..., E]` to values `[...]`."""
        inner = jax.nn.relu(nn.Dense(self.width, dtype=self.dtype, name="hidden")(hidden))
        output = nn.Dense(1, kernel_init=nn.initializers.zeros, name="value")
        return output(inner.astype(jnp.float32))[..., 0]


def is_on(module: nn.Module, name: str) -> bool:
    """Whether `module` has the part `name`: always at initialisation, then if params hold it."""
    return module.is_initializing() or module.has_variable("params", name)


def trunk(params: PyTree) -> PyTree:
    """`params` without adapters, LoRA and value head: the reference policy; no array is copied."""
    leaves = flatten_dict(params)
    return unflatten_dict({path: leaves[path] for path in leaves if _part(path) == "trunk"})


def attach(params: PyTree, trunk: PyTree) -> PyTree:
    """`params` with another trunk; the converse of `trunk`."""
    return unflatten_dict({**flatten_dict(params), **flatten_dict(trunk)})


def labels(params: PyTree, trainable: str) -> PyTree:
    """Which optimiser each leaf belongs to, `train` or `freeze`, for `optax.partition`.

    A value head always learns: it has nothing to start from.

    Args:
      params: of a model.
      trainable: one of `TRAINABLE`; `adapter` and `lora` leave the trunk alone, and `heads` the
        adapters too.

    Raises:
      ValueError: if `trainable` is unknown, or `params` have nothing of that kind.
    """
    checks.one_of("trainable", trainable, TRAINABLE)
    parts = {path: _part(path) for path in flatten_dict(params)}
    if trainable not in {"all", *parts.values()}:
        raise ValueError(
            f"trainable is {trainable!r}, but params have no such part; build the model with one"
        )
    learning = {*parts.values()} if trainable == "all" else {trainable, "heads"}
    return unflatten_dict(
        {path: "train" if part in learning else "freeze" for path, part in parts.items()}
    )


def merge_lora(params: PyTree, lora: LoRA) -> PyTree:
    """`params` with every low-rank update added to its projection, and its two leaves dropped."""
    if not isinstance(params, dict):
        return params
    merged = {name: merge_lora(leaf, lora) for name, leaf in params.items()}
    if "lora_a" in merged:
        update = lora.scale * merged.pop("lora_a") @ merged.pop("lora_b")
        merged["weight"] = merged["weight"] + update
    return merged


def _part(path: tuple[str, ...]) -> str:
    """The kind of a leaf, one of `TRAINABLE` but `all`, or `trunk`."""
    return "lora" if path[-1] in _LORA_LEAVES else _PARTS.get(path[0], "trunk")
