"""The demo's result as one self-contained page, a JSON file and a table on the terminal.

The page needs no network and no script: clips are an animated GIF inlined as data, the loss curve
is SVG.

Legend: N clips, T frames, H W pixels (grey in [0, 1]).
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor

from megagen.demo.digits import VIDEO_FPS, WORDS, Clips
from megagen.demo.judge import Verdict

_GAP = 2
_COLUMNS = (
    ("digit accuracy", "digit_accuracy", "{:.3f}"),
    ("direction accuracy", "direction_accuracy", "{:.3f}"),
    ("Frechet distance", "frechet", "{:.1f}"),
    ("diversity", "diversity", "{:.2f}"),
    ("clips", "num_clips", "{:d}"),
)


@dataclass
class DemoResult:
    """Everything the demo has to show.

    Args:
        verdicts: row title to figures, the main row of sampled clips first.
        real: held-out real clips, ordered like ``sampled``.
        sampled: sampled clips of the main row, digits in turn.
        losses: training loss of each step.
        seconds: phase to its wall-clock seconds.
        facts: what else to print and save (parameters, steps, parity...), JSON values.
    """

    verdicts: dict[str, Verdict]
    real: Clips
    sampled: Clips
    losses: Sequence[float]
    seconds: dict[str, float]
    facts: dict[str, Any] = field(default_factory=dict)


def write_report(result: DemoResult, folder: Path) -> None:
    """Write ``report.html``, ``metrics.json`` and ``clips.gif`` (sampled left, real right)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(render(result), encoding="utf-8")
    sides = [grid(clips.frames_NTHW) for clips in (result.sampled, result.real)]
    gap = torch.full((len(sides[0]), sides[0].shape[1], 6), 110, dtype=torch.uint8)
    (folder / "clips.gif").write_bytes(gif(torch.cat([sides[0], gap, sides[1]], dim=2), scale=2))
    (folder / "metrics.json").write_text(json.dumps(metrics(result), indent=2) + "\n")


def metrics(result: DemoResult) -> dict[str, Any]:
    """The content of ``metrics.json``: the main row's figures on top, all rows and facts below."""
    main = next(iter(result.verdicts.values()))
    return {
        **main.as_dict(),
        "final_loss": float(torch.tensor(result.losses[-100:]).mean()) if result.losses else None,
        **result.facts,
        "rows": {title: verdict.as_dict() for title, verdict in result.verdicts.items()},
        "seconds": {name: round(value, 2) for name, value in result.seconds.items()},
    }


def print_table(result: DemoResult) -> None:
    """The figures and the phases as two tables on the terminal."""
    from rich.console import Console
    from rich.table import Table

    figures = Table(title="Moving digits", title_justify="left")
    figures.add_column("", no_wrap=True)
    for title, _, _ in _COLUMNS:
        figures.add_column(title, justify="right")
    for title, cells in _rows(result.verdicts):
        figures.add_row(title, *cells)
    phases = Table(title="Time", title_justify="left")
    phases.add_column("phase")
    phases.add_column("seconds", justify="right")
    for name, seconds in [*result.seconds.items(), ("total", sum(result.seconds.values()))]:
        phases.add_row(name, f"{seconds:.1f}")
    console = Console()
    console.print(figures)
    console.print(phases)


def render(result: DemoResult) -> str:
    """The page."""
    page = Template((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))
    header = "".join(f"<th>{title}</th>" for title, _, _ in _COLUMNS)
    rows = "".join(
        f"<tr><th>{html.escape(title)}</th>{''.join(f'<td>{c}</td>' for c in cells)}</tr>"
        for title, cells in _rows(result.verdicts)
    )
    return page.substitute(
        header=header,
        rows=rows,
        digits="".join(f"<span>{word}</span>" for word in WORDS),
        sampled=gif_uri(result.sampled.frames_NTHW),
        real=gif_uri(result.real.frames_NTHW),
        curve=loss_svg(result.losses),
        facts=_definitions(_flat(result.facts)),
        seconds=_definitions({name: f"{value:.1f} s" for name, value in result.seconds.items()}),
    )


