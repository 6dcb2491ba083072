"""Environments as pure step functions of one patient; `core` batches and resets all of them."""
