"""Names of arrays, keys and trees, for annotations."""

from __future__ import annotations

from typing import Any

import jax

Array = jax.Array
Key = jax.Array
PyTree = Any
