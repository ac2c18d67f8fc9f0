"""DMD2 with a discriminator on a CUDA device, against the same run on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.synthetic import write_config, write_dataset
from tests.trainer.test_dmd2_runs import curve, tree_of
from tests.trainer.test_runs import read_metrics

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


def train(folder: Path, *, cpu: bool, text_only: bool, **method: Any) -> list[dict[str, float]]:
    """Train in a process of its own."""
    data = folder.parent / "data"
    if not data.exists():
        write_dataset(data)
    tree = tree_of(data, folder / "run", {}, text_only=text_only)
    tree["method"] |= {"cfg_uncond": {"text": "zero"}, **method}
    file = write_config(folder / "run.yaml", tree)
    environment = dict(os.environ, NVIDIA_TF32_OVERRIDE="0")
    if cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "megagen", "train", "--config", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return read_metrics(folder / "run")


@pytest.mark.parametrize("text_only", [True, False])
def test_fp32_on_one_gpu_is_the_cpu_run(text_only: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {}
    if not text_only:
        options = {"gan_loss_weight_gen": 0.5, "gan_r1_reg_weight": 1.0}
        options["discriminator"] = {"width": 8}
    gpu = train(tmp_path / "gpu", cpu=False, text_only=text_only, **options)
    cpu = train(tmp_path / "cpu", cpu=True, text_only=text_only, **options)
    assert curve(gpu) == pytest.approx(curve(cpu), rel=1e-4)
