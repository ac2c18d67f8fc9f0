"""Weights to and from the diffusers layout, and through distributed checkpoints, under layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file
from torch import Tensor

from megagen.checkpoint.diffusers import (
    DiffusersStore,
    InitialStore,
    check_weights,
    load_weights,
    save_weights,
)
from megagen.core.errors import CheckpointError
from megagen.core.streams import Streams
from megagen.models.wan import WanModel
from megagen.parallel.dims import ParallelDims
from megagen.parallel.launch import run_ranks
from tests.models.wan_cases import CASES, build, reference_model

STEM = "diffusion_pytorch_model"
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"tp_size": 2},
    {"pp_size": 2},
    {"tp_size": 2, "pp_size": 2, "pipeline_layers": (2, 1)},
    {"cp_size": 2, "pp_size": 2, "pipeline_layers": (1, 2)},
]


def _tensors(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def _same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def _copy(source: Path, target: Path, dims: ParallelDims, options: dict[str, Any]) -> None:
    precision = options.pop("precision", "fp32")
    plugin, chunks, mesh = build(source, dims, precision=precision)
    save_weights(plugin, chunks, mesh, target, base_dir=source, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_is_bitwise(
    tmp_path: Path, generator: torch.Generator, layout: dict[str, Any]
) -> None:
    source, target = tmp_path / "source", tmp_path / "made" / "target"
    reference_model(CASES["i2v"], generator).save_pretrained(source, max_shard_size="60KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    dims = ParallelDims(**layout)
    run_ranks(dims.model_parallel_size, _copy, source, target, dims, {"max_shard_bytes": 100_000})
    _same(_tensors(target), _tensors(source))
    assert (target / "config.json").read_bytes() == (source / "config.json").read_bytes()
    files = sorted(file.name for file in target.glob("*.safetensors"))
    assert files[0] == f"{STEM}-00001-of-{len(files):05d}.safetensors" and len(files) > 1
    index = json.loads((target / f"{STEM}.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in _tensors(source).values())
    assert sorted(p.name for p in target.parent.iterdir()) == ["target"]  # nothing staged is left
    loaded = WanTransformer3DModel.from_pretrained(target)
    _same(dict(loaded.state_dict()), _tensors(source))


def test_bf16_files_come_back_bitwise(tmp_path: Path, generator: torch.Generator) -> None:
    model = reference_model(CASES["flf2v"], generator).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    options = {"precision": "bf16", "dtype": torch.bfloat16}
    run_ranks(1, _copy, tmp_path / "source", tmp_path / "target", ParallelDims(), options)
    assert (tmp_path / "target" / f"{STEM}.safetensors").is_file()  # one file: the plain name
    _same(_tensors(tmp_path / "target"), _tensors(tmp_path / "source"))


def _initialise(target: Path, dims: ParallelDims) -> None:
    plugin, chunks, mesh = build(target / "source", dims)
    load_weights(plugin, chunks, mesh, InitialStore(plugin, Streams(7), "student"))
    save_weights(plugin, chunks, mesh, target / f"{dims.tp_size}{dims.pp_size}")


def test_fresh_weights_do_not_depend_on_the_layout(
    tmp_path: Path, generator: torch.Generator
) -> None:
    reference = reference_model(CASES["flf2v"], generator)
    reference.save_pretrained(tmp_path / "source")
    run_ranks(1, _initialise, tmp_path, ParallelDims())
    run_ranks(4, _initialise, tmp_path, ParallelDims(tp_size=2, pp_size=2))
    expected = _tensors(tmp_path / "11")
    _same(_tensors(tmp_path / "22"), expected)
    fresh = WanTransformer3DModel(**CASES["flf2v"]).state_dict()  # diffusers' own start
    for name, value in fresh.items():
        assert expected[name].shape == value.shape
        if value.numel() > 500:
            assert abs(expected[name].std() - value.std()) < 0.2 * value.std() + 1e-6, name
    assert expected["blocks.0.attn1.norm_q.weight"].eq(1).all()
    assert expected["blocks.0.norm2.bias"].eq(0).all()
    config = json.loads((tmp_path / "11" / "config.json").read_text())
    assert WanTransformer3DModel.from_config(config).config.ffn_dim == 72


def _save_distributed(source: Path, target: Path, dims: ParallelDims) -> None:
    _, chunks, mesh = build(source, dims)
    dist_checkpointing.save(_sharded(chunks, mesh), target)


def _load_distributed(source: Path, target: Path, dims: ParallelDims) -> dict[str, Tensor]:
    _, chunks, mesh = build(source, dims)
    expected = [
        {k: v.clone() for k, v in chunk.state_dict().items() if v is not None} for chunk in chunks
    ]
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.zero_()
    loaded = dist_checkpointing.load(_sharded(chunks, mesh), target)
    for chunk, values in zip(chunks, expected, strict=True):
        chunk.load_state_dict(
            {k.split("/")[1]: v for k, v in loaded.items() if k.split("/")[1] in values}
        )
        _same({k: v for k, v in chunk.state_dict().items() if v is not None}, values)
    return {}


def _sharded(chunks: Any, mesh: Any) -> dict[str, Any]:
    """Keys by chunk, so that two chunks of a rank may hold copies of the embedders."""
    metadata = {"dp_cp_group": mesh.pg.dp_cp}
    return {
        f"{number}/{name}": tensor
        for number, chunk in enumerate(chunks)
        for name, tensor in chunk.sharded_state_dict(metadata=metadata).items()
    }


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ({"tp_size": 2, "pp_size": 2}, {}),
        ({"pp_size": 2, "virtual_pp_size": 2}, {"tp_size": 2}),
        ({"cp_size": 2}, {"pp_size": 2, "virtual_pp_size": 2}),
    ],
)
def test_distributed_checkpoint_changes_layout(
    tmp_path: Path, generator: torch.Generator, written: dict[str, Any], read: dict[str, Any]
) -> None:
    source, target = tmp_path / "source", tmp_path / "checkpoint"
    reference_model({**CASES["i2v"], "num_layers": 4}, generator).save_pretrained(source)
    target.mkdir()
    for function, layout in ((_save_distributed, written), (_load_distributed, read)):
        dims = ParallelDims(**layout)
        run_ranks(dims.model_parallel_size, function, source, target, dims)


@pytest.fixture
def saved(tmp_path: Path, generator: torch.Generator) -> Path:
    reference_model(CASES["t2v"], generator).save_pretrained(tmp_path / "weights")
    return tmp_path / "weights"


def _changed(directory: Path, name: str, value: Tensor | None) -> None:
    file = directory / f"{STEM}.safetensors"
    tensors = {**load_file(file), name: value}
    save_file({k: v.clone() for k, v in tensors.items() if v is not None}, file)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (
            "blocks.1.attn1.to_q.weight",
            None,
            ["'blocks.1.attn1.to_q.weight'", "missing", "[56, 56]"],
        ),
        ("blocks.1.norm2.bias", torch.zeros(55), ["[55]", "[56]", "'blocks.1.norm2.bias'", STEM]),
        ("blocks.9.norm2.bias", torch.zeros(56), ["'blocks.9.norm2.bias'", "not expected", STEM]),
    ],
)
def test_wrong_tensors_are_named(
    saved: Path, name: str, value: Tensor | None, words: list[str]
) -> None:
    plugin = WanModel(WanModel.Options(init_from=str(saved)))
    _changed(saved, name, value)
    with pytest.raises(CheckpointError) as caught:
        check_weights(plugin, DiffusersStore(saved))
    for word in words:
        assert word in str(caught.value)


def test_published_extra_norm_is_ignored(saved: Path) -> None:
    _changed(saved, "blocks.0.attn2.norm_added_q.weight", torch.ones(56))
    check_weights(WanModel(WanModel.Options(init_from=str(saved))), DiffusersStore(saved))


def test_broken_directories(saved: Path, tmp_path: Path, generator: torch.Generator) -> None:
    file = saved / f"{STEM}.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="safetensors"):
        DiffusersStore(saved)
    file.unlink()
    with pytest.raises(CheckpointError, match="holds neither"):
        DiffusersStore(saved)
    with pytest.raises(CheckpointError, match="no directory"):
        DiffusersStore(tmp_path / "nowhere")
    sharded = tmp_path / "sharded"
    reference_model(CASES["t2v"], generator).save_pretrained(sharded, max_shard_size="60KB")
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=lost.name):
        DiffusersStore(sharded)


def _refused(saved: Path, target: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        _copy(saved, target, ParallelDims(pp_size=2), {})
    return str(caught.value)


def test_saving_replaces_weights_and_nothing_else(saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / f"{STEM}-00001-of-00002.safetensors").write_text("old")
    run_ranks(1, _copy, saved, target, ParallelDims(), {})
    assert sorted(p.name for p in target.iterdir()) == ["config.json", f"{STEM}.safetensors"]
    (target / "notes.txt").write_text("mine")
    for message in run_ranks(2, _refused, saved, target):
        assert "notes.txt" in message
    assert (target / "notes.txt").read_text() == "mine"
    _same(_tensors(target), _tensors(saved))
