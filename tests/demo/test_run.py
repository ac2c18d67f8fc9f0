"""A miniature of the main job end to end: every phase, every file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from megagen.data.video import read_video
from megagen.demo import choose
from megagen.demo import clips as clip_sets
from megagen.demo.rows import STUDENT_STEPS
from megagen.demo.run import export_teacher
from megagen.parallel.dims import ParallelDims
from megagen.parallel.launch import run_ranks
from megagen.sampling import source
from megagen.sampling.pipeline import SamplingOptions

ROOT = Path(__file__).parents[2]
STEPS = 6
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``megagen demo`` with few clips and a tiny network."""
    folder = tmp_path_factory.mktemp("demo")
    tree = yaml.safe_load((ROOT / "configs/demo/pretrain.yaml").read_text())
    tree["models"]["student"]["architecture"] |= {"num_layers": 2, "ffn_dim": 96}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-W", "ignore", "-m", "megagen", "demo"]
    command += ["--config", str(folder / "tiny.yaml"), "--out", str(folder), "--nproc", "1"]
    command += ["--num-train", "100", "--num-held-out", "100", "--num-samples", "20"]
    command += ["--num-paths", "20", "--kd-steps", "4", "--dmd2-steps", "8"]
    command += ["--judge-epochs", "2", "--training.loop.max_train_steps", str(STEPS)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env={**os.environ, "COLUMNS": "160"}
    )
    assert done.returncode == 0, done.stderr
    assert "digit accuracy" in done.stdout
    return folder


def test_every_file_is_there_and_whole(job: Path) -> None:
    figures = json.loads((job / "metrics.json").read_text())
    for name in ("digit_accuracy", "direction_accuracy", "frechet", "diversity"):
        assert figures[name] == figures["rows"]["student, 4 steps"][name]
    assert figures["training_steps"] == {"kd": 4, "dmd2": 8} and figures["num_clips"] == 20
    for name in ("student, 2 steps", "teacher, 48 steps", "teacher, 4 steps", "teacher, 2 steps"):
        assert figures["rows"][name]["num_clips"] == 20
        assert figures["milliseconds_per_clip"][name] > 0
    assert figures["against_teacher"]["teacher, 48 steps"]["frechet"] == 1.0
    for name in ("student, 4 steps, known captions", "teacher, 48 steps, known captions"):
        assert figures["rows"][name]["num_clips"] == 20
    points = [(p["run"], p["step"]) for p in figures["progress"]]
    assert points == [("kd", 4), *(("dmd2", step) for step in (2, 4, 6, 8))]
    last = figures["progress"][-1]
    assert last["4"]["frechet"] == pytest.approx(figures["frechet"], rel=1e-3)
    assert figures["diffusers_relative_error"] < 1e-5
    assert figures["rows"]["real, training"]["direction_accuracy"] == 1.0
    page = (job / "report.html").read_text()
    assert page.count("data:image/gif") == 6 and "<polyline" in page
    assert len(list((job / "samples").glob("*.mp4"))) == 20
    assert read_video(next((job / "samples").glob("*.mp4")))[0].shape[0] == 8
    losses = [json.loads(x)["loss/total"] for x in (job / "sft/metrics.jsonl").open()]
    assert len(losses) == STEPS and losses[-1] < losses[0]


def test_the_dataset_holds_the_clips_that_were_written(job: Path) -> None:
    from megagen.core.streams import Streams
    from megagen.demo import digits

    written = digits.make_clips("held_out", 100, Streams(0))
    found = clip_sets.from_dataset(job / "held_out")
    assert sorted(found.captions) == sorted(written.captions)
    # the same clips in another order: each has a near twin (H.264 and the resize lose a little)
    distance = torch.cdist(found.frames_NTHW.flatten(1), written.frames_NTHW.flatten(1))
    same = torch.tensor([[a == b for b in written.captions] for a in found.captions])
    nearest = distance.masked_fill(~same, float("inf")).min(1).values
    assert (nearest.square() / found.frames_NTHW[0].numel()).sqrt().max() < 0.05


def test_the_exported_directory_samples_like_the_run_under_tensor_parallelism(job: Path) -> None:
    by_directory = run_ranks(1, sampled, str(job / "teacher"), None, ParallelDims())[0]
    by_run = run_ranks(2, sampled, None, job / "sft", ParallelDims(tp_size=2))[0]
    assert (by_directory.int() - by_run.int()).abs().max() <= 1


def test_the_exported_student_says_how_it_is_sampled(job: Path) -> None:
    spec = source.read_spec(job / "student")
    assert spec is not None
    assert (spec.t_list, spec.sampler) == (list(STUDENT_STEPS[4]), "sde")
    assert spec.guidance_scale == 1.0
    kd = source.read_spec(job / "kd_student")
    assert kd is not None and kd.sampler == "euler"


def test_lists_of_timesteps_are_compared_on_the_training_alone(job: Path) -> None:
    lists = ((1000.0, 500.0), (1000.0, 750.0, 300.0), (1000.0, 250.0))
    few = {"num_samples": 20, "judge_epochs": 1}
    found = choose.compare(job / "student", job / "data", lists, num_processes=2, **few)
    assert [len(steps) for steps in found] == [3, 2, 2] and set(found) == set(lists)
    pair = [found[steps].frechet for steps in found if len(steps) == 2]
    assert pair == sorted(pair)
    chosen = choose.best(found)
    assert set(chosen) == {2, 3} and all(steps[-1] == 0 for steps in chosen.values())
    one = choose.compare(job / "student", job / "data", lists, num_processes=1, **few)
    assert one[lists[0]].frechet == pytest.approx(found[lists[0]].frechet, rel=1e-3)


def test_a_second_export_replaces_the_first(job: Path) -> None:
    before = (job / "teacher" / source.SPEC).read_text()
    run_ranks(1, export_teacher, job)
    assert (job / "teacher" / source.SPEC).read_text() == before


def sampled(model: str | None, run: Path | None, dims: ParallelDims) -> torch.Tensor:
    found = source.from_run(run) if run else source.from_directory(str(model))
    spec = found.spec
    options = SamplingOptions(
        num_frames=spec.num_frames or 0,
        height=spec.height or 0,
        width=spec.width or 0,
        num_steps=3,
        guidance_scale=2.0,
    )
    videos = source.build_pipeline(found, dims).generate(["a six moving up"], options)
    return next(iter(dict(videos).values()), torch.empty(0))
