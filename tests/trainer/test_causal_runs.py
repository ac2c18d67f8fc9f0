"""A causal network in a run: trained, validated as a stream, exported, streamed from, built on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from megagen.builder import build_plugins
from megagen.cli.convert import convert
from megagen.cli.main import main
from megagen.cli.train import run_training
from megagen.config.load import load_run_config
from megagen.data.preprocess import preprocess, preprocess_options
from megagen.data.video import read_video
from megagen.models.wan_causal import WanCausalModel
from tests.data.builders import options, write_clips
from tests.trainer.synthetic import config_tree, write_config
from tests.trainer.test_runs import read_metrics

CAUSAL = {"num_frames_per_block": 2, "local_attn_size": 5, "sink_size": 1}
STREAM = {"t_list": [1000, 500, 0], "sample_type": "ode"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps under PP2, two videos streamed at the end."""
    root = tmp_path_factory.mktemp("causal")
    clips = write_clips(root / "clips", 6, torch.Generator().manual_seed(1))
    preprocess(preprocess_options(options(clips, root / "set", buckets=["8x24x32"])))
    run_training(config(root, "wan_causal", CAUSAL), ranks=2, fork=True)
    return root / "run"


def config(root: Path, target: str, model: dict[str, Any]) -> Any:
    tree = config_tree(root / "set", root / "run", distributed={"pp_size": 2})
    tree["training"]["data"] |= {"global_batch_size": 4, "text_len": None}
    tree["training"]["loop"]["max_train_steps"] = 2
    student = tree["models"]["student"]
    student["architecture"] |= {"in_channels": 48, "out_channels": 48, "text_dim": 8}
    tree["models"]["student"] = {**student, "_target_": target, **model}
    if "init_from" in model:
        del tree["models"]["student"]["architecture"]
    tree["callbacks"]["validation"] = {
        "prompts": ["one", "two"],
        "every_steps": 0,
        "guidance_scale": 1.0,
        "stream": STREAM,
    }
    return load_run_config(write_config(root / f"{target}.yaml", tree))


def test_a_run_streams_its_validation_and_its_samples(run: Path, tmp_path: Path) -> None:
    assert len(read_metrics(run)) == 2
    videos = sorted((run / "validation").rglob("*.mp4"))
    assert videos and all(len(read_video(video)[0]) == 8 for video in videos)
    words = ["sample", "--run", str(run), "--prompt", "one", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--stream", "--t-list", "1000,500", "--nproc", "2", "--pp-size", "2"])
    assert not stopped.value.code
    (file,) = tmp_path.glob("*.mp4")
    assert len(read_video(file)[0]) == 8


def test_a_run_exports_and_others_begin_with_it(run: Path, tmp_path: Path) -> None:
    words = ["to-diffusers", "--checkpoint", str(run), "--output", str(tmp_path / "out")]
    assert CliRunner().invoke(convert, words, catch_exceptions=False).exit_code == 0
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert CAUSAL.items() <= found["_causal"].items()
    for source in (run, tmp_path / "out"):
        init = {"init_from": str(source)}
        same = build_plugins(config(run.parent, "wan_causal", init))["student"]
        assert isinstance(same, WanCausalModel)
        assert CAUSAL.items() <= same.causal.model_dump().items()
        plain = build_plugins(config(run.parent, "wan", init))["student"]
        assert not plain.is_causal and plain.num_layers == same.num_layers
