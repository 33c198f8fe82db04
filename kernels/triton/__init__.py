"""Triton kernels, one module per op: the package ``flowkern.kernels``. Imported only where a kernel is about to run."""
