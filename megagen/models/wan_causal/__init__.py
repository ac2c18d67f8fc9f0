"""Wan with block-causal attention: streaming students of the Wan family (arXiv 2506.08009).

The weights are those of a bidirectional Wan. Latent frames are made in blocks
(``plugin.blocks(num_frames)``); a block sees itself and the blocks before, within a window.

Three kinds of request:
* a whole video, ``timestep`` ``[B]`` or one a frame ``[B, T]``: all blocks at once, as in training
  by diffusion forcing;
* a whole video with ``condition["clean_latents_BCTHW"]`` (and ``clean_timestep``): teacher forcing,
  noisy blocks see clean ones;
* a block with ``cache`` (see ``megagen/engine/kv_cache.py`` for how a rollout goes).
"""

from megagen.models.wan_causal.plugin import WanCausalModel

__all__ = ["WanCausalModel"]
