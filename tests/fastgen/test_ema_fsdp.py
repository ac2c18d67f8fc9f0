"""The moving average of a module that FSDP2 shards over two ranks, against the unsharded one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from megagen.fastgen.config import EMAConfig
from megagen.fastgen.ema import ExponentialMovingAverage
from megagen.parallel.launch import run_ranks
from tests import seeds


class Net(nn.Module):
    """Rows that divide among two ranks, that do not, and fewer than ranks; a parameter of its own
    for the root, which FSDP2 leaves gathered after a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 1)])
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        for layer in self.layers:
            x = layer(x)
        return x


def pair(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Net, Net, torch.Generator]:
    """The same network plain and sharded, and a generator that is the same on both ranks."""
    generator = torch.Generator().manual_seed(seed)
    plain = Net().to(dtype)
    walk(plain, None, generator)
    return plain, shard(copy.deepcopy(plain)), generator


def shard(net: Net) -> Net:
    for layer in net.layers:
        fully_shard(layer)
    return fully_shard(net)


@torch.no_grad()
def walk(plain: Net, sharded: Net | None, generator: torch.Generator) -> None:
    """New weights, the same for both."""
    for tensor in (*plain.parameters(), *plain.buffers()):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    if sharded is not None:
        for tensor, whole in zip(tensors(sharded), tensors(plain), strict=True):
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).copy_(
                part(tensor, whole)
            )


def tensors(net: nn.Module) -> Iterator[Tensor]:
    yield from net.parameters()
    yield from net.buffers()


