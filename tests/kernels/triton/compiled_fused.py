"""The fused operations as machine code: nothing is spilled, lines move in 16-byte pieces."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megagen.kernels.triton import (
    bias_gelu,
    layernorm,
    losses,
    norm_rope,
    norm_rope_tile,
    residual,
    segments,
)
from tests.kernels.triton.compiled import ARCHITECTURES, IS_OLDEST, ONE_SIZE
from tests.kernels.triton.launches import Launch, meta, table

S, B, FRAMES = 32_760, 2, 21
FP32, INT64 = torch.float32, torch.int64
Calls = dict[str, Callable[[], object]]


def of_lines(dim: int) -> Calls:
    """Kernels that hold a whole line, as training launches them.

    ``frames``: a modulation for each frame and sample; ``rows``: for a token's row, all samples.
    """
    x, mean = meta(S, B, dim), meta(S, B, dtype=FP32)
    frames, rows = meta(FRAMES, B, dim, dtype=FP32), meta(5, 1, dim, dtype=FP32)
    row = meta(S, dtype=INT64)
    stats = (mean, mean)
    return {
        "layernorm": lambda: layernorm.forward(x, None, None, frames, frames, None, 1e-6, 1.0),
        "residual_layernorm": lambda: layernorm.forward(x, x, rows, rows, rows, row, 1e-6, 1.0),
        "layernorm_backward": lambda: layernorm.backward(
            x, None, x, None, None, frames, *stats, None, 1.0
        ),
        "residual_layernorm_backward": lambda: layernorm.backward(
            x, x, x, x, rows, rows, *stats, row, 1.0
        ),
        "residual": lambda: residual.forward(x, x, rows, row),
        "residual_backward": lambda: residual.backward(x, x, frames, None),
    }


def of_heads(heads: int, head_dim: int) -> Calls:
    """Norm and rotation, by raster tokens and by blocks; ``reduced``: a sum over ranks is given."""
    fused = meta(S, B, 3 * heads, head_dim)
    x, weight, rstd = fused[:, :, :heads], meta(heads, head_dim), meta(S, B, dtype=FP32)
    turn = (meta(S, head_dim // 2, dtype=FP32),) * 2
    sums, tokens, n = meta(S, B, 1, dtype=FP32), meta(64 * 546, dtype=INT64), heads * head_dim
    slots, means = meta(B, heads, 64 * 546, head_dim), meta(B, heads, 546, head_dim)
    norm, tile = norm_rope, norm_rope_tile
    return {
        "norm_rope": lambda: norm.forward(x, weight, *turn, None, 1e-6, n),
        "norm_rope_backward": lambda: norm.backward(x, x, weight, *turn, None, rstd, n),
        "reduced_norm_rope": lambda: norm.forward(x, weight, *turn, sums, 1e-6, 4 * n),
        "reduced_norm_rope_backward": lambda: norm.backward(x, x, weight, *turn, sums, rstd, 4 * n),
        "sum_squares": lambda: norm.sum_squares(x),
        "norm_rope_tile": lambda: tile.forward(x, weight, *turn, None, tokens, 1e-6, n),
        "norm_rope_tile_backward": lambda: tile.backward(
            slots, means, x, weight, *turn, None, rstd, tokens, n
        ),
        "reduced_norm_rope_tile": lambda: tile.forward(x, weight, *turn, sums, tokens, 1e-6, n),
        "reduced_norm_rope_tile_backward": lambda: tile.backward(
            slots, means, x, weight, *turn, sums, rstd, tokens, n
        ),
        "values_tile": lambda: tile.forward(x, None, None, None, None, tokens, 1e-6, n),
        "values_tile_backward": lambda: tile.backward(
            slots, means, x, None, None, None, None, rstd, tokens, n
        ),
    }


def of_numbers() -> Calls:
    """Kernels that take numbers as they come."""
    hidden, bias = meta(S, B, 8960), meta(8960)
    latent = meta(B, 16, FRAMES, 60, 104)
    each, frame = meta(B, dtype=FP32), meta(B, 1, FRAMES, 1, 1, dtype=FP32)
    loss = meta(dtype=FP32)
    sums = [(meta(5, B, 5120, dtype=FP32), meta(99, B, 5120, dtype=FP32))] * 3
    cut = segments.cut(S, B, 5, B, meta(S, dtype=INT64))
    return {
        "bias_gelu": lambda: bias_gelu.forward(hidden, bias),
        "bias_gelu_backward": lambda: bias_gelu.backward(hidden, hidden, bias),
        "gelu_backward": lambda: bias_gelu.backward(hidden, hidden, None),
        "column_sums": lambda: cut.finish(*sums),
        "flow": lambda: losses.flow_matching(latent, latent, latent, frame),
        "flow_backward": lambda: losses.flow_matching_backward(loss, latent, latent, latent, frame),
        "vsd": lambda: losses.vsd(latent, latent, latent, None, True),
        "vsd_backward": lambda: losses.vsd_backward(loss, latent, latent, latent, each),
    }


EVERYWHERE = table({**of_lines(3072), **of_heads(24, 128), **of_numbers()})
"""On each architecture."""

WIDE = table({**of_lines(5120), **of_heads(40, 128)}, EVERYWHERE.values())
NARROW = table({**of_lines(1536), **of_heads(12, 64)}, EVERYWHERE.values())
ON_HOPPER = [*(("wide", name) for name in WIDE), *(("narrow", name) for name in NARROW)]


def check(launch: Launch, target: int) -> None:
    counts = launch.compile(target)
    assert counts.wide_loads + counts.ldgsts > 0, counts


@pytest.mark.parametrize("target", ARCHITECTURES)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_on_each_architecture(name: str, target: int) -> None:
    check(EVERYWHERE[name], target)


@pytest.mark.skipif(IS_OLDEST, reason=ONE_SIZE)
@pytest.mark.parametrize(("size", "name"), ON_HOPPER)
def test_other_sizes_on_hopper(size: str, name: str) -> None:
    check((WIDE if size == "wide" else NARROW)[name], 90)
