"""What is sampled: the rows of the table, and the student at each of its checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagen.demo import clips as clip_sets
from megagen.demo.digits import Clips
from megagen.demo.judge import Judge, Verdict
from megagen.demo.training import checkpoints

if TYPE_CHECKING:
    from megagen.sampling.pipeline import VideoPipeline

STUDENT_STEPS: Mapping[int, tuple[float, ...]] = {
    4: (1000.0, 750.0, 300.0, 100.0, 0.0),
    2: (1000.0, 750.0, 0.0),
}
"""Number of steps to the timesteps that the student is sampled at.

They are not all those it is trained at (1000, 900, 750, 500): three steps at much noise narrow the
samples, and two more at little noise keep what two steps reach. Chosen with other noise than the
demo's.
"""


@dataclass(frozen=True)
class Row:
    """Sampled clips and how long they took.

    Args:
        clips: with frames.
        seconds: of wall-clock time for all of them, decoding included.
    """

    clips: Clips
    seconds: float


@dataclass(frozen=True)
class Point:
    """What the student was worth at a checkpoint.

    Args:
        run: ``kd`` or ``dmd2``.
        step: of that run.
        verdicts: number of sampling steps to figures.
    """

    run: str
    step: int
    verdicts: Mapping[int, Verdict]


def sample_rows(
    student: Path, teacher: Path, asked: Clips, *, seed: int, guidance: float, steps: Sequence[int]
) -> dict[str, Row]:
    """Clips of the student, then of the teacher by ``steps`` guided Euler steps."""
    rows = {}
    pipeline = load(student)
    for count in STUDENT_STEPS:
        rows[f"student, {count} steps"] = timed(pipeline, asked, student_way(count, seed))
    pipeline = load(teacher)
    for count in steps:
        how = {"num_steps": count, "sampler": "euler", "guidance_scale": guidance, "seed": seed}
        rows[f"teacher, {count} steps"] = timed(pipeline, asked, how)
    return rows


def student_way(steps: int, seed: int) -> dict[str, Any]:
    """How the student is sampled: no guidance, fresh noise at each step."""
    t_list = list(STUDENT_STEPS[steps])
    return {"t_list": t_list, "sampler": "sde", "guidance_scale": 1.0, "seed": seed}


def timed(pipeline: VideoPipeline, asked: Clips, how: Mapping[str, Any]) -> Row:
    """A row of clips and how long they took."""
    begin = time.monotonic()
    clips = clip_sets.sample(pipeline, asked, **how)
    return Row(clips, time.monotonic() - begin)


def follow(out: Path, judge: Judge, asked: Clips, seed: int) -> list[Point]:
    """The student's figures at each of its checkpoints."""
    found = []
    for run, step, pipeline in student_pipelines(out):
        verdicts = {
            steps: judge.judge(clip_sets.sample(pipeline, asked, **student_way(steps, seed)))
            for steps in STUDENT_STEPS
        }
        found.append(Point(run, step, verdicts))
    return found


def load(directory: Path) -> VideoPipeline:
    """A pipeline over a diffusers directory with ``sampling.json``."""
    from megagen.parallel.dims import ParallelDims
    from megagen.sampling.source import build_pipeline, from_directory

    return build_pipeline(from_directory(str(directory)), ParallelDims())


def student_pipelines(out: Path) -> Iterator[tuple[str, int, VideoPipeline]]:
    """The student at the end of the first run and at each checkpoint of the second."""
    from megagen.parallel.dims import ParallelDims
    from megagen.sampling.source import build_pipeline, from_run

    for run in ("kd", "dmd2"):
        for step in checkpoints(out / run):
            yield run, step, build_pipeline(from_run(out / run, step), ParallelDims())
