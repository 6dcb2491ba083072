"""Data sets as pure functions and iterators: synthetic clinical text, tokens, trajectories."""
