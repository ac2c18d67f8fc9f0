"""Fake scores: copied, or built without memory, sharded and filled; on diffusers' Wan."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from modelopt.torch.fastgen import create_fake_score as peer_create
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from megagen.fastgen.factory import (
    create_fake_score,
    create_fake_score_meta,
    load_fake_score_weights,
)
from megagen.parallel.launch import run_ranks
from tests import seeds


def wan(seed: int) -> WanTransformer3DModel:
    """A tiny one whose tables of rotations no checkpoint has; 3 out channels: uneven shards."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=3,
        out_channels=3,
        text_dim=8,
        freq_dim=8,
        ffn_dim=18,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return model.requires_grad_(False).eval()


def run(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return model(
        hidden_states=torch.randn(1, 3, 2, 4, 6, generator=generator, dtype=dtype),
        timestep=torch.tensor([400]),
        encoder_hidden_states=torch.randn(1, 5, 8, generator=generator, dtype=dtype),
        return_dict=False,
    )[0]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict((*model.named_parameters(), *model.named_buffers()))


def expect_copy(fake_score: nn.Module, teacher: nn.Module) -> None:
    """Same names, values and dtypes; trains, shares no memory, and the teacher does not train."""
    ours, theirs = tensors(fake_score), tensors(teacher)
    assert ours.keys() == theirs.keys() and fake_score.training
    for name, want in theirs.items():
        got = ours[name].full_tensor() if isinstance(ours[name], DTensor) else ours[name]
        want = want.full_tensor() if isinstance(want, DTensor) else want
        assert got.dtype == want.dtype and torch.equal(got, want), name
    for name, parameter in fake_score.named_parameters():
        assert parameter.requires_grad and not theirs[name].requires_grad
        assert not parameter.is_meta and parameter.is_leaf
    assert not teacher.training


@pytest.fixture
def teacher() -> WanTransformer3DModel:
    return wan(seeds.fresh())


def test_a_copy_as_the_peer_makes_it(teacher: WanTransformer3DModel) -> None:
    ours, peer = create_fake_score(teacher), peer_create(teacher)
    expect_copy(ours, teacher)
    expect_copy(peer, teacher)
    assert type(ours) is type(peer)
    same = create_fake_score(teacher, deep_copy=False)
    assert same is teacher and teacher.training
    assert all(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("make", [create_fake_score, peer_create])
def test_fsdp1_is_refused_as_by_the_peer(make: Any) -> None:
    wrapped = nn.Sequential(nn.Linear(2, 2))
    wrapped[0]._fsdp_wrapped_module = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="FSDP"):
        make(wrapped)
    assert make(wrapped, deep_copy=False) is wrapped


def test_any_sharded_parameter_is_noticed() -> None:
    class Sharded(nn.Parameter):
        def full_tensor(self) -> Tensor:
            return self.data

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].bias = Sharded(torch.zeros(2))
    peer_create(copy.deepcopy(model[0]))
    with pytest.raises(RuntimeError, match="FSDP"):
        create_fake_score(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_built_from_the_teachers_config(teacher: WanTransformer3DModel, dtype: torch.dtype) -> None:
    for parameter in teacher.parameters():  # not the rotations
        parameter.data = parameter.data.to(dtype)
    state = torch.get_rng_state()
    fake_score = create_fake_score_meta(teacher)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.is_meta and p.dtype == dtype for p in fake_score.parameters())
    assert not any(b.is_meta for b in fake_score.buffers())
    assert load_fake_score_weights(fake_score, teacher) is fake_score
    expect_copy(fake_score, teacher)
    if dtype == torch.float32:
        assert torch.equal(run(fake_score), run(teacher))
    run(fake_score, dtype).sum().backward()
    master = create_fake_score_meta(teacher, teacher_state=teacher, dtype=torch.float32)
    assert {p.dtype for p in master.parameters()} == {torch.float32}
    assert torch.equal(master.proj_out.weight, teacher.proj_out.weight.float())


class OnDisk(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.file: Any = safe_open(path, "pt")

    def __getitem__(self, name: str) -> Tensor:
        return self.file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.file.keys())

    def __len__(self) -> int:
        return len(self.file.keys())


def test_from_a_state_dict_on_disk(teacher: WanTransformer3DModel, tmp_path: Path) -> None:
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    stored = OnDisk(tmp_path / "teacher.safetensors")
    assert not any(name.startswith("rope") for name in stored)
    fake_score = create_fake_score_meta(
        lambda: WanTransformer3DModel.from_config(teacher.config), teacher_state=stored
    )
    expect_copy(fake_score, teacher)
    assert torch.equal(run(fake_score), run(teacher))


