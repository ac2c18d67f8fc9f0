"""Kernels in Triton, one idea a file; importing a file here imports triton."""
