"""One script a result; each is `python -m experiments.<name>` and takes `--help`."""
