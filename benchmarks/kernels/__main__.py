"""The CPU kernels: ``python -m benchmarks.kernels [--threads 1] [--part fused|vsa|all]``."""

from __future__ import annotations

import torch
import typer

from benchmarks.kernels import operations, vsa
from benchmarks.measure import write_result
from megagen.kernels.vsa.layout import BLOCK, VSALayout


def main(
    threads: int = 1,
    pairs: int = 15,
    part: str = "all",
    heads: int = 12,
    repeats: int = 3,
    tokens: str = "4096,8192",
    flex: bool = False,
) -> None:
    """Time them and write ``kernels.json`` and ``vsa_cpu_<threads>.json``."""
    torch.set_num_threads(threads)
    if part in ("all", "fused"):
        operations.main(threads, pairs)
    if part not in ("all", "vsa"):
        return
    rows = []
    for count in (int(t) for t in tokens.split(",")):
        sizes = torch.full((count // BLOCK,), BLOCK, dtype=torch.int32)
        rows += [vsa.Row(f"S{count}", heads, sizes, sizes.numel() // share) for share in (8, 1)]
    if part == "all":
        wan = VSALayout((21, 30, 52))
        rows.append(vsa.Row("wan_480p", max(1, heads // 6), wan.tables().sizes_n, wan.topk(0.875)))
    found = {}
    for row in rows:
        name = f"{row.name}_{row.selected}_of_{row.sizes.numel()}"
        full = bool((row.sizes == BLOCK).all()) and row.selected < row.sizes.numel()
        found[name] = one = vsa.measure(row, repeats, with_flex=flex and full)
        typer.echo(
            f"{name:24} forward {one['forward']['ms']:8.1f} ms "
            f"{one['forward']['dense_over_ours_process']:5.2f}x  backward "
            f"{one['backward']['ms']:8.1f} ms {one['backward']['dense_over_ours_process']:5.2f}x  "
            f"flex {one['flex_over_ours']}"
        )
    result = {"threads": threads, "heads": heads, "repeats": repeats, "rows": found}
    typer.echo(write_result(f"vsa_cpu_{threads}", result))


if __name__ == "__main__":
    typer.run(main)
