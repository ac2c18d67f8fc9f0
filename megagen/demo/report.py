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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megagen.demo.charts import loss_svg, progress_svg
from megagen.demo.digits import VIDEO_FPS, WORDS, Clips
from megagen.demo.judge import Verdict
from megagen.demo.rows import Point
from megagen.demo.words import Words

if TYPE_CHECKING:
    from rich.table import Table

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
        verdicts: row title to figures: the student's rows, the teacher's, real clips.
        milliseconds: row title to the time a sampled clip took.
        shown: row title to clips that show the same, digits in turn; real ones first.
        progress: the student at its checkpoints.
        losses: run to the training loss of each step.
        seconds: phase to its wall-clock seconds.
        facts: what else to print and save (parameters, steps, parity...), JSON values.
        words: of the page.
        streams: title to figures of making one clip at a time; none where nothing is streamed.
    """

    verdicts: dict[str, Verdict]
    milliseconds: dict[str, float]
    shown: dict[str, Clips]
    progress: Sequence[Point]
    losses: dict[str, Sequence[float]]
    seconds: dict[str, float]
    facts: dict[str, Any] = field(default_factory=dict)
    words: Words = field(default_factory=Words)
    streams: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def write_report(result: DemoResult, folder: Path) -> None:
    """Write ``report.html``, ``metrics.json`` and ``clips.gif`` (the grids side by side)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(render(result), encoding="utf-8")
    titles = [title for title in result.words.gif if title in result.shown]
    sheets = [grid(result.shown[title].frames_NTHW) for title in titles]
    gap = torch.full((len(sheets[0]), sheets[0].shape[1], 6), 110, dtype=torch.uint8)
    sides = [part for sheet in sheets for part in (gap, sheet)][1:]
    (folder / "clips.gif").write_bytes(gif(torch.cat(sides, dim=2), scale=2))
    (folder / "metrics.json").write_text(json.dumps(metrics(result), indent=2) + "\n")


def metrics(result: DemoResult) -> dict[str, Any]:
    """The content of ``metrics.json``: the main row's figures on top, all rows and facts below."""
    main = next(iter(result.verdicts.values()))
    return {
        **main.as_dict(),
        **result.facts,
        "training_steps": {run: len(losses) for run, losses in result.losses.items()},
        "against_teacher": against_teacher(result),
        "rows": {title: verdict.as_dict() for title, verdict in result.verdicts.items()},
        "milliseconds_per_clip": {k: round(v, 2) for k, v in result.milliseconds.items()},
        "progress": [
            {"run": p.run, "step": p.step, **{str(k): v.as_dict() for k, v in p.verdicts.items()}}
            for p in result.progress
        ],
        "seconds": {name: round(value, 2) for name, value in result.seconds.items()},
        **({"streaming": result.streams} if result.streams else {}),
    }


def against_teacher(result: DemoResult) -> dict[str, dict[str, float]]:
    """Each sampled row's figures over those of the teacher's first row (its many steps)."""
    teacher = next((t for t in result.verdicts if t.startswith("teacher")), None)
    if teacher is None:
        return {}
    base, found = result.verdicts[teacher], {}
    for title, taken in result.milliseconds.items():
        own = result.verdicts[title]
        found[title] = {
            name: getattr(own, name) / max(getattr(base, name), 1e-9)
            for name in ("frechet", "diversity", "digit_accuracy", "direction_accuracy")
        } | {"speed": result.milliseconds[teacher] / taken}
    return found


def print_table(result: DemoResult) -> None:
    """The figures and the phases as two tables on the terminal."""
    from rich.console import Console
    from rich.table import Table

    figures = Table(title=result.words.title, title_justify="left")
    figures.add_column("", no_wrap=True)
    for title in (*(title for title, _, _ in _COLUMNS), "ms a clip"):
        figures.add_column(title, justify="right")
    for title, cells in _rows(result):
        figures.add_row(title, *cells)
    phases = Table(title="Time", title_justify="left")
    phases.add_column("phase")
    phases.add_column("seconds", justify="right")
    for name, seconds in [*result.seconds.items(), ("total", sum(result.seconds.values()))]:
        phases.add_row(name, f"{seconds:.1f}")
    console = Console()
    console.print(figures)
    if result.streams:
        console.print(_streams_table(result.streams))
    console.print(phases)


