"""What is sampled: the rows of the table, and the student at each of its checkpoints."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megagen.demo import clips as clip_sets
from megagen.demo.digits import Clips
from megagen.demo.judge import Verdict
from megagen.demo.training import checkpoints

if TYPE_CHECKING:
    from megagen.sampling.pipeline import VideoPipeline

STUDENT_STEPS: Mapping[int, tuple[float, ...]] = {
    4: (1000.0, 750.0, 300.0, 100.0, 0.0),
    2: (1000.0, 750.0, 0.0),
}
"""Number of steps to the timesteps that the student is sampled at.

They are not all those it is trained at: three steps at much noise narrow the samples, and two more
at little noise keep what two steps reach. ``megagen.demo.choose`` compares such lists on captions
and clips of the training.
"""


@dataclass(frozen=True)
class Row:
    """Sampled clips and how long they took.

    Args:
        clips: with frames.
        seconds: of wall-clock time for all of them on all cores, decoding included; None: not
            known.
    """

    clips: Clips
    seconds: float | None


Checkpoint = tuple[str, int, dict[int, Clips]]
"""Run, its step, and number of sampling steps to the clips that the student made then."""


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
    student: Path,
    teacher: Path,
    asked: Clips,
    paths: Path,
    *,
    seed: int,
    guidance: float,
    steps: Sequence[int],
) -> dict[str, Row]:
    """Clips of the student, then of the teacher by ``steps`` guided Euler steps. Collective.

    A further row of each shows captions of the training: the teacher's are the ends of the paths
    that the student began with, the student's are made for the same captions with other noise.

    Args:
        student, teacher: diffusers directories.
        asked: held-out captions.
        paths: of the teacher, by its main row's steps.
        seed: of the noise.
        guidance: of the teacher.
        steps: the teacher's, its main row first.
    """
    rows, further = {}, {}
    pipeline = load(student)
    for count in STUDENT_STEPS:
        rows[f"student, {count} steps"] = timed(
            pipeline, asked, student_way(STUDENT_STEPS[count], seed)
        )
    count = next(iter(STUDENT_STEPS))
    known = path_ends(paths, pipeline)
    further[on_known(f"student, {count} steps")] = timed(
        pipeline, known, student_way(STUDENT_STEPS[count], seed)
    )
    further[on_known(f"teacher, {steps[0]} steps")] = Row(known, None)
    pipeline = load(teacher)
    for count in steps:
        way = teacher_way(count, guidance, seed)
        rows[f"teacher, {count} steps"] = timed(pipeline, asked, way)
    return rows | further


def path_ends(folder: Path, pipeline: VideoPipeline) -> Clips:
    """The clips at which the paths of a cache end."""
    from megagen.data.ode_cache import OdeCache, read_manifest

    cache = OdeCache(folder, read_manifest(folder).timesteps)
    keys = sorted(int(file.stem) for file in (folder / "samples").glob("*.safetensors"))
    samples = [cache.read(key, ()) for key in keys]
    x0_BCTHW = torch.stack([sample.x0_CTHW for sample in samples])
    video_BCTHW = pipeline.codec.decode(pipeline.roles[0].plugin.denormalize(x0_BCTHW))
    return clip_sets.from_pixels(video_BCTHW, [sample.caption for sample in samples])


def on_known(title: str) -> str:
    """The title of the row whose captions are those of the training."""
    return f"{title}, known captions"


def teacher_way(steps: int, guidance: float, seed: int) -> dict[str, Any]:
    """How the teacher is sampled: guided Euler steps."""
    return {"num_steps": steps, "sampler": "euler", "guidance_scale": guidance, "seed": seed}


def student_way(t_list: Sequence[float], seed: int) -> dict[str, Any]:
    """How the student is sampled: no guidance, fresh noise at each step."""
    return {"t_list": list(t_list), "sampler": "sde", "guidance_scale": 1.0, "seed": seed}


def timed(pipeline: VideoPipeline, asked: Clips, how: Mapping[str, Any]) -> Row:
    """A row of clips and how long they took."""
    begin = time.monotonic()
    clips = clip_sets.sample(pipeline, asked, **how)
    return Row(clips, time.monotonic() - begin)


def sample_progress(
    out: Path, asked: Clips, rows: Mapping[str, Row], seed: int
) -> list[Checkpoint]:
    """The student at each of its checkpoints; at the last it made the rows. Collective."""
    points = [(run, step) for run in ("kd", "dmd2") for step in checkpoints(out / run)]
    found: list[Checkpoint] = []
    for run, step in points[:-1]:
        pipeline = load_run(out / run, step)
        ways = {count: student_way(t_list, seed) for count, t_list in STUDENT_STEPS.items()}
        drawn = {count: clip_sets.sample(pipeline, asked, **way) for count, way in ways.items()}
        found.append((run, step, drawn))
    last = {count: rows[f"student, {count} steps"].clips for count in STUDENT_STEPS}
    return [*found, (*points[-1], last)]


def load(directory: Path) -> VideoPipeline:
    """A pipeline over a diffusers directory with ``sampling.json``."""
    from megagen.parallel.dims import ParallelDims
    from megagen.sampling.source import build_pipeline, from_directory

    return build_pipeline(from_directory(str(directory)), ParallelDims())


def load_run(run: Path, step: int) -> VideoPipeline:
    """A pipeline over a run's student at a step."""
    from megagen.parallel.dims import ParallelDims
    from megagen.sampling.source import build_pipeline, from_run

    return build_pipeline(from_run(run, step), ParallelDims())
