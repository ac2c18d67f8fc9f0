"""Killed, stopped and diverging runs."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from megagen.cli.train import run_training
from megagen.config.load import load_run_config
from tests.trainer.synthetic import config_tree, write_config, write_dataset
from tests.trainer.test_runs import LAYOUTS, curve, read_metrics, run

STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


def start(data: Path, output: Path, layout: str) -> multiprocessing.process.BaseProcess:
    """A run that saves every step, in a process of its own."""
    ranks, distributed = LAYOUTS.get(layout, (1, {}))
    tree = config_tree(data, output, distributed=distributed)
    tree["training"]["loop"]["max_train_steps"] = STEPS
    tree["training"]["checkpoint"] |= {
        "training_state_checkpointing_steps": 1,
        "checkpoints_total_limit": 2,
    }
    config = load_run_config(write_config(output.parent / "run.yaml", tree))

    def body() -> None:
        try:
            run_training(config, ranks=ranks, fork=True)
        except SystemExit as stop:
            os._exit(int(stop.code or 0))
        finally:
            sys.stderr.flush()
        os._exit(0)

    child = multiprocessing.get_context("fork").Process(target=body)
    child.start()
    return child


def lines(output: Path) -> int:
    file = output / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def wait_for(condition, child: multiprocessing.process.BaseProcess) -> None:
    while child.is_alive() and not condition():
        time.sleep(0.005)


@pytest.mark.parametrize("layout", ["one", "tp2"])
def test_killed_again_and_again_ends_bitwise_the_same(
    layout: str, data: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole" / "run"
    ranks, distributed = LAYOUTS.get(layout, (1, {}))
    expected = run(data, whole, ranks, distributed, training__loop__max_train_steps=STEPS)
    output = tmp_path / "killed" / "run"
    moments = random.Random(7)
    for kill_at in (1, 3, 5):
        child = start(data, output, layout)
        wait_for(lambda at=kill_at: lines(output) >= at, child)
        time.sleep(moments.uniform(0, 0.3))
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)  # its ranks die with it
        child.join()
    child = start(data, output, layout)
    child.join()
    assert child.exitcode == 0
    assert curve(read_metrics(output)) == curve(expected)
    assert [m["step"] for m in read_metrics(output)] == list(range(1, STEPS + 1))


def test_sigterm_saves_marks_and_resumes(data: Path, tmp_path: Path) -> None:
    expected = run(data, tmp_path / "whole" / "run", training__loop__max_train_steps=STEPS)
    output = tmp_path / "stopped" / "run"
    child = start(data, output, "one")
    wait_for(lambda: lines(output) >= 2, child)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGTERM)
    child.join()
    assert child.exitcode == 0
    stopped = json.loads((output / "STOPPED.json").read_text())
    assert stopped["reason"] == "signal" and 2 <= stopped["step"] < STEPS
    child = start(data, output, "one")
    child.join()
    assert child.exitcode == 0 and not (output / "STOPPED.json").exists()
    assert curve(read_metrics(output)) == curve(expected)


def test_the_newest_checkpoint_corrupt_the_one_before_is_taken(data: Path, tmp_path: Path) -> None:
    expected = run(data, tmp_path / "whole" / "run", training__loop__max_train_steps=STEPS)
    output = tmp_path / "corrupt" / "run"
    child = start(data, output, "one")
    child.join()
    newest = output / "checkpoints" / f"step_{STEPS:08d}"
    shard = max((newest / "state").iterdir(), key=lambda p: p.stat().st_size)
    payload = bytearray(shard.read_bytes())
    payload[len(payload) // 2] ^= 1
    shard.write_bytes(bytes(payload))
    child = start(data, output, "one")
    child.join()
    assert child.exitcode == 0
    assert curve(read_metrics(output)) == curve(expected)
