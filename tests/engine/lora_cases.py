"""Adapters beside the tiny Wan, and diffusers' class with PEFT's to compare with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import Tensor, nn

from megagen.engine import lora
from megagen.engine.role import Role
from megagen.engine.settings import OptimizerSettings, RoleSettings
from megagen.models.adapters import AdapterSpec, adapted_modules, adapter_shapes
from megagen.parallel.dims import ParallelDims
from megagen.parallel.mesh import Mesh
from tests.engine import cases

ALL = ("to_q", "to_k", "to_v", "to_out", "ffn", "time_", "text_embedder", "proj_out")
SPEC = AdapterSpec(3, 4.5)
EVERYWHERE = AdapterSpec(2, 1.0, ALL, ())
"""Also on the feed-forward, the head and the embedders that every stage has a copy of."""
PARTLY = AdapterSpec(3, 3.0, ("attn1.to_q", "attn1.to_v", "blocks.1.attn2.to_k", "blocks.1.ffn"))
"""Of fused projections some, and on the first of two stages more than on the second."""
FIRST_STAGE = AdapterSpec(2, 2.0, ("blocks.0.attn1",))
ADAMW = dataclasses.replace(cases.ADAMW, use_distributed_optimizer=False, max_grad_norm=0.0)


def random_adapters(spec: AdapterSpec, seed: int) -> dict[str, Tensor]:
    """Every A and B random, none zero."""
    plugin = cases.make_plugin()
    generator = torch.Generator().manual_seed(seed)
    shapes = adapter_shapes(plugin, adapted_modules(plugin, spec), spec.rank)
    return {n: 0.4 * torch.randn(shape, generator=generator) for n, shape in shapes.items()}


def make_role(
    weights: cases.Weights,
    adapters: cases.Weights,
    spec: AdapterSpec | None,
    dims: ParallelDims,
    *,
    name: str = "student",
    base: Role | None = None,
    data: ParallelDims | None = None,
    **settings: Any,
) -> Role:
    """In a rank: a role with ``weights`` and ``adapters``."""
    if settings.get("trainable", True):
        settings.setdefault("optimizer", cases.ADAMW)
    return Role.build(
        cases.make_plugin(),
        RoleSettings(name=name, dims=dims, lora=spec, **settings),
        data_layout=Mesh.build(dims if data is None else data),
        store=cases.DictStore(weights),
        adapters=cases.DictStore(adapters),
        base=base,
    )


def whole(role: Role, value: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
    """``value`` of every adapter parameter of this rank's stages, in diffusers' names."""
    found: dict[str, Tensor] = {}
    assert role.settings.lora is not None
    for chunk in role.chunks:
        for name, source in lora.sources(role.plugin, chunk, role.settings.lora.rank).items():
            parameter: Any = chunk.get_parameter(name)
            tensor = value(parameter).detach().float().contiguous()
            if getattr(parameter, "tensor_model_parallel", False) and role.mesh.dims.tp_size > 1:
                parts = [torch.empty_like(tensor) for _ in range(role.mesh.dims.tp_size)]
                dist.all_gather(parts, tensor, group=role.mesh.pg.tp)
                tensor = torch.cat(parts, parameter.partition_dim)
            found |= dict(zip(source.names, [tensor.clone()], strict=True))
    return found


class PeftModel(cases.PlainModel):
    """diffusers' Wan with PEFT's adapters, of which alone AdamW knows."""

    def __init__(
        self,
        weights: cases.Weights,
        adapters: cases.Weights,
        spec: AdapterSpec,
        settings: OptimizerSettings = cases.ADAMW,
    ) -> None:
        self.model = WanTransformer3DModel(**cases.ARCH)
        self.model.load_state_dict(dict(weights))
        self.model.requires_grad_(False)
        modules = sorted({name.partition(".lora_")[0] for name in adapters})
        self.model.add_adapter(
            LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=modules)
        )
        self._own = {_plain(n): p for n, p in self.model.named_parameters() if ".lora_" in n}
        assert self._own.keys() == adapters.keys()
        with torch.no_grad():
            for name, parameter in self._own.items():
                parameter.copy_(adapters[name])
        self.settings = settings
        self.optimizer = torch.optim.AdamW(
            self._own.values(),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in self._own.items() if p.grad is not None}

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self._own.items()}


def _plain(name: str) -> str:
    return name.replace(".default.", ".")


def peft_curve(
    weights: cases.Weights,
    adapters: cases.Weights,
    spec: AdapterSpec,
    num_steps: int,
    settings: OptimizerSettings = cases.ADAMW,
) -> dict[str, Any]:
    """Predictions and gradients of the first step, losses and norms, adapters at the end."""
    model = PeftModel(weights, adapters, spec, settings)
    found: dict[str, Any] = {"curve": []}
    for step in range(num_steps):
        requests = cases.make_requests(step)
        predictions = [model(request) for request in requests]
        pairs = zip(predictions, requests, strict=True)
        loss = torch.stack([cases.squared_error(v, r)["loss"] for v, r in pairs]).mean()
        loss.backward()
        if step == 0:
            found["predictions"] = [prediction.detach() for prediction in predictions]
            found["gradients"] = model.gradients()
        found["curve"] += [loss.item(), model.step()]
    return {**found, "adapters": model.weights()}


def run(
    weights: cases.Weights,
    adapters: cases.Weights,
    spec: AdapterSpec,
    dims: ParallelDims,
    num_steps: int,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """In a rank: the same of a role; gradients where each rank keeps them whole."""
    role = make_role(weights, adapters, spec, dims, **settings)
    assert role.optimizer is not None
    own = cases.own_part(cases.make_requests(0), role.mesh)
    found: dict[str, Any] = {"curve": [], "predictions": role.predict(own), "gradients": None}
    found["part"] = role.mesh.dp_rank * len(own)
    for step in range(num_steps):
        found["curve"] += cases.update(role, step)
        if step == 0 and not role.optimizer.settings.use_distributed_optimizer:
            found["gradients"] = whole(role, lambda p: p.main_grad)
    role.sync_weights()
    base = cases.whole(role, lambda p: p)
    assert all(torch.equal(base[name], weights[name]) for name in base), "the base has changed"
    return {**found, "adapters": whole(role, lambda p: p)}
