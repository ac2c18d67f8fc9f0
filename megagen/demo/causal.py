"""``megagen demo-causal``: the digit teacher made causal, distilled and streamed.

Three runs of ``megagen train``, each from the weights of the one before: diffusion forcing on the
training clips makes a causal teacher; knowledge distillation learns where its paths end, with a
timestep a block; self-forcing goes on from captions alone, scored by the bidirectional teacher.
What they leave makes a clip block by block on a cache, in four steps a block or two.

The paths are the causal teacher's. A block's end on a bidirectional one's depends on noise of later
blocks, which a causal student does not see: it learns means, and its clips lose variety.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagen.core.streams import Streams
from megagen.demo import clips as clip_sets
from megagen.demo import digits, processes
from megagen.demo.digits import Clips
from megagen.demo.distil import DistilOptions, Phase, export, steps_of, write_prompts
from megagen.demo.report import DemoResult
from megagen.demo.rows import (
    Checkpoint,
    Row,
    load,
    load_run,
    on_known,
    path_ends,
    teacher_way,
    timed,
)
from megagen.demo.run import GRID, TEXT_ENCODER, DemoOptions, Phases, figures, make_data
from megagen.demo.training import checkpoints, read_losses, train
from megagen.demo.words import FIGURES, Words

if TYPE_CHECKING:
    from megagen.sampling.pipeline import VideoPipeline

RUNS = ("forcing", "causal_kd", "self_forcing")
"""Names of the three runs and of their folders."""
CAUSAL_STEPS: Mapping[int, tuple[float, ...]] = {
    4: (1000.0, 900.0, 750.0, 500.0, 0.0),
    2: (1000.0, 750.0, 0.0),
}
"""Number of steps a block to the timesteps at which the causal student is streamed.

