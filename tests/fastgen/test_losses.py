"""The stateless losses beside the published ones and beside their formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megagen.fastgen import losses
from megagen.fastgen.flow_matching import rf_alpha, rf_sigma

SHAPE = (3, 4, 2, 5, 3)


def tensors(count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(SHAPE, dtype=dtype, requires_grad=True) for _ in range(count)]


@pytest.mark.parametrize("pred_type", ["x0", "eps", "flow", "v"])
@pytest.mark.parametrize("fp32", [False, True])
def test_denoising_is_a_mean_square(pred_type: str, fp32: bool) -> None:
    prediction, x0, eps = tensors(3)
    t = torch.rand(3, dtype=torch.float64)
    times = t.view(3, 1, 1, 1, 1)
    target = {"x0": x0, "eps": eps, "flow": eps - x0, "v": (1 - times) * eps - times * x0}
    wanted = ((prediction - target[pred_type]) ** 2).mean()
    found = losses.dsm_loss(
        pred_type,
        prediction,
        x0=x0.detach(),
        eps=eps.detach(),
        t=t,
        alpha_fn=rf_alpha,
        sigma_fn=rf_sigma,
        fp32=fp32,
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    own = torch.autograd.grad(2 * found, prediction)[0]
    torch.testing.assert_close(own, 2 * torch.autograd.grad(wanted, prediction)[0])


@pytest.mark.parametrize("normalizer", ["sample", "global"])
@pytest.mark.parametrize("scaled", [False, True])
def test_vsd_is_its_formula(normalizer: Any, scaled: bool) -> None:
    gen, teacher, fake = tensors(3)
    scale = torch.rand(3) + 0.5 if scaled else None
    axes = (1, 2, 3, 4) if normalizer == "sample" else (0, 1, 2, 3, 4)
    weight = 1 / ((gen - teacher).abs().mean(axes, keepdim=True) + 1e-6)
    if scale is not None:
        weight = weight * scale.double().view(3, 1, 1, 1, 1)
    direction = ((fake - teacher) * weight).detach()
    for fp32 in (False, True):
        found = losses.vsd_loss(gen, teacher, fake, scale, normalizer=normalizer, fp32=fp32)
        torch.testing.assert_close(found, (direction**2).mean() / 2, rtol=1e-6, atol=0)
        slopes = torch.autograd.grad(found, (gen, teacher, fake), allow_unused=True)
        assert slopes[1] is None and slopes[2] is None
        torch.testing.assert_close(slopes[0], direction / gen.numel(), rtol=1e-6, atol=1e-12)


def test_fp32_losses_of_half_precision_are_exact() -> None:
    """The loss of bf16 tensors, computed as if they were float64."""
    gen, teacher, fake = (x.detach().bfloat16().requires_grad_() for x in tensors(3))
    exact = losses.vsd_loss(*(x.detach().double() for x in (gen, teacher, fake)), fp32=True)
    found = losses.vsd_loss(gen, teacher, fake, fp32=True)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)
    found.backward()
    assert gen.grad is not None and gen.grad.dtype == torch.bfloat16
    wanted = F.mse_loss(gen.detach().double(), teacher.detach().double())
    found = losses.dsm_loss("x0", gen, x0=teacher, fp32=True)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_all_losses_equal_the_published_ones(dtype: torch.dtype) -> None:
    published = pytest.importorskip("modelopt.torch.fastgen").losses
    tolerance = 1e-6 if dtype != torch.bfloat16 else 1e-2
    gen, teacher, fake = tensors(3, dtype)
    real, unreal = torch.randn(3, 2, dtype=dtype), torch.randn(3, 2, dtype=dtype)
    t, scale = torch.rand(3), torch.rand(3)
    alphas = {"t": t, "alpha_fn": rf_alpha, "sigma_fn": rf_sigma}
    calls: list[tuple[str, tuple, dict]] = [
        ("vsd_loss", (gen, teacher, fake), {}),
        ("vsd_loss", (gen, teacher, fake, scale), {}),
        ("gan_gen_loss", (unreal,), {}),
        ("gan_disc_loss", (real, unreal), {}),
        ("r1_loss", (real, unreal), {}),
        *(
            ("dsm_loss", (kind, gen), {"x0": teacher, "eps": fake, **alphas})
            for kind in ("x0", "eps", "v", "flow")
        ),
    ]
    for name, args, options in calls:
        leaves = [x for x in args if isinstance(x, Tensor) and x.is_floating_point()]
        found: list[list[Tensor | None]] = []
        for library in (losses, published):
            for leaf in leaves:
                leaf.requires_grad_().grad = None
            loss = getattr(library, name)(*args, **options)
            loss.backward()
            found.append([loss.detach(), *(leaf.grad for leaf in leaves)])
        for ours, theirs in zip(*found, strict=True):
            assert (ours is None) == (theirs is None), name
            if ours is not None and theirs is not None:
                torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * 1e-3)


@pytest.mark.parametrize("student", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scores", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_vsd_of_unequal_dtypes_equals_the_published_one(
    student: torch.dtype, scores: torch.dtype
) -> None:
    """A student in float32 under a bf16 teacher: nothing is rounded that is not rounded there."""
    published = pytest.importorskip("modelopt.torch.fastgen").losses
    gen = torch.randn(SHAPE, dtype=student, requires_grad=True)
    teacher, fake = (torch.randn(SHAPE, dtype=scores) for _ in range(2))
    found = []
    for library in (losses, published):
        loss = library.vsd_loss(gen, teacher, fake)
        found.append((loss.detach(), torch.autograd.grad(loss, gen)[0]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "args", "options", "error"),
    [
        ("dsm_loss", ("x0", torch.ones(2)), {}, AssertionError),
        ("dsm_loss", ("eps", torch.ones(2)), {"x0": torch.ones(2)}, AssertionError),
        ("dsm_loss", ("flow", torch.ones(2)), {"eps": torch.ones(2)}, AssertionError),
        (
            "dsm_loss",
            ("v", torch.ones(2)),
            {"eps": torch.ones(2), "x0": torch.ones(2)},
            AssertionError,
        ),
        ("dsm_loss", ("velocity", torch.ones(2)), {}, ValueError),
        ("gan_gen_loss", (torch.ones(2),), {}, AssertionError),
        ("gan_disc_loss", (torch.ones(2, 1), torch.ones(2)), {}, AssertionError),
        ("gan_disc_loss", (torch.ones(2), torch.ones(2, 1)), {}, AssertionError),
        ("r1_loss", (torch.ones(2, 1), torch.ones(2, 2)), {}, AssertionError),
    ],
)
def test_the_same_calls_are_rejected(
    name: str, args: tuple, options: dict[str, Any], error: type[Exception]
) -> None:
    published = pytest.importorskip("modelopt.torch.fastgen").losses
    for library in (losses, published):
        with pytest.raises(error):
            getattr(library, name)(*args, **options)


@pytest.mark.parametrize(
    ("divergence", "weight"),
    [
        ("rkl", lambda r: torch.ones_like(r)),
        ("kl", lambda r: r),
        ("js", lambda r: r / (1 + r)),
        ("sf", lambda r: 1 / (1 + r)),
        ("neyman", lambda r: r**-1),
        ("sh", lambda r: r**0.5),
        ("jf", lambda r: 1 + r),
    ],
)
def test_weights_of_other_divergences(divergence: str, weight: Any) -> None:
    logits = 3 * torch.randn(7, 2)
    logits[0] = 30.0  # beyond both clamps
    h = weight(logits.double().mean(1).clamp(-10, 10).exp().clamp(0.1, 20))
    found = losses.f_divergence_weight(logits, divergence)
    torch.testing.assert_close(found.double(), h / h.mean(), rtol=1e-5, atol=0)


def test_what_the_published_losses_do_not_know_is_checked() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="kll"):
        losses.f_divergence_weight(x, "kll")
    with pytest.raises(ValueError, match="batch"):
        losses.vsd_loss(x, x, x, normalizer="batch")  # type: ignore[arg-type]
