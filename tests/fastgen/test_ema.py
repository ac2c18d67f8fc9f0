"""The moving average against nvidia-modelopt's, on the same walk of weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from modelopt.torch.fastgen import EMAConfig as PeerConfig
from modelopt.torch.fastgen import ExponentialMovingAverage as PeerEMA
from torch import Tensor, nn

from megagen.fastgen.config import EMAConfig
from megagen.fastgen.ema import ExponentialMovingAverage

SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"decay": 0.9},
    "halflife": {"type": "halflife", "halflife_kimg": 0.05, "batch_size": 3, "rampup_ratio": 0.3},
    "halflife_flat": {"type": "halflife", "halflife_kimg": 0.02, "rampup_ratio": None},
    "halflife_zero": {"type": "halflife", "halflife_kimg": 0.0},
    "power": {"type": "power", "gamma": 3.7},
}


class Net(nn.Module):
    """Odd sizes, a parameter that is not contiguous, one without axes, buffers of three kinds."""

    def __init__(
        self, generator: torch.Generator, dtype: torch.dtype = torch.float32, size: int = 77
    ) -> None:
        super().__init__()
        self.first = nn.Linear(7, 5)
        self.large = nn.Parameter(torch.zeros(size))
        self.transposed = nn.Parameter(torch.zeros(6, 4).t())
        self.scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("table", torch.zeros(4, dtype=torch.float64), persistent=False)
        self.to(dtype)
        self.walk(generator)

    def walk(self, generator: torch.Generator) -> None:
        """New weights and buffers, some way from the last."""
        with torch.no_grad():
            for tensor in (*self.parameters(), *self.buffers()):
                step = torch.randn(tensor.shape, generator=generator)
                tensor.add_((5 if tensor.dtype == torch.int64 else 0.1) * step.to(tensor.dtype))


def equal(ours: dict[str, Tensor], peer: dict[str, Tensor]) -> None:
    assert ours.keys() == peer.keys()
    for name, value in peer.items():
        assert ours[name].dtype == value.dtype, name
        assert ours[name].shape == value.shape, name
        assert torch.equal(ours[name], value), name


def both(net: nn.Module, **options: Any) -> tuple[ExponentialMovingAverage, PeerEMA]:
    ours = ExponentialMovingAverage(net, EMAConfig(**options))
    return ours, PeerEMA(net, PeerConfig(**options))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("live", "dtype"),
    [
        (torch.float32, "float32"),
        (torch.bfloat16, "float32"),
        (torch.float64, "float32"),
        (torch.bfloat16, None),
        (torch.float64, None),
        (torch.float32, "bfloat16"),
        (torch.float32, "float16"),
    ],
    ids=str,
)
def test_fifty_updates_are_the_peers(
    seeded: torch.Generator, schedule: str, live: torch.dtype, dtype: str | None
) -> None:
    net = Net(seeded, live)
    ours, peer = both(net, dtype=dtype, **SCHEDULES[schedule])
    equal(ours.state_dict(), peer.state_dict())
    for iteration in range(1, 51):
        net.walk(seeded)
        ours.update(net, iteration=iteration)
        peer.update(net, iteration=iteration)
        if iteration % 10 in (1, 2):
            equal(ours.state_dict(), peer.state_dict())
    equal(ours.state_dict(), peer.state_dict())


@pytest.mark.parametrize("live", [torch.bfloat16, torch.float32], ids=str)
def test_pieces_of_a_large_parameter_are_the_peers(
    seeded: torch.Generator, live: torch.dtype
) -> None:
    net = Net(seeded, live, size=2**19 + 77)
    ours, peer = both(net, decay=0.3)
    for iteration in range(3):
        net.walk(seeded)
        ours.update(net, iteration=iteration)
        peer.update(net, iteration=iteration)
    equal(ours.state_dict(), peer.state_dict())


@pytest.mark.parametrize("start_iter", [0, 1, 7])
@pytest.mark.parametrize(
    "iterations", [range(12), range(1, 13), [7, 7, 8, 8, 3, 7, 9], [0, 0, 1, 1, 1], [20, 5, 21]]
)
def test_where_averaging_starts(
    seeded: torch.Generator, start_iter: int, iterations: list[int]
) -> None:
    net = Net(seeded)
    ours, peer = both(net, decay=0.75, start_iter=start_iter)
    for iteration in iterations:
        net.walk(seeded)
        ours.update(net, iteration=iteration)
        peer.update(net, iteration=iteration)
        equal(ours.state_dict(), peer.state_dict())
        assert ours.iteration == iteration


def test_the_formula_in_float64(seeded: torch.Generator) -> None:
    net = nn.Linear(3, 2)
    average = ExponentialMovingAverage(net, EMAConfig(type="power", gamma=2.0))
    expected = torch.empty(0)
    for i in range(1, 30):
        with torch.no_grad():
            net.weight.normal_(generator=seeded)
        average.update(net, iteration=i)
        beta = (1 - 1 / i) ** 3
        live = net.weight.detach().double()
        expected = live if i == 1 else beta * expected + (1 - beta) * live
    torch.testing.assert_close(average.state_dict()["weight"].double(), expected)


class Wrapped(nn.Module):
    """As torch's activation checkpoint wrapper names its inside."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self._checkpoint_wrapped_module = inside


