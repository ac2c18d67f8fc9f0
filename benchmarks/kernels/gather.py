"""How fast tiles of keys and values reach a GPU's processors, over working sets and kinds of lists.

The first thing to measure on a new GPU. The kernel of ``megagen.kernels.vsa.probe`` loads what the
forward loads and computes nothing; what it takes is a floor under any forward with these lists. If
that floor is near the forward's time, only loading less can help (lists shared by more query
blocks); if it is far below, overlap can.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.kernels import lists
from benchmarks.kernels.arms import unserved
from benchmarks.kernels.clock import GpuClock, take_turns
from benchmarks.kernels.rows import HEAD_DIM
from megagen.kernels.vsa import BLOCK, Lists, VSALayout
from megagen.kernels.vsa.probe import GatherProbe

BLOCKS = (256, 512, 1024, 1440, 2048, 4096)
"""Of keys: 8 to 128 MiB of keys and values a head."""
MASKS = ("random", "local")
HEADS, SELECTED = 8, 64


def measure(blocks: int, mask: str, device: torch.device) -> dict[str, Any]:
    """One working set.

    Args:
        blocks: n, a multiple of 16.
        mask: ``random`` or ``local``.
        device: a Hopper GPU; elsewhere the record says why it was not measured.
    """
    layout = VSALayout((4, 16, blocks))
    record = {"blocks": blocks, "mask": mask, "heads": HEADS, "selected": SELECTED}
    reason = unserved("cuda", device)
    if reason is not None:
        return {**record, "status": f"not measured: {reason}"}
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, HEADS, layout.padded, HEAD_DIM)
    k, v = (
        torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        for _ in range(2)
    )
    draw = lists.random_lists if mask == "random" else lists.local_lists
    index = draw(layout, HEADS, SELECTED, generator)
    sizes = layout.tables(device).sizes_n
    probe = GatherProbe.of(k, v, Lists(index.idx_BHqM, index.num_BHq, sizes, sizes))
    moved, times = probe.num_bytes(), {}
    for name, flushes in (("ms", True), ("hot_ms", False)):
        clock = GpuClock(device, flushes=flushes)
        found, _ = take_turns({"gather": probe.launch}, clock, least=25, most=25, seconds=0)
        times[name] = 1e3 * found["gather"].wall
    flop = 4.0 * HEAD_DIM * BLOCK**2 * int(index.num_BHq.sum())
    return {
        **record,
        **times,
        "status": "measured",
        "working_set_bytes": probe.working_set(),
        "overlap": lists.overlap(index, blocks),
        "bytes": moved,
        "bytes_per_s": moved / times["hot_ms"] * 1e3,
        "flop_per_byte": flop / moved,
        "forward_flop_per_s_at_most": flop / times["hot_ms"] * 1e3,
        "multicast": "not measured: the probe has no variant with clusters",
    }
