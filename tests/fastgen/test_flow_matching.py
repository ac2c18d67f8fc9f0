"""Changes of variable beside the published ones: values, gradients, and what is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megagen.fastgen import flow_matching as ours
from megagen.fastgen import utils

FUNCTIONS = ("add_noise", "pred_noise_to_pred_x0", "pred_x0_from_flow", "x0_to_eps", "x0_to_flow")
SHAPE = (3, 4, 2, 5, 3)
TIMES = {
    "per sample": (3,),
    "per frame": (3, 1, 2, 1, 1),
    "one for all": (),
    "more axes than the sample": (1, 3, 1, 1, 1, 1),
}


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def outcome(library: Any, name: str, inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    """The result and the gradients of all three inputs under a loss that is not linear."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = getattr(library, name)(*leaves)
    loss = (weight * out.double().pow(2)).sum()
    return [out.detach(), *torch.autograd.grad(loss, leaves)]


def test_every_published_name_is_here(published: Any) -> None:
    assert set(published.flow_matching.__all__) <= set(ours.__all__)
    assert set(published.utils.__all__) <= set(dir(utils))
    assert ours.expand_like is utils.expand_like


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_equal_the_published_ones(
    published: Any, name: str, dtype: torch.dtype, times: str
) -> None:
    inputs = [torch.randn(SHAPE).to(dtype), torch.randn(SHAPE).to(dtype), torch.rand(TIMES[times])]
    weight = torch.randn(SHAPE, dtype=torch.float64)
    found = outcome(ours, name, inputs, weight)
    wanted = outcome(published.flow_matching, name, inputs, weight)
    for own, theirs in zip(found, wanted, strict=True):
        assert own.dtype == theirs.dtype and own.shape == theirs.shape
        assert relative_error(own, theirs) <= (1e-6 if dtype != torch.float64 else 1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_ends_of_the_path_equal_the_published_ones(published: Any, name: str) -> None:
    """Where a division by zero is avoided."""
    inputs = [torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([0.0, 1.0, 1e-7])]
    assert torch.equal(
        getattr(ours, name)(*inputs), getattr(published.flow_matching, name)(*inputs)
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_shapes_broadcast_as_published(published: Any, name: str) -> None:
    inputs = [torch.randn(1, *SHAPE[1:]), torch.randn(1, 4, 1, 5, 1), torch.rand(3)]
    assert torch.equal(
        getattr(ours, name)(*inputs), getattr(published.flow_matching, name)(*inputs)
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    inputs = [torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    t = (0.2 + 0.6 * torch.rand(2, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(getattr(ours, name), (*inputs, t))
    assert torch.autograd.gradgradcheck(getattr(ours, name), (*inputs, t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_inputs_are_left_alone(name: str, dtype: torch.dtype) -> None:
    inputs = [torch.randn(SHAPE, dtype=dtype), torch.randn(SHAPE, dtype=dtype), torch.rand(3)]
    kept = [x.clone() for x in inputs]
    getattr(ours, name)(*inputs)
    assert all(map(torch.equal, inputs, kept))


@pytest.mark.parametrize("shape", [(), (3,), (3, 1, 2), (3, 1, 2, 1, 1, 1)])
def test_expand_like_equals_the_published_one(published: Any, shape: tuple[int, ...]) -> None:
    x, target = torch.rand(shape), torch.empty(SHAPE)
    found, wanted = utils.expand_like(x, target), published.utils.expand_like(x, target)
    assert found.shape == wanted.shape and torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.5])
def test_guidance_equals_the_published_one(
    published: Any, scale: float, dtype: torch.dtype
) -> None:
    pair = [torch.randn(SHAPE).to(dtype) for _ in range(2)]
    found = utils.classifier_free_guidance(*pair, scale)
    assert torch.equal(found, published.utils.classifier_free_guidance(*pair, scale))
    if dtype == torch.float64:
        torch.testing.assert_close(found, torch.lerp(pair[1], pair[0], scale))


def test_coefficients() -> None:
    t = torch.rand(5)
    assert torch.equal(ours.rf_alpha(t), 1 - t) and torch.equal(ours.rf_sigma(t), t)