def test_checkpoint_wrappers_leave_no_trace_in_names(seeded: torch.Generator) -> None:
    plain = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    wrapped = nn.Sequential(Wrapped(copy.deepcopy(plain[0])), Wrapped(copy.deepcopy(plain[1])))
    ours, peer = both(wrapped, decay=0.5)
    with torch.no_grad():
        for tensor in (*wrapped.parameters(), *wrapped.buffers()):
            tensor.fill_(2)
    ours.update(wrapped, iteration=0)
    peer.update(wrapped, iteration=0)
    equal(ours.state_dict(), peer.state_dict())
    assert list(ours.state_dict()) == [name for name, _ in plain.named_parameters()] + [
        name for name, _ in plain.named_buffers()
    ]
    ours.copy_to(plain)
    assert all(bool((p == 2).all()) for p in (*plain.parameters(), *plain.buffers()))


def test_copy_to_casts_as_the_peer(seeded: torch.Generator) -> None:
    net = Net(seeded)
    ours, peer = both(net, decay=0.9)
    for iteration in range(4):
        net.walk(seeded)
        ours.update(net, iteration=iteration)
        peer.update(net, iteration=iteration)
    targets = [Net(seeded, torch.bfloat16), Net(seeded, torch.bfloat16)]
    ours.copy_to(targets[0])
    peer.copy_to(targets[1])
    equal(
        dict((*targets[0].named_parameters(), *targets[0].named_buffers())),
        dict((*targets[1].named_parameters(), *targets[1].named_buffers())),
    )
    assert all(p.requires_grad and p.is_leaf for p in targets[0].parameters())


def test_a_saved_average_goes_on_as_if_never_interrupted(
    seeded: torch.Generator, tmp_path: Any
) -> None:
    net = Net(seeded, torch.bfloat16)
    options = {"type": "power", "gamma": 4.0, "start_iter": 2}
    ours, peer = both(net, **options)
    for iteration in range(1, 6):
        net.walk(seeded)
        ours.update(net, iteration=iteration)
        peer.update(net, iteration=iteration)
    torch.save([ours.state_dict(), ours.get_extra_state()], tmp_path / "average.pt")
    state, extra = torch.load(tmp_path / "average.pt", weights_only=True)
    again = ExponentialMovingAverage(Net(seeded, torch.bfloat16), EMAConfig(**options))
    assert again.load_state_dict(state) == ([], [])
    again.set_extra_state(extra)
    assert (again.iteration, again.initialized) == (5, True)
    for iteration in range(6, 9):
        net.walk(seeded)
        again.update(net, iteration=iteration)
        peer.update(net, iteration=iteration)
    equal(again.state_dict(), peer.state_dict())


def test_an_average_saved_before_its_start_still_starts_with_a_copy(
    seeded: torch.Generator,
) -> None:
    net = Net(seeded)
    ours, _ = both(net, start_iter=5)
    ours.update(net, iteration=3)
    assert ours.get_extra_state() == {"iteration": 3, "initialized": False}
    again, _ = both(net, start_iter=5)
    again.load_state_dict(ours.state_dict())
    again.set_extra_state(ours.get_extra_state())
    net.walk(seeded)
    again.update(net, iteration=6)
    assert torch.equal(again.state_dict()["large"], net.large)


def test_peers_state_loads_and_ours_loads_there(seeded: torch.Generator) -> None:
    net = Net(seeded)
    ours, peer = both(net)
    other = Net(seeded, torch.float64)
    mine, theirs = both(other, dtype=None)
    ours.load_state_dict(theirs.state_dict())
    peer.load_state_dict(mine.state_dict())
    equal(ours.state_dict(), peer.state_dict())


def test_unknown_and_missing_names_are_reported(seeded: torch.Generator) -> None:
    net = Net(seeded)
    ours, _ = both(net)
    before = ours.state_dict()
    state = {name: value + 1 for name, value in before.items() if name != "mean"}
    state["stranger"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"missing \['mean'\], unexpected \['stranger'\]"):
        ours.load_state_dict(state, strict=True)
    equal(ours.state_dict(), before)
    assert not ours.initialized
    keys = ours.load_state_dict(state)
    assert keys.missing_keys == ["mean"] and keys.unexpected_keys == ["stranger"]
    assert torch.equal(ours.state_dict()["large"], before["large"] + 1)
    assert torch.equal(ours.state_dict()["mean"], before["mean"])