Those it is trained at, and two of them: the nearest to clips of the training, asked in the
training's captions, as ``megagen.demo.choose`` finds them.
"""
_TIMED_CLIPS = 6

WORDS = Words(
    title="Moving digits, block by block",
    about=(
        "A bidirectional video diffusion transformer makes clips of handwritten digits in 48 "
        "steps. Made causal here (diffusion forcing), it is a causal teacher; a student learned "
        "where its paths end (causal knowledge distillation) and was then trained on its own clips "
        "(self-forcing) against the bidirectional teacher, from captions alone. The student makes "
        "a clip two frames at a time, in 4 steps each, or 2, on a cache of the frames before."
    ),
    figures=FIGURES,
    progress=(
        "Figures at the end of causal knowledge distillation (kd) and at steps of self-forcing; "
        "dashed: the teacher at its most steps."
    ),
    gif=("real, held out", "teacher, 48 steps", "teacher, 4 steps", "causal student, 4 steps"),
    begins=("causal_kd",),
)


@dataclass(frozen=True)
class CausalOptions:
    """The three runs.

    Args:
        forcing, kd, self_forcing: their configs.
        num_ranks: of data parallelism.
        num_paths: the causal teacher's paths that knowledge distillation learns, one a caption.
        guidance_scale: of both teachers.
        forcing_steps, kd_steps, self_forcing_steps: training steps; None: as the configs say.
    """

    forcing: Path = Path("configs/demo/diffusion_forcing.yaml")
    kd: Path = Path("configs/demo/causal_kd.yaml")
    self_forcing: Path = Path("configs/demo/self_forcing.yaml")
    num_ranks: int = 2
    num_paths: int = 320
    guidance_scale: float = DistilOptions.guidance_scale
    forcing_steps: int | None = None
    kd_steps: int | None = None
    self_forcing_steps: int | None = None


def run_causal_demo(options: DemoOptions, causal: CausalOptions) -> DemoResult:
    """The whole job.

    Leaves ``data/``, what ``make_causal`` leaves, and ``samples/``.

    Args:
        options: of clips, teacher, sampling and judging.
        causal: of the trainings.

    Raises:
        MegagenError: a phase failed; the message says which.
    """
    out, streams, phase = options.out, Streams(options.seed), Phases(7)
    make_data(options, streams, phase)
    make_causal(causal, options.teacher, out, phase)
    asked = clip_sets.asked(options.num_samples, "held_out")
    with phase("sample", f"{options.num_samples} clips from captions for each row"):
        rows, progress = processes.together(options.processes, sample, options, causal, asked)
        clip_sets.write_samples(next(iter(rows.values())).clips, out / "samples", GRID)
        one_by_one = processes.together(1, stream_figures, options, causal, asked)
    with phase("judge", "classifier, motion and Frechet distance, also of the checkpoints"):
        found = figures(options, streams, asked, rows, progress)
    return DemoResult(
        **found,
        losses={run: read_losses(out / run) for run in RUNS},
        seconds=phase.seconds,
        facts=processes.together(1, facts, options, causal),
        words=WORDS,
        streams=one_by_one,
    )


def make_causal(options: CausalOptions, teacher: Path, out: Path, phase: Phase) -> None:
    """The three runs, on ``out/data`` and on captions.

    Leaves ``forcing/`` and ``causal_teacher/``, ``prompts/``, ``paths/``, ``causal_kd/`` and
    ``kd_student/``, ``self_forcing/`` and ``student/``: each run and its averaged weights.

    Raises:
        MegagenError: a run failed.
    """
    with phase("forcing", f"megagen train --config {options.forcing}"):
        forcing = {
            "models.student.init_from": teacher,
            "training.data.data_path": out / "data",
            **steps_of(options.forcing_steps),
        }
        train(options.forcing, out / "forcing", options.num_ranks, forcing)
        export(out / "forcing", out / "causal_teacher", teacher)
    write_prompts(out, options.num_paths, TEXT_ENCODER)
    shutil.rmtree(out / "paths", ignore_errors=True)
    keys: dict[str, object] = {"training.data.data_path": out / "prompts"}
    with phase("causal_kd", f"{options.num_paths} paths, megagen train --config {options.kd}"):
        kd = keys | {
            "models.student.init_from": out / "causal_teacher",
            "models.teacher.init_from": out / "causal_teacher",
            "method.teacher_path_cache": out / "paths",
            "method.teacher_guidance_scale": options.guidance_scale,
            **steps_of(options.kd_steps),
        }
        train(options.kd, out / "causal_kd", options.num_ranks, kd)
        export(out / "causal_kd", out / "kd_student", teacher)
    with phase("self_forcing", f"megagen train --config {options.self_forcing}"):
        own = keys | {
            "models.student.init_from": out / "kd_student",
            "models.teacher.init_from": teacher,
            "models.critic.init_from": teacher,
            **steps_of(options.self_forcing_steps, parts=3),
        }
        train(options.self_forcing, out / "self_forcing", options.num_ranks, own)
        export(out / "self_forcing", out / "student", teacher, CAUSAL_STEPS[4])


# -- sampling --------------------------------------------------------------------------------------
def streamed_way(t_list: Sequence[float], seed: int) -> dict[str, Any]:
    """How the causal student is sampled: block by block, fresh noise at each step, no guidance."""
    stream = {"t_list": list(t_list), "sample_type": "sde"}
    return {"stream": stream, "guidance_scale": 1.0, "seed": seed}


def sample(
    options: DemoOptions, causal: CausalOptions, asked: Clips
) -> tuple[dict[str, Row], list[Checkpoint]]:
    """The student's rows and the teacher's, and the student on its way. Collective."""
    seed, rows, further = options.seed, {}, {}
    pipeline = load(options.out / "student")
    for count, t_list in CAUSAL_STEPS.items():
        rows[f"causal student, {count} steps"] = timed(pipeline, asked, streamed_way(t_list, seed))
    known = path_ends(options.out / "paths", pipeline)
    count, t_list = next(iter(CAUSAL_STEPS.items()))
    further[on_known(f"causal student, {count} steps")] = timed(
        pipeline, known, streamed_way(t_list, seed)
    )
    further[on_known("causal teacher, 48 steps")] = Row(known, None)
    pipeline = load(options.teacher)
    for count in options.teacher_steps:
        way = teacher_way(count, causal.guidance_scale, seed)
        rows[f"teacher, {count} steps"] = timed(pipeline, asked, way)
    return rows | further, sample_progress(options, asked, rows)


def sample_progress(
    options: DemoOptions, asked: Clips, rows: Mapping[str, Row]
) -> list[Checkpoint]:
    """The student from knowledge distillation on; at its last checkpoint it made the rows."""
    out, found = options.out, []
    points = [(run, step) for run in RUNS[1:] for step in checkpoints(out / run)]
    for run, step in points[:-1]:
        pipeline = load_run(out / run, step)
        ways = {n: streamed_way(t_list, options.seed) for n, t_list in CAUSAL_STEPS.items()}
        drawn = {n: clip_sets.sample(pipeline, asked, **way) for n, way in ways.items()}
        found.append((run, step, drawn))
    last = {n: rows[f"causal student, {n} steps"].clips for n in CAUSAL_STEPS}
    return [*found, (*points[-1], last)]


# -- one clip at a time ----------------------------------------------------------------------------
def stream_figures(
    options: DemoOptions, causal: CausalOptions, asked: Clips
) -> dict[str, dict[str, float]]:
    """Seconds a clip, frames a second and seconds to the first frame, medians over single clips."""
    captions, found = asked.captions[:_TIMED_CLIPS], {}
    pipeline = load(options.out / "student")
    for count, t_list in CAUSAL_STEPS.items():
        times = [_streamed(pipeline, text, t_list) for text in captions]
        found[f"causal student, {count} steps"] = _medians(times)
    pipeline = load(options.teacher)
    for count in options.teacher_steps:
        way = teacher_way(count, causal.guidance_scale, options.seed)
        times = [_whole(pipeline, text, way) for text in captions]
        found[f"teacher, {count} steps"] = _medians(times)
    return found


def _streamed(
    pipeline: VideoPipeline, caption: str, t_list: Sequence[float]
) -> tuple[float, float]:
    """Seconds to the first frame and to the last."""
    from megagen.core.options import parse_options
    from megagen.sampling.pipeline import SamplingOptions

    options = parse_options(SamplingOptions, _size() | streamed_way(t_list, seed=0), "demo")
    seconds = [piece.seconds for piece in pipeline.stream([caption], options)]
    return seconds[0], seconds[-1]


def _whole(pipeline: VideoPipeline, caption: str, way: dict[str, Any]) -> tuple[float, float]:
    """The same of a clip whose frames are made together."""
    from megagen.core.options import parse_options
    from megagen.sampling.pipeline import SamplingOptions

    options = parse_options(SamplingOptions, _size() | way, "demo")
    begin = time.perf_counter()
    list(pipeline.generate([caption], options))
    seconds = time.perf_counter() - begin
    return seconds, seconds


def _size() -> dict[str, Any]:
    side = digits.FRAME_SIZE
    return {"num_frames": digits.NUM_FRAMES, "height": side, "width": side, "batch_size": 1}


def _medians(times: list[tuple[float, float]]) -> dict[str, float]:
    """The first clip warms up and does not count, where there are others."""
    counted = times[1:] or times
    first, last = (statistics.median(each) for each in zip(*counted, strict=True))
    return {
        "seconds a clip": last,
        "frames a second": digits.NUM_FRAMES / last,
        "seconds to the first frame": first,
    }


def facts(options: DemoOptions, causal: CausalOptions) -> dict[str, Any]:
    """What else the report says."""
    pipeline = load(options.out / "student")
    student = pipeline.roles[0].plugin
    latent_frames = pipeline.codec.latent_frames(digits.NUM_FRAMES)
    a_block = len(student.blocks(latent_frames)[0])
    return {
        "parameters": student.num_parameters(),
        "frames_a_block": a_block * digits.NUM_FRAMES // latent_frames,
        "teacher": str(options.teacher),
        "teacher_paths": causal.num_paths,
        "guidance_scale": causal.guidance_scale,
    }
