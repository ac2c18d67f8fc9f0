"""The kernels against their peers: ``python -m benchmarks.kernels [--device gpu]``.

Writes JSON and tables to ``benchmarks/results/<machine>/``; see ``docs/benchmarks.md``.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import typer

from benchmarks.kernels import fused, gather, suite, table
from benchmarks.kernels.rows import SUITES, Row
from benchmarks.kernels.worker import Task, measured
from benchmarks.measure import RESULTS

NO_GPU = "benchmarks.kernels: torch finds no CUDA GPU here, so nothing was measured"
_LIMIT_S = 900
_DEVICES = {"cpu": "cpu", "gpu": "cuda"}
_PARTS = ("all", "gather", "vsa", "fused")


def main(
    device: str = "cpu",
    part: str = "all",
    threads: int = 1,
    rows: str = "",
    suite_name: str = typer.Option("", "--suite"),
    mask: str = "",
    heads: int = 0,
    seconds: float = 20.0,
    out: Path = RESULTS,
) -> None:
    """Measure and write.

    Args:
        device: cpu | gpu.
        part: all | gather (GPU) | vsa | fused.
        threads: of a CPU.
        rows: names of rows, by commas; empty: all of the suite. The others stay "not measured".
        suite_name: cpu | gpu | density | length; empty: the device's.
        mask: random | local | smooth instead of each row's own.
        heads: at most so many; 0: each row's own.
        seconds: of a row's rounds.
        out: the folder above the machine's.
    """
    if device not in _DEVICES or part not in _PARTS:
        raise typer.BadParameter(f"device is cpu or gpu, part one of {', '.join(_PARTS)}")
    if device == "gpu" and not torch.cuda.is_available():
        typer.echo(NO_GPU, err=True)
        raise typer.Exit(1)
    where = _DEVICES[device]
    common: Task = {"device": where, "threads": threads, "seconds": seconds}
    records: list[dict[str, Any]] = []
    if part in ("all", "gather") and where == "cuda":
        _gather(common, out)
    if part in ("all", "vsa"):
        name = suite_name or device
        if name not in SUITES:
            raise typer.BadParameter(f"suite is one of {', '.join(SUITES)}, found {name!r}")
        records += _attention(common, name, set(filter(None, rows.split(","))), mask, heads, out)
    if part in ("all", "fused"):
        records += _fused(common, out)
    bad = suite.wrong(records)
    if bad:
        typer.echo("\n".join(bad), err=True)
        raise typer.Exit(1)


def _suffix(common: Task) -> str:
    return "gpu" if common["device"] == "cuda" else f"cpu_{common['threads']}"


def tasks(common: Task, name: str, wanted: set[str], mask: str, heads: int) -> list[Task]:
    """One for each row and kind of list of a suite; what is not wanted has no ``kind``."""
    known = {row.name for row in SUITES[name]} | {row.label for row in SUITES[name]}
    if wanted - known:
        raise typer.BadParameter(
            f"no row {', '.join(sorted(wanted - known))}; there are {', '.join(sorted(known))}"
        )
    found: list[Task] = []
    for row in SUITES[name]:
        is_wanted = not wanted or bool(wanted & {row.name, row.label})
        for one in (mask,) if mask else row.masks:
            task: Task = {**common, "row": asdict(row.with_heads(heads)), "mask": one}
            found.append({**task, "kind": "vsa"} if is_wanted else task)
    return found


def _attention(
    common: Task, name: str, wanted: set[str], mask: str, heads: int, out: Path
) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    given = tasks(common, name, wanted, mask, heads)
    file = f"vsa_{_suffix(common)}" + ("" if name in _DEVICES else f"_{name}")
    for number, task in enumerate(given):
        row = Row(**{key: _tupled(value) for key, value in task["row"].items()})
        record = suite.describe(row, task["mask"]) | {"status": table.NOT_MEASURED}
        if "kind" in task:
            typer.echo(f"{number + 1} of {len(given)}: {table.title(record)}")
            record |= measured(task, _LIMIT_S)
        records.append(record)
        text = table.attention(records, common["device"])
        result = {"suite": name, "threads": common["threads"], "rows": records}
        paths = table.write(
            out, file, result, text
        )  # after every row, should a later one be cut off
    typer.echo(text)
    typer.echo("\n".join(map(str, paths)))
    return records


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _gather(common: Task, out: Path) -> None:
    records = []
    for blocks in gather.BLOCKS:
        for mask in gather.MASKS:
            about = {"blocks": blocks, "mask": mask}
            task = {**common, "kind": "gather", **about}
            records.append({**about, **measured(task, _LIMIT_S)})
    text = table.gathered(records)
    paths = table.write(out, f"gather_{_suffix(common)}", {"rows": records}, text)
    typer.echo(text)
    typer.echo("\n".join(map(str, paths)))


def _fused(common: Task, out: Path) -> list[dict[str, Any]]:
    records = []
    device = torch.device(common["device"])
    for operation in fused.operations(device):
        for size in fused.cases(operation, device):
            about = {"operation": operation, "size": size}
            task = {**common, "kind": "fused", **about}
            records.append({**about, **measured(task, _LIMIT_S)})
    text = table.fused(records)
    result = {"threads": common["threads"], "operations": records}
    paths = table.write(out, f"fused_{_suffix(common)}", result, text)
    typer.echo(text)
    typer.echo("\n".join(map(str, paths)))
    return records


if __name__ == "__main__":
    typer.run(main)
