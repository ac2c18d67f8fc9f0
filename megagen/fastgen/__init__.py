"""A loss library for diffusion training and distillation. Imports nothing of megagen but itself."""
