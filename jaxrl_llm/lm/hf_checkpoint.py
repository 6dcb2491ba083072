"""GPT-2 checkpoints as Hugging Face directories, read and written without torch or transformers.

    model, params = load(directory)
    logits = model.apply({"params": params}, tokens, attention_mask=attention_mask)
    save(directory, model, params, tokenizer)

A directory holds `config.json`, the weights as `model.safetensors` (or as shards that
`model.safetensors.index.json` lists) and, where it has one, a tokenizer. The parameter tree of
`nn.gpt2` is the checkpoint's own, split at the dots, so names and shapes come from the model.

Reading trusts nothing: no pickle is run, no path leaves the directory, nothing is downloaded, and
weights that are not exactly the configuration's are refused with every difference in one error.
Writing is whole or not at all, and the same parameters give the same bytes.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from jaxrl_llm import checks
from jaxrl_llm.lm import tokenizer as tokenizers
from jaxrl_llm.nn.gpt2 import GPT2, GPT2Config
from jaxrl_llm.types import PyTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TORCH_WEIGHTS = "pytorch_model.bin"
# What every config.json says; transformers, too, has a default for the rest.
_SHAPE_FIELDS = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
# Buffers that old checkpoints store, the lower triangle and minus infinity: they are no parameters.
_CAUSAL_MASK = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")
_HEAD = "lm_head.weight"
_EMBEDDING = "transformer.wte.weight"
_OWN_FILES = re.compile(
    r"(generation_)?config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|vocab\.json"
    r"|merges\.txt|chat_template\.jinja"
)

Tensors = dict[str, np.ndarray]


def load(directory: str | Path, *, dtype: DTypeLike = jnp.float32) -> tuple[GPT2, PyTree]:
    """The model and the parameters of a Hugging Face GPT-2 directory.

    Args:
      directory: with `config.json` and `model.safetensors`, its sharded form, or, where torch is
        installed, `pytorch_model.bin` (read with `weights_only=True`, which runs no code).
      dtype: of the computation.

    Returns:
      `(model, params)`, params in float32 whatever the stored type. Names may lack the prefix
      `transformer.`; stored causal masks, and an output layer equal to the embedding that it is
      tied to, are passed over.

    Raises:
      ValueError: if a file is missing or damaged, the configuration is not one that `nn.gpt2`
        builds, or weights or tokenizer do not fit it; then with all differences.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; give one that holds {_CONFIG}")
    config = _read_config(directory / _CONFIG)
    tensors, faults = _with_our_names(_read_weights(directory), config)
    shapes = _shapes(config)
    faults += _differences(shapes, tensors)
    if tokenizers.is_in(directory):
        faults += _vocabulary_faults(tokenizers.load(directory), config)
    if faults:
        remedy = "take all files from one checkpoint"
        raise ValueError(f"{directory} does not fit its {_CONFIG}: {'; '.join(faults)}; {remedy}")
    # One at a time, so that no more than one tensor is held twice.
    params = {name: jnp.asarray(tensors.pop(name), jnp.float32) for name in shapes}
    return GPT2(config, dtype=dtype), unflatten_dict(params, sep=".")


