"""Small Wans, their inputs, diffusers' answer, and megagen's under a layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megagen.checkpoint.diffusers import DiffusersStore, load_weights
from megagen.core import process
from megagen.models.base import Request
from megagen.models.wan import WanModel
from megagen.parallel.dims import ParallelDims
from megagen.parallel.mesh import Mesh

TINY: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 14,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 20,
    "freq_dim": 32,
    "ffn_dim": 72,
    "num_layers": 3,
}
IMAGE: dict[str, Any] = {"in_channels": 12, "image_dim": 24, "added_kv_proj_dim": 56}
CASES: dict[str, dict[str, Any]] = {
    "t2v": TINY,
    "i2v": {**TINY, **IMAGE},
    "flf2v": {**TINY, **IMAGE, "pos_embed_seq_len": 10},
    "ti2v": {**TINY, "in_channels": 6, "out_channels": 6, "num_layers": 2},
    "plain_norm": {**TINY, "cross_attn_norm": False, "patch_size": [2, 1, 2], "num_layers": 1},
}


def reference_model(arch: Mapping[str, Any], generator: torch.Generator) -> WanTransformer3DModel:
    """diffusers' class with every parameter random, those that start at 0 or 1 included."""
    model = WanTransformer3DModel(**arch)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = (
                0.5 if parameter.ndim == 1 or "table" in name else 0.7 / parameter[0].numel() ** 0.5
            )
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model


