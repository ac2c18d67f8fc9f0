"""What is asked of a role in a step, as far as plans need to know it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megagen.models.base import ModelPlugin, Passes
from megagen.parallel.dims import ParallelDims


@dataclass(frozen=True)
class Load:
    """What is asked of a role.

    Args:
        dims: its layout.
        world_size: ranks of the run.
        latent_shape: [C, T, H, W] of one sample.
        micro_batch_size: samples per micro-batch.
        num_micro_batches: micro-batches per step and replica.
        trainable: whether it has gradients and an optimizer.
        bf16: bf16 weights with fp32 masters, else fp32.
        recompute: none, selective or full.
        distributed_optimizer: states sharded over data ranks.
        ema: whether an EMA is kept.
        passes: of each sample in a step.
        adapters: parameters of LoRA, which alone are trained; None: the whole network is.
        trains_mlp: weights or adapters of the MLP have gradients.
        borrows_base: the base weights are another role's.
        cached_micro_batches: whose keys and values are held at once.
        holds: the graphs of all micro-batches are kept while other roles give the targets.
    """

    dims: ParallelDims
    world_size: int
    latent_shape: Sequence[int]
    micro_batch_size: int
    num_micro_batches: int
    trainable: bool
    bf16: bool
    recompute: str
    distributed_optimizer: bool
    ema: bool
    passes: Passes
    adapters: int | None = None
    trains_mlp: bool = True
    borrows_base: bool = False
    cached_micro_batches: float = 0.0
    holds: bool = False

    @property
    def num_frames(self) -> int:
        """Latent frames of the longest video that is made."""
        return self.passes.video_frames or self.latent_shape[1]

    @property
    def cp_parts(self) -> int:
        """Over how many CP ranks heads are dealt out."""
        return self.dims.cp_size if self.dims.cp_comm_type == "a2a" else 1

    def blocks(self, plugin: ModelPlugin) -> list[range]:
        """What of a video is made together."""
        return plugin.blocks(self.num_frames)

    def num_passes(self, plugin: ModelPlugin) -> int:
        """Passes with gradients of a replica in a step."""
        blocks = len(self.blocks(plugin)) if self.passes.by_block else 1
        return self.num_micro_batches * blocks