def save(
    directory: str | Path,
    model: GPT2,
    params: PyTree,
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a directory that `load`, and `transformers` with torch, read.

    It is written beside its place and then renamed, so that a kill leaves no checkpoint by halves,
    only a hidden folder that may be deleted. A checkpoint that is already there is replaced as a
    whole, its tokenizer included.

    Args:
      directory: new, empty, or holding nothing but the files of a checkpoint.
      model: its configuration is stored; its computation type and adapters are not.
      params: of the trunk alone, stored in float32.
      tokenizer: stored too, if given.
      max_shard_bytes: weights beyond this are split into files of at most so many bytes, save for
        a larger tensor, which has one of its own.

    Raises:
      ValueError: if `params` has other leaves than the checkpoint (then all are listed), tokens of
        the tokenizer have no embedding, or `directory` holds something else.
    """
    checks.at_least("max_shard_bytes", max_shard_bytes, 1)
    model.config.validate()
    tensors = {
        name: np.ascontiguousarray(leaf, np.float32)
        for name, leaf in sorted(flatten_dict(jax.device_get(params), sep=".").items())
    }
    faults = _differences(_shapes(model.config), tensors)
    if faults:
        remedy = "merge LoRA into its weights, and pass the trunk without adapter and value_head"
        raise ValueError(f"params is not what a checkpoint stores: {'; '.join(faults)}; {remedy}")
    faults = [] if tokenizer is None else _vocabulary_faults(tokenizer, model.config)
    if faults:
        raise ValueError(faults[0])
    directory = Path(directory).resolve()
    _check_replaceable(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        _write_json(partial / _CONFIG, _config_content(model.config))
        _write_weights(partial, tensors, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        _move(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_config(path: Path) -> GPT2Config:
    content = _read_json(path, "give a directory that a GPT-2 was saved in")
    if content.get("model_type") != "gpt2":
        raise ValueError(f"{path}: model_type is {content.get('model_type')!r}; it must be 'gpt2'")
    if content.get("add_cross_attention"):
        raise ValueError(f"{path}: add_cross_attention is true; it must be false")
    missing = [name for name in _SHAPE_FIELDS if name not in content]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; copy the checkpoint's own {_CONFIG}")
    values = {}
    for name, hint in get_type_hints(GPT2Config).items():
        if name in content:
            values[name] = _typed(f"{path}: {name}", content[name], get_args(hint) or (hint,))
    config = GPT2Config(**values)
    try:
        config.validate()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return config


def _typed(name: str, value: object, types: tuple[type, ...]) -> Any:
    if float in types and type(value) is int:
        return float(value)
    # By identity, because True is an int.
    if type(value) not in types:
        wanted = " or ".join(option.__name__.replace("NoneType", "null") for option in types)
        raise ValueError(f"{name} is {value!r}; it must be {wanted}")
    return value


def _config_content(config: GPT2Config) -> dict[str, Any]:
    names = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "dtype": "float32"}
    return {**names, **dataclasses.asdict(config)}


def _shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a checkpoint, by its name there."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(GPT2(config).init, jax.random.key(0), tokens)["params"]
    leaves: Any = flatten_dict(params, sep=".")
    return {name: leaf.shape for name, leaf in leaves.items()}


def _with_our_names(stored: Tensors, config: GPT2Config) -> tuple[Tensors, list[str]]:
    """The stored tensors by the names of our parameters, and what is wrong with them."""
    tensors, faults = {}, []
    for name, tensor in stored.items():
        if _CAUSAL_MASK.fullmatch(name):
            continue
        is_prefixed = name.startswith("transformer.") or name == _HEAD
        ours = name if is_prefixed else f"transformer.{name}"
        if ours in tensors:
            faults.append(f"{ours} is there twice, with and without `transformer.`")
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            faults.append(f"{name} is {tensor.dtype}, must be floating point")
        tensors[ours] = tensor
    if config.tie_word_embeddings and _HEAD in tensors:
        head = tensors.pop(_HEAD)
        if _EMBEDDING in tensors and not np.array_equal(head, tensors[_EMBEDDING]):
            remedy = "set tie_word_embeddings to false"
            faults.append(f"{_HEAD} differs from {_EMBEDDING}, which it is tied to ({remedy})")
    return tensors, faults


def _differences(shapes: Mapping[str, tuple[int, ...]], tensors: Tensors) -> list[str]:
    missing = [f"{name} is missing" for name in shapes if name not in tensors]
    foreign = [f"{name} has no place in it" for name in tensors if name not in shapes]
    misshapen = [
        f"{name} has shape {tensors[name].shape}, must be {shape}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    return missing + foreign + misshapen


def _vocabulary_faults(tokenizer: PreTrainedTokenizerFast, config: GPT2Config) -> list[str]:
    largest = max(tokenizer.get_vocab().values())
    if largest < config.vocab_size:
        return []
    return [
        f"vocab_size is {config.vocab_size}, must be above the tokenizer's last token, {largest}"
    ]


def _read_weights(directory: Path) -> Tensors:
    if (directory / _WEIGHTS).exists():
        return _read_safetensors(directory / _WEIGHTS)
    if (directory / _INDEX).exists():
        return _read_shards(directory / _INDEX)
    if (directory / _TORCH_WEIGHTS).exists():
        return _read_torch(directory / _TORCH_WEIGHTS)
    raise ValueError(f"{directory} has no weights; it must hold {_WEIGHTS} or {_INDEX}")


def _read_safetensors(path: Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        raise ValueError(f"{path} is missing; copy it again")
    try:
        return dict(sorted(load_file(path).items()))
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None
    except (AttributeError, KeyError, TypeError) as error:
        fault = f"stores a type that NumPy lacks ({error})"
        raise ValueError(f"{path} {fault}; convert it to float32") from None


def _read_shards(path: Path) -> Tensors:
    weight_map = _read_json(path, "copy it again").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map; copy the checkpoint's own")
    for name, file in weight_map.items():
        # A plain name cannot leave the directory; on Windows a colon or a backslash could.
        if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file):
            wanted = "the name of a .safetensors file beside it"
            raise ValueError(f"{path}: weight_map[{name!r}] is {file!r}; it must be {wanted}")
    tensors = {}
    for file in sorted(set(weight_map.values())):
        shard = _read_safetensors(path.with_name(file))
        listed = {name for name in weight_map if weight_map[name] == file}
        if listed != shard.keys():
            names = ", ".join(sorted(listed ^ shard.keys()))
            raise ValueError(f"{path} and {file} disagree about {names}; copy both again")
        tensors |= shard
    return tensors


def _read_torch(path: Path) -> Tensors:
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        remedy = f"install torch, or convert it to {_WEIGHTS}"
        raise ValueError(f"{path} is read only where torch is; {remedy}") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.float().numpy() for name, tensor in sorted(state.items())}
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    fault = (str(error).splitlines() or [type(error).__name__])[0]
    return ValueError(f"{path} is truncated or damaged ({fault}); copy it again")


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        fault = (error.strerror or "").lower()
        raise ValueError(f"{path} cannot be read ({fault}); {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {remedy}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; {remedy}")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_weights(directory: Path, tensors: Tensors, max_shard_bytes: int) -> None:
    """As one file, or as shards and their index; `tensors` in the order of their names."""
    shards: list[Tensors] = [{}]
    for name, tensor in tensors.items():
        size = sum(other.nbytes for other in shards[-1].values())
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        _write_safetensors(directory / _WEIGHTS, tensors)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(directory / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(directory / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_safetensors(path: Path, tensors: Tensors) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    # safetensors lets nobody else read what it writes, whatever the process's umask.
    path.chmod((path.parent / _CONFIG).stat().st_mode)


def _check_replaceable(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ValueError(f"{directory} is a file; give a directory")
    for path in sorted(directory.iterdir()):
        if not (path.is_file() and _OWN_FILES.fullmatch(path.name)):
            remedy = "give a new directory, since saving replaces the whole"
            raise ValueError(f"{directory} holds {path.name}, which is no checkpoint's; {remedy}")


def _move(source: Path, target: Path) -> None:
    """Renames the directory `source` to `target`, which disappears if it is there."""
    if not target.exists():
        source.rename(target)
        return
    replaced = source.with_suffix(".replaced")
    target.rename(replaced)
    try:
        source.rename(target)
    except OSError:
        replaced.rename(target)
        raise
    shutil.rmtree(replaced)
