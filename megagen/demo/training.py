"""The demo's runs: ``megagen train`` in processes of its own, as a user would start it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from megagen.core.errors import MegagenError


def train(config: Path, run: Path, num_ranks: int, keys: Mapping[str, object]) -> None:
    """A run from its first step.

    Args:
        config: YAML file.
        run: its output folder; what is there is removed.
        num_ranks: of data parallelism.
        keys: dotted overrides of the config.

    Raises:
        MegagenError: it failed; its own error is on stderr.
    """
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, "-W", "ignore", "-m", "megagen", "train"]
    command += ["--config", str(config), "--nproc", str(num_ranks)]
    command += ["--training.checkpoint.output_dir", str(run)]
    for name, value in keys.items():
        command += [f"--{name}", str(value)]
    threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    code = subprocess.run(command, env=environment, check=False).returncode
    if code:
        raise MegagenError(
            f"megagen train ended with exit code {code}; its error stands above.",
            where=str(config),
        )


def read_losses(run: Path, name: str = "loss/total") -> list[float]:
    """A loss of each step that has it, from a run's ``metrics.jsonl``."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def checkpoints(run: Path) -> list[int]:
    """Steps of a run's checkpoints, in order."""
    from megagen.checkpoint import commit

    return sorted(step for step, _ in commit.steps(run / "checkpoints"))
