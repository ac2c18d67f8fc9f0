"""``torchrun -m megagen train`` joins the ranks that torchrun started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.synthetic import config_tree, write_config, write_dataset
from tests.trainer.test_runs import curve, read_metrics, run


def test_torchrun_gives_the_same_run(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    expected = run(data, tmp_path / "forked" / "run", training__loop__max_train_steps=2)
    output = tmp_path / "torchrun" / "run"
    tree = config_tree(data, output, distributed={"tp_size": 2})
    file = write_config(tmp_path / "torchrun.yaml", tree)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--standalone", "-m", "megagen", "train", "--config", str(file)),
        *("--training.loop.max_train_steps", "2"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert curve(read_metrics(output)) == pytest.approx(curve(expected), rel=1e-5)
