"""Host side of a run: the loop, checkpoints, logs, the command line and pictures."""
