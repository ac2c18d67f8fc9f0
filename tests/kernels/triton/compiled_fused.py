"""The fused operations as machine code: nothing is spilled, lines move in 16-byte pieces."""

from __future__ import annotations

from typing import Any

import pytest

from megagen.kernels.triton import (
    bias_gelu,
    layernorm,
    losses,
    norm_rope,
    norm_rope_tile,
    residual,
    segments,
)
from megagen.kernels.triton.launch import block_of, warps_of
from tests.kernels.triton.compiled import ARCHITECTURES, Counts, compile_kernel

TABLES = {"ORDER": "*i64", "OFFSETS": "*i64", "MORE_ROW": "*i64", "MORE_BEGIN": "*i64"}
POINTERS: dict[str, str] = {
    **TABLES,
    **dict.fromkeys(("X", "Y", "OUT", "H", "DH", "DOUT", "DX", "DY", "BIAS", "WEIGHT"), "*bf16"),
    **dict.fromkeys(("GATE", "SCALE", "SHIFT", "MEAN", "RSTD", "COS", "SIN"), "*fp32"),
    **dict.fromkeys(("DGATE", "MORE_GATE", "DSCALE", "MORE_SCALE"), "*fp32"),
    **dict.fromkeys(("DSHIFT", "MORE_SHIFT", "DWEIGHT", "MORE_WEIGHT"), "*fp32"),
    **dict.fromkeys(("DBIAS", "MORE_BIAS", "TOTAL", "SQUARES", "DSQUARES"), "*fp32"),
    **dict.fromkeys(("A", "MORE_A", "B", "MORE_B", "C", "MORE_C"), "*fp32"),
    **dict.fromkeys(("PREDICTION", "X0", "NOISE", "REAL", "FAKE", "GRAD", "DMEAN"), "*bf16"),
    **dict.fromkeys(("PARTIAL", "DLOSS"), "*fp32"),
    **dict.fromkeys(("ROWS", "TOKENS"), "*i64"),
    **dict.fromkeys(("eps", "factor"), "fp32"),
}
SMALL = {
    *("batch", "run", "num_rows", "lanes", "per_row", "mod_batch", "num_lines", "num_features"),
    *("heads", "blocks", "frames"),
}
"""Integers that need not divide by 16; sizes and strides do."""


def compiled(kernel: Any, target: int, num_warps: int, constexprs: dict[str, Any]) -> Counts:
    """The kernel with the types of training in bf16."""
    free = [name for name in kernel.arg_names if name not in constexprs]
    signature = {name: POINTERS.get(name, "i32") for name in free}
    sizes = [name for name in free if signature[name] == "i32" and name not in SMALL]
    options = {"num_warps": num_warps}
    return compile_kernel(kernel, signature, constexprs, target, options, sizes).check()


def line(kernel: Any, target: int, dim: int, **constexprs: Any) -> Counts:
    """A kernel that holds a whole line of ``dim`` numbers."""
    block = block_of(dim)
    warps = warps_of(block, 8 if "STAGES" in constexprs else 16)
    return compiled(kernel, target, warps, {"BLOCK": block, **constexprs})


BACKWARD = {"SIZE": segments.SEGMENT, "STAGES": 3}
NO_TABLES = dict.fromkeys(TABLES)
ALONE = dict.fromkeys(("Y", "GATE"))
ALONE_BACK = dict.fromkeys(("DOUT", "Y", "GATE", "DY", "DGATE", "MORE_GATE"))

KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "layernorm": (layernorm.forward_kernel, {"ONE": 1.0, "ROWS": None, **ALONE}),
    "residual_layernorm": (layernorm.forward_kernel, {"ONE": 1.0}),
    "layernorm_backward": (
        layernorm.backward_kernel,
        {"ONE": 1.0, **BACKWARD, **NO_TABLES, **ALONE_BACK},
    ),
    "residual_layernorm_backward": (layernorm.backward_kernel, {"ONE": 1.0, **BACKWARD}),
    "stream_layernorm_backward": (
        layernorm.backward_kernel,
        {"ONE": 1.0, **BACKWARD, **{k: v for k, v in ALONE_BACK.items() if k != "DOUT"}},
    ),
    "residual": (residual.forward_kernel, {}),
    "residual_backward": (residual.backward_kernel, {**BACKWARD, **NO_TABLES}),
    "norm_rope": (norm_rope.forward_kernel, {"K": 128, "SQUARES": None}),
    "norm_rope_backward": (norm_rope.backward_kernel, {"K": 128, "DSQUARES": None, **BACKWARD}),
    "sum_squares": (norm_rope.squares_kernel, {"K": 128}),
}


SIZES = [(name, 5120) for name in KERNELS]
SIZES += [(name, 1536) for name in KERNELS if name.endswith("backward")]


@pytest.mark.parametrize(("name", "dim"), SIZES)
def test_lines_on_sm90(name: str, dim: int) -> None:
    kernel, constexprs = KERNELS[name]
    if name == "residual_layernorm_backward":
        dim = min(dim, layernorm._LARGEST)  # beyond, two other kernels of the table are launched
    if dim > 4096 and "STAGES" in constexprs:
        constexprs = {**constexprs, "STAGES": 2}
    counts = line(kernel, 90, dim, **constexprs)
    assert counts.wide_loads + counts.ldgsts > 0


@pytest.mark.parametrize("target", [a for a in ARCHITECTURES if a != 90])
@pytest.mark.parametrize("name", ["residual_layernorm_backward", "norm_rope_backward"])
def test_lines_elsewhere(name: str, target: int) -> None:
    kernel, constexprs = KERNELS[name]
    line(kernel, target, 3072, **constexprs)


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_bias_gelu(target: int) -> None:
    tile = {"LINES": bias_gelu._LINES, "COLUMNS": bias_gelu._COLUMNS}
    compiled(bias_gelu.forward_kernel, target, 8, tile)
    counts = compiled(bias_gelu.backward_kernel, target, 8, {**tile, **BACKWARD})
    assert counts.wide_loads + counts.ldgsts > 0


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_column_sums(target: int) -> None:
    compiled(segments.add_more, target, 4, {"COLUMNS": 128, "LINES": 32})


@pytest.mark.parametrize(("head_dim", "given"), [(64, "own"), (128, "own"), (128, "reduced")])
def test_norm_rope_tile(head_dim: int, given: str) -> None:
    tile = {"K": head_dim, "LANES": head_dim, "SLOTS": norm_rope_tile.SLOTS}
    squares = {"SQUARES": None} if given == "own" else {}
    counts = compiled(norm_rope_tile.forward_kernel, 90, 8, {**tile, **squares})
    assert counts.wide_loads > 0 and counts.wide_stores > 0
    squares = {"DSQUARES": None} if given == "own" else {}
    counts = compiled(norm_rope_tile.backward_kernel, 90, 8, {**tile, **squares})
    assert counts.wide_loads > 0 and counts.wide_stores > 0


@pytest.mark.parametrize("target", [80, 100])
def test_norm_rope_tile_elsewhere(target: int) -> None:
    tile = {"K": 128, "LANES": 128, "SLOTS": norm_rope_tile.SLOTS}
    compiled(norm_rope_tile.backward_kernel, target, 8, {**tile, "DSQUARES": None})


@pytest.mark.parametrize(
    "name", ["flow_kernel", "flow_backward_kernel", "vsd_kernel", "vsd_backward_kernel"]
)
def test_losses(name: str) -> None:
    counts = compiled(getattr(losses, name), 90, 8, {"PIECE": losses._PIECE})
    assert counts.wide_loads > 0
