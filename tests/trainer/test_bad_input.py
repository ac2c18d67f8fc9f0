"""Bad input: one paragraph on stderr, exit code 2, no traceback, before any step, nothing lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megagen.cli.main import main
from tests.data.builders import write_clips
from tests.trainer.synthetic import config_tree, write_config, write_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


def refused(capfd: pytest.CaptureFixture[str], *words: object) -> str:
    """Run the command line; the one paragraph that it says."""
    with pytest.raises(SystemExit) as stop:
        main([str(w) for w in words])
    said = capfd.readouterr().err
    assert stop.value.code == 2
    assert "Traceback" not in said
    paragraphs = [line for line in said.splitlines() if line.startswith("megagen: error: ")]
    assert len(paragraphs) == 1, said
    return paragraphs[0]


def accepted(*words: object) -> None:
    """Run the command line; it must end well."""
    with pytest.raises(SystemExit) as stop:
        main([str(w) for w in words])
    assert not stop.value.code


def config_file(tmp_path: Path, data: Path, **changes: Any) -> Path:
    tree = config_tree(data, tmp_path / "run")
    for path, value in changes.items():
        node = tree
        *parents, leaf = path.split("__")
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = value
    return write_config(tmp_path / "run.yaml", tree)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--training.distributed.tp_sise", "2"], ["tp_sise", "'tp_size'"]),
        (["--method.weighting_shceme", "mode"], ["weighting_shceme", "'weighting_scheme'"]),
        (["--models.student.architecture.num_layer", "2"], ["num_layer", "'num_layers'"]),
        (["--callbacks.emma.decay", "0.9"], ["emma", "'ema'"]),
        (["--models.student._target_", "wam"], ["wam", "'wan'"]),
        (["--nproc", "2", "--training.distributed.cp_size", "3"], ["cp_size 3", "2 ranks"]),
        (["--nproc", "3", "--training.distributed.tp_size", "3"], ["4", "tp_size"]),
        (["--nproc", "4", "--training.distributed.tp_size", "2", "--training.distributed.cp_size",
          "2", "--models.student.architecture.num_attention_heads", "2"], ["heads"]),
        (["--nproc", "2", "--training.data.global_batch_size", "6"], ["global_batch_size", "4"]),
        (["--training.distributed.pp_size", "5", "--nproc", "5"], ["layers", "pp_size"]),
        (["--training.data.data_path", "/no/such"], ["/no/such"]),
        (["--training.loop.gradient_accumulation_steps", "3"], ["gradient_accumulation_steps"]),
        (["training.seed", "1"], ["training.seed"]),
    ],
)  # fmt: skip
def test_wrong_configs(
    words: list[str], expected: list[str], data: Path, tmp_path: Path, capfd
) -> None:
    said = refused(capfd, "train", "--config", config_file(tmp_path, data), *words)
    assert all(part in said for part in expected), said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_dry_run_needs_no_data_and_prints_the_plan(tmp_path: Path, capsys) -> None:
    file = config_file(tmp_path, tmp_path / "nowhere")
    accepted(
        *("train", "--config", str(file), "--dry-run", "--world-size", "1024"),
        *("--training.distributed.tp_size", "4", "--training.data.global_batch_size", "512"),
    )
    said = capsys.readouterr().out
    assert "1024: dp 256, tp 4" in said and "M parameters" in said
    assert not (tmp_path / "run").exists()


def corrupt_parquet(data: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    file = copy / "data.parquet"
    file.write_bytes(file.read_bytes()[:-200])
    return copy


def test_a_truncated_parquet_file(data: Path, tmp_path: Path, capfd) -> None:
    copy = corrupt_parquet(data, tmp_path)
    said = refused(capfd, "train", "--config", config_file(tmp_path, copy))
    assert "data.parquet" in said


def weights(tmp_path: Path, data: Path) -> Path:
    """A diffusers directory of the config's network, made by a run of one step and an export."""
    file = config_file(tmp_path / "w", data)
    accepted("train", "--config", file, "--nproc", 2, "--training.loop.max_train_steps", 1)
    target = tmp_path / "weights"
    accepted("convert", "to-diffusers", "--checkpoint", tmp_path / "w/run", "--output", target)
    return target


