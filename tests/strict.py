"""The strict settings of every test and doctest, loaded by `addopts = -p tests.strict`.

A plugin rather than a `conftest.py`, because the doctests of `jaxrl_llm/` and `README.md` lie
outside `tests/` and must run under the same rules, alone or together.
"""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import jax

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


def pytest_configure(config: pytest.Config) -> None:
    """Keep compiled programs in pytest's own cache, which `--cache-clear` empties."""
    if not config.pluginmanager.has_plugin("cacheprovider"):
        return
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("compiled")))
    # Most programs of a test compile in less than JAX's default threshold of a second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
