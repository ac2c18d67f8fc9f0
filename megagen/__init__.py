"""megagen: train video diffusion transformers at Megatron scale, distil them to few steps."""

__version__ = "0.1.0"