def test_weights_with_a_missing_or_misshaped_tensor(data: Path, tmp_path: Path, capfd) -> None:
    target = weights(tmp_path, data)
    file = target / "diffusion_pytorch_model.safetensors"
    whole = load_file(file)
    name = "blocks.1.attn2.to_k.weight"
    config = config_file(tmp_path, data, models__student__init_from=str(target))
    tree = json.loads(json.dumps(config_tree(data, tmp_path / "run")))
    del tree["models"]["student"]["architecture"]
    tree["models"]["student"]["init_from"] = str(target)
    write_config(config, tree)
    for nproc in (1, 2):
        save_file({n: t for n, t in whole.items() if n != name}, file)
        said = refused(capfd, "train", "--config", config, "--nproc", nproc)
        assert name in said and "missing" in said
        save_file(whole | {name: torch.zeros(3, 3)}, file)
        said = refused(capfd, "train", "--config", config, "--nproc", nproc)
        assert name in said and "[3, 3]" in said
        file.write_bytes(file.read_bytes()[:1000])
        said = refused(capfd, "train", "--config", config, "--nproc", nproc)
        assert file.name in said
    (target / "config.json").unlink()
    assert "config.json" in refused(capfd, "train", "--config", config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_resuming_with_another_width_or_seed_is_refused(data: Path, tmp_path: Path, capfd) -> None:
    file = config_file(tmp_path, data)
    accepted("train", "--config", file, "--nproc", 2, "--training.loop.max_train_steps", 1)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    for words, expected in (
        (["--models.student.architecture.ffn_dim", "96"], "96"),
        (["--training.seed", "4"], "seed 3"),
        (
            ["--training.distributed.use_distributed_optimizer", "false"],
            "use_distributed_optimizer",
        ),
    ):
        said = refused(capfd, "train", "--config", file, "--nproc", 2, *words)
        assert expected in said
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == lines


@pytest.fixture(scope="module")
def wan_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny VAE of diffusers' own class, whose frame counts are 4n + 1."""
    from diffusers import AutoencoderKLWan

    folder = tmp_path_factory.mktemp("vae")
    vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    vae.save_pretrained(folder / "vae")
    return folder


def preprocess(folder: Path, output: Path, *words: object) -> tuple[object, ...]:
    return (
        *("preprocess", "--input-dir", folder, "--output-dir", output),
        *("--text-encoder", "hashed", *words),
    )


def test_a_frame_count_that_is_not_4n_plus_1(wan_vae: Path, tmp_path: Path, capfd) -> None:
    clips = write_clips(tmp_path / "clips", 3, torch.Generator().manual_seed(0))
    codec = ("--codec", "wan_vae", "--codec.path", wan_vae, "--buckets", "8x24x32")
    said = refused(capfd, *preprocess(clips, tmp_path / "out", *codec))
    assert "8" in said and "5" in said and "9" in said  # found, and the nearest legal ones
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_a_folder_of_truncated_videos(tmp_path: Path, capfd) -> None:
    clips = write_clips(tmp_path / "clips", 3, torch.Generator().manual_seed(0))
    for file in clips.glob("*.mp4"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    size = ("--codec", "space_to_depth", "--codec.patch", 4, "--buckets", "8x24x32")
    said = refused(capfd, *preprocess(clips, tmp_path / "out", *size))
    assert "clip" in said or "quarantine" in said
    quarantine = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert len(quarantine) == 3 and all("mp4" in line for line in quarantine)


def test_sample_from_what_is_no_model(tmp_path: Path, capfd) -> None:
    (tmp_path / "empty").mkdir()
    prompt = ("--prompt", "a three moving left", "--out", tmp_path / "out")
    assert "config.json" in refused(capfd, "sample", "--model", tmp_path / "empty", *prompt)
    assert "run.yaml" in refused(capfd, "sample", "--run", tmp_path / "empty", *prompt)
    assert "--model" in refused(capfd, "sample", *prompt)
