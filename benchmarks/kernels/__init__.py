"""Timings of kernels against their peers."""
