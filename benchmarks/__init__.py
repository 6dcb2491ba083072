"""Speed of the hot paths beside the programs that do the same job: `python -m benchmarks`."""
