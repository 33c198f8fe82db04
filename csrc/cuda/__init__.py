"""The sources of the CUDA kernels: the package ``flowkern.kernels.cuda``, which ``flowkern/_core/nvrtc.py`` compiles."""
