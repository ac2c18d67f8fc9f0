"""Video sparse attention in Triton compiles for every GPU of the table, fits and never spills."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megagen.kernels.triton import (
    vsa_coarse,
    vsa_fine_backward,
    vsa_fine_forward,
    vsa_glue,
    vsa_index,
    vsa_select,
)
from megagen.kernels.triton.vsa_index import Segments
from megagen.kernels.triton.vsa_launch import CONFIGS
from tests.kernels.triton.compiled import ARCHITECTURES, IS_OLDEST, ONE_SIZE
from tests.kernels.triton.launches import Launch, launches, meta, table

H, Q, K, M = 12, 546, 1440, 144
"""Heads, query and key blocks, and places of a list."""

FP32, INT32, INT64 = torch.float32, torch.int32, torch.int64
SIZES = (meta(Q, dtype=INT32), meta(K, dtype=INT32))
SOURCES = {"fine_forward": 3, "fine_dq": 4, "fine_dkv": 4}
"""Tensors that a kernel of the fine stage reads block by block."""


def blocks(number: int, dim: int) -> Tensor:
    return meta(1, H, 64 * number, dim)


def lists(rows: int) -> Segments:
    counts = meta(H * rows, dtype=INT32)
    return Segments(meta(H * rows * M, dtype=INT32), meta(H * rows, dtype=INT64), counts, counts)


def fine(kernel: str, dim: int, target: int) -> Launch:
    """The launch of a kernel of the fine stage as the table has it."""
    config = CONFIGS[kernel, dim, target]
    q, k, lse = blocks(Q, dim), blocks(K, dim), meta(1, H, 64 * Q, dtype=FP32)
    end = (*SIZES, dim**-0.5, config)
    calls: dict[str, Callable[[], object]] = {
        "fine_forward": lambda: vsa_fine_forward.fine_forward(q, k, k, lists(Q), *end),
        "fine_dq": lambda: vsa_fine_backward.fine_dq(q, k, k, q, lse, lse, lists(Q), *end),
        "fine_dkv": lambda: vsa_fine_backward.fine_dkv(q, k, k, q, lse, lse, lists(K), *end),
    }
    (launch,) = launches(calls[kernel])
    return launch


FINE = {key: fine(*key) for key in CONFIGS}


@pytest.mark.parametrize(("kernel", "dim", "target"), CONFIGS, ids=str)
def test_fine_stage(kernel: str, dim: int, target: int) -> None:
    if IS_OLDEST and dim == 64 and target != 90:
        pytest.skip(ONE_SIZE)
    counts = FINE[kernel, dim, target].compile(target)
    if target == 80:
        assert counts.hmma > 0 and counts.ldgsts > 0
    if target == 90:
        assert counts.hgmma > 0
        # each of the two loops prefetches, and the blocks that stay are loaded in bulk too
        assert counts.utmaldg > 2 * SOURCES[kernel], counts


def coarse(dim: int, num_k: int, score_dtype: torch.dtype) -> Callable[[], object]:
    q, k, sizes = meta(1, H, Q, dim), meta(1, H, num_k, dim), meta(num_k, dtype=INT32)
    return lambda: vsa_coarse.coarse_forward(q, k, k, sizes, 144, dim**-0.5, score_dtype)


def of_blocks(dim: int) -> dict[str, Callable[[], object]]:
    """Kernels around the products; tokens and gate lie in a fused projection."""
    x = meta(32_760, 1, 4 * H, dim).transpose(0, 1)[:, :, :H]
    packed = meta(1, 32_760, H, dim)
    slots, means, (sizes, _) = blocks(Q, dim), meta(1, H, Q, dim), SIZES
    to_raster, to_slot = meta(64 * Q, dtype=INT64), meta(32_760, dtype=INT64)
    lse = meta(1, H, 64 * Q, dtype=FP32)
    glue, delta = vsa_glue, vsa_fine_backward.fine_delta
    return {
        "tile_pool": lambda: glue.tile_pool(x, to_raster, sizes),
        "tile_pool_backward": lambda: glue.tile_pool_backward(slots, means, to_slot, sizes),
        "untile": lambda: glue.untile_combine(slots, means, x, to_slot),
        "untile_backward": lambda: glue.untile_combine_backward(packed, means, x, to_raster),
        "untile_ungated": lambda: glue.untile_combine(slots, means, None, to_slot),
        "untile_ungated_backward": lambda: glue.untile_combine_backward(
            packed, means, None, to_raster
        ),
        "means": lambda: vsa_coarse.block_mean(slots, sizes),
        "delta": lambda: delta(slots, slots, lse, None, sizes),
        "delta_of_lse": lambda: delta(slots, slots, lse, lse, sizes),
    }


def of_lists() -> dict[str, Callable[[], object]]:
    idx, num = meta(1, H, Q, M, dtype=INT32), meta(1, H, Q, dtype=INT32)
    scores, long = meta(1, H, Q, K, dtype=FP32), meta(1, H, Q, 4096, dtype=FP32)
    return {
        "parted": lambda: vsa_index.key_blocks_of_queries(idx, num, SIZES[1]),
        "transposed": lambda: vsa_index.transpose_index(idx, num, K),
        "chosen": lambda: vsa_select.select_topk(scores, SIZES[1], M),
        "chosen_of_4096": lambda: vsa_select.select_topk(long, meta(4096, dtype=INT32), M),
    }


EVERYWHERE = table({**of_blocks(128), **of_lists(), "coarse": coarse(128, K, FP32)})
"""On each architecture."""

ON_HOPPER = table(
    {
        **of_blocks(64),
        "coarse_in_bf16": coarse(128, K, torch.bfloat16),
        "coarse_of_4096": coarse(64, 4096, FP32),
    },
    EVERYWHERE.values(),
)
NUMBER_BY_NUMBER = ("parted", "transposed", "chosen")
"""Lists begin anywhere."""


def check(name: str, launch: Launch, target: int) -> None:
    counts = launch.compile(target)
    if name.startswith("coarse"):
        assert target != 90 or counts.hgmma > 0
    elif not name.startswith(NUMBER_BY_NUMBER):
        assert counts.wide_loads > 0
        assert name.startswith(("means", "delta")) or counts.wide_stores > 0


@pytest.mark.parametrize("target", ARCHITECTURES)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_on_each_architecture(name: str, target: int) -> None:
    check(name, EVERYWHERE[name], target)


@pytest.mark.skipif(IS_OLDEST, reason=ONE_SIZE)
@pytest.mark.parametrize("name", ON_HOPPER)
def test_other_sizes_on_hopper(name: str) -> None:
    check(name, ON_HOPPER[name], 90)