def part(like: Tensor, whole: Tensor) -> Tensor:
    """This rank's rows, cut without DTensor."""
    if not isinstance(like, DTensor):
        return whole
    rows = -(-whole.shape[0] // dist.get_world_size())
    return whole[dist.get_rank() * rows : (dist.get_rank() + 1) * rows]


def expect(found: dict[str, Tensor], reference: dict[str, Tensor], net: Net | None) -> None:
    """``found`` holds the reference, or with a net this rank's parts of it."""
    likes = {} if net is None else dict(net.named_parameters())
    assert found.keys() == reference.keys()
    for name, whole in reference.items():
        want = part(likes[name], whole) if name in likes else whole
        assert type(found[name]) is Tensor and found[name].dtype == want.dtype, name
        assert torch.equal(found[name], want), name


@contextmanager
def silent() -> Iterator[None]:
    """Nothing inside communicates."""
    with CommDebugMode() as comms:
        yield
    assert comms.get_total_counts() == 0


def modes(dtype: str | None = "float32", **options: Any) -> dict[str, EMAConfig]:
    return {
        mode: EMAConfig(mode=mode, dtype=dtype, **options)
        for mode in ("full_tensor", "local_shard")
    }


def trajectories(seed: int) -> None:
    for live, dtype in [
        (torch.float32, "float32"),
        (torch.bfloat16, "float32"),
        (torch.bfloat16, None),
        (torch.float32, "bfloat16"),
    ]:
        for schedule in ({"decay": 0.7}, {"type": "power", "gamma": 3.0, "start_iter": 3}):
            plain, sharded, generator = pair(seed, live)
            configs = modes(dtype, **schedule)
            reference = ExponentialMovingAverage(plain, configs["full_tensor"])
            full = ExponentialMovingAverage(sharded, configs["full_tensor"])
            with silent():
                parts = ExponentialMovingAverage(sharded, configs["local_shard"])
            for iteration in range(1, 9):
                walk(plain, sharded, generator)
                reference.update(plain, iteration=iteration)
                full.update(sharded, iteration=iteration)
                with silent():
                    parts.update(sharded, iteration=iteration)
                    own = parts.state_dict()
                expect(full.state_dict(), reference.state_dict(), None)
                expect(own, reference.state_dict(), sharded)


def averages(seed: int) -> tuple[Net, Net, ExponentialMovingAverage, dict[str, Any]]:
    """A net plain and sharded, the plain one's average, and the sharded one's in both modes."""
    plain, sharded, generator = pair(seed, torch.bfloat16)
    reference = ExponentialMovingAverage(plain, EMAConfig(decay=0.5))
    both = {
        mode: ExponentialMovingAverage(sharded, config) for mode, config in modes(decay=0.5).items()
    }
    for iteration in (1, 2):
        walk(plain, sharded, generator)
        reference.update(plain, iteration=iteration)
        for average in both.values():
            average.update(sharded, iteration=iteration)
    return plain, sharded, reference, both


def copies(seed: int) -> None:
    plain, sharded, reference, both = averages(seed)
    wanted = copy.deepcopy(plain)
    reference.copy_to(wanted)
    for average in both.values():
        target = shard(Net().bfloat16())
        # leaves the root's own parameter gathered: what is written there would be lost
        with torch.no_grad():
            target(torch.ones(2, 3).bfloat16())
        with silent():
            average.copy_to(target)
        for got, want in zip(tensors(target), tensors(wanted), strict=True):
            own = got.to_local() if isinstance(got, DTensor) else got
            assert torch.equal(own, part(got, want))
        x = torch.ones(2, 3).bfloat16()
        assert torch.equal(target(x), wanted(x))
        export = Net().double()
        average.copy_to(export)
        for got, want in zip(export.parameters(), reference.state_dict().values(), strict=False):
            assert torch.equal(got, want.double())

        live = plain(x)
        with average.swapped(sharded), torch.no_grad():
            assert torch.equal(sharded(x), wanted(x))
        assert torch.equal(sharded(x), live) and not torch.equal(live, wanted(x))


def gathered_root(seed: int) -> None:
    """An average made and updated while the root's parameters lie gathered."""
    plain, sharded, _ = pair(seed)
    reference = ExponentialMovingAverage(plain, EMAConfig(decay=0.5))
    x = torch.ones(2, 3)
    for mode, config in modes(decay=0.5).items():
        with torch.no_grad():
            sharded(x)
        average = ExponentialMovingAverage(sharded, config)
        for iteration in (1, 2):
            if mode == "full_tensor":
                reference.update(plain, iteration=iteration)
            with torch.no_grad():
                sharded(x)
            average.update(sharded, iteration=iteration)
        sharded.reshard()
        own = sharded if mode == "local_shard" else None
        expect(average.state_dict(), reference.state_dict(), own)


def saved(seed: int, folder: Path) -> None:
    _, sharded, reference, both = averages(seed)
    parts, full = both["local_shard"], both["full_tensor"]
    whole = reference.state_dict()
    file = folder / f"{dist.get_rank()}.pt"
    torch.save(parts.state_dict(), file)
    assert all(
        value.untyped_storage().nbytes() == value.nbytes for value in parts.state_dict().values()
    )

    def fresh(mode: str = "local_shard") -> ExponentialMovingAverage:
        return ExponentialMovingAverage(shard(Net().bfloat16()), modes()[mode])

    for state in (
        torch.load(file, weights_only=True),
        whole,
        full.state_dict(),
        parts.state_dict(as_dtensor=True),
    ):
        again = fresh()
        with silent():
            assert again.load_state_dict(state, strict=True) == ([], [])
        expect(again.state_dict(), whole, sharded)
    again = fresh("full_tensor")
    again.load_state_dict(parts.state_dict(as_dtensor=True), strict=True)
    expect(again.state_dict(), whole, None)

    for name, value in parts.state_dict(as_dtensor=True).items():
        found = value.full_tensor() if isinstance(value, DTensor) else value
        assert torch.equal(found, whole[name])
    dcp.save(parts.state_dict(as_dtensor=True, clone=False), checkpoint_id=folder / "dcp")
    again = fresh()
    state = again.state_dict(as_dtensor=True, clone=False)
    dcp.load(state, checkpoint_id=folder / "dcp")
    again.load_state_dict(state, strict=True)
    expect(again.state_dict(), whole, sharded)

    before = again.state_dict()
    wrong = dict(whole) | {"layers.0.bias": torch.zeros(4)}
    with pytest.raises(RuntimeError, match=r"layers\.0\.bias"):
        again.load_state_dict(wrong)
    assert all(torch.equal(before[name], value) for name, value in again.state_dict().items())


def not_gathered(seed: int) -> None:
    """``fsdp2=False``: the shadow of a DTensor is a DTensor, as the peer has it."""
    plain, sharded, generator = pair(seed)
    config = EMAConfig(decay=0.6, fsdp2=False)
    reference = ExponentialMovingAverage(plain, config)
    with silent():
        average = ExponentialMovingAverage(sharded, config)
        for iteration in range(4):
            walk(plain, sharded, generator)
            reference.update(plain, iteration=iteration)
            average.update(sharded, iteration=iteration)
    for name, value in average.state_dict().items():
        found = value.full_tensor() if isinstance(value, DTensor) else value
        assert torch.equal(found, reference.state_dict()[name])


@pytest.mark.parametrize("check", [trajectories, copies, gathered_root, not_gathered])
def test_under_fsdp2(check: Any) -> None:
    run_ranks(2, check, seeds.fresh())


def test_saved_and_loaded_in_every_form(tmp_path: Path) -> None:
    run_ranks(2, saved, seeds.fresh(), tmp_path)
