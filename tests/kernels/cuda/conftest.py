"""Fixtures of the CUDA kernels' tests."""

from tests.kernels.cuda.emulated import built, emulated

__all__ = ["built", "emulated"]
