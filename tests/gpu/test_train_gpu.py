"""Whole runs on CUDA devices by torchrun: one against the CPU, and layouts over several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.synthetic import config_tree, write_config, write_dataset
from tests.trainer.test_runs import LAYOUTS, curve, read_metrics

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


def train(
    folder: Path, ranks: int, distributed: dict[str, Any], *words: str, cpu: bool = False
) -> list[dict[str, float]]:
    """Train in processes of their own; a parent that has touched CUDA must not fork."""
    data = folder.parent / "data"
    if not data.exists():
        write_dataset(data)
    output = folder / "run"
    file = write_config(folder / "run.yaml", config_tree(data, output, distributed=distributed))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, "-m", "megagen", "train", "--config", str(file), *words]
    environment = dict(os.environ, NVIDIA_TF32_OVERRIDE="0")
    if cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return read_metrics(output)


def test_fp32_on_one_gpu_is_the_cpu_run(tmp_path: Path) -> None:
    gpu = train(tmp_path / "gpu", 1, {})
    cpu = train(tmp_path / "cpu", 1, {}, cpu=True)
    assert curve(gpu) == pytest.approx(curve(cpu), rel=1e-4)


def test_bf16_trains_close_to_fp32(tmp_path: Path) -> None:
    bf16 = train(tmp_path / "bf16", 1, {}, "--training.precision", "bf16")
    fp32 = train(tmp_path / "fp32", 1, {})
    assert curve(bf16) == pytest.approx(curve(fp32), rel=0.03)


def test_resume_on_a_gpu_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", 1, {})
    train(tmp_path / "halves", 1, {}, "--training.loop.max_train_steps", "2")
    assert curve(train(tmp_path / "halves", 1, {})) == pytest.approx(curve(whole), rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_over_nccl(layout: str, tmp_path: Path) -> None:
    ranks, distributed = LAYOUTS[layout]
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs, {torch.cuda.device_count()} here")
    one = train(tmp_path / "one", 1, {})
    assert curve(train(tmp_path / layout, ranks, distributed)) == pytest.approx(
        curve(one), rel=1e-4
    )
