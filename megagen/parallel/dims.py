"""Degrees of parallelism and the checks that need no process group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megagen.core.errors import ConfigError

CPCommType = Literal["a2a", "all_gather", "p2p", "a2a+p2p"]


@dataclass(frozen=True)
class ParallelDims:
    """The layout of one network over the ranks of the run; data parallelism is what remains.

    Rank order is tp fastest, then cp, dp, pp (Megatron's order).

    Args:
        tp_size: tensor parallel ranks: heads and FFN columns.
        cp_size: context parallel ranks: tokens.
        pp_size: pipeline stages: layers.
        virtual_pp_size: model chunks per stage (interleaved 1F1B); None or 1: one chunk.
        sequence_parallel: shard tokens over TP outside attention and MLP (Megatron SP).
        cp_comm_type: how self-attention sees all tokens under CP: ``a2a`` (Ulysses, heads must
            divide by tp x cp), ``all_gather`` (keys and values), ``p2p`` (ring), ``a2a+p2p``
            (Ulysses over ``cp_a2a_size`` ranks, ring over the rest).
        cp_a2a_size: Ulysses degree of ``a2a+p2p``; it divides ``cp_size``.
        pipeline_layers: layers of each (virtual) stage in pipeline order, for uneven splits; None:
            even, the first stages taking one more where the layers do not divide.
    """

    tp_size: int = 1
    cp_size: int = 1
    pp_size: int = 1
    virtual_pp_size: int | None = None
    sequence_parallel: bool = False
    cp_comm_type: CPCommType = "a2a"
    cp_a2a_size: int | None = None
    pipeline_layers: tuple[int, ...] | None = None

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one replica of the network."""
        return self.tp_size * self.cp_size * self.pp_size

    @property
    def num_chunks(self) -> int:
        """Model chunks on each pipeline rank."""
        return self.virtual_pp_size or 1

    def dp_size(self, world_size: int) -> int:
        """Data-parallel replicas in a world of ``world_size`` ranks.

        Raises:
            ConfigError: the world does not divide.
        """
        if world_size % self.model_parallel_size:
            raise ConfigError(
                f"tp_size {self.tp_size} x cp_size {self.cp_size} x pp_size {self.pp_size} = "
                f"{self.model_parallel_size} does not divide the {world_size} ranks of the run.",
                remedy="Change a degree, or start a multiple of that many ranks.",
                where="training.distributed",
            )
        return world_size // self.model_parallel_size
