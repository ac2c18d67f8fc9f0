"""Losses on latents: one pass to sums of pieces, which are added in order, one to the gradient.

Legend: B samples, n numbers of a sample, T frames, P pieces of a sample.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagen.kernels.losses import SMALLEST_DISTANCE
from megagen.kernels.triton.launch import on_device_of

_PIECE = 4096
_WARPS = 8


@triton.jit
def piece_of(size, PIECE: tl.constexpr):
    """Sample, numbers of this program's piece, their places in the tensor, and the mask."""
    sample = tl.program_id(1)
    numbers = tl.program_id(0).to(tl.int64) * PIECE + tl.arange(0, PIECE)
    return sample, numbers, sample.to(tl.int64) * size + numbers, numbers < size


@triton.jit
def weighted_residual(PREDICTION, X0, NOISE, WEIGHT, size, frames, frame_size, PIECE: tl.constexpr):
    """``v - (noise - x0)`` of a piece, its weights, its places and mask."""
    sample, numbers, at, keep = piece_of(size, PIECE)
    v = tl.load(PREDICTION + at, mask=keep, other=0.0).to(tl.float32)
    noise = tl.load(NOISE + at, mask=keep, other=0.0).to(tl.float32)
    residual = v - (noise - tl.load(X0 + at, mask=keep, other=0.0).to(tl.float32))
    frame = sample * frames + (numbers // frame_size) % frames
    return residual, tl.load(WEIGHT + frame, mask=keep, other=0.0).to(tl.float32), at, keep


@triton.jit
def flow_kernel(
    PREDICTION, X0, NOISE, WEIGHT, PARTIAL, size, frames, frame_size, PIECE: tl.constexpr
):
    residual, weight, _, _ = weighted_residual(
        PREDICTION, X0, NOISE, WEIGHT, size, frames, frame_size, PIECE
    )
    at = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(PARTIAL + at, tl.sum(weight * residual * residual, 0))


@triton.jit
def flow_backward_kernel(
    PREDICTION,
    X0,
    NOISE,
    WEIGHT,
    DLOSS,
    GRAD,
    size,
    frames,
    frame_size,
    factor,
    PIECE: tl.constexpr,
):
    residual, weight, at, keep = weighted_residual(
        PREDICTION, X0, NOISE, WEIGHT, size, frames, frame_size, PIECE
    )
    grad = residual * weight * (tl.load(DLOSS).to(tl.float32) * factor)
    tl.store(GRAD + at, grad.to(GRAD.dtype.element_ty), mask=keep)


@triton.jit
def vsd_kernel(X, REAL, FAKE, PARTIAL, size, PIECE: tl.constexpr):
    _, _, at, keep = piece_of(size, PIECE)
    x = tl.load(X + at, mask=keep, other=0.0).to(tl.float32)
    real = tl.load(REAL + at, mask=keep, other=0.0).to(tl.float32)
    gap = tl.load(FAKE + at, mask=keep, other=0.0).to(tl.float32) - real
    to = PARTIAL + 2 * (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0))
    tl.store(to, tl.sum(tl.abs(x - real), 0))
    tl.store(to + 1, tl.sum(gap * gap, 0))


@triton.jit
def vsd_backward_kernel(REAL, FAKE, WEIGHT, DLOSS, GRAD, size, factor, PIECE: tl.constexpr):
    sample, _, at, keep = piece_of(size, PIECE)
    gap = tl.load(FAKE + at, mask=keep, other=0.0).to(tl.float32)
    gap -= tl.load(REAL + at, mask=keep, other=0.0).to(tl.float32)
    slope = tl.load(WEIGHT + sample) * (tl.load(DLOSS).to(tl.float32) * factor)
    tl.store(GRAD + at, (gap * slope).to(GRAD.dtype.element_ty), mask=keep)


def _grid(x: Tensor) -> tuple[int, int]:
    return triton.cdiv(x[0].numel(), _PIECE), len(x)


def _frames(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """Numbers of a sample, weights of a sample, and numbers that lie side by side in a frame."""
    frames = weight[0].numel()
    return x[0].numel(), frames, x[0].numel() if frames == 1 else x[0, 0, 0].numel()


def flow_matching(prediction: Tensor, x0: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
    """The loss, fp32; weight ``[B]`` or ``[B, 1, T, 1, 1]``."""
    given = tuple(t.contiguous() for t in (prediction, x0, noise, weight))
    partial = prediction.new_empty(_grid(prediction), dtype=torch.float32)
    with on_device_of(prediction):
        flow_kernel[_grid(prediction)](
            *(*given, partial, *_frames(prediction, weight)), PIECE=_PIECE, num_warps=_WARPS
        )
    return partial.sum() / prediction.numel()


def flow_matching_backward(
    dloss: Tensor, prediction: Tensor, x0: Tensor, noise: Tensor, weight: Tensor
) -> Tensor:
    """The gradient of the prediction, in its type."""
    given = tuple(t.contiguous() for t in (prediction, x0, noise, weight))
    grad = torch.empty_like(given[0])
    with on_device_of(prediction):
        flow_backward_kernel[_grid(prediction)](
            *(*given, dloss, grad, *_frames(prediction, weight), 2.0 / prediction.numel()),
            PIECE=_PIECE,
            num_warps=_WARPS,
        )
    return grad


def vsd(
    x: Tensor, real: Tensor, fake: Tensor, scale: Tensor | None, per_sample: bool
) -> tuple[Tensor, Tensor]:
    """The loss, and each sample's factor of ``fake - real``, ``[B]``; both fp32."""
    given = tuple(t.contiguous() for t in (x, real, fake))
    pieces, batch = _grid(x)
    partial = x.new_empty(batch, pieces, 2, dtype=torch.float32)
    with on_device_of(x):
        vsd_kernel[_grid(x)](*given, partial, x[0].numel(), PIECE=_PIECE, num_warps=_WARPS)
    distance, square = partial.sum(1).unbind(1)
    mean = distance / x[0].numel()
    mean = mean if per_sample else mean.mean().expand(batch)
    weight = 1 / (mean + SMALLEST_DISTANCE)
    weight = weight if scale is None else weight * scale.float()
    return (weight.square() * square).sum() / (2 * x.numel()), weight


def vsd_backward(dloss: Tensor, x: Tensor, real: Tensor, fake: Tensor, weight: Tensor) -> Tensor:
    """The gradient of ``x``, in its type; weight from the forward."""
    grad = x.new_empty(x.shape)
    with on_device_of(x):
        vsd_backward_kernel[_grid(x)](
            *(real.contiguous(), fake.contiguous(), weight, dloss, grad, x[0].numel()),
            *(1.0 / x.numel(),),
            PIECE=_PIECE,
            num_warps=_WARPS,
        )
    return grad