def test_a_state_of_another_shape_is_refused_before_anything_is_loaded(
    seeded: torch.Generator,
) -> None:
    net = Net(seeded)
    ours, _ = both(net)
    before = ours.state_dict()
    # [1] would broadcast into [5]
    state = {name: value + 1 for name, value in before.items()} | {"first.bias": torch.ones(1)}
    with pytest.raises(RuntimeError, match="bias"):
        ours.load_state_dict(state)
    equal(ours.state_dict(), before)
    with pytest.raises(RuntimeError, match="weight"):
        ExponentialMovingAverage(nn.Linear(1, 4), EMAConfig()).copy_to(nn.Linear(3, 4))


def test_the_state_is_a_copy_unless_asked_otherwise(seeded: torch.Generator) -> None:
    net = Net(seeded)
    ours, _ = both(net, decay=0.5)
    ours.update(net, iteration=1)
    copied, live, there = (
        ours.state_dict(),
        ours.state_dict(clone=False),
        ours.state_dict(device="cpu"),
    )
    before = {name: value.clone() for name, value in copied.items()}
    net.walk(seeded)
    ours.update(net, iteration=2)
    equal(copied, before)
    equal(there, before)
    equal(live, ours.state_dict())
    assert not torch.equal(live["large"], before["large"])


def test_the_shadow_shares_no_memory_with_the_model(seeded: torch.Generator) -> None:
    flat = torch.randn(100, generator=seeded)
    net = nn.Module()
    net.part = nn.Parameter(flat[10:20])
    shadow = ExponentialMovingAverage(net, EMAConfig()).state_dict(clone=False)["part"]
    assert shadow.untyped_storage().nbytes() == 40
    net.part.data.zero_()
    assert bool(shadow.any())


def test_swapped_puts_the_live_weights_back(seeded: torch.Generator) -> None:
    net = Net(seeded, torch.bfloat16)
    ours, _ = both(net, decay=0.5)
    for iteration in range(3):
        net.walk(seeded)
        ours.update(net, iteration=iteration)
    live = copy.deepcopy(net)
    wanted = copy.deepcopy(net)
    ours.copy_to(wanted)
    net.steps.add_(3)
    live.steps.add_(3)
    with ours.swapped(net) as shown:
        assert shown is net
        for got, want in zip(net.parameters(), wanted.parameters(), strict=True):
            assert torch.equal(got, want) and got.requires_grad
        assert torch.equal(net.steps, wanted.steps)
        net.first(torch.ones(1, 7, dtype=torch.bfloat16)).sum().backward()
    with pytest.raises(ZeroDivisionError), ours.swapped(net, device="cpu"):
        raise ZeroDivisionError
    equal(
        dict((*net.named_parameters(), *net.named_buffers())),
        dict((*live.named_parameters(), *live.named_buffers())),
    )


class Whole(Tensor):
    """A shard of some other library: all that is known of it is its ``full_tensor``."""

    def full_tensor(self) -> Tensor:
        return 3 * self.as_subclass(Tensor)


def test_whatever_has_a_full_tensor_is_gathered() -> None:
    net = nn.Module()
    net.weight = nn.Parameter(torch.ones(4).as_subclass(Whole))
    average = ExponentialMovingAverage(net, EMAConfig(decay=0.75))
    average.update(net, iteration=0)
    with torch.no_grad():
        net.weight.zero_()
    average.update(net, iteration=1)
    assert average.state_dict()["weight"].tolist() == [2.25] * 4
    plain = nn.Module()
    plain.weight = nn.Parameter(torch.zeros(4))
    average.copy_to(plain)
    average.copy_to(net)
    assert plain.weight.tolist() == net.weight.tolist() == [2.25] * 4


def test_unknown_settings_are_refused() -> None:
    net = nn.Linear(2, 2)
    config = EMAConfig()
    object.__setattr__(config, "dtype", "int8")
    with pytest.raises(ValueError, match="int8"):
        ExponentialMovingAverage(net, config)
    config = EMAConfig()
    average = ExponentialMovingAverage(net, config)
    object.__setattr__(config, "type", "cosine")
    average.update(net, iteration=1)
    with pytest.raises(ValueError, match="cosine"):
        average.update(net, iteration=2)


def test_casting_takes_a_bounded_amount_of_memory(seeded: torch.Generator) -> None:
    net = nn.Linear(1500, 2000, dtype=torch.bfloat16)
    ours, _ = both(net)
    ours.update(net, iteration=1)
    with torch.profiler.profile(profile_memory=True) as profile:
        ours.update(net, iteration=2)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 2**20  # the peer casts the whole: 12 MB
