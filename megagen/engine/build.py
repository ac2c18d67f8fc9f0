"""From a plugin and a layout to chunks that megatron-core can train."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from torch import nn

from megagen.core import process
from megagen.core.errors import ConfigError
from megagen.engine import lora
from megagen.engine.layout import rank_chunks
from megagen.engine.settings import RoleSettings
from megagen.models.base import ModelPlugin
from megagen.parallel.mesh import Mesh


def make_config(plugin: ModelPlugin, settings: RoleSettings) -> Any:
    """The role's own TransformerConfig: megatron-core's schedules keep hooks and state on it."""
    config = plugin.transformer_config(
        settings.dims,
        precision=settings.precision,
        recompute=settings.recompute,
        transformer_impl=settings.transformer_impl,
        fp8=settings.fp8,
        # batched exchange with interleaving gives wrong gradients under two stages, and with
        # shapes that vary it can deadlock under four
        batch_p2p_comm=False,
        overlap_p2p_comm=settings.dims.num_chunks > 1,
    )
    # gradients of the embedders that every stage holds are summed over stages
    config.has_cond_embedder = True
    return config


def make_chunks(
    plugin: ModelPlugin,
    settings: RoleSettings,
    config: Any,
    mesh: Mesh,
    base: Sequence[nn.Module] | None = None,
) -> list[nn.Module]:
    """This rank's chunks, uninitialised, on its device; on the weights of ``base`` where given."""
    chunks = []
    for number, chunk in enumerate(rank_chunks(plugin.num_layers, settings.dims, mesh.pp_rank)):
        with lora.unallocated() if base is not None else contextlib.nullcontext():
            module = plugin.build_chunk(
                config,
                mesh.pg,
                layers=chunk.layers,
                pre_process=chunk.pre_process,
                post_process=chunk.post_process,
                vp_stage=chunk.vp_stage,
                attention_backend=settings.attention_backend,
            )
        if settings.lora is not None:
            lora.attach(plugin, module, settings.lora, mesh.pg.tp)
        if base is not None:
            lora.share(module, base[number], settings.name)
        chunks.append(module.to(process.device()))
    return chunks


def wrap_ddp(
    chunks: Sequence[nn.Module], settings: RoleSettings, config: Any, mesh: Mesh
) -> list[nn.Module]:
    """The chunks in megatron-core's DDP, with gradient buffers."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    assert settings.optimizer is not None
    if settings.overlap_param_gather and not settings.overlap_grad_reduce:
        raise ConfigError(
            "overlap_param_gather needs overlap_grad_reduce.",
            remedy="Set both or neither.",
            where=f"models.{settings.name}.distributed.overlap_param_gather",
        )
    wrapped = []
    for number, chunk in enumerate(chunks):
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=settings.grad_reduce_in_fp32,
            overlap_grad_reduce=settings.overlap_grad_reduce,
            overlap_param_gather=settings.overlap_param_gather,
            use_distributed_optimizer=settings.optimizer.use_distributed_optimizer,
        )
        wrapped.append(
            DistributedDataParallel(
                config=config,
                ddp_config=ddp_config,
                module=chunk,
                disable_bucketing=number > 0,
                pg_collection=mesh.pg,
            )
        )
    functions = [chunk.no_sync for chunk in wrapped]
    config.no_sync_func = functions if len(functions) > 1 else functions[0]
    return wrapped
