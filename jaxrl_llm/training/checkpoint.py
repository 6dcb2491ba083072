"""Checkpoints of a training state, each sealed so that damage is noticed.

    save(directory, step, state, {"config": ...})
    state, step, meta = restore(directory, jax.eval_shape(algorithm.init, key))

Orbax writes a step to a temporary folder and renames it, so that a kill leaves no step by halves.
It does not protect what is written: a flipped byte restores silently, wrong dtypes are cast, a
half-deleted step is still listed. So a finished step is sealed by a manifest with the SHA-256 of
each of its files, shapes and dtypes are compared before anything is read, and the newest step
whose manifest holds is the one restored.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.data.files import write_atomically
from jaxrl_llm.types import PyTree

_MANIFEST = "manifest.json"


def save(
    directory: str | Path,
    step: int,
    state: PyTree,
    meta: Mapping[str, Any] | None = None,
    *,
    max_to_keep: int = 3,
) -> None:
    """Writes `state` as the checkpoint `step` and seals it; returns when it is on disk.

    With several processes each must call it, and `state` must be of global arrays.

    Args:
      directory: of the checkpoints, created if it is absent.
      step: at least 0, later than every sound checkpoint in `directory`.
      state: a pytree of arrays; typed keys, bfloat16 and optax states are kept bit by bit.
      meta: what JSON can hold, returned as it is by `restore`.
      max_to_keep: older checkpoints are deleted.

    Raises:
      ValueError: if a leaf is not an array or is empty, `meta` is not JSON, or `directory` holds
        a sound checkpoint of this or a later step.
    """
    import orbax.checkpoint as ocp
    from jax.experimental import multihost_utils

    leaves = _leaves(state)
    for path, leaf in leaves.items():
        _check_leaf(path, leaf)
    try:
        meta_text = json.dumps(dict(meta or {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"meta is not JSON ({error}); keep arrays in the state") from None
    directory = Path(directory).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    damaged = _damaged_from(directory, step)
    if jax.process_index() == 0:
        # Orbax would refuse to overwrite them, or to save a step before them.
        for folder in damaged:
            shutil.rmtree(folder)
    multihost_utils.sync_global_devices("checkpoint directory ready")
    description = {path: _description(leaf) for path, leaf in leaves.items()}
    with _manager(directory, max_to_keep) as manager:
        manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(leaves),
                meta=ocp.args.JsonSave({"meta": json.loads(meta_text), "leaves": description}),
            ),
        )
        manager.wait_until_finished()
    if jax.process_index() == 0:
        folder = directory / str(step)
        manifest = json.dumps(_digests(folder), indent=1) + "\n"
        write_atomically(folder / _MANIFEST, manifest.encode())
    multihost_utils.sync_global_devices("checkpoint sealed")


def restore(directory: str | Path, target: PyTree) -> tuple[PyTree, int, dict[str, Any]]:
    """The newest sound checkpoint; each damaged one on the way is named on stderr.

    Args:
      directory: of the checkpoints.
      target: the state's structure, `jax.eval_shape(algorithm.init, key)` or arrays. A leaf with a
        sharding is restored to it, one without to the default device, a NumPy array as NumPy.

    Returns:
      `(state, step, meta)`; `state` has the classes, shapes and dtypes of `target`.

    Raises:
      ValueError: if no checkpoint is sound, or the newest sound one is not of `target`'s leaves.
    """
    import orbax.checkpoint as ocp

    directory = Path(directory).absolute()
    steps = _steps(directory)
    if not steps:
        raise ValueError(f"{directory} has no checkpoints; give the folder of a run that saved one")
    faults = {}
    for step in steps:
        fault = _fault(directory / str(step))
        if fault is None:
            break
        faults[step] = fault
    else:
        newest = f"checkpoint {steps[0]} is damaged ({faults[steps[0]]})"
        raise ValueError(f"{directory} has no sound checkpoint: {newest}; start a new run")
    for damaged, fault in faults.items():
        where = f"checkpoint {damaged} in {directory} is damaged"
        print(f"warning: {where} ({fault}); using checkpoint {step}", file=sys.stderr)
    leaves = _leaves(target)
    with _manager(directory) as manager:
        described = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        _compare(f"checkpoint {step} in {directory}", described["meta"]["leaves"], leaves)
        abstract = {path: _abstract(leaf) for path, leaf in leaves.items()}
        restored = manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        )
    values = [restored["state"][path] for path in leaves]
    state = jax.tree.unflatten(jax.tree.structure(target), values)
    return state, step, described["meta"]["meta"]


def _manager(directory: Path, max_to_keep: int | None = None) -> Any:
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(
        max_to_keep=max_to_keep,
        cleanup_tmp_directories=max_to_keep is not None,
        # The seal needs the finished files: there is nothing to overlap with.
        enable_async_checkpointing=False,
    )
    return ocp.CheckpointManager(directory, options=options)


def _leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by path. Saved so, no container passes through orbax, which would change its class."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _check_leaf(path: str, leaf: Any) -> None:
    if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
        raise ValueError(f"state{path} is {leaf!r}, not an array; wrap a number in jnp.asarray")
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) and np.dtype(leaf.dtype).kind in "OSUMm":
        raise ValueError(f"state{path} has dtype {leaf.dtype}; only numbers can be saved")
    if leaf.size == 0:
        raise ValueError(f"state{path} has shape {list(leaf.shape)}, no elements; leave it out")


def _description(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _compare(name: str, saved: Mapping[str, str], wanted: Mapping[str, Any]) -> None:
    remedy = "resume with the configuration it was saved with"
    for path in dict.fromkeys([*wanted, *saved]):
        if path not in saved:
            raise ValueError(f"{name} has no state{path}; {remedy}")
        if path not in wanted:
            raise ValueError(f"{name} has state{path}, which this run does not; {remedy}")
        if (needed := _description(wanted[path])) != saved[path]:
            raise ValueError(f"{name}: state{path} is {saved[path]}, not {needed}; {remedy}")


def _abstract(leaf: Any) -> Any:
    if isinstance(leaf, (np.ndarray, np.generic)):
        return np.asarray(leaf)
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _steps(directory: Path) -> list[int]:
    """Steps with a folder, newest first."""
    try:
        names = [path.name for path in directory.iterdir() if path.is_dir()]
    except OSError as error:
        raise ValueError(f"{directory} cannot be read: {(error.strerror or '').lower()}") from None
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def _damaged_from(directory: Path, step: int) -> list[Path]:
    """Folders of `step` and later; a sound one among them is an error, on every process alike."""
    later = [other for other in _steps(directory) if other >= step]
    for other in later:
        if _fault(directory / str(other)) is None:
            remedy = "resume from it or save in another folder"
            raise ValueError(f"step is {step}, but {directory} has checkpoint {other}; {remedy}")
    return [directory / str(other) for other in later]


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _MANIFEST:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            digests[path.relative_to(folder).as_posix()] = digest
    return digests


def _fault(folder: Path) -> str | None:
    """What is wrong with a step, None if it is as it was sealed."""
    try:
        sealed = json.loads((folder / _MANIFEST).read_bytes())
        found = _digests(folder)
    except FileNotFoundError:
        return "it was never sealed: its save was interrupted"
    except ValueError:
        return f"its {_MANIFEST} cannot be read"
    except OSError as error:
        return f"{error.filename}: {(error.strerror or '').lower()}"
    if not isinstance(sealed, dict):
        return f"its {_MANIFEST} cannot be read"
    for name in sorted(sealed.keys() | found.keys()):
        if name not in found:
            return f"file {name} is missing"
        if name not in sealed:
            return f"file {name} is not in its manifest"
        if sealed[name] != found[name]:
            return f"file {name} differs from its manifest"
    return None
