"""What every test of language models runs under."""

import pytest

from tests.lm import tiny

quick_compilation = pytest.fixture(scope="package", autouse=True)(tiny.quick_compilation)
