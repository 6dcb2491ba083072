"""Pure array kernels, one subject a file, each written for ONE example: batch them with `vmap`."""
