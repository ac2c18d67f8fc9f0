"""Micro-batches between two layouts of the same ranks.

Every rank holds the requests of its *data rank* (the run's layout). A role's replica under another
layout may contain several data ranks: it gathers their requests, in data-rank order. Replicas that
contain the same data ranks share the work out where the count divides, else each does all of it.
Each request carries the weight that makes the mean over replicas of their mean losses the mean over
all requests of the run; it is 1 in all regular cases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megagen.core import process
from megagen.models.base import Request
from megagen.parallel.mesh import Mesh, make_group

T = TypeVar("T")
Item = tuple[int, int]
"""(data rank, number of the micro-batch there)."""


@dataclass(frozen=True)
class _Plan:
    """Who contains what: pure functions of the two layouts.

    Args:
        replicas: ranks of each replica of the role.
        contents: data ranks of each replica.
        data_rank: of each rank.
    """

    replicas: list[list[int]]
    contents: list[tuple[int, ...]]
    data_rank: list[int]

    def twins(self, replica: int) -> list[int]:
        """Replicas with the same contents as ``replica``, itself included."""
        return [r for r, found in enumerate(self.contents) if found == self.contents[replica]]

    def items(self, replica: int, num_requests: int) -> list[Item]:
        """The micro-batches that ``replica`` works on."""
        union = [(d, i) for d in self.contents[replica] for i in range(num_requests)]
        twins = self.twins(replica)
        if len(union) % len(twins):
            return union
        share = len(union) // len(twins)
        place = twins.index(replica)
        return union[place * share : (place + 1) * share]

    def weights(self, replica: int, num_requests: int) -> list[float]:
        """The weight of each of ``items``' losses."""
        everyone = [self.items(r, num_requests) for r in range(len(self.replicas))]
        copies = Counter(item for items in everyone for item in items)
        own = everyone[replica]
        scale = len(self.replicas) * len(own) / len(copies)
        return [scale / copies[item] for item in own]


