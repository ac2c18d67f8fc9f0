"""Results as files: JSON with every figure, and a table of them to read."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import machine

Record = dict[str, Any]
NOT_MEASURED = "not measured"
_UNITS = {"cpu": ("GFLOP/s", 1e9), "cuda": ("TFLOP/s", 1e12)}


def facts() -> Record:
    """The machine and the versions."""
    found: Record = {
        "machine": machine(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),  # noqa: UP017
        "load_average": os.getloadavg()[0],  # beyond the cores in use: others were at work
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        version = torch.backends.cudnn.version()
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "cudnn": version}
    return found


def write(folder: Path, name: str, result: Record, text: str) -> tuple[Path, Path]:
    """``<name>.json`` and ``<name>.md`` in the machine's folder."""
    home = folder / machine()
    home.mkdir(parents=True, exist_ok=True)
    written = home / f"{name}.json", home / f"{name}.md"
    written[0].write_text(json.dumps({**facts(), **result}, indent=1) + "\n")
    written[1].write_text(text)
    return written


def attention(records: Sequence[Record], device: str) -> str:
    """A table for each row and direction."""
    unit, per = _UNITS[device]
    parts = ["# Sparse attention", ""]
    for record in records:
        parts += [f"## {title(record)}", ""]
        if "arms" not in record:
            parts += [record["status"], ""]
            continue
        ceiling = record["ceiling"]
        parts += [
            f"{record['dtype']}, {record['clock']} time, {record['statistic']}; matrix product "
            f"{ceiling['flop_per_s'] / per:.0f} {unit}, copy "
            f"{ceiling['copy_bytes_per_s'] / 1e9:.1f} GB/s; neighbours share "
            f"{record['overlap']:.2f} of a list.",
            "",
        ]
        parts += [*_directions(record, unit, per), "", *_parts(record)]
    return "\n".join(parts)


def _parts(record: Record) -> list[str]:
    """What a layer's forward is made of."""
    known = record["parts"]
    if known is None:
        return [f"Parts of a layer: {NOT_MEASURED}.", ""]
    words = ", ".join(f"{name} {ms:.3g}" for name, ms in known["forward_ms"].items())
    return [f"Forward of a layer on {known['backend']}, ms: {words}.", ""]


def title(record: Record) -> str:
    """A row in a few words."""
    grid, tile = ("x".join(map(str, record[key])) for key in ("grid", "tile"))
    words = (
        f"{record['name']}: {grid} tokens in tiles of {tile}, {record['heads']} heads, "
        f"{record['selected']} of {record['blocks']} blocks, {record['mask']} lists"
    )
    threads = record.get("threads")
    return f"{words}, {threads} thread{'s' if threads > 1 else ''}" if threads else words


def _directions(record: Record, unit: str, per: float) -> list[str]:
    arms: dict[str, Record] = record["arms"]
    ours = [name for name, arm in arms.items() if arm["ours"]]
    others = [name for name, arm in arms.items() if not arm["ours"]]
    peers = [name for name in others if arms[name]["status"] == "measured"]
    head = ["arm", "direction", "ms", f"{unit} on blocks", "on real tokens", "of product"]
    head += [*(f"{name} takes" for name in peers), "over fine", "peak MB", "error"]
    lines = [head, ["---"] * len(head)]
    for name in (*ours, *others):
        arm = arms[name]
        if arm["status"] != "measured":
            lines.append([name, arm["status"], *[""] * (len(head) - 2)])
            continue
        for direction in ("forward", "backward", "both"):
            cell = arm.get(direction, NOT_MEASURED)
            if direction == "both" and not isinstance(cell, dict):
                continue
            lines.append([name, direction, *_cells(arm, direction, peers, per)])
    return ["| " + " | ".join(line) + " |" for line in lines]


def _cells(arm: Record, direction: str, peers: Sequence[str], per: float) -> list[str]:
    cell = arm[direction]
    if not isinstance(cell, dict):
        why = arm.get("no_backward")
        return [f"{cell}: {why}" if why else cell, *[""] * (len(peers) + 6)]
    times = cell.get("times", {})
    ratios = [f"{times[name]:.2f}x" if name in times else "" for name in peers]
    fine = f"{cell['over_fine']:.2f}x" if "over_fine" in cell else ""
    hot = f" ({cell['hot_ms']:.3g} hot)" if "hot_ms" in cell else ""
    rates = [f"{cell[f'flop_per_s_{key}'] / per:.3g}" for key in ("blocks", "tokens")]
    peaks = arm.get("peak_mb")
    peak = NOT_MEASURED if peaks is None else f"{peaks[_peak_of(direction)]:.0f}"
    share = f"{100 * cell['share_of_ceiling']:.0f}%"
    milliseconds = f"{cell['ms']:.4g}{hot}"
    return [milliseconds, *rates, share, *ratios, fine, peak, _error(arm["error"], direction)]


def _peak_of(direction: str) -> str:
    return "forward" if direction == "forward" else "both"


def _error(found: dict[str, float], direction: str) -> str:
    """The worst of what a direction gives."""
    is_forward = direction == "forward"
    seen = [e for name, e in found.items() if (name in ("out", "selection")) == is_forward]
    return f"{max(seen):.1e}"


def fused(records: Sequence[Record]) -> str:
    """One table of all operations."""
    head = [
        "operation",
        "size",
        "arm",
        "direction",
        "ms",
        "GB/s",
        "of copy",
        "time / ours",
        "error",
    ]
    lines = [head, ["---"] * len(head)]
    for record in records:
        start = [record["operation"], record["size"]]
        if "arms" not in record:
            lines.append([*start, record["status"], *[""] * (len(head) - 3)])
            continue
        for name, arm in record["arms"].items():
            if arm["status"] != "measured":
                lines.append([*start, name, arm["status"], *[""] * (len(head) - 4)])
                continue
            for direction in ("forward", "backward"):
                lines.append([*start, name, direction, *_fused_cells(arm, direction)])
    table = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join(["# Fused operations", "", *table, ""])


def _fused_cells(arm: Record, direction: str) -> list[str]:
    cell = arm[direction]
    times = cell["times_ours"]
    is_forward = direction == "forward"
    seen = [e for name, e in arm["error"].items() if name.startswith("out") == is_forward]
    return [
        f"{cell['ms']:.3g}",
        f"{cell['bytes_per_s'] / 1e9:.1f}",
        f"{100 * cell['share_of_copy']:.0f}%",
        NOT_MEASURED if times is None else f"{times:.2f}x",
        f"{max(seen):.1e}",
    ]


def gathered(records: Sequence[Record]) -> str:
    """The gather probe."""
    head = ["K and V of a head", "lists", "neighbours share", "ms", "TB/s", "FLOP a byte"]
    head += ["forward at most, TFLOP/s", "with multicast"]
    lines = [head, ["---"] * len(head)]
    for record in records:
        start = [f"{record['blocks'] * 32 / 1024:g} MiB", record["mask"]]
        if record["status"] != "measured":
            lines.append([*start, record["status"], *[""] * (len(head) - 3)])
            continue
        lines.append(
            [
                *start,
                f"{record['overlap']:.2f}",
                f"{record['ms']:.3g} ({record['hot_ms']:.3g} hot)",
                f"{record['bytes_per_s'] / 1e12:.2f}",
                f"{record['flop_per_byte']:.0f}",
                f"{record['forward_flop_per_s_at_most'] / 1e12:.0f}",
                NOT_MEASURED,
            ]
        )
    table = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join(["# Gathering tiles of keys and values", "", *table, ""])
