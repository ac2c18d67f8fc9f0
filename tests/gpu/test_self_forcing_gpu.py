"""Self-forcing and diffusion forcing on a CUDA device, against the same run on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.synthetic import config_tree, write_config, write_dataset
from tests.trainer.test_dmd2_runs import curve
from tests.trainer.test_runs import read_metrics
from tests.trainer.test_self_forcing_runs import rollout_tree

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


def train(tree: dict[str, Any], folder: Path, *, cpu: bool) -> list[dict[str, float]]:
    """Train in a process of its own."""
    file = write_config(folder / "run.yaml", tree)
    environment = dict(os.environ, NVIDIA_TF32_OVERRIDE="0")
    if cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "megagen", "train", "--config", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return read_metrics(folder / "run")


def tree_of(method: str, data: Path, output: Path) -> dict[str, Any]:
    if method == "self_forcing":
        tree = rollout_tree(data, output, {})
        tree["method"]["cfg_uncond"] = {"text": "zero"}
        tree["training"]["loop"]["max_train_steps"] = 4
        return tree
    tree = config_tree(data, output)
    tree["models"]["student"] |= {"_target_": "wan_causal", "num_frames_per_block": 1}
    tree["method"] = {"_target_": method}
    return tree


@pytest.mark.parametrize("method", ["self_forcing", "diffusion_forcing", "teacher_forcing"])
def test_fp32_on_one_gpu_is_the_cpu_run(method: str, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    found = {}
    for name in ("gpu", "cpu"):
        tree = tree_of(method, data, tmp_path / name / "run")
        found[name] = curve(train(tree, tmp_path / name, cpu=name == "cpu"))
    assert found["gpu"] == pytest.approx(found["cpu"], rel=1e-4)
