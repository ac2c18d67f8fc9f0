"""Losses on latents in one pass: flow matching, and score distillation with its normaliser.

    flow_matching_loss = mean(w (v - (noise - x0))^2)       Lipman et al., arXiv 2210.02747, eq. 23
    vsd_loss = mean(g^2) / 2,   g = h (fake - real) / (mean|x - real| + 1e-6),   d vsd / dx = g / N
                                                    DMD, Yin et al., arXiv 2311.18828, eq. 7 and 8

Nothing latent-sized is written but the gradient: targets, residuals and g exist in registers only.
Sums are fp32 in an order that depends on shapes alone. On a CPU the formulas run in plain torch.

Legend: B samples, T frames, N numbers of all samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megagen.kernels.backend import math_dtype, serves_triton, triton_kernels
from megagen.kernels.spec import Case, Spec

SMALLEST_DISTANCE = 1e-6


def flow_matching_loss(
    prediction: Tensor, x0: Tensor, noise: Tensor, weight: Tensor | None = None
) -> Tensor:
    """``mean(weight (prediction - (noise - x0))^2)``; gradient goes to the prediction alone.

    Args:
        prediction: velocities ``[B, ...]``, as ``[B, C, T, H, W]``.
        x0, noise: like it.
        weight: ``[B]``, or a frame's ``[B, 1, T, 1, 1]``; None: 1.

    Returns:
        Scalar fp32.

    Raises:
        ValueError: shapes do not fit together.
    """
    _check(prediction, x0=x0, noise=noise)
    if weight is None:
        weight = prediction.new_ones(1, dtype=torch.float32).expand(len(prediction))
    _check_weight(prediction, weight)
    if serves_triton(prediction, x0, noise, weight):
        loss: Tensor = _flow_matching(prediction, x0, noise, weight)
        return loss
    return flow_matching_loss_reference(prediction, x0, noise, weight)


def flow_matching_loss_reference(
    prediction: Tensor, x0: Tensor, noise: Tensor, weight: Tensor | None = None
) -> Tensor:
    """The formula in plain torch."""
    dtype = math_dtype(prediction)
    with torch.no_grad():
        target = noise.to(dtype) - x0.to(dtype)
    square = (prediction.to(dtype) - target).square()
    return (square if weight is None else _spread(weight.to(dtype), square) * square).mean()


def vsd_loss(
    x: Tensor, real: Tensor, fake: Tensor, scale: Tensor | None = None, *, per_sample: bool = True
) -> Tensor:
    """Score distillation: ``mean(g^2) / 2``, whose gradient by ``x`` is ``g / N``.

    ``g = scale (fake - real) / (mean|x - real| + 1e-6)``: the direction in which the two scores
    differ, on a scale that does not depend on the noise level. Only ``x`` gets a gradient.

    Args:
        x: the student's samples ``[B, ...]``.
        real: the teacher's x0 at the re-noised samples, like ``x``.
        fake: the critic's, like ``x``.
        scale: ``[B]`` fp32; None: 1.
        per_sample: take the mean of each sample, else of all.

    Returns:
        Scalar fp32.

    Raises:
        ValueError: shapes do not fit together.
    """
    _check(x, real=real, fake=fake)
    if scale is not None and scale.shape != x.shape[:1]:
        raise ValueError(f"scale must be [{len(x)}], found {tuple(scale.shape)}")
    if serves_triton(x, real, fake, scale):
        loss: Tensor = _vsd(x, real, fake, scale, per_sample)[0]
        return loss
    return vsd_loss_reference(x, real, fake, scale, per_sample=per_sample)


def vsd_loss_reference(
    x: Tensor, real: Tensor, fake: Tensor, scale: Tensor | None = None, *, per_sample: bool = True
) -> Tensor:
    """The formula in plain torch."""
    dtype = math_dtype(x)
    with torch.no_grad():
        axes = tuple(range(1 if per_sample else 0, x.dim()))
        distance = (x.to(dtype) - real.to(dtype)).abs().mean(axes, keepdim=True)
        residual = (fake.to(dtype) - real.to(dtype)) / (distance + SMALLEST_DISTANCE)
        if scale is not None:
            residual *= _spread(scale.to(dtype), residual)
    moved = x.to(dtype) - x.to(dtype).detach()  # zero, with the gradient of x
    return residual.square().mean() / 2 + (moved * residual).mean()


def _check(first: Tensor, **others: Tensor) -> None:
    for name, value in others.items():
        if value.shape != first.shape:
            raise ValueError(f"{name} must be {tuple(first.shape)}, found {tuple(value.shape)}")


def _check_weight(like: Tensor, weight: Tensor) -> None:
    ok = weight.shape == like.shape[:1]
    if not ok and like.dim() > 2 and weight.dim() == like.dim():
        ok = weight.shape == (len(like), 1, like.shape[2], *[1] * (like.dim() - 3))
    if not ok:
        raise ValueError(
            f"weight must be [{len(like)}] or [B, 1, T, 1, 1] for {tuple(like.shape)}, "
            f"found {tuple(weight.shape)}"
        )


def _spread(weight: Tensor, like: Tensor) -> Tensor:
    return weight.reshape(*weight.shape, *[1] * (like.dim() - weight.dim()))


@torch.library.custom_op("megagen::flow_matching_loss", mutates_args=())
def _flow_matching(prediction: Tensor, x0: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
    loss: Tensor = triton_kernels("losses").flow_matching(prediction, x0, noise, weight)
    return loss


@_flow_matching.register_fake
def _(prediction: Tensor, x0: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
    return prediction.new_empty((), dtype=torch.float32)


@torch.library.custom_op("megagen::flow_matching_loss_backward", mutates_args=())
def _flow_matching_backward(
    dloss: Tensor, prediction: Tensor, x0: Tensor, noise: Tensor, weight: Tensor
) -> Tensor:
    backward = triton_kernels("losses").flow_matching_backward
    grad: Tensor = backward(dloss, prediction, x0, noise, weight)
    return grad


@_flow_matching_backward.register_fake
def _(dloss: Tensor, prediction: Tensor, x0: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(prediction, memory_format=torch.contiguous_format)


_flow_matching.register_autograd(
    lambda ctx, dloss: (_flow_matching_backward(dloss, *ctx.saved_tensors), None, None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.library.custom_op("megagen::vsd_loss", mutates_args=())
def _vsd(
    x: Tensor, real: Tensor, fake: Tensor, scale: Tensor | None, per_sample: bool
) -> tuple[Tensor, Tensor]:
    made: tuple[Tensor, Tensor] = triton_kernels("losses").vsd(x, real, fake, scale, per_sample)
    return made


@_vsd.register_fake
def _(
    x: Tensor, real: Tensor, fake: Tensor, scale: Tensor | None, per_sample: bool
) -> tuple[Tensor, Tensor]:
    loss = x.new_empty((), dtype=torch.float32)
    return loss, x.new_empty(len(x), dtype=torch.float32)


@torch.library.custom_op("megagen::vsd_loss_backward", mutates_args=())
def _vsd_backward(dloss: Tensor, x: Tensor, real: Tensor, fake: Tensor, weight_B: Tensor) -> Tensor:
    grad: Tensor = triton_kernels("losses").vsd_backward(dloss, x, real, fake, weight_B)
    return grad


@_vsd_backward.register_fake
def _(dloss: Tensor, x: Tensor, real: Tensor, fake: Tensor, weight_B: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:3], output[1])


def _backward(ctx: Any, dloss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return _vsd_backward(dloss, *ctx.saved_tensors), None, None, None, None


_vsd.register_autograd(_backward, setup_context=_save)


def _latents(case: Case, generator: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    shape = (case["B"], 4, case["T"], case["H"], case["H"])
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


def _make_flow(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    prediction, x0, noise = _latents(case, generator, dtype)
    weights = {
        0: None,
        1: torch.rand(case["B"], generator=generator),
        2: torch.rand((case["B"], 1, case["T"], 1, 1), generator=generator),
    }
    return {"prediction": prediction, "x0": x0, "noise": noise, "weight": weights[case["weight"]]}


def _make_vsd(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    x, real, fake = _latents(case, generator, dtype)
    scale = torch.rand(case["B"], generator=generator) if case["scale"] else None
    per_sample = bool(case["per_sample"])
    return {"x": x, "real": real, "fake": fake, "scale": scale, "per_sample": per_sample}


_BENCH = {"B": 1, "T": 21, "H": 256}

FLOW_MATCHING_SPEC = Spec(
    name="flow_matching_loss",
    function=flow_matching_loss,
    reference=flow_matching_loss_reference,
    make=_make_flow,
    differentiable=("prediction",),
    cases=(
        {"B": 2, "T": 3, "H": 21, "weight": 2},
        {"B": 3, "T": 1, "H": 40, "weight": 1},
        {"B": 1, "T": 2, "H": 5, "weight": 0},
    ),
    bench_case={**_BENCH, "weight": 1},
    bytes=lambda case, size: 3 * 4 * case["B"] * case["T"] * case["H"] ** 2 * size,
)

VSD_SPEC = Spec(
    name="vsd_loss",
    function=vsd_loss,
    reference=vsd_loss_reference,
    make=_make_vsd,
    differentiable=("x",),
    cases=(
        {"B": 2, "T": 3, "H": 21, "scale": 1, "per_sample": 1},
        {"B": 3, "T": 1, "H": 40, "scale": 0, "per_sample": 0},
    ),
    bench_case={**_BENCH, "scale": 0, "per_sample": 1},
    bytes=lambda case, size: 3 * 4 * case["B"] * case["T"] * case["H"] ** 2 * size,
)
