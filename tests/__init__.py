"""Tests: a mirror of `jaxrl_llm/`, beside the exact answers they compare with."""
