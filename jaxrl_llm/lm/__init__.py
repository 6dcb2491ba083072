"""Language models: tokens, checkpoints, generation and alignment, one file an algorithm."""