def _streams_table(streams: Mapping[str, Mapping[str, float]]) -> Table:
    from rich.table import Table

    table = Table(title="One clip at a time", title_justify="left")
    table.add_column("", no_wrap=True)
    for column in next(iter(streams.values())):
        table.add_column(column, justify="right")
    for title, row in streams.items():
        table.add_row(title, *(f"{value:.4g}" for value in row.values()))
    return table


def render(result: DemoResult) -> str:
    """The page."""
    page = Template((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))
    header = "".join(f"<th>{title}</th>" for title, _, _ in _COLUMNS) + "<th>ms a clip</th>"
    rows = "".join(
        f"<tr><th>{html.escape(title)}</th>{''.join(f'<td>{c}</td>' for c in cells)}</tr>"
        for title, cells in _rows(result)
    )
    return page.substitute(
        about=html.escape(result.words.about),
        figures=html.escape(result.words.figures),
        clips=html.escape(result.words.clips),
        moved=html.escape(result.words.progress),
        streams=_streams(result.streams),
        header=header,
        rows=rows,
        grids="".join(_figure(title, clips) for title, clips in result.shown.items()),
        progress="".join(_progress(result)),
        curves="".join(
            f"<h3>{html.escape(run)}</h3>{loss_svg(losses)}"
            for run, losses in result.losses.items()
        ),
        facts=_definitions(_flat(result.facts)),
        seconds=_definitions({name: f"{value:.1f} s" for name, value in result.seconds.items()}),
    )


def _streams(streams: Mapping[str, Mapping[str, float]]) -> str:
    """A table of figures of single clips, or nothing."""
    if not streams:
        return ""
    columns = "".join(f"<th>{html.escape(name)}</th>" for name in next(iter(streams.values())))
    rows = "".join(
        f"<tr><th>{html.escape(title)}</th>"
        + "".join(f"<td>{value:.4g}</td>" for value in row.values())
        + "</tr>"
        for title, row in streams.items()
    )
    return (
        "<h2>One clip at a time</h2>"
        f"<table><thead><tr><th></th>{columns}</tr></thead><tbody>{rows}</tbody></table>"
    )


def _figure(title: str, clips: Clips) -> str:
    words = "".join(f"<span>{word}</span>" for word in WORDS)
    return (
        f'<figure><figcaption>{html.escape(title)}</figcaption><div class="digits">{words}</div>'
        f'<img src="{gif_uri(clips.frames_NTHW)}" alt="{html.escape(title)}"></figure>'
    )


def _progress(result: DemoResult) -> list[str]:
    """A drawing for each figure that is asked of the student."""
    teacher = next((v for t, v in result.verdicts.items() if t.startswith("teacher")), None)
    if teacher is None or not result.progress:
        return []
    marks = [p.run if p.run in result.words.begins else f"{p.step}" for p in result.progress]
    found = []
    for title, name, _ in _COLUMNS[:-1]:
        curves = {
            f"{steps} steps": [getattr(p.verdicts[steps], name) for p in result.progress]
            for steps in result.progress[0].verdicts
        }
        found.append(progress_svg(title, marks, curves, getattr(teacher, name)))
    return found


def _rows(result: DemoResult) -> list[tuple[str, list[str]]]:
    found = []
    for title, verdict in result.verdicts.items():
        cells = [form.format(getattr(verdict, name)) for _, name, form in _COLUMNS]
        taken = result.milliseconds.get(title)
        found.append((title, [*cells, "" if taken is None else f"{taken:.1f}"]))
    return found


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