def _rows(verdicts: Mapping[str, Verdict]) -> list[tuple[str, list[str]]]:
    return [
        (title, [form.format(getattr(verdict, name)) for _, name, form in _COLUMNS])
        for title, verdict in verdicts.items()
    ]


def _flat(facts: Mapping[str, Any]) -> dict[str, str]:
    shown = {}
    for name, value in facts.items():
        text = f"{value:.3g}" if isinstance(value, float) else f"{value}"
        shown[name.replace("_", " ")] = f"{value:,}" if isinstance(value, int) else text
    return shown


def _definitions(values: Mapping[str, str]) -> str:
    return "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
        for name, value in values.items()
    )


def grid(frames_NTHW: Tensor, columns: int = len(WORDS)) -> Tensor:
    """Clips side by side, row by row, as uint8 frames ``[T, H', W']``."""
    levels = (frames_NTHW.clamp(0, 1) * 255).round().to(torch.uint8)
    count, length, height, width = levels.shape
    rows = math.ceil(count / columns)
    sheet = torch.full((length, rows * (height + _GAP), columns * (width + _GAP)), 40).byte()
    for n, clip in enumerate(levels):
        top, left = n // columns * (height + _GAP), n % columns * (width + _GAP)
        sheet[:, top : top + height, left : left + width] = clip
    return sheet[:, :-_GAP, :-_GAP]


def gif_uri(frames_NTHW: Tensor) -> str:
    """All clips in one looping GIF, as a ``data:`` address."""
    return f"data:image/gif;base64,{base64.b64encode(gif(grid(frames_NTHW))).decode()}"


def gif(levels_THW: Tensor, scale: int = 1) -> bytes:
    """Grey uint8 frames as a looping GIF, each pixel ``scale`` by ``scale``."""
    from PIL import Image

    larger = levels_THW.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    stills = [Image.fromarray(still.numpy(), mode="L") for still in larger]
    out = io.BytesIO()
    stills[0].save(
        out,
        format="GIF",
        save_all=True,
        append_images=stills[1:],
        duration=round(1000 / VIDEO_FPS),
        loop=0,
    )
    return out.getvalue()


def loss_svg(losses: Sequence[float], width: int = 720, height: int = 260) -> str:
    """Training loss over steps on a logarithmic axis: each step faint, a running mean on top."""
    values = [v for v in losses if math.isfinite(v) and v > 0]
    if len(values) < 2:
        return "<p>No training in this run.</p>"
    smooth, mean = [], values[0]
    for i, value in enumerate(values):
        mean += (value - mean) * max(0.02, 1 / (i + 1))
        smooth.append(mean)
    low, high = math.log(min(values)), math.log(max(values))
    left, bottom = 46, height - 24

    def point(i: int, value: float) -> str:
        x = left + (width - left - 8) * i / (len(values) - 1)
        y = 8 + (bottom - 8) * (high - math.log(value)) / max(high - low, 1e-9)
        return f"{x:.1f},{y:.1f}"

    stride = max(1, len(values) // 700)
    faint = " ".join(point(i, values[i]) for i in range(0, len(values), stride))
    strong = " ".join(point(i, smooth[i]) for i in range(0, len(values), stride))
    ticks = "".join(_tick(v, point(0, v).split(",")[1], left, width) for v in _levels(low, high))
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="training loss">{ticks}'
        f'<polyline class="faint" points="{faint}"/><polyline class="strong" points="{strong}"/>'
        f'<text x="{width - 8}" y="{height - 6}" text-anchor="end">step {len(values)}</text>'
        f'<text x="{left}" y="{height - 6}">step 1</text></svg>'
    )


def _levels(low: float, high: float) -> list[float]:
    """Round values (1, 2, 5 times a power of ten) between exp(low) and exp(high)."""
    powers = range(math.floor(low / math.log(10)), math.ceil(high / math.log(10)) + 1)
    candidates = [m * 10.0**p for p in powers for m in (1, 2, 5)]
    return [v for v in candidates if low <= math.log(v) <= high]


def _tick(value: float, y: str, left: int, width: int) -> str:
    return (
        f'<line class="tick" x1="{left}" x2="{width - 8}" y1="{y}" y2="{y}"/>'
        f'<text x="{left - 6}" y="{y}" dy="4" text-anchor="end">{value:g}</text>'
    )
