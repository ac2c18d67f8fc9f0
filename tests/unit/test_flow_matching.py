"""Rectified flow's changes of variable invert one another, in float64, for t of any shape."""

import pytest
import torch

from megagen.fastgen import flow_matching as fm


@pytest.fixture
def pair(seeded: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.randn(3, 4, 2, 5, 5, generator=seeded),
        torch.randn(3, 4, 2, 5, 5, generator=seeded),
    )


@pytest.mark.parametrize("shape", [(3,), (3, 1, 2, 1, 1)])
def test_velocity_and_clean_latents_invert(pair, shape, seeded) -> None:
    x0, eps = pair
    t = torch.rand(shape, generator=seeded).clamp(0.05, 0.95)
    x_t = fm.add_noise(x0.double(), eps.double(), t)
    v = fm.velocity_target(x0.double(), eps.double())
    assert torch.allclose(fm.pred_x0_from_flow(v, x_t, t), x0.double(), atol=1e-12)
    assert torch.allclose(fm.x0_to_flow(x0.double(), x_t, t), v, atol=1e-9)
    assert torch.allclose(fm.x0_to_eps(x0.double(), x_t, t), eps.double(), atol=1e-9)


def test_add_noise_is_the_straight_line(pair) -> None:
    x0, eps = pair
    t = torch.tensor([0.0, 0.25, 1.0])
    x_t = fm.add_noise(x0, eps, t)
    assert torch.equal(x_t[0], x0[0]) and torch.equal(x_t[2], eps[2])
    assert torch.allclose(x_t[1], 0.75 * x0[1] + 0.25 * eps[1])


def test_bf16_latents_lose_nothing_on_the_way(pair) -> None:
    x0, eps = (x.bfloat16() for x in pair)
    t = torch.tensor([0.3, 0.6, 0.9])
    exact = fm.add_noise(x0.double(), eps.double(), t)
    assert torch.equal(fm.add_noise(x0, eps, t), exact.bfloat16())


def test_shift() -> None:
    sigma = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64)
    shifted = 1000 * fm.shift_sigma(sigma, 5.0)
    assert torch.allclose(shifted, torch.tensor([1000, 937.5, 833.3333333, 625, 0]).double())
    assert torch.equal(fm.shift_sigma(sigma, 1.0), sigma)
    with pytest.raises(ValueError, match="shift"):
        fm.shift_sigma(sigma, 0.0)
