"""The report is self-contained and says what was measured."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from megagen.core.streams import Streams
from megagen.demo import digits, report
from megagen.demo.charts import loss_svg
from megagen.demo.judge import Verdict
from megagen.demo.rows import Point


@pytest.fixture
def result() -> report.DemoResult:
    clips = digits.make_clips("held_out", 20, Streams(0))
    row = Verdict(0.971, 0.93, 0.985, 31.4, 0.87, 640)
    return report.DemoResult(
        verdicts={
            "student": row,
            "teacher": Verdict(0.95, 0.94, 1.0, 30.0, 0.9, 640),
            "real <train>": Verdict(0.99, 0.98, 1.0, 2.0, 1.0, 640),
        },
        milliseconds={"student": 4.0, "teacher": 100.0},
        shown={"real, held out": clips, "student, 4 steps": clips},
        progress=[Point("kd", 9, {4: row}), Point("dmd2", 20, {4: row})],
        losses={"dmd2": [1.0 / (1 + i) + 0.05 for i in range(1500)]},
        seconds={"train": 401.2},
        facts={"parameters": 1040000, "diffusers_relative_error": 1.2e-7},
    )


def test_report_and_metrics_hold_the_figures(result: report.DemoResult, tmp_path: Path) -> None:
    report.write_report(result, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "0.971" in page and "31.4" in page and "1,040,000" in page
    assert "real &lt;train&gt;" in page
    assert not re.search(r'(src|href)="(?!data:)', page), "the page must not load anything"
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert figures["digit_accuracy"] == 0.971
    assert figures["rows"]["real <train>"]["frechet"] == 2.0
    assert figures["against_teacher"]["student"]["speed"] == 25.0
    assert figures["against_teacher"]["student"]["frechet"] == pytest.approx(31.4 / 30)
    assert [p["step"] for p in figures["progress"]] == [9, 20]
    assert page.count("<svg") == 5  # four figures over the checkpoints, one loss
    assert figures["seconds"] == {"train": 401.2}


def test_the_gif_shows_each_frame_of_each_clip(result: report.DemoResult) -> None:
    uri = report.gif_uri(result.shown["real, held out"].frames_NTHW)
    gif = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert gif.n_frames == digits.NUM_FRAMES
    sheet = report.grid(result.shown["real, held out"].frames_NTHW)
    for t in range(gif.n_frames):
        gif.seek(t)
        shown = torch.frombuffer(bytearray(gif.convert("L").tobytes()), dtype=torch.uint8)
        assert torch.equal(shown.view(gif.height, gif.width), sheet[t])


def test_the_curve_survives_odd_losses() -> None:
    assert "polyline" in loss_svg([1.0, math.nan, 0.5, 0.0])
    assert "polyline" not in loss_svg([1.0])
    assert "polyline" in loss_svg([0.3, 0.3])
