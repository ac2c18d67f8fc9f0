"""How a Wan can be cut over ranks, and megatron-core's config for a cut."""

from __future__ import annotations

from typing import Any

import torch

from megagen.core import process
from megagen.core.errors import ConfigError, suggest
from megagen.core.vsa import VSAOptions
from megagen.kernels.vsa.dispatch import NAMES
from megagen.models.wan.architecture import WanArchitecture
from megagen.parallel.dims import ParallelDims

KERNELS = ("auto", *NAMES)


def check_layout(arch: WanArchitecture, dims: ParallelDims, where: str) -> None:
    """Raise ``ConfigError`` naming the key under ``where`` if the network cannot be cut so."""
    heads, tp = arch.num_attention_heads, dims.tp_size
    for key, count in (("num_attention_heads", heads), ("ffn_dim", arch.ffn_dim)):
        if count % tp:
            raise ConfigError(
                f"is {tp}, but {key} {count} does not divide by it.",
                remedy=f"Allowed: {_divisors(heads, arch.ffn_dim)}.",
                where=f"{where}.tp_size",
            )
    a2a = a2a_degree(dims)
    if (heads // tp) % a2a:
        key = "cp_a2a_size" if dims.cp_comm_type == "a2a+p2p" else "cp_size"
        raise ConfigError(
            f"is {a2a}, but the {heads} heads over tp_size {tp} leave {heads // tp} a rank, "
            "which do not divide by it.",
            remedy=f"Allowed with cp_comm_type {dims.cp_comm_type!r}: {_divisors(heads // tp)}; or "
            "set cp_comm_type to p2p or all_gather, or to a2a+p2p with such a cp_a2a_size.",
            where=f"{where}.{key}",
        )
    _check_stages(arch, dims, where)


def check_sparse(vsa: VSAOptions, dims: ParallelDims, where: str, distributed: str) -> None:
    """Raise ``ConfigError`` if tiles could not be chosen: a rank must hold all tokens of a head.

    Args:
        vsa: sparse attention.
        dims: layout.
        where: key path of the role.
        distributed: key path of the layout.
    """
    if vsa.kernels not in KERNELS:
        raise ConfigError(
            f"unknown kernels {vsa.kernels!r};",
            remedy=suggest(vsa.kernels, KERNELS),
            where=f"{where}.attention.vsa.kernels",
        )
    if dims.cp_size > 1 and dims.cp_comm_type != "a2a":
        raise ConfigError(
            f"is {dims.cp_comm_type!r}, but sparse attention chooses among all tokens of a head, "
            "which only a2a brings together.",
            remedy="Set it to a2a, with a cp_size that divides the heads of a TP rank.",
            where=f"{distributed}.cp_comm_type",
        )


def a2a_degree(dims: ParallelDims) -> int:
    """Ranks over which self-attention exchanges tokens for heads."""
    return {"a2a": dims.cp_size, "a2a+p2p": dims.cp_a2a_size or 1}.get(dims.cp_comm_type, 1)


def _check_stages(arch: WanArchitecture, dims: ParallelDims, where: str) -> None:
    chunks = dims.pp_size * dims.num_chunks
    if dims.num_chunks > 1 and dims.pp_size == 1:
        raise ConfigError(
            f"is {dims.virtual_pp_size}, but there is one pipeline stage.",
            remedy="Virtual stages need pp_size of 2 or more.",
            where=f"{where}.virtual_pp_size",
        )
    if dims.pipeline_layers is not None:
        layers = dims.pipeline_layers
        if len(layers) != chunks or sum(layers) != arch.num_layers or min(layers) < 1:
            raise ConfigError(
                f"is {list(layers)}; it must give {chunks} stages (pp_size {dims.pp_size} x "
                f"{dims.num_chunks} chunks) at least one layer each, {arch.num_layers} in all.",
                where=f"{where}.pipeline_layers",
            )
    elif arch.num_layers < chunks:
        raise ConfigError(
            f"is {dims.pp_size}: with {dims.num_chunks} chunks a stage that makes {chunks}, more "
            f"than the network's {arch.num_layers} layers.",
            remedy="Take fewer stages.",
            where=f"{where}.pp_size",
        )


def _divisors(*numbers: int) -> str:
    common = [d for d in range(1, min(numbers) + 1) if all(n % d == 0 for n in numbers)]
    return ", ".join(map(str, common))


def megatron_config(
    arch: WanArchitecture,
    dims: ParallelDims,
    *,
    precision: str,
    recompute: str,
    transformer_impl: str,
    fp8: bool,
    **fields: Any,
) -> Any:
    """megatron-core's ``TransformerConfig`` for the network under a layout.

    Interleaved stages always use overlapped, unbatched point-to-point calls: megatron-core's
    default pair of flags gives wrong gradients with two stages.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    is_interleaved = dims.num_chunks > 1
    values: dict[str, Any] = {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "kv_channels": arch.attention_head_dim,
        "ffn_hidden_size": arch.ffn_dim,
        "layernorm_epsilon": arch.eps,
        "add_bias_linear": True,
        "gated_linear_unit": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": precision == "bf16",
        "tensor_model_parallel_size": dims.tp_size,
        "context_parallel_size": dims.cp_size,
        "pipeline_model_parallel_size": dims.pp_size,
        "virtual_pipeline_model_parallel_size": dims.num_chunks if is_interleaved else None,
        "sequence_parallel": dims.sequence_parallel and dims.tp_size > 1,
        "cp_comm_type": dims.cp_comm_type,
        "overlap_p2p_comm": is_interleaved,
        "batch_p2p_comm": not is_interleaved,
        "transformer_impl": transformer_impl,
        "perform_initialization": False,
        "use_cpu_initialization": process.device().type == "cpu",
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "recompute_granularity": None if recompute == "none" else recompute,
    }
    if recompute == "full":
        values |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    if fp8:
        values["fp8"] = "hybrid"
    config = TransformerConfig(**{**values, **fields})
    config.has_cond_embedder = True  # gradients of the embedders' copies are summed over stages
    return config
