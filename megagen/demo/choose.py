"""Timesteps for sampling the demo's student, chosen without a look at what it is judged by.

    python -m megagen.demo.choose --out runs/demo
    python -m megagen.demo.choose --out runs/demo-causal --stream

Lists of timesteps are compared on captions of the training, with noise that no other part of the
demo uses, against training clips. ``rows.STUDENT_STEPS`` holds the best of each length, and
``causal.CAUSAL_STEPS`` that of the causal student.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from megagen.core.streams import Streams
from megagen.demo import clips as clip_sets
from megagen.demo import processes
from megagen.demo.causal import streamed_way
from megagen.demo.digits import Clips
from megagen.demo.judge import Verdict, train_judge
from megagen.demo.rows import load, student_way

CANDIDATES: tuple[tuple[float, ...], ...] = (
    (1000, 900, 750, 500),
    (1000, 900, 750, 300),
    (1000, 900, 750, 100),
    (1000, 900, 500, 200),
    (1000, 750, 500, 250),
    (1000, 750, 500, 100),
    (1000, 750, 300, 100),
    (1000, 500, 250, 100),
    (1000, 900),
    (1000, 750),
    (1000, 500),
    (1000, 300),
)
"""Timesteps, without the final 0."""
_SEED = 1000

Way = Callable[[Sequence[float], int], dict[str, Any]]
"""(timesteps and a final 0, seed) -> keys of ``SamplingOptions``."""


def compare(
    student: Path,
    data: Path,
    candidates: Sequence[Sequence[float]] = CANDIDATES,
    *,
    way: Way = student_way,
    num_samples: int = 1000,
    seed: int = _SEED,
    judge_epochs: int = 24,
    num_processes: int | None = None,
) -> dict[tuple[float, ...], Verdict]:
    """Each list's figures, those of one length together and the nearest to the clips first.

    Args:
        student: diffusers directory.
        data: dataset of training clips.
        candidates: lists of timesteps, without the final 0.
        way: how it is sampled.
        num_samples: clips of each list.
        seed: of the noise, another than the demo's.
        judge_epochs: of the classifier.
        num_processes: that sample and judge; None: one a core.
    """
    count = num_processes or processes.available()
    lists = [tuple(float(t) for t in steps) for steps in candidates]
    asked = clip_sets.asked(num_samples, "train")
    drawn = processes.together(count, _sample, student, asked, lists, way, seed)
    judge = train_judge(
        Streams(seed), reference=clip_sets.from_dataset(data), num_epochs=judge_epochs
    )
    found = dict(zip(lists, processes.each(count, judge.judge, drawn), strict=True))
    order = sorted(found, key=lambda steps: (-len(steps), found[steps].frechet))
    return {steps: found[steps] for steps in order}


def best(found: dict[tuple[float, ...], Verdict]) -> dict[int, tuple[float, ...]]:
    """The nearest list of each length, with the final 0: what ``rows.STUDENT_STEPS`` holds."""
    chosen: dict[int, tuple[float, ...]] = {}
    for steps in sorted(found, key=lambda steps: found[steps].frechet):
        chosen.setdefault(len(steps), (*steps, 0.0))
    return chosen


def _sample(
    student: Path, asked: Clips, lists: Sequence[tuple[float, ...]], way: Way, seed: int
) -> list[Clips]:
    pipeline = load(student)
    return [clip_sets.sample(pipeline, asked, **way((*steps, 0.0), seed)) for steps in lists]


def main(
    out: Annotated[Path, typer.Option(help="Folder of a finished demo.")] = Path("runs/demo"),
    num_samples: Annotated[int, typer.Option(min=20, help="Clips of each list.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = _SEED,
    judge_epochs: Annotated[int, typer.Option(min=1, help="Of the digit classifier.")] = 24,
    stream: Annotated[bool, typer.Option(help="Of a causal student.")] = False,
) -> None:
    """Compare lists of timesteps on captions and clips of the training, and print a table."""
    from rich.console import Console
    from rich.table import Table

    found = compare(
        out / "student",
        out / "data",
        way=streamed_way if stream else student_way,
        num_samples=num_samples,
        seed=seed,
        judge_epochs=judge_epochs,
    )
    table = Table(title="Captions and clips of the training", title_justify="left")
    for column in ("timesteps", "Frechet distance", "diversity", "digit", "direction"):
        table.add_column(column, justify="left" if column == "timesteps" else "right")
    for steps, verdict in found.items():
        table.add_row(
            ", ".join(f"{t:g}" for t in steps),
            f"{verdict.frechet:.2f}",
            f"{verdict.diversity:.3f}",
            f"{verdict.digit_accuracy:.3f}",
            f"{verdict.direction_accuracy:.3f}",
        )
    Console().print(table)
    for count, steps in best(found).items():
        typer.echo(f"{count} steps: {', '.join(f'{t:g}' for t in steps)}")


if __name__ == "__main__":
    typer.run(main)
