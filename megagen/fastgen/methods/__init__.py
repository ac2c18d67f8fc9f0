"""Distillation methods, one file each."""

from megagen.fastgen.methods.dmd import DMDPipeline

__all__ = ["DMDPipeline"]
