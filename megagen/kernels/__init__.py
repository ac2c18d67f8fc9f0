"""Video sparse attention (``vsa``), and fused memory-bound operations of a diffusion transformer.

Each fused operation is one file: its formula, a reference in plain torch, the fused version behind
``torch.library``, and a ``SPEC`` that tests and benchmarks loop over. A public function takes the
fused path where a backend serves its tensors (fp32 on the CPU in C++; fp32, bf16 and fp16 on CUDA
devices in Triton) and the reference elsewhere.
Nothing is imported before it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megagen.kernels.backend import status
    from megagen.kernels.bias_gelu import bias_gelu_tanh
    from megagen.kernels.layernorm import layernorm_affine, layernorm_modulate
    from megagen.kernels.losses import flow_matching_loss, vsd_loss
    from megagen.kernels.norm_rope import rmsnorm_rope, sum_squares
    from megagen.kernels.norm_rope_tile import norm_rope_tile_pool
    from megagen.kernels.residual import gated_residual
    from megagen.kernels.residual_norm import (
        gated_residual_layernorm_affine,
        gated_residual_layernorm_modulate,
    )
    from megagen.kernels.vsa import (
        BlockIndex,
        VSALayout,
        block_mean,
        block_sparse_attention,
        coarse_attention,
        index_from_map,
        map_from_index,
        select_topk,
        tile,
        transpose_index,
        untile,
        vsa_attention,
    )

__all__ = [
    "BlockIndex",
    "VSALayout",
    "bias_gelu_tanh",
    "block_mean",
    "block_sparse_attention",
    "coarse_attention",
    "flow_matching_loss",
    "gated_residual",
    "gated_residual_layernorm_affine",
    "gated_residual_layernorm_modulate",
    "index_from_map",
    "layernorm_affine",
    "layernorm_modulate",
    "map_from_index",
    "norm_rope_tile_pool",
    "rmsnorm_rope",
    "select_topk",
    "status",
    "sum_squares",
    "tile",
    "transpose_index",
    "untile",
    "vsa_attention",
    "vsd_loss",
]

_HOME = {
    "BlockIndex": "vsa",
    "VSALayout": "vsa",
    "bias_gelu_tanh": "bias_gelu",
    "block_mean": "vsa",
    "block_sparse_attention": "vsa",
    "coarse_attention": "vsa",
    "flow_matching_loss": "losses",
    "gated_residual": "residual",
    "gated_residual_layernorm_affine": "residual_norm",
    "gated_residual_layernorm_modulate": "residual_norm",
    "index_from_map": "vsa",
    "layernorm_affine": "layernorm",
    "layernorm_modulate": "layernorm",
    "map_from_index": "vsa",
    "norm_rope_tile_pool": "norm_rope_tile",
    "rmsnorm_rope": "norm_rope",
    "select_topk": "vsa",
    "status": "backend",
    "sum_squares": "norm_rope",
    "tile": "vsa",
    "transpose_index": "vsa",
    "untile": "vsa",
    "vsa_attention": "vsa",
    "vsd_loss": "losses",
}

SPECS = {
    "bias_gelu_tanh": "megagen.kernels.bias_gelu:SPEC",
    "gated_residual": "megagen.kernels.residual:SPEC",
    "layernorm_modulate": "megagen.kernels.layernorm:SPEC",
    "rmsnorm_rope": "megagen.kernels.norm_rope:SPEC",
}
"""Every operation with its reference, cases and sizes: what tests and benchmarks loop over."""

GPU_SPECS = {
    "flow_matching_loss": "megagen.kernels.losses:FLOW_MATCHING_SPEC",
    "gated_residual_layernorm_modulate": "megagen.kernels.residual_norm:SPEC",
    "norm_rope_tile_pool": "megagen.kernels.norm_rope_tile:SPEC",
    "vsd_loss": "megagen.kernels.losses:VSD_SPEC",
}
"""Operations that are one kernel on a GPU only; a CPU composes them, or runs plain torch."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
