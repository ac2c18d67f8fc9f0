"""Curves of the demo's report as SVG: losses, and how the student's figures moved."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence


def progress_svg(
    title: str,
    marks: Sequence[str],
    curves: Mapping[str, Sequence[float]],
    level: float,
    width: int = 340,
    height: int = 190,
) -> str:
    """A figure at each checkpoint, with the teacher's value as a dashed line.

    Args:
        title: the figure's name.
        marks: names of the checkpoints.
        curves: name to one value per checkpoint; the first is drawn strong.
        level: the teacher's value.
        width, height: of the drawing.
    """
    if not marks:
        return "<p>No checkpoint in this run.</p>"
    values = [value for curve in curves.values() for value in curve] + [level]
    low, high = min(values), max(values)
    left, right, top, bottom = 44, width - 40, 24, height - 24

    def x(i: int) -> float:
        return left + (right - left) * i / max(len(marks) - 1, 1)

    def y(value: float) -> float:
        return top + (bottom - top) * (high - value) / max(high - low, 1e-9)

    parts = [f'<text x="4" y="13">{html.escape(title)}</text>']
    for value in sorted({low, level, high}):
        parts.append(
            f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        )
    parts.append(
        f'<line class="level" x1="{left}" x2="{right}" y1="{y(level):.1f}" y2="{y(level):.1f}"/>'
    )
    for number, (name, curve) in enumerate(curves.items()):
        points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(curve))
        style = "strong" if number == 0 else "second"
        parts.append(f'<polyline class="{style}" points="{points}"/>')
        parts.append(f'<text x="{right + 3}" y="{y(curve[-1]) + 4:.1f}">{html.escape(name)}</text>')
    for i, mark in enumerate(marks):
        parts.append(
            f'<text x="{x(i):.1f}" y="{height - 6}" text-anchor="middle">{html.escape(mark)}</text>'
        )
    box = f"0 0 {width} {height}"
    label = html.escape(title)
    return f'<svg viewBox="{box}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def loss_svg(losses: Sequence[float], width: int = 720, height: int = 200) -> str:
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
