"""The rows of the sparse attention benchmark: shapes of video models, and the work each one is.

A row is a grid of tokens, cut into blocks of 64 slots, whose query blocks each attend to
``selected`` key blocks. FLOPs are counted as FastVideo counts them, ``4 H P 64 k D`` for a forward
with every slot of a block, and again on real tokens alone.

Legend: H heads, P slots (64 a block), S tokens, D head dim, n blocks, k selected blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from megagen.kernels.vsa import BLOCK, BlockIndex, VSALayout

HEAD_DIM = 128
FACTOR = {"forward": 1.0, "backward": 2.5, "both": 3.5}
"""Work of a direction by that of the forward: two products against five."""

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Row:
    """One shape and sparsity.

    Args:
        name: of the shape.
        grid: tokens ``(T, H, W)``.
        heads: H.
        selected: k.
        tile: tokens of a block.
        masks: kinds of lists to measure, of ``lists.KINDS``.
        also_all: measure the sparse kernel with every block selected too.
    """

    name: str
    grid: Grid
    heads: int
    selected: int
    tile: Grid = (4, 4, 4)
    masks: tuple[str, ...] = ("random",)
    also_all: bool = False

    @property
    def layout(self) -> VSALayout:
        """The blocks."""
        return VSALayout(self.grid, self.tile)

    @property
    def label(self) -> str:
        """Unique among the rows of a suite, without spaces."""
        return f"{self.name}-k{self.selected}"

    @property
    def flop(self) -> float:
        """Of a forward, on all slots of selected blocks."""
        return 4.0 * self.heads * self.layout.padded * BLOCK * self.selected * HEAD_DIM

    @property
    def dense_flop(self) -> float:
        """Of a dense forward on real tokens."""
        return 4.0 * self.heads * float(self.layout.num_tokens) ** 2 * HEAD_DIM

    def least_bytes(self, itemsize: int) -> dict[str, int]:
        """Bytes that must move: 4 tensors of slots forward, 8 backward."""
        tensor = self.heads * self.layout.padded * HEAD_DIM * itemsize
        return {"forward": 4 * tensor, "backward": 8 * tensor}

    def with_heads(self, heads: int) -> Row:
        """At most so many heads; 0: all."""
        return replace(self, heads=min(self.heads, heads)) if heads else self


WAN_480P, WAN_720P = (21, 30, 52), (21, 45, 80)
_EVERY = ("random", "local", "smooth")
_EQUAL = (3, 5, 4)
"""A tile that divides Wan's grids, so that no block is ragged."""

CPU_ROWS = (
    Row("S4096", (4, 32, 32), 12, 8, also_all=True),
    Row("S8192", (8, 32, 32), 12, 16),
    Row("wan_480p", WAN_480P, 1, 78),
)

GPU_ROWS = (
    Row("R1_wan1.3b_480p", WAN_480P, 12, 125),
    Row("R1_wan1.3b_480p", WAN_480P, 12, 63, masks=_EVERY, also_all=True),
    Row("R2_wan14b_480p", WAN_480P, 40, 63),
    Row("R3_wan14b_720p", WAN_720P, 40, 288),
    Row("R3_wan14b_720p", WAN_720P, 40, 180),
    Row("R3_wan14b_720p", WAN_720P, 40, 144, masks=_EVERY),
    Row("R4_wan14b_720p_sp8", WAN_720P, 5, 144),
    Row("R5_hunyuan_30x48x80", (30, 48, 80), 24, 240),
    Row("R5_hunyuan_30x48x80", (30, 48, 80), 24, 192),
    Row("R6_hunyuan_720p129f", (33, 45, 80), 24, 216),
    Row("R7_paper_16x28x52", (16, 28, 52), 12, 32),
    Row("R8_wan14b_720p_354", WAN_720P, 40, 126, tile=_EQUAL),
    Row("R9_wan1.3b_480p_354", WAN_480P, 12, 55, tile=_EQUAL),
)

DENSITY_ROWS = tuple(
    Row("density_S32768", (32, 32, 32), 24, selected)
    for selected in (26, 52, 64, 103, 128, 256, 512)
)
LENGTH_ROWS = tuple(
    Row(f"length_S{16_384 * i}", (16 * i, 32, 32), 24, 32 * i) for i in (2, 3, 4, 5, 6, 7)
)
SUITES = {
    "cpu": CPU_ROWS,
    "gpu": GPU_ROWS,
    "density": DENSITY_ROWS,
    "length": LENGTH_ROWS,
}


@dataclass(frozen=True)
class Work:
    """FLOPs of a forward.

    Args:
        blocks: on all slots of the selected blocks.
        tokens: on real tokens alone.
    """

    blocks: float
    tokens: float


def sparse_work(index: BlockIndex, sizes_n: Tensor) -> Work:
    """Of lists over blocks of these sizes; all entries of a list count."""
    sizes = sizes_n.to(index.idx_BHqM.device)
    pairs = int(index.num_BHq.sum())
    keys = sizes[index.idx_BHqM.long()].sum(-1)
    tokens = int((keys.double() * sizes).sum())
    return Work(4.0 * HEAD_DIM * BLOCK**2 * pairs, 4.0 * HEAD_DIM * tokens)


def dense_work(row: Row) -> Work:
    """Of dense attention on real tokens."""
    return Work(row.dense_flop, row.dense_flop)
