"""Validation videos of a run, and starting another run from its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from megagen.builder import build_plugins
from megagen.checks import check
from megagen.cli.convert import convert
from megagen.cli.train import run_training
from megagen.config.load import load_run_config
from megagen.core.errors import ConfigError
from megagen.data.preprocess import preprocess, preprocess_options
from megagen.data.video import read_video
from megagen.sampling.source import read_spec
from tests.data.builders import options, write_clips
from tests.trainer.synthetic import config_tree, write_config
from tests.trainer.test_runs import curve, read_metrics

PROMPTS = ["clip number 1 moving left", "clip number 2 moving left", "moving"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    clips = write_clips(root / "clips", 9, torch.Generator().manual_seed(1))
    preprocess(preprocess_options(options(clips, root / "set", buckets=["8x24x32"])))
    return root / "set"


def train(
    data: Path, folder: Path, ranks: int, init_from: Path | None = None, **given: Any
) -> Path:
    output = folder / "run"
    tree = config_tree(data, output, distributed=given.get("distributed", {}))
    tree["training"]["data"] |= {"global_batch_size": 4, "text_len": None}
    tree["training"]["loop"]["max_train_steps"] = 2
    architecture = tree["models"]["student"]["architecture"]
    architecture |= {"in_channels": 48, "out_channels": 48, "text_dim": 8}
    if init_from is not None:
        tree["models"]["student"] = {"_target_": "wan", "init_from": str(init_from)}
    tree["callbacks"]["validation"] = {
        "prompts": PROMPTS,
        "every_steps": 1,
        "run_at_start": True,
        "sampling_steps": [2, 3],
        "guidance_scale": 1.5,
        "batch_size": 2,
        **given.get("validation", {}),
    }
    config = load_run_config(write_config(folder / "run.yaml", tree))
    run_training(config, ranks=ranks, fork=True)
    return output


def grids(output: Path) -> dict[str, torch.Tensor]:
    """Every frame of every video, without loss (mp4 would blow up a level's difference)."""
    files = sorted((output / "validation").rglob("*_grid.png"))
    return {str(f.relative_to(output)): pixels(f) for f in files}


def pixels(file: Path) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(file)).astype(np.int16))


@pytest.mark.parametrize("distributed", [{"cp_size": 2}, {"pp_size": 2}, {}])
def test_the_same_videos_under_every_layout(
    data: Path, tmp_path: Path, distributed: dict[str, int]
) -> None:
    one = train(data, tmp_path / "one", 1)
    two = train(data, tmp_path / "two", 2, distributed=distributed)
    expected, found = grids(one), grids(two)
    # start, step 1, step 2, each with two solver lengths
    assert expected.keys() == found.keys() and len(found) == 6
    for name, grid in expected.items():
        assert (grid - found[name]).abs().max() <= 1, name
        assert grid.float().std() > 20  # there is something to see
    files = sorted((two / "validation").rglob("*.mp4"))
    assert len(files) == 6 * len(PROMPTS)
    assert read_video(files[0])[0].shape == (8, 24, 32, 3)
    # sampling in between changes nothing of the training
    assert curve(read_metrics(two)) == pytest.approx(curve(read_metrics(one)), rel=1e-5)


def test_a_run_starts_from_another_runs_weights(data: Path, tmp_path: Path) -> None:
    first = train(data, tmp_path / "first", 2, distributed={"tp_size": 2})
    second = train(data, tmp_path / "second", 1, init_from=first)
    # the second begins with the first's weights (not its average): compare with use_ema off
    plain = train(data, tmp_path / "plain", 1, validation={"use_ema": False})
    last = grids(plain)["validation/step_00000002/steps_3_grid.png"]
    start = grids(second)["validation/step_00000000/steps_3_grid.png"]
    assert (last - start).abs().max() <= 1


def test_an_exported_run_says_how_to_sample_it(data: Path, tmp_path: Path) -> None:
    output = train(data, tmp_path / "run", 1)
    target = tmp_path / "exported"
    words = ["to-diffusers", "--checkpoint", str(output), "--output", str(target)]
    assert CliRunner().invoke(convert, words, catch_exceptions=False).exit_code == 0
    spec = read_spec(target)
    assert spec is not None and (spec.num_frames, spec.height, spec.width) == (8, 24, 32)
    assert spec.codec["name"] == "space_to_depth" and spec.text_encoder["name"] == "hashed"


def test_validation_needs_a_prompt(data: Path, tmp_path: Path) -> None:
    tree = config_tree(data, tmp_path / "run")
    tree["callbacks"]["validation"] = {"prompts": []}
    config = load_run_config(write_config(tmp_path / "run.yaml", tree))
    with pytest.raises(ConfigError, match="names no prompt"):
        check(config, build_plugins(config), 1)