def make_request(
    arch: Mapping[str, Any],
    generator: torch.Generator,
    *,
    batch: int = 1,
    size: tuple[int, int, int] = (3, 6, 10),
    timestep: str = "sample",
) -> Request:
    """Inputs of the network itself (condition channels included) and a probe for the loss."""
    patch = arch.get("patch_size", (1, 2, 2))
    frames, rows, columns = (n // p for n, p in zip(size, patch, strict=True))
    counts = {"sample": None, "frame": frames, "token": frames * rows * columns}
    shape = (batch,) if counts[timestep] is None else (batch, counts[timestep])
    condition = {}
    text_len = 7
    if "image_dim" in arch:
        text_len = 512  # diffusers takes the last 512 tokens for the text
        tokens = arch.get("pos_embed_seq_len", 5)
        condition["image_embeds_BLD"] = _normal(generator, batch, tokens, arch["image_dim"])
    condition["text_embeds_BLD"] = _normal(generator, batch, text_len, arch["text_dim"])
    return Request(
        latents_BCTHW=_normal(generator, batch, arch["in_channels"], *size),
        timestep=torch.rand(shape, generator=generator) * 1000,
        condition=condition,
        extra={"probe": _normal(generator, batch, arch["out_channels"], *size)},
    )


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def reference_run(
    model: WanTransformer3DModel, request: Request
) -> tuple[Tensor, dict[str, Tensor]]:
    """Prediction, and gradients of ``(prediction * probe).mean()``."""
    timestep = request.timestep
    patch = model.config.patch_size
    grid = [n // p for n, p in zip(request.latents_BCTHW.shape[2:], patch, strict=True)]
    if timestep.ndim == 2 and timestep.size(1) == grid[0]:
        timestep = timestep.repeat_interleave(grid[1] * grid[2], dim=1)
    image = request.condition.get("image_embeds_BLD")
    if image is not None and model.config.pos_embed_seq_len is not None:
        image = image.reshape(2 * image.size(0), -1, image.size(-1))  # first and last frame apart
    model.zero_grad()
    out = model(
        request.latents_BCTHW,
        timestep,
        request.condition["text_embeds_BLD"],
        image,
        return_dict=False,
    )[0]
    (out.float() * request.extra["probe"]).mean().backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def build(
    directory: str | Path, dims: ParallelDims, *, attention_backend: str = "sdpa", **overrides: Any
) -> tuple[WanModel, list[MegatronModule], Mesh]:
    """This rank's chunks of the network in ``directory``."""
    plugin = WanModel(WanModel.Options(init_from=str(directory)))
    mesh = Mesh.build(dims)
    config = plugin.transformer_config(dims, **overrides)
    num_chunks = dims.pp_size * dims.num_chunks
    sizes = dims.pipeline_layers or [
        plugin.num_layers // num_chunks + (i < plugin.num_layers % num_chunks)
        for i in range(num_chunks)
    ]
    chunks = []
    for virtual in range(dims.num_chunks):
        index = virtual * dims.pp_size + mesh.pp_rank
        start = sum(sizes[:index])
        chunks.append(
            plugin.build_chunk(
                config,
                mesh.pg,
                layers=range(start, start + sizes[index]),
                pre_process=index == 0,
                post_process=index == num_chunks - 1,
                vp_stage=virtual if dims.num_chunks > 1 else None,
                attention_backend=attention_backend,
            ).to(process.device())
        )
    load_weights(plugin, chunks, mesh, DiffusersStore(directory))
    return plugin, chunks, mesh


def megagen_run(
    directory: str | Path, dims: ParallelDims, request: Request, overrides: dict[str, Any]
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """In a rank: prediction (last stage) and whole gradients of this stage in diffusers' names."""
    plugin, (chunk,), mesh = build(directory, dims, **overrides)
    group, stage = mesh.pg.pp, mesh.pp_rank
    hidden = None
    if stage > 0:
        shard = chunk.shard(_grid(request, plugin))
        hidden = torch.empty(len(shard.own), request.latents_BCTHW.size(0), plugin.hidden_size)
        dist.recv(hidden, dist.get_global_rank(group, stage - 1), group=group)
        chunk.set_input_tensor([hidden.requires_grad_()])
    out = chunk(request)
    if mesh.is_last_stage:
        (out.float() * request.extra["probe"]).mean().backward()
    else:
        following = dist.get_global_rank(group, stage + 1)
        dist.send(out.detach(), following, group=group)
        grad = torch.empty_like(out)
        dist.recv(grad, following, group=group)
        out.backward(grad)
    if hidden is not None:
        dist.send(hidden.grad, dist.get_global_rank(group, stage - 1), group=group)
    return (out.detach() if mesh.is_last_stage else None), _whole_gradients(plugin, chunk, mesh)


def _grid(request: Request, plugin: WanModel) -> tuple[int, ...]:
    sizes = request.latents_BCTHW.shape[2:]
    return tuple(n // p for n, p in zip(sizes, plugin.arch.patch_size, strict=True))


def _whole_gradients(plugin: WanModel, chunk: MegatronModule, mesh: Mesh) -> dict[str, Tensor]:
    """What DDP and ``finalize_model_grads`` make of the gradients, then made whole over TP."""
    whole = {}
    for name, source in plugin.weights(chunk).items():
        parameter = chunk.get_parameter(name)
        assert parameter.grad is not None, f"{name} has no gradient"
        grad = parameter.grad.contiguous()
        dist.all_reduce(grad, group=mesh.pg.cp)
        if getattr(parameter, "pipeline_parallel", False):
            dist.all_reduce(grad, group=mesh.pg.pp)
        if getattr(parameter, "tensor_model_parallel", False):
            parts = [torch.empty_like(grad) for _ in range(mesh.pg.tp.size())]
            dist.all_gather(parts, grad, group=mesh.pg.tp)
            grad = torch.cat(parts, parameter.partition_dim)
        elif getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(grad, group=mesh.pg.tp)
        else:  # what is not reduced over TP must be the same there
            first = grad.clone()
            dist.broadcast(first, dist.get_global_rank(mesh.pg.tp, 0), group=mesh.pg.tp)
            assert relative(grad, first) < 1e-5, f"{name} differs over TP"
        whole |= dict(zip(source.names, source.split(grad), strict=True))
    return whole


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative L2 error."""
    norm = expected.double().norm().item()
    return (found.double() - expected.double()).norm().item() / max(norm, 1e-30)


def worst(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest relative error over tensors that both must hold, and whose it is.

    Softmax does not see a shift common to all keys, so the gradient of a key's bias is a small
    difference of large numbers: its error is measured against the gradient of its weight.
    """
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    errors = []
    for name, value in expected.items():
        error = relative(found[name], value)
        if name.endswith(("to_k.bias", "add_k_proj.bias")):
            error *= (value.norm() / expected[name.replace("bias", "weight")].norm()).item()
        errors.append((error, name))
    return max(errors)


def together(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Relative error of all tensors as one vector."""
    names = sorted(expected)
    return relative(*(torch.cat([t[n].flatten() for n in names]) for t in (found, expected)))
