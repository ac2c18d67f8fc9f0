"""The main job: clips, preprocess, distil a teacher, sample, judge, compare with diffusers, report.

Each phase goes through the parts that a user's own data goes through: mp4 files with a captions
file, ``megagen preprocess``, ``megagen train`` with a YAML config, the sampling pipeline, a
diffusers directory.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megagen.config.load import parse_overrides
from megagen.core.log import get_logger
from megagen.core.streams import Streams
from megagen.demo import clips as clip_sets
from megagen.demo import digits, processes
from megagen.demo.digits import Clips
from megagen.demo.distil import DistilOptions, distil
from megagen.demo.judge import Judge, Verdict, train_judge
from megagen.demo.report import DemoResult
from megagen.demo.rows import Checkpoint, Point, Row, load, sample_progress, sample_rows
from megagen.demo.training import read_losses, train

if TYPE_CHECKING:
    from megagen.sampling.pipeline import VideoPipeline

log = get_logger(__name__)

CODEC = {
    "name": "space_to_depth",
    "patch": 2,
    "temporal": 2,
    "channels": 1,
    # mean and standard deviation of the clips' pixels in [-1, 1]
    "offset": -0.8,
    "scale": 0.5,
}
TEXT_ENCODER = {"name": "hashed", "dim": 64, "max_length": 5}
WEIGHTS = Path(__file__).parent / "weights"
"""The teacher that comes with megagen."""
GRID = 40
"""Clips in each grid of the report: every held-out caption four times."""


@dataclass(frozen=True)
class DemoOptions:
    """What to do and how much of it.

    Args:
        out: folder of everything that the demo makes.
        distil: the student's two runs.
        teacher: diffusers directory of the teacher, where none is trained.
        config: run config of the teacher's training; None: ``teacher`` is taken as it is.
        overrides: dotted overrides of it.
        num_train, num_held_out: clips to make.
        num_samples: clips to sample and judge, of each row.
        teacher_steps: solver steps of the teacher's rows, the main row first.
        judge_epochs: epochs of the classifier's training.
        processes: that sample and judge.
        seed: of clips, judge and sampling noise (the training's is in its config).
    """

    out: Path
    distil: DistilOptions = field(default_factory=DistilOptions)
    teacher: Path = WEIGHTS
    config: Path | None = None
    overrides: tuple[str, ...] = ()
    num_train: int = 1437
    num_held_out: int = 1440
    num_samples: int = 1000
    teacher_steps: tuple[int, ...] = (48, 4, 2)
    judge_epochs: int = 24
    processes: int = field(default_factory=processes.available)
    seed: int = 0


@dataclass
class Phases:
    """Names, times and announces the phases.

    Args:
        count: of phases.
        seconds: phase to its wall-clock seconds.
    """

    count: int
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, name: str, what: str) -> Iterator[None]:
        log.info("[%d/%d] %s: %s", len(self.seconds) + 1, self.count, name, what)
        begin = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - begin


def run_demo(options: DemoOptions) -> DemoResult:
    """The whole job.

    Leaves ``data/``, ``sft/`` (the teacher's run, where it is trained), ``teacher/``, what
    ``distil`` leaves, and ``samples/``.

    Raises:
        MegagenError: a phase failed; the message says which.
    """
    out, streams = options.out, Streams(options.seed)
    phase = Phases(6 + (options.config is not None))
    make_data(options, streams, phase)
    teacher = make_teacher(options, phase)
    distil(options.distil, teacher, out, TEXT_ENCODER, phase)
    asked = clip_sets.asked(options.num_samples, "held_out")
    with phase("sample", f"{options.num_samples} clips from captions for each row"):
        rows, progress = processes.together(options.processes, sample, options, teacher, asked)
        clip_sets.write_samples(next(iter(rows.values())).clips, out / "samples", GRID)
    with phase("judge", "classifier, motion and Frechet distance, also of the checkpoints"):
        found = figures(options, streams, asked, rows, progress)
    return DemoResult(
        **found,
        losses={run: read_losses(out / run) for run in ("kd", "dmd2")},
        seconds=phase.seconds,
        facts=processes.together(1, facts, options, teacher),
    )


def make_data(options: DemoOptions, streams: Streams, phase: Phases) -> None:
    """``out/videos``, and of it ``out/data`` and ``out/held_out``; the first two phases."""
    count = f"{options.num_train} training and {options.num_held_out} held-out mp4s"
    with phase("clips", count):
        make_videos(options, streams)
    out = options.out
    with phase("preprocess", f"mp4 files to latents in {out / 'data'}"):
        for videos, data in (("train", "data"), ("held_out", "held_out")):
            clip_sets.preprocess_videos(
                out / "videos" / videos, out / data, CODEC, TEXT_ENCODER, options.processes
            )


def figures(
    options: DemoOptions,
    streams: Streams,
    asked: Clips,
    rows: Mapping[str, Row],
    progress: Sequence[Checkpoint],
) -> dict[str, Any]:
    """What ``DemoResult`` has of sampled clips: verdicts, milliseconds, shown, progress.

    Args:
        options: of the job.
        streams: of the judge.
        asked: the held-out captions.
        rows: sampled clips; those of other captions are judged and not shown.
        progress: the student's at its checkpoints.
    """
    real = clip_sets.from_dataset(options.out / "held_out")
    known = clip_sets.from_dataset(options.out / "data", limit=len(real))
    judge = train_judge(streams, reference=real, num_epochs=options.judge_epochs)
    sets = {title: row.clips for title, row in rows.items()}
    sets |= {"real, training": known, "real, held out": real}
    verdicts, points = judged(judge, sets, progress, options.processes)
    shown = {"real, held out": clip_sets.in_order_of(real, asked, GRID)}
    shown |= {
        title: clip_sets.first(row.clips, GRID)
        for title, row in rows.items()
        if row.clips.captions[:GRID] == asked.captions[:GRID]
    }
    return {
        "verdicts": verdicts,
        "milliseconds": {
            title: 1e3 * row.seconds / len(row.clips)
            for title, row in rows.items()
            if row.seconds is not None
        },
        "shown": shown,
        "progress": points,
    }


def sample(
    options: DemoOptions, teacher: Path, asked: Clips
) -> tuple[dict[str, Row], list[Checkpoint]]:
    """The rows, and the student on its way to them. Collective."""
    rows = sample_rows(
        options.out / "student",
        teacher,
        asked,
        options.out / "paths",
        seed=options.seed,
        guidance=options.distil.guidance_scale,
        steps=options.teacher_steps,
    )
    return rows, sample_progress(options.out, asked, rows, options.seed)


def judged(
    judge: Judge, sets: dict[str, Clips], progress: Sequence[Checkpoint], num_processes: int
) -> tuple[dict[str, Verdict], list[Point]]:
    """Figures of named sets of clips and of the checkpoints'."""
    drawn = [clips for _, _, ways in progress for clips in ways.values()]
    found = processes.each(num_processes, judge.judge, [*sets.values(), *drawn])
    verdicts = dict(zip(sets, found, strict=False))
    rest = iter(found[len(sets) :])
    points = [
        Point(run, step, {count: next(rest) for count in ways}) for run, step, ways in progress
    ]
    return verdicts, points


def make_teacher(options: DemoOptions, phase: Phases) -> Path:
    """The directory of the teacher: the given one, or that of a run made here."""
    if options.config is None:
        return options.teacher
    with phase("teacher", f"megagen train --config {options.config}"):
        run = options.out / "sft"
        keys = parse_overrides(options.overrides)
        keys["training.data.data_path"] = options.out / "data"
        train(options.config, run, options.distil.num_ranks, keys)
        processes.together(1, export_teacher, options.out)
    return options.out / "teacher"


def facts(options: DemoOptions, teacher: Path) -> dict[str, Any]:
    """What else the report says."""
    student = load(options.out / "student")
    return {
        "parameters": student.roles[0].plugin.num_parameters(),
        "teacher": str(teacher),
        "teacher_paths": options.distil.num_paths,
        "guidance_scale": options.distil.guidance_scale,
        "diffusers_relative_error": diffusers_error(student, options.out / "student"),
    }


def make_videos(options: DemoOptions, streams: Streams) -> None:
    """``out/videos/train`` and ``out/videos/held_out``; an earlier run's whole folders are kept."""
    for split, count in (("train", options.num_train), ("held_out", options.num_held_out)):
        folder = options.out / "videos" / split
        if clip_sets.count_videos(folder) == count:
            log.info("keeping the %d clips in %s", count, folder)
            continue
        shutil.rmtree(folder, ignore_errors=True)
        made = digits.make_clips(split, count, streams)  # type: ignore[arg-type]
        digits.write_clips(made, folder)


def export_teacher(out: Path) -> None:
    """``out/teacher``: the run's averaged weights, with how to decode and sample them."""
    from megagen.checkpoint.diffusers import save_weights
    from megagen.parallel.dims import ParallelDims
    from megagen.sampling.source import SPEC, build_pipeline, from_run, write_spec

    source = from_run(out / "sft")
    role = build_pipeline(source, ParallelDims()).roles[0]
    (out / "teacher" / SPEC).unlink(missing_ok=True)  # an earlier run's; the rest is replaced whole
    save_weights(role.plugin, role.chunks, role.mesh, out / "teacher")
    spec = source.spec.model_copy(
        update={"fps": digits.VIDEO_FPS, "flow_shift": role.plugin.flow_shift}
    )
    write_spec(out / "teacher", spec)


def diffusers_error(pipeline: VideoPipeline, directory: Path) -> float:
    """Relative L2 error of our forward pass against diffusers' own class on the same directory."""
    from diffusers import WanTransformer3DModel

    from megagen.models.base import Request

    role = pipeline.roles[0]
    shape = pipeline.codec.latent_shape(digits.NUM_FRAMES, digits.FRAME_SIZE, digits.FRAME_SIZE)
    noise_BCTHW = Streams(0).normal("parity", 0, range(4), shape)
    timestep_B = torch.tensor([1.0, 250.0, 700.0, 1000.0])
    text_BLD, _ = pipeline.text_encoder.encode([digits.caption(d, d) for d in range(4)])
    ours = role.predict([Request(noise_BCTHW, timestep_B, {"text_embeds_BLD": text_BLD})])[0]
    model = WanTransformer3DModel.from_pretrained(directory)
    with torch.no_grad():
        theirs = model(noise_BCTHW, timestep_B, text_BLD, return_dict=False)[0]
    return float((ours - theirs).norm() / theirs.norm())