class Tied(nn.Module):
    """A parameter under two names, one that its constructor fills, tensors of three kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        shared = nn.Parameter(torch.arange(3.0).sin())
        self.left, self.right = shared, shared
        self.register_buffer("table", torch.arange(6.0), persistent=False)
        self.register_buffer("steps", torch.tensor(3))
        self.plain = torch.arange(4) * 1j


def test_shared_parameters_stay_shared_and_plain_tensors_real() -> None:
    teacher = Tied().requires_grad_(False).eval()
    fake_score = create_fake_score_meta(Tied)
    assert {p.device.type for p in fake_score.parameters()} == {"meta"}
    load_fake_score_weights(fake_score, teacher)
    expect_copy(fake_score, teacher)
    assert fake_score.head.weight is fake_score.embed.weight
    assert fake_score.left is fake_score.right
    assert torch.equal(fake_score.plain, teacher.plain)
    # safetensors keep a shared tensor once
    state = {name: x for name, x in teacher.state_dict().items() if name != "embed.weight"}
    expect_copy(create_fake_score_meta(Tied, teacher_state=state), teacher)


def test_misfits_are_refused_and_nothing_is_loaded() -> None:
    teacher = Tied()
    state = teacher.state_dict()
    lacking = {name: x for name, x in state.items() if name not in ("left", "right")}
    fake_score = create_fake_score_meta(Tied)
    with pytest.raises(RuntimeError, match=r"missing \['left'\], unexpected \['odd'\]"):
        load_fake_score_weights(fake_score, lacking | {"odd": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"missing \['left'\]"):
        load_fake_score_weights(fake_score, lacking, strict=False)
    assert all(p.is_meta for p in fake_score.parameters())
    load_fake_score_weights(fake_score, state | {"odd": torch.zeros(1)}, strict=False)
    with pytest.raises(RuntimeError, match="steps"):
        load_fake_score_weights(fake_score, {k: v for k, v in state.items() if k != "steps"})
    with pytest.raises(RuntimeError, match=r"left: cannot copy shape \(1,\) into \(3,\)"):
        load_fake_score_weights(fake_score, state | {"left": torch.zeros(1)})
    with torch.device("meta"):
        nowhere = Tied()
    with pytest.raises(RuntimeError, match="table"):
        load_fake_score_weights(nowhere, state)
    load_fake_score_weights(nowhere, teacher)
    assert torch.equal(nowhere.table, teacher.table)
    with pytest.raises(TypeError, match="no config"):
        create_fake_score_meta(teacher)


def shard(model: nn.Module, mesh: Any = None) -> None:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def under_fsdp2(seed: int, folder: Path) -> None:
    whole = wan(seed)
    sharded = wan(seed)
    shard(sharded)
    expected = run(whole)
    for make in (create_fake_score, peer_create):
        with pytest.raises(RuntimeError, match="FSDP"):
            make(sharded)
    run(sharded)  # leaves the root's parameters gathered

    fake_score = create_fake_score_meta(sharded, shard=shard)
    assert type(fake_score).__mro__[2] is WanTransformer3DModel
    assert all(p.is_meta and isinstance(p, DTensor) for p in fake_score.parameters())
    with CommDebugMode() as comms:
        load_fake_score_weights(fake_score, sharded)
    assert comms.get_total_counts() == 0  # shard to shard
    expect_copy(fake_score, sharded)
    expect_copy(fake_score, whole)
    run(fake_score).square().mean().backward()
    assert torch.equal(run(fake_score), expected)

    state = whole.state_dict() if dist.get_rank() == 0 else {}
    save_file(whole.state_dict(), folder / f"{dist.get_rank()}.safetensors")
    other_mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    elsewhere = wan(seed)
    shard(elsewhere, other_mesh)
    for source, options in [
        (whole, {}),
        (whole.state_dict(), {}),
        (sharded.state_dict(), {}),  # DTensors
        (elsewhere, {}),
        (OnDisk(folder / f"{dist.get_rank()}.safetensors"), {}),
        (state, {"from_rank0": True}),
        (whole if dist.get_rank() == 0 else {}, {"from_rank0": True}),
    ]:
        fake_score = create_fake_score_meta(whole, teacher_state=source, shard=shard, **options)
        expect_copy(fake_score, whole)
        assert torch.equal(run(fake_score), expected)
    for source, options in [(sharded, {}), (state, {"from_rank0": True})]:
        fake_score = create_fake_score_meta(whole, teacher_state=source, **options)
        expect_copy(fake_score, whole)

    with pytest.raises(ValueError, match="whole tensors"):
        create_fake_score_meta(whole, teacher_state=sharded, shard=shard, from_rank0=True)
    odd = {**whole.state_dict(), "odd": torch.zeros(1)} if dist.get_rank() == 0 else {}
    with pytest.raises(RuntimeError, match="odd"):
        create_fake_score_meta(whole, teacher_state=odd, shard=shard, from_rank0=True)


def test_under_fsdp2(tmp_path: Path) -> None:
    run_ranks(2, under_fsdp2, seeds.fresh(), tmp_path)