class Exchange:
    """Carries requests from the data layout to a role's layout, and results back.

    Args:
        data: the run's layout.
        role: the role's.
    """

    def __init__(self, data: Mesh, role: Mesh) -> None:
        self._data, self._role = data, role
        self._plan = _plan(data, role)
        rank = dist.get_rank()
        self._replica = next(r for r, ranks in enumerate(self._plan.replicas) if rank in ranks)
        self._twin_group = self._make_twin_group()

    @property
    def gathers(self) -> bool:
        """Whether any replica contains several data ranks."""
        return any(len(found) > 1 for found in self._plan.contents)

    def weights(self, num_requests: int) -> list[float]:
        """The weight of the loss of each request that this replica works on."""
        return self._plan.weights(self._replica, num_requests)

    def all_items(self, num_requests: int) -> list[Item]:
        """The requests of this replica's data ranks, in the order of ``collect_all``."""
        contents = self._plan.contents[self._replica]
        return [(data_rank, index) for data_rank in contents for index in range(num_requests)]

    def own_items(self, num_requests: int) -> list[Item]:
        """This data rank's requests."""
        return [(self._data.dp_rank, index) for index in range(num_requests)]

    def collect(self, own: Sequence[T]) -> list[T]:
        """From one object per own request to one per request that this replica works on.

        Collective over the role's replica. Every data rank has the same number of requests.
        """
        wanted = set(self._plan.items(self._replica, len(own)))
        found = zip(self.all_items(len(own)), self.collect_all(own), strict=True)
        return [each for item, each in found if item in wanted]

    def collect_all(self, own: Sequence[T]) -> list[T]:
        """``collect`` without sharing out: one object per request of this replica's data ranks."""
        union: dict[int, Sequence[T]] = {self._data.dp_rank: own}
        if self.gathers:
            for data_rank in self._plan.contents[self._replica]:
                union[data_rank] = self._broadcast(own, data_rank)
        return [union[data_rank][index] for data_rank, index in self.all_items(len(own))]

    def deliver(self, results: Sequence[Tensor], own: Sequence[Tensor]) -> list[Tensor]:
        """From results of this replica's requests to those of the own ones.

        Args:
            results: in the order of ``collect``, known on every rank of the replica.
            own: one tensor per own request, of its result's shape and dtype.
        """
        wanted = [(self._data.dp_rank, i) for i in range(len(own))]
        items = self._plan.items(self._replica, len(own))
        found = dict(zip(items, results, strict=True))
        if not self._is_split(len(own)):
            return [found[item] for item in wanted]
        shapes = self._shapes([tensor.shape for tensor in own])
        sizes = [shape.numel() for shape in shapes.values()]
        flat = torch.zeros(sum(sizes), dtype=own[0].dtype, device=own[0].device)
        parts = dict(zip(shapes, flat.split(sizes), strict=True))
        for item, result in found.items():
            parts[item].copy_(result.reshape(-1))
        dist.all_reduce(flat, group=self._twin_group)
        return [parts[item].view(shapes[item]) for item in wanted]

    def deliver_objects(self, results: Sequence[T], num_own: int) -> list[T]:
        """``deliver`` for small Python objects."""
        items = self._plan.items(self._replica, num_own)
        found = dict(zip(items, results, strict=True))
        if self._is_split(num_own):
            assert self._twin_group is not None
            everyone: list[Any] = [None] * self._twin_group.size()
            dist.all_gather_object(everyone, found, group=self._twin_group)
            found = {item: result for part in everyone for item, result in part.items()}
        return [found[self._data.dp_rank, i] for i in range(num_own)]

    def _is_split(self, num_requests: int) -> bool:
        union = len(self._plan.contents[self._replica]) * num_requests
        return len(self._plan.items(self._replica, num_requests)) < union

    def _shapes(self, own: Sequence[torch.Size]) -> dict[Item, torch.Size]:
        """Shape of every item in this replica's contents."""
        union: dict[int, Sequence[torch.Size]] = {self._data.dp_rank: own}
        if self.gathers:
            for data_rank in self._plan.contents[self._replica]:
                union[data_rank] = self._broadcast([tuple(s) for s in own], data_rank)
        return {
            (data_rank, i): torch.Size(union[data_rank][i])
            for data_rank in self._plan.contents[self._replica]
            for i in range(len(own))
        }

    def _broadcast(self, own: Sequence[Any], data_rank: int) -> list[Any]:
        """The objects of ``data_rank``, from the first rank of the replica that holds them."""
        ranks = self._plan.replicas[self._replica]
        source = next(r for r in ranks if self._plan.data_rank[r] == data_rank)
        is_source = dist.get_rank() == source
        tensors: list[Tensor] = []
        payload: list[Any] = [None]
        if is_source:
            skeleton = [_take_out(item, tensors) for item in own]
            payload = [(skeleton, [(t.shape, t.dtype) for t in tensors])]
        group = self._role.replica
        device = process.device()
        dist.broadcast_object_list(payload, src=source, group=group, device=device)
        skeleton, kinds = payload[0]
        moved = []
        for number, (shape, dtype) in enumerate(kinds):
            if is_source:
                buffer = tensors[number].detach().to(device).contiguous()
            else:
                buffer = torch.empty(shape, dtype=dtype, device=device)
            dist.broadcast(buffer, src=source, group=group)
            moved.append(buffer)
        return [_put_in(item, moved) for item in skeleton]

    def _make_twin_group(self) -> ProcessGroup | None:
        """Ranks with this rank's place in each replica of the same contents."""
        rows: list[list[int]] = []
        for replica in range(len(self._plan.replicas)):
            twins = self._plan.twins(replica)
            if twins[0] == replica:
                ranks = [self._plan.replicas[twin] for twin in twins]
                rows += [list(place) for place in zip(*ranks, strict=True)]
        return make_group(rows) if any(len(row) > 1 for row in rows) else None


def _plan(data: Mesh, role: Mesh) -> _Plan:
    data_rank, role_rank = data.data_ranks(), role.data_ranks()
    replicas = [
        [rank for rank, replica in enumerate(role_rank) if replica == number]
        for number in range(role.dp_size)
    ]
    contents = [tuple(sorted({data_rank[rank] for rank in ranks})) for ranks in replicas]
    return _Plan(replicas, contents, data_rank)


@dataclass(frozen=True)
class _Slot:
    """Where a tensor was taken out."""

    number: int


def _take_out(value: Any, tensors: list[Tensor]) -> Any:
    """``value`` with its tensors moved to ``tensors``."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Slot(len(tensors) - 1)
    return _map(value, lambda item: _take_out(item, tensors))


def _put_in(value: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(value, _Slot):
        return tensors[value.number]
    return _map(value, lambda item: _put_in(item, tensors))


def _map(value: Any, change: Any) -> Any:
    if isinstance(value, Request):
        fields = ("latents_BCTHW", "timestep", "condition", "extra", "cache")
        return Request(**{name: change(getattr(value, name)) for name in fields})
    if isinstance(value, Mapping):
        return {key: change(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([change(item) for item in value])
    return value
