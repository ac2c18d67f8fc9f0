"""How fast tiles of keys and values reach the processors: an upper limit of block-sparse attention.

The kernel walks merged lists as the forward does, loads every tile they name and computes nothing.
Over working sets from a few MiB to more than the L2 cache holds, it says whether a list is served
from L2 or from memory, and how many FLOP each byte must serve.

Legend: B batch, H heads, K key slots (64 a block), D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megagen.kernels.vsa.backends import cuda
from megagen.kernels.vsa.index import Lists


@dataclass(frozen=True)
class GatherProbe:
    """One gather, to be launched as often as a measurement wants.

    Args:
        k_BHKD: bf16, head dim 64 or 128, on a Hopper GPU.
        v_BHKD: like ``k``.
        entries: merged lists of ``cuda.merge_queries``.
        counts: their lengths.
    """

    k_BHKD: Tensor
    v_BHKD: Tensor
    entries: Tensor
    counts: Tensor

    @classmethod
    def of(cls, k_BHKD: Tensor, v_BHKD: Tensor, lists: Lists) -> GatherProbe:
        """The gather that the forward of such lists would do.

        Raises:
            ValueError: the CUDA kernels do not serve such tensors.
        """
        reason = cuda.serves(k_BHKD)
        if reason is not None:
            raise ValueError(f"the gather probe does not run here: {reason}")
        return cls(k_BHKD, v_BHKD, *cuda.merge_queries(lists))

    def launch(self) -> None:
        """Queues the gather on the current stream."""
        cuda.gather(self.k_BHKD, self.v_BHKD, self.entries, self.counts)

    def num_bytes(self) -> int:
        """Bytes that one launch brings to the processors; waits for the GPU."""
        tile = 64 * self.k_BHKD.size(-1) * self.k_BHKD.element_size()
        return 2 * tile * int(self.counts.sum())

    def working_set(self) -> int:
        """Bytes of keys and values of one sequence of blocks (one batch and head)."""
        return 2 * self.k_BHKD[0, 0].numel() * self.k_BHKD.element_size()
