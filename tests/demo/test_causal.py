"""A miniature of the causal job end to end: three trainings, streamed clips, every file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megagen.data.video import read_video
from megagen.demo.causal import CAUSAL_STEPS, RUNS, _medians

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(300)


def run(*arguments: str) -> str:
    """``megagen`` from the repository's root; what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "megagen", *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "160"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``megagen demo-causal`` with few clips and steps."""
    folder = tmp_path_factory.mktemp("causal")
    command = ["demo-causal", "--out", str(folder), "--nproc", "1", "--num-samples", "20"]
    command += ["--num-train", "100", "--num-held-out", "100", "--num-paths", "20"]
    command += ["--forcing-steps", "3", "--kd-steps", "3", "--self-forcing-steps", "4"]
    printed = run(*command, "--judge-epochs", "2")
    assert "digit accuracy" in printed and "frames a second" in printed
    return folder


def test_every_file_is_there_and_whole(job: Path) -> None:
    figures = json.loads((job / "metrics.json").read_text())
    assert figures["training_steps"] == dict(zip(RUNS, (3, 3, 4), strict=True))
    for count in CAUSAL_STEPS:
        row = figures["rows"][f"causal student, {count} steps"]
        assert row["num_clips"] == 20 and row["frechet"] > 0
    assert figures["frechet"] == figures["rows"]["causal student, 4 steps"]["frechet"]
    assert figures["against_teacher"]["teacher, 48 steps"]["frechet"] == 1.0
    points = [(p["run"], p["step"]) for p in figures["progress"]]
    assert points == [("causal_kd", 3), *(("self_forcing", step) for step in (1, 2, 3, 4))]
    assert figures["progress"][-1]["4"]["frechet"] == pytest.approx(figures["frechet"], rel=1e-3)
    assert figures["frames_a_block"] == 2
    page = (job / "report.html").read_text()
    assert page.count("data:image/gif") == 6 and "seconds to the first frame" in page
    assert len(list((job / "samples").glob("*.mp4"))) == 20


def test_the_first_frame_comes_long_before_the_last(job: Path) -> None:
    figures = json.loads((job / "metrics.json").read_text())["streaming"]
    student, teacher = figures["causal student, 4 steps"], figures["teacher, 48 steps"]
    assert student["seconds to the first frame"] < 0.6 * student["seconds a clip"]
    assert teacher["seconds to the first frame"] == teacher["seconds a clip"]
    assert student["frames a second"] == pytest.approx(8 / student["seconds a clip"])
    assert _medians([(9, 9), (1, 4), (2, 2)])["seconds a clip"] == 3  # the first does not count


def test_validation_streams_and_so_does_the_exported_student(job: Path, tmp_path: Path) -> None:
    assert len(list((job / "self_forcing/validation").rglob("*.mp4"))) == 4
    given = ("--model", str(job / "student"), "--out", str(tmp_path))
    printed = run("sample", *given, "--stream", "--prompt", "a six moving up")
    assert "8 frames" in printed and "first after" in printed
    (file,) = tmp_path.glob("*.mp4")
    assert read_video(file)[0].shape[0] == 8
