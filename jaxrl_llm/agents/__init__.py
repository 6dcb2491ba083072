"""Learners, one file an algorithm; none imports another."""
