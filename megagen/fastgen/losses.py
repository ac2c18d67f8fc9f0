"""The losses of distribution matching and adversarial distillation, without any state.

Each takes tensors and gives a scalar; none knows a network, an optimizer or a process. Latents are
``[B, ...]`` of any number of axes (``[B, C, T, H, W]`` for video), ``t`` is ``[B]`` or per frame
``[B, 1, T, 1, 1]``.

Papers: DMD2, Yin et al., arXiv 2405.14867; f-distill, Xu et al., arXiv 2502.15681; approximate R1,
Lin et al., arXiv 2501.08316.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megagen.fastgen.utils import expand_like

__all__ = [
    "dsm_loss",
    "f_divergence_weight",
    "gan_disc_loss",
    "gan_gen_loss",
    "r1_loss",
    "vsd_loss",
    "vsd_residual",
]

SMALLEST_DISTANCE = 1e-6
LARGEST_LOGIT = 10.0

_RATIO_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rkl": torch.ones_like,
    "kl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "sf": lambda r: 1 / (1 + r),
    "neyman": lambda r: 1 / r,
    "sh": torch.sqrt,
    "jf": lambda r: 1 + r,
}


class _SquaredResidual(torch.autograd.Function):
    """``factor * mean(residual^2)`` as a function of ``prediction = target + residual``.

    The residual is the one latent-sized tensor that is kept, and it becomes the gradient.
    """

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, residual: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(residual)
        ctx.dtype, ctx.slope = prediction.dtype, 2 * factor / residual.numel()
        wide = torch.promote_types(residual.dtype, torch.float32)
        norm = torch.linalg.vector_norm(residual, dtype=wide)
        return (norm.square() * (factor / residual.numel())).to(residual.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (residual,) = ctx.saved_tensors
        return (residual * (gradient * ctx.slope)).to(ctx.dtype), None, None


def dsm_loss(
    pred_type: str,
    net_pred: Tensor,
    *,
    x0: Tensor | None = None,
    eps: Tensor | None = None,
    t: Tensor | None = None,
    alpha_fn: Callable[[Tensor], Tensor] | None = None,
    sigma_fn: Callable[[Tensor], Tensor] | None = None,
    fp32: bool = False,
) -> Tensor:
    """Denoising score matching: the mean square distance of a prediction to its target.

    Vincent 2011; in the velocity form Lipman et al., arXiv 2210.02747, eq. 23. The target is ``x0``
    for ``x0``, ``eps`` for ``eps``, ``eps - x0`` for ``flow`` and
    ``alpha(t) eps - sigma(t) x0`` for ``v`` (Salimans and Ho, arXiv 2202.00512).

    Args:
        pred_type: ``x0``, ``eps``, ``v`` or ``flow``.
        net_pred: the network's prediction in that space, ``[B, ...]``.
        x0: clean sample, like ``net_pred``; for all but ``eps``.
        eps: the noise that was added, like ``net_pred``; for all but ``x0``.
        t: ``[B]`` or ``[B, 1, T, 1, 1]`` in [0, 1]; for ``v``.
        alpha_fn: t -> weight of the data; for ``v``.
        sigma_fn: t -> weight of the noise; for ``v``.
        fp32: subtract and average in float32 whatever ``net_pred`` is; gradient then goes to
            ``net_pred`` alone.

    Returns:
        Scalar >= 0, the mean over all elements, in net_pred's dtype (float32 with ``fp32``).

    Raises:
        AssertionError: a tensor that ``pred_type`` needs is missing.
        ValueError: unknown ``pred_type``.
    """
    parts = _dsm_target(pred_type, x0, eps, t, alpha_fn, sigma_fn)
    if not fp32:
        terms = [value if scale is None else scale * value for scale, value in parts]
        return F.mse_loss(net_pred, terms[0] if len(terms) == 1 else terms[0] - terms[1])
    with torch.no_grad():
        wide = torch.promote_types(net_pred.dtype, torch.float32)
        residual = net_pred.to(wide, copy=True)
        for sign, (scale, value) in zip((-1, 1), parts, strict=False):
            one = residual.new_ones(()) if scale is None else scale.to(wide)
            residual.addcmul_(value, one, value=sign)
    return _SquaredResidual.apply(net_pred, residual, 1.0)


def _dsm_target(
    pred_type: str,
    x0: Tensor | None,
    eps: Tensor | None,
    t: Tensor | None,
    alpha_fn: Callable[[Tensor], Tensor] | None,
    sigma_fn: Callable[[Tensor], Tensor] | None,
) -> list[tuple[Tensor | None, Tensor]]:
    """The target, or the two (weight, tensor) whose difference it is; no weight is 1."""
    if pred_type not in ("x0", "eps", "v", "flow"):
        raise ValueError(f"unknown pred_type {pred_type!r}; take 'x0', 'eps', 'v' or 'flow'")
    if pred_type == "x0":
        assert x0 is not None, "pred_type 'x0' needs x0"
        return [(None, x0)]
    assert eps is not None, f"pred_type {pred_type!r} needs eps"
    if pred_type == "eps":
        return [(None, eps)]
    assert x0 is not None, f"pred_type {pred_type!r} needs x0"
    if pred_type == "flow":
        return [(None, eps), (None, x0)]
    assert t is not None, "pred_type 'v' needs t"
    assert alpha_fn is not None and sigma_fn is not None, "pred_type 'v' needs alpha_fn, sigma_fn"
    alpha, sigma = (expand_like(fn(t), x0).to(x0) for fn in (alpha_fn, sigma_fn))
    return [(alpha, eps), (sigma, x0)]


def vsd_loss(
    gen_data: Tensor,
    teacher_x0: Tensor,
    fake_score_x0: Tensor,
    additional_scale: Tensor | None = None,
    *,
    normalizer: Literal["sample", "global"] = "sample",
    fp32: bool = False,
) -> Tensor:
    """Variational score distillation: a scalar whose gradient moves samples to the teacher's.

    DMD, Yin et al., arXiv 2311.18828, eq. 7 and 8. With ``g = vsd_residual(...)`` the value is
    ``mean(g^2) / 2`` and the gradient ``d loss / d gen_data = g / gen_data.numel()``; nothing else
    gets a gradient.

    Args:
        gen_data: the student's samples x0, ``[B, ...]``.
        teacher_x0: the teacher's x0 at the re-noised samples, guided, like ``gen_data``.
        fake_score_x0: the fake score's x0 there, like ``gen_data``.
        additional_scale: ``[B]``, multiplies each sample's weight (f-divergences).
        normalizer: see ``vsd_residual``.
        fp32: compute in float32 whatever the dtypes are, with one latent-sized temporary.

    Returns:
        Scalar >= 0 in the dtype to which the tensors promote (float32 with ``fp32`` and, as of
        torch's own mean square, under autocast).

    Raises:
        ValueError: ``normalizer`` is neither.
    """
    residual = vsd_residual(
        gen_data, teacher_x0, fake_score_x0, additional_scale, normalizer=normalizer, fp32=fp32
    )
    if not fp32:
        # the distance to the target gen_data - g as that target is rounded: the published loss
        with torch.no_grad():
            residual.neg_().add_(gen_data)
            if torch.is_autocast_enabled(gen_data.device.type):
                residual = residual.to(torch.promote_types(residual.dtype, torch.float32))
            residual.neg_().add_(gen_data)
    return _SquaredResidual.apply(gen_data, residual, 0.5)


@torch.no_grad()
def vsd_residual(
    gen_data: Tensor,
    teacher_x0: Tensor,
    fake_score_x0: Tensor,
    additional_scale: Tensor | None = None,
    *,
    normalizer: Literal["sample", "global"] = "sample",
    fp32: bool = False,
) -> Tensor:
    """``g = w (fake_score_x0 - teacher_x0)`` with ``w = h / (mean|gen_data - teacher_x0| + 1e-6)``.

    The direction in which the two scores differ, on a scale that does not depend on the noise
    level (arXiv 2311.18828, eq. 8). The distance and ``w`` are float32.

    Args:
        gen_data: ``[B, ...]``.
        teacher_x0: like ``gen_data``.
        fake_score_x0: like ``gen_data``.
        additional_scale: ``[B]``, the factor h; 1 where not given.
        normalizer: mean over each sample, or over all that this call is given (``global``).
        fp32: give ``g`` in float32 rather than in the dtype to which the tensors promote.

    Returns:
        ``[B, ...]`` without a graph.

    Raises:
        ValueError: ``normalizer`` is neither.
    """
    if normalizer not in ("sample", "global"):
        raise ValueError(f"normalizer must be 'sample' or 'global', found {normalizer!r}")
    first = 1 if normalizer == "sample" else 0
    axes = tuple(range(first, gen_data.ndim))
    narrow = teacher_x0.dtype.itemsize < 4  # is widened, exactly, without a copy in float32
    distance = gen_data.to(torch.float32, copy=True)
    distance.sub_(teacher_x0 if narrow else teacher_x0.float())
    distance = distance.abs_().mean(dim=axes, keepdim=True)
    weight = 1.0 / (distance + SMALLEST_DISTANCE)
    if additional_scale is not None:
        weight = weight * expand_like(additional_scale.float(), gen_data)
    if fp32:
        wide = torch.promote_types(gen_data.dtype, torch.float32)
        return fake_score_x0.to(wide, copy=True).sub_(teacher_x0).mul_(weight)
    difference, weight = fake_score_x0 - teacher_x0, weight.to(gen_data.dtype)
    wide = torch.promote_types(difference.dtype, weight.dtype)
    return difference.to(wide).mul_(weight)


def gan_gen_loss(fake_logits: Tensor) -> Tensor:
    """The generator's non-saturating loss ``mean softplus(-D(fake))``.

    Goodfellow et al., arXiv 1406.2661, section 3, as DMD2 uses it (arXiv 2405.14867, section 4.3).

    Args:
        fake_logits: ``[B, heads]``, positive where the discriminator takes a sample for real.

    Returns:
        Scalar >= 0.

    Raises:
        AssertionError: not two axes.
    """
    _check_logits(fake_logits, "fake_logits")
    return F.softplus(-fake_logits).mean()


def gan_disc_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The discriminator's loss ``mean softplus(D(fake)) + mean softplus(-D(real))``.

    Goodfellow et al., arXiv 1406.2661, eq. 1, in logits.

    Args:
        real_logits: ``[B, heads]``.
        fake_logits: ``[B', heads]``.

    Returns:
        Scalar >= 0.

    Raises:
        AssertionError: not two axes.
    """
    _check_logits(real_logits, "real_logits")
    _check_logits(fake_logits, "fake_logits")
    return F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()


def r1_loss(real_logits: Tensor, perturbed_real_logits: Tensor) -> Tensor:
    """Approximate R1: how much the logits of real samples move under a small perturbation.

    Lin et al., arXiv 2501.08316, eq. 3: ``mean (D(x) - D(x + alpha n))^2``, in place of the
    gradient penalty of Mescheder et al. (arXiv 1801.04406), which needs a second derivative.

    Args:
        real_logits: ``[B, heads]``.
        perturbed_real_logits: the same samples after the perturbation, ``[B, heads]``.

    Returns:
        Scalar >= 0; both arguments get a gradient.

    Raises:
        AssertionError: the shapes differ.
    """
    shapes = tuple(real_logits.shape), tuple(perturbed_real_logits.shape)
    assert shapes[0] == shapes[1], f"r1_loss takes equal shapes, found {shapes[0]} and {shapes[1]}"
    return F.mse_loss(real_logits, perturbed_real_logits)


@torch.no_grad()
def f_divergence_weight(
    logits: Tensor,
    divergence: str,
    *,
    ratio_range: tuple[float, float] = (0.1, 20.0),
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The weight h(r) that makes score distillation minimise another f-divergence.

    f-distill, Xu et al., arXiv 2502.15681, table 1: reverse KL is the case h = 1. The density ratio
    ``r = p_real / p_fake`` is ``exp(logit)`` of a discriminator (mean over heads, clamped to +-10),
    clipped to ``ratio_range``; h is divided by its mean over the batch (and ``group``), so that the
    learning rate keeps its meaning.

    Args:
        logits: ``[B, heads]`` of the discriminator at the re-noised samples.
        divergence: ``rkl`` 1, ``kl`` r, ``js`` r / (1 + r), ``sf`` 1 / (1 + r), ``neyman`` 1 / r,
            ``sh`` sqrt(r), ``jf`` 1 + r.
        ratio_range: lowest and highest r, > 0.
        group: data-parallel group over which the mean is taken; None: this process alone.

    Returns:
        ``[B]`` float32, > 0, mean 1, without a graph.

    Raises:
        AssertionError: logits without two axes.
        ValueError: unknown divergence.
    """
    _check_logits(logits, "logits")
    if divergence not in _RATIO_WEIGHTS:
        raise ValueError(f"unknown divergence {divergence!r}; take one of {list(_RATIO_WEIGHTS)}")
    ratio = logits.float().mean(dim=1).clamp(-LARGEST_LOGIT, LARGEST_LOGIT).exp()
    weight = _RATIO_WEIGHTS[divergence](ratio.clamp(*ratio_range))
    mean = weight.mean()
    if group is not None:
        dist.all_reduce(mean, group=group)
        mean = mean / group.size()
    return weight / mean


def _check_logits(logits: Tensor, name: str) -> None:
    assert logits.ndim == 2, f"{name} must be [B, heads], found shape {tuple(logits.shape)}"
