"""The main job: clips, preprocess, train, sample, judge, export, compare with diffusers, report.

Each phase goes through the parts that a user's own data goes through: mp4 files with a captions
file, ``megagen preprocess``, ``megagen train`` with a YAML config, the sampling pipeline, a
diffusers directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megagen.core.errors import MegagenError
from megagen.core.log import get_logger
from megagen.core.streams import Streams
from megagen.demo import clips as clip_sets
from megagen.demo import digits
from megagen.demo.digits import Clips
from megagen.demo.judge import Judge, Verdict, train_judge
from megagen.demo.report import DemoResult

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
_GRID = 80  # clips in each grid of the report: every digit in every direction twice


@dataclass(frozen=True)
class DemoOptions:
    """What to do and how much of it.

    Args:
        out: folder of everything that the demo makes.
        config: run config of the training.
        overrides: dotted overrides of it, as on the command line of ``megagen train``.
        num_ranks: ranks of the training (data parallel).
        num_train, num_held_out: clips to make.
        num_samples: clips to sample and judge.
        sampling_steps: solver steps of the rows of the table, the main row first.
        guidance_scale: of the sampled clips.
        judge_epochs: epochs of the classifier's training.
        seed: of clips, judge and sampling noise (the training's is in its config).
    """

    out: Path
    config: Path
    overrides: tuple[str, ...] = ()
    num_ranks: int = 2
    num_train: int = 2 * 1437
    num_held_out: int = 1440
    num_samples: int = 640
    sampling_steps: tuple[int, ...] = (16, 4)
    guidance_scale: float = 2.5
    judge_epochs: int = 24
    seed: int = 0


@dataclass
class _Phases:
    """Names, times and announces the phases."""

    count: int
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, name: str, what: str) -> Iterator[None]:
        log.info("[%d/%d] %s: %s", len(self.seconds) + 1, self.count, name, what)
        begin = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - begin


def run_demo(options: DemoOptions) -> DemoResult:
    """The whole job. Leaves ``data/``, ``sft/`` (the run), ``teacher/`` and ``samples/``.

    Raises:
        MegagenError: a phase failed; the message says which.
    """
    out, phase, streams = options.out, _Phases(6), Streams(options.seed)
    with phase("clips", f"{options.num_train} training and {options.num_held_out} held-out mp4s"):
        make_videos(options, streams)
    with phase("preprocess", f"mp4 files to latents in {out / 'data'}"):
        for videos, data in (("train", "data"), ("held_out", "held_out")):
            clip_sets.preprocess_videos(out / "videos" / videos, out / data, CODEC, TEXT_ENCODER)
    with phase("train", f"megagen train --config {options.config} --nproc {options.num_ranks}"):
        train(options)
    with phase("export", f"the averaged weights to {out / 'teacher'}, read back by diffusers"):
        pipeline, error = export(out)
    with phase("sample", f"{options.num_samples} clips from captions"):
        asked = clip_sets.asked(options.num_samples)
        sampled = {
            steps: clip_sets.sample(pipeline, asked, options.seed, steps, options.guidance_scale)
            for steps in options.sampling_steps
        }
        clip_sets.write_samples(sampled[options.sampling_steps[0]], out / "samples", _GRID)
    with phase("judge", "classifier, motion and Frechet distance"):
        real = clip_sets.from_dataset(out / "held_out")
        known = clip_sets.from_dataset(out / "data", limit=len(real))
        judge = train_judge(streams, reference=real, num_epochs=options.judge_epochs)
        verdicts = judge_all(judge, options, sampled, real=real, known=known)
    losses = read_losses(out / "sft")
    plugin = pipeline.roles[0].plugin
    return DemoResult(
        verdicts=verdicts,
        real=clip_sets.in_order_of(real, asked, _GRID),
        sampled=clip_sets.first(sampled[options.sampling_steps[0]], _GRID),
        losses=losses,
        seconds=phase.seconds,
        facts={
            "parameters": plugin.num_parameters(),
            "training_steps": len(losses),
            "training_clips": options.num_train,
            "guidance_scale": options.guidance_scale,
            "diffusers_relative_error": error,
        },
    )


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


def train(options: DemoOptions) -> None:
    """``megagen train`` in a process of its own, as a user would start it.

    Raises:
        MegagenError: it failed; its own error is on stderr.
    """
    out = options.out
    shutil.rmtree(out / "sft", ignore_errors=True)
    command = [sys.executable, "-W", "ignore", "-m", "megagen", "train"]
    command += ["--config", str(options.config), "--nproc", str(options.num_ranks)]
    command += ["--training.data.data_path", str(out / "data")]
    command += ["--training.checkpoint.output_dir", str(out / "sft"), *options.overrides]
    threads = max(1, len(os.sched_getaffinity(0)) // options.num_ranks)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    code = subprocess.run(command, env=environment, check=False).returncode
    if code:
        raise MegagenError(
            f"megagen train ended with exit code {code}; its error stands above.",
            where=str(options.config),
        )


def export(out: Path) -> tuple[VideoPipeline, float]:
    """Load the run's averaged weights, write ``out/teacher`` and compare with diffusers' class.

    Returns:
        A pipeline over the weights, and the relative L2 error between the two forward passes.
    """
    from megagen.checkpoint.diffusers import save_weights
    from megagen.parallel.dims import ParallelDims
    from megagen.parallel.launch import init_distributed
    from megagen.sampling.source import SPEC, build_pipeline, from_run, write_spec

    init_distributed()
    source = from_run(out / "sft")
    pipeline = build_pipeline(source, ParallelDims())
    role = pipeline.roles[0]
    (out / "teacher" / SPEC).unlink(missing_ok=True)  # an earlier run's; the rest is replaced whole
    save_weights(role.plugin, role.chunks, role.mesh, out / "teacher")
    spec = source.spec.model_copy(
        update={"fps": digits.VIDEO_FPS, "flow_shift": role.plugin.flow_shift}
    )
    write_spec(out / "teacher", spec)
    return pipeline, diffusers_error(pipeline, out / "teacher")


def diffusers_error(pipeline: VideoPipeline, directory: Path) -> float:
    """Relative L2 error of our forward pass against diffusers' own class on the same directory."""
    from diffusers import WanTransformer3DModel

    from megagen.models.base import Request

    role = pipeline.roles[0]
    shape = pipeline.codec.latent_shape(digits.NUM_FRAMES, digits.FRAME_SIZE, digits.FRAME_SIZE)
    noise_BCTHW = Streams(0).normal("parity", 0, range(4), shape)
    timestep_B = torch.tensor([1.0, 250.0, 700.0, 1000.0])
    text_BLD, _ = pipeline.text_encoder.encode([digits.caption(d, d % 4) for d in range(4)])
    ours = role.predict([Request(noise_BCTHW, timestep_B, {"text_embeds_BLD": text_BLD})])[0]
    model = WanTransformer3DModel.from_pretrained(directory)
    with torch.no_grad():
        theirs = model(noise_BCTHW, timestep_B, text_BLD, return_dict=False)[0]
    return float((ours - theirs).norm() / theirs.norm())


def judge_all(
    judge: Judge, options: DemoOptions, sampled: dict[int, Clips], *, real: Clips, known: Clips
) -> dict[str, Verdict]:
    """The rows of the table, the main one first."""
    rows = {f"sampled, {steps} steps": judge.judge(clips) for steps, clips in sampled.items()}
    return {
        **rows,
        "real, training": judge.judge(known),
        "real, held out": judge.judge(real),
    }


def read_losses(run: Path) -> list[float]:
    """``loss/total`` of each step in a run's ``metrics.jsonl``."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss/total"] for line in lines]
