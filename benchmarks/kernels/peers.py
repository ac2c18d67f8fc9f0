"""Other implementations, by import where they are installed.

Written against their documented interfaces: FlexAttention of torch, fastvideo-kernel (Triton, and
ThunderKittens on Hopper), nvidia-cudnn-frontend's block-sparse attention with blocks of 64, and
flash-attn 2, 3 and 4. A peer that fails on a row is reported with its own words, never as a speed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.kernels.arms import Arm, Call, ours, sdpa
from benchmarks.kernels.problem import Problem
from benchmarks.kernels.rows import Row
from megagen.kernels.vsa import BLOCK, index_from_map, map_from_index

_MASK_TOKENS = 4096
"""Beyond so many, a mask of every pair of tokens is too much memory to be of use."""
_FLEX_MODE = "max-autotune-no-cudagraphs"
"""Tiles of its default 128 do not divide blocks of 64; among those it tries some do."""


def for_cpu(row: Row) -> tuple[Arm, ...]:
    """All arms of a row on a CPU."""
    compiled = "torch compiles FlexAttention for a CPU without a backward"
    slow = "its forward tells enough of what a mask costs"
    return (
        *ours("cpu", row),
        Arm("SDPA", "dense", "bhsd", sdpa),
        Arm(
            "SDPA, mask",
            "sparse",
            "slots",
            sdpa_masked,
            lacks=_too_long_for_a_mask,
            no_backward=slow,
        ),
        Arm("FlexAttention", "sparse", "slots", flex, no_backward=compiled),
    )


def for_gpu(row: Row) -> tuple[Arm, ...]:
    """All arms of a row on a GPU."""
    cudnn, flash = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
    fastvideo = "fastvideo_kernel"
    return (
        *ours("cuda", row),
        *ours("triton", row),
        Arm("SDPA cuDNN", "dense", "bhsd", partial(sdpa, backends=(cudnn,))),
        Arm("SDPA flash", "dense", "bhsd", partial(sdpa, backends=(flash,))),
        *_flash_attn(),
        Arm("FlexAttention", "sparse", "slots", flex),
        Arm(
            "fastvideo Triton",
            "sparse",
            "slots",
            partial(fastvideo_sparse, operator="block_sparse_attn_triton"),
            needs=(fastvideo,),
        ),
        Arm(
            "fastvideo TK",
            "sparse",
            "slots",
            partial(fastvideo_sparse, operator="block_sparse_attn_sm90"),
            needs=(fastvideo,),
        ),
        Arm("fastvideo, whole layer", "layer", "bshd", fastvideo_layer, needs=(fastvideo,)),
        Arm("cuDNN BSA", "sparse", "slots", cudnn_sparse, needs=("cudnn", "cutlass")),
    )


def _flash_attn() -> tuple[Arm, ...]:
    modules = {
        "flash-attn 2": "flash_attn.flash_attn_interface",
        "flash-attn 3": "flash_attn_interface",
        "flash-attn 4": "flash_attn.cute",
    }
    return tuple(
        Arm(name, "dense", "bshd", partial(flash_attn, module=module), needs=(module,))
        for name, module in modules.items()
    )


def flash_attn(problem: Problem, *, module: str) -> Call:
    """``flash_attn_func`` of one of the packages; some return the LSE too."""
    function = importlib.import_module(module).flash_attn_func
    leaves = problem.leaves("bshd")

    def run() -> Tensor:
        found = function(*leaves)
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out

    return Call(run, leaves)


def flex(problem: Problem) -> Call:
    """FlexAttention, compiled; blocks of 64, full ones as such and ragged ones with a mask."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    leaves, n = problem.leaves("slots"), problem.row.layout.num_blocks
    sizes = problem.sizes_n
    is_listed, is_full = map_from_index(problem.index, n), sizes == BLOCK
    # different tensors, even where both are empty: the compiler tells arguments by their memory
    full, ragged = (index_from_map(is_listed & kind) for kind in (is_full, ~is_full))
    is_ragged = not bool(is_full.all())
    mask = BlockMask.from_kv_blocks(
        ragged.num_BHq.contiguous(),
        ragged.idx_BHqM.contiguous(),
        full.num_BHq.contiguous(),
        full.idx_BHqM.contiguous(),
        BLOCK_SIZE=BLOCK,
        mask_mod=(lambda b, h, q, k: k % BLOCK < sizes[k // BLOCK]) if is_ragged else None,
    )
    on_cpu = problem.device.type == "cpu"
    compiled = torch.compile(flex_attention, mode=None if on_cpu else _FLEX_MODE)
    if on_cpu:
        leaves = tuple(x.detach() for x in leaves)
    q, k, v = leaves

    def run() -> Tensor:
        out: Tensor = compiled(q, k, v, block_mask=mask)
        return out

    return Call(run, leaves)


def sdpa_masked(problem: Problem) -> Call:
    """torch's attention with the same lists as a mask of tokens."""
    leaves = problem.leaves("slots")
    is_listed = map_from_index(problem.index, problem.row.layout.num_blocks)
    is_real = torch.arange(BLOCK, device=problem.device) < problem.sizes_n[:, None]
    pairs = is_listed.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
    bias = torch.zeros(pairs.shape, device=problem.device, dtype=problem.q.dtype)
    bias.masked_fill_(~(pairs & is_real.flatten()), -torch.inf)
    q, k, v = leaves
    return Call(lambda: scaled_dot_product_attention(q, k, v, attn_mask=bias), leaves)


def _too_long_for_a_mask(row: Row, device: torch.device) -> str | None:
    tokens = row.layout.padded
    return None if tokens <= _MASK_TOKENS else f"a mask of {tokens} x {tokens} is too large"


def fastvideo_sparse(problem: Problem, *, operator: str) -> Call:
    """fastvideo-kernel's operators on lists; its backward transposes them itself."""
    module = importlib.import_module("fastvideo_kernel.block_sparse_attn")
    function: Callable[..., tuple[Tensor, Tensor]] = getattr(module, operator)
    leaves, index = problem.leaves("slots"), problem.index
    lists = (index.idx_BHqM, index.num_BHq, problem.sizes_n)
    return Call(lambda: function(*leaves, *lists)[0], leaves)


def fastvideo_layer(problem: Problem) -> Call:
    """fastvideo-kernel's ``video_sparse_attn``, with tiling before and after it."""
    kernel = importlib.import_module("fastvideo_kernel")
    layout, topk = problem.row.layout, problem.row.selected
    leaves = problem.leaves("bshd", has_gate=True)
    sizes, to_slot = problem.sizes_n, layout.tables(problem.device).raster_to_slot_S

    def tiled(x_BSHD: Tensor) -> Tensor:
        slots = x_BSHD.new_zeros(1, layout.padded, *x_BSHD.shape[2:])
        return slots.index_copy(1, to_slot, x_BSHD).transpose(1, 2).contiguous()

    def run() -> Tensor:
        q, k, v, gate = map(tiled, leaves)
        # block_size: the tile; an int would be taken as the side of a cube
        out = kernel.video_sparse_attn(
            q, k, v, sizes, sizes, topk, block_size=(4, 4, 4), compress_attn_weight=gate
        )
        return out.transpose(1, 2).index_select(1, to_slot)

    return Call(run, leaves, ("dq", "dk", "dv", "dgate"), _fastvideo_choice(problem, tiled))


def _fastvideo_choice(problem: Problem, tiled: Callable[[Tensor], Tensor]) -> Any:
    """The lists that ``video_sparse_attn`` chooses, by its own functions."""
    fused = importlib.import_module("fastvideo_kernel.triton_kernels.fused_compress_topk")
    q, k = (
        fused.fused_block_mean(tiled(x), problem.sizes_n, BLOCK) for x in (problem.q, problem.k)
    )
    scores = q @ k.mT / q.size(-1) ** 0.5
    found = index_from_map(fused.fused_topk_mask(scores, problem.row.selected).bool())
    width = int(found.num_BHq.max())
    return type(found)(found.idx_BHqM[..., :width].contiguous(), found.num_BHq)


def cudnn_sparse(problem: Problem) -> Call:
    """The CuTe kernels of nvidia-cudnn-frontend, blocks of 64; autograd is ours."""
    bsa = importlib.import_module("cudnn").BSA
    leaves, index, sizes = problem.leaves("slots"), problem.index, problem.sizes_n
    options = {
        "block_sparse_num": problem.row.selected,
        "block_sizes": sizes,
        "sparse_block_size": BLOCK,
    }

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, lse = bsa.block_sparse_attention_forward(q, k, v, index.idx_BHqM, **options)
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
            given = (grads[0].contiguous(), *ctx.saved_tensors, index.idx_BHqM)
            dq, dk, dv = bsa.block_sparse_attention_backward(*given, **options)
            return dq, dk, dv

    def run() -> Tensor:
        out: Tensor = Attention.apply(*leaves)
        return out

    return Call(run, leaves)
