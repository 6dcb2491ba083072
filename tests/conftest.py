"""Fixtures shared by the tests; the settings they run under are in `strict.py`."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def x64() -> Iterator[None]:
    """The whole test computes in float64."""
    with jax.enable_x64(True):
        yield
