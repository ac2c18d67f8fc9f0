"""The example runs as its first lines say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from diffusers import WanTransformer3DModel
from PIL import Image

ROOT = Path(__file__).parents[2]


def test_the_custom_loop(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "examples/fastgen_custom_loop.py", "--steps", "4", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^(?:teacher|student), \d+ steps +blur [\d.]+", done.stdout, re.M)) == 3
    assert Image.open(tmp_path / "clips.png").size == (10 * 16 * 3, 3 * 16 * 3)
    WanTransformer3DModel.from_pretrained(tmp_path / "student")
