"""Requests of the run's layout on their way to the replica that works on them, and results back.

Legend: B batch, C channels, T H W latent size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagen.core import process
from megagen.engine import features
from megagen.engine.exchange import Exchange
from megagen.engine.kv_cache import CacheRef, Caches
from megagen.engine.schedule import Pipeline
from megagen.models.base import Request
from megagen.models.cache import KVCache
from megagen.parallel.mesh import Mesh


class Delivery:
    """What goes into a role and what comes out of it; all calls are collective.

    Args:
        data_layout: which rank holds which requests.
        pipeline: of the role.
    """

    def __init__(self, data_layout: Mesh, pipeline: Pipeline) -> None:
        self._pipeline, self._mesh = pipeline, pipeline.mesh
        self._exchange, self._caches = Exchange(data_layout, pipeline.mesh), Caches()
        self.sparsity: float | None = None  # of sparse attention, in the requests that come in

    # -- in ----------------------------------------------------------------------------------------
    def collect(self, requests: Sequence[Request]) -> list[Request]:
        """The requests that this rank's replica works on, on this rank's device."""
        return [self._on_device(request) for request in self._exchange.collect(requests)]

    def collect_recording(self, requests: Sequence[Request]) -> list[Request]:
        """``collect`` for a pass that makes caches; a request without cache begins a video."""
        # on every replica that has the request: which one works on it later, nobody knows yet
        given = [self._on_device(request) for request in self._exchange.collect_all(requests)]
        return [r.with_(cache=(r.cache or KVCache()).recording()) for r in given]

    def collect_targets(self, targets: Sequence[Any]) -> list[Any]:
        """Of one object per request, those that go with ``collect``'s requests."""
        return self._exchange.collect(targets)

    def weights(self, num_requests: int) -> list[float]:
        """Of the loss of each of ``collect``'s requests, of so many that this data rank has."""
        return self._exchange.weights(num_requests)

    # -- out ---------------------------------------------------------------------------------------
    def predictions(
        self, found: Sequence[Tensor], given: Sequence[Request], requests: Sequence[Request]
    ) -> list[Tensor]:
        """The last stage's predictions of ``given`` as those of ``requests``, on every rank."""
        results = list(found) if found else _templates(given)
        self._pipeline.from_stage(results, self._mesh.dims.pp_size - 1)
        return self._exchange.deliver(results, _templates(requests))

    def input_gradients(
        self, leaves: Sequence[Tensor], requests: Sequence[Request]
    ) -> list[Tensor]:
        """What a backward pass left at the latents of ``collect``'s requests, on every rank."""
        gradients = [self._pipeline.whole_gradient(leaf) for leaf in leaves]
        self._pipeline.from_stage(gradients, 0)
        return self._exchange.deliver(gradients, _templates(requests))

    def features(
        self, by_block: Sequence[Sequence[Tensor]], requests: Sequence[Request]
    ) -> list[list[Tensor]]:
        """Whole features by block, then request, as those of each of ``requests`` by block."""
        own = features.templates(self._pipeline.plugin, requests)
        delivered = [self._exchange.deliver(whole, own) for whole in by_block]
        return [list(row) for row in zip(*delivered, strict=True)]

    def caches(self, found: Sequence[KVCache], requests: Sequence[Request]) -> list[CacheRef]:
        """References to what ``collect_recording``'s requests have made."""
        items = self._exchange.all_items(len(requests))
        ends = [(r.cache.next_frame if r.cache else 0) + r.latents_BCTHW.size(2) for r in requests]
        own = zip(self._exchange.own_items(len(requests)), ends, strict=True)
        return self._caches.keep(dict(zip(items, found, strict=True)), list(own))

    def objects(self, found: Sequence[Any], num_requests: int) -> list[Any]:
        """Small Python objects, one for each of ``collect``'s requests, as the own ones'."""
        return self._exchange.deliver_objects(found, num_requests)

    def terms(
        self, reports: Sequence[Mapping[str, float]], num_requests: int
    ) -> tuple[list[dict[str, Tensor]], bool]:
        """The last stage's loss terms as those of the own requests; whether all were finite."""
        payload: list[Any] = [list(reports)]
        group = self._mesh.pg.pp
        if group.size() > 1:
            source = dist.get_global_rank(group, group.size() - 1)
            dist.broadcast_object_list(payload, src=source, group=group, device=process.device())
        is_finite = all(math.isfinite(v) for terms in payload[0] for v in terms.values())
        own = self._exchange.deliver_objects(payload[0], num_requests)
        return [{n: torch.tensor(v) for n, v in terms.items()} for terms in own], is_finite

    def _on_device(self, request: Request) -> Request:
        device = process.device()
        return request.with_(
            latents_BCTHW=request.latents_BCTHW.to(device),
            timestep=request.timestep.to(device),
            condition={name: value.to(device) for name, value in request.condition.items()},
            cache=self._caches.find(request.cache),
            sparsity=self.sparsity,
        )


def _templates(requests: Sequence[Request]) -> list[Tensor]:
    """Empty fp32 tensors of the requests' latent shapes."""
    device = process.device()
    return [torch.empty(r.latents_BCTHW.shape, device=device) for r in requests]
