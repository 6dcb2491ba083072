"""Flax modules: parameters and forward passes, without losses."""
