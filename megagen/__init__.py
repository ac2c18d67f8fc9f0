"""megagen: train video diffusion transformers at Megatron scale and distil them into few-step generators."""

__version__ = "0.1.0"
