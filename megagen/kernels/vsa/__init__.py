"""Video sparse attention: one API over several backends.

Zhang et al. 2025 (arXiv 2505.13389). Tokens of a video are cut into blocks of 64 slots
(``VSALayout``); a coarse stage attends over block means and chooses key blocks, a fine stage
attends to the tokens of the chosen ones (``vsa_attention``). Each stage can be had alone.
"""

from __future__ import annotations

from megagen.kernels.vsa.attention import (
    Pooled,
    VSAAux,
    vsa_attention,
    vsa_attention_pooled,
    wants_pooled,
)
from megagen.kernels.vsa.coarse import block_mean, coarse_attention, select_topk
from megagen.kernels.vsa.fine import block_sparse_attention
from megagen.kernels.vsa.index import (
    BlockIndex,
    Lists,
    index_from_map,
    map_from_index,
    transpose_index,
)
from megagen.kernels.vsa.layout import BLOCK, VSALayout, best_tile
from megagen.kernels.vsa.tile import tile, untile

__all__ = [
    "BLOCK",
    "BlockIndex",
    "Lists",
    "Pooled",
    "VSAAux",
    "VSALayout",
    "best_tile",
    "block_mean",
    "block_sparse_attention",
    "coarse_attention",
    "index_from_map",
    "map_from_index",
    "select_topk",
    "tile",
    "transpose_index",
    "untile",
    "vsa_attention",
    "vsa_attention_pooled",
    "wants_pooled",
]
