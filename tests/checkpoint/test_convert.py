"""diffusers -> checkpoint -> diffusers, bitwise, with diffusers' own class at both ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from typer.testing import CliRunner

from megagen.cli.convert import convert
from megagen.core.errors import CheckpointError


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipe")
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=40,
        num_layers=2,
    )
    model.save_pretrained(folder / "transformer")
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text("{}")
    (folder / "model_index.json").write_text("{}")
    return folder


def call(*words: object) -> str:
    result = CliRunner().invoke(convert, [str(w) for w in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output.strip()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize(
    ("nproc", "layout"), [(1, ()), (2, ("--tp-size", 2)), (2, ("--pp-size", 2))]
)
def test_round_trip_is_bitwise(nproc: int, layout: tuple, original: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    call("from-diffusers", "--model", original, "--output", run, "--nproc", nproc, *layout)
    back = tmp_path / "back"
    call(
        *("to-diffusers", "--checkpoint", run, "--output", back),
        *("--base", original, "--max-shard-gb", 0.001),
    )
    before, after = tensors(original / "transformer"), tensors(back / "transformer")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    config = (original / "transformer" / "config.json").read_text()
    assert (back / "transformer" / "config.json").read_text() == config
    assert (back / "vae" / "config.json").is_file() and (back / "model_index.json").is_file()
    loaded = WanTransformer3DModel.from_pretrained(back / "transformer")
    assert torch.equal(loaded.state_dict()["proj_out.weight"], before["proj_out.weight"])


def test_bf16_stays_bf16_and_other_types_can_be_asked_for(original: Path, tmp_path: Path) -> None:
    model = WanTransformer3DModel.from_pretrained(original / "transformer").bfloat16()
    model.save_pretrained(tmp_path / "bf16")
    stored = tensors(tmp_path / "bf16")
    call("from-diffusers", "--model", tmp_path / "bf16", "--output", tmp_path / "run")
    call("to-diffusers", "--checkpoint", tmp_path / "run", "--output", tmp_path / "back")
    call(
        *("to-diffusers", "--checkpoint", tmp_path / "run"),
        *("--output", tmp_path / "fp32", "--dtype", "fp32"),
    )
    back, fp32 = tensors(tmp_path / "back"), tensors(tmp_path / "fp32")
    assert all(fp32[n].dtype == torch.float32 for n in fp32)
    assert all(torch.equal(fp32[n], stored[n].float()) for n in fp32)
    assert all(torch.equal(back[n].float(), stored[n].float()) for n in back)


def test_what_is_not_there_or_in_the_way(original: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
        call("to-diffusers", "--checkpoint", tmp_path / "no", "--output", tmp_path / "x")
    run = tmp_path / "run"
    call("from-diffusers", "--model", original, "--output", run)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(CheckpointError, match="is there already"):
        call("to-diffusers", "--checkpoint", run, "--output", tmp_path / "used")
    with pytest.raises(CheckpointError, match="no ema"):
        call(
            *("to-diffusers", "--checkpoint", run, "--output", tmp_path / "x"),
            *("--weights", "ema"),
        )
    with pytest.raises(CheckpointError, match="no role 'teacher'"):
        call(
            *("to-diffusers", "--checkpoint", run, "--output", tmp_path / "x"),
            *("--role", "teacher"),
        )


def test_a_causal_network_stays_causal(original: Path, tmp_path: Path) -> None:
    causal = {"num_frames_per_block": 2, "local_attn_size": 5, "sink_size": 1}
    before = tmp_path / "before"
    shutil.copytree(original / "transformer", before)
    config = json.loads((before / "config.json").read_text())
    (before / "config.json").write_text(json.dumps({**config, "_causal": causal}))
    call("from-diffusers", "--model", before, "--output", tmp_path / "run")
    for name, base in (("alone", ()), ("base", ("--base", original))):
        back = tmp_path / name
        call("to-diffusers", "--checkpoint", tmp_path / "run", "--output", back, *base)
        back = back / "transformer" if base else back
        assert causal.items() <= json.loads((back / "config.json").read_text())["_causal"].items()
        assert all(torch.equal(tensors(before)[n], t) for n, t in tensors(back).items())
        WanTransformer3DModel.from_pretrained(back)
