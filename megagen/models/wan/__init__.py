"""The Wan family: 2.1 T2V, I2V, FLF2V; 2.2 TI2V-5B and A14B."""

from megagen.models.wan.plugin import WanModel

__all__ = ["WanModel"]
