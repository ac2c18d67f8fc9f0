"""One SFT step of a small Wan: megagen's role, and a plain PyTorch loop over diffusers' own class.

Both do the same work on the same numbers: forward, mean squared error on the velocity, backward,
global-norm clip, AdamW, in fp32. Legend: B batch, C channels, T H W latent sizes, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megagen.models.base import Request

LEARNING_RATE, MAX_GRAD_NORM = 1e-4, 1.0
Step = Callable[[], float]
"""Does one step and returns its loss."""


@dataclass(frozen=True)
class Case:
    """A network and its input.

    Args:
        arch: diffusers config of the network.
        size: latent frames, height and width.
        batch: samples of the micro-batch.
        text_len: text tokens.
    """

    arch: dict[str, Any]
    size: tuple[int, int, int]
    batch: int
    text_len: int


CASES = {
    "small": Case(  # 1,024 tokens: GEMMs and attention dominate, as in training at scale
        {
            "num_attention_heads": 6,
            "attention_head_dim": 64,
            "in_channels": 16,
            "out_channels": 16,
            "text_dim": 256,
            "freq_dim": 256,
            "ffn_dim": 1536,
            "num_layers": 4,
        },
        size=(4, 32, 32),
        batch=1,
        text_len=64,
    ),
    "demo": Case(  # many small samples: memory-bound operations and overheads show
        {
            "num_attention_heads": 4,
            "attention_head_dim": 24,
            "in_channels": 8,
            "out_channels": 8,
            "text_dim": 64,
            "freq_dim": 64,
            "ffn_dim": 384,
            "num_layers": 6,
        },
        size=(8, 8, 8),
        batch=16,
        text_len=8,
    ),
}


def make_request(case: Case) -> Request:
    """The same input for both sides; ``extra`` holds the target."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    latents = (case.batch, case.arch["in_channels"], *case.size)
    return Request(
        latents_BCTHW=normal(*latents),
        timestep=torch.rand(case.batch, generator=generator) * 1000,
        condition={"text_embeds_BLD": normal(case.batch, case.text_len, case.arch["text_dim"])},
        extra={"target": normal(*latents)},
    )


def make_weights(case: Case) -> dict[str, Tensor]:
    """Random weights in diffusers' names, the zero-initialised ones included."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        shapes = {n: t.shape for n, t in WanTransformer3DModel(**case.arch).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * (0.02 if len(shape) > 1 else 0.1)
        + float("norm" in name and name.endswith("weight"))
        for name, shape in shapes.items()
    }


class StateDict:
    """Named tensors in memory as a ``WeightStore``."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> Any:
        """Names of all tensors."""
        return iter(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of one."""
        return tuple(self.tensors[name].shape)

    def read(self, name: str, dim: int | None, part: int, num_parts: int) -> Tensor:
        """A copy of one part of one."""
        tensor = self.tensors[name]
        return (tensor if dim is None else tensor.chunk(num_parts, dim)[part]).clone()


def loss_of(velocity: Tensor, target: Tensor) -> Tensor:
    return (velocity.float() - target).square().mean()


def make_ours(case: Case, **layout: Any) -> Step:
    """megagen's step; the process group must be there."""
    from megagen.engine.role import OptimizerSettings, Role, RoleSettings
    from megagen.models.wan import WanModel
    from megagen.parallel.dims import ParallelDims
    from megagen.parallel.mesh import Mesh

    dims = ParallelDims(**layout)
    plugin = WanModel(WanModel.Options(architecture=case.arch))
    optimizer = OptimizerSettings(
        learning_rate=LEARNING_RATE, weight_decay=0.0, max_grad_norm=MAX_GRAD_NORM
    )
    role = Role.build(
        plugin,
        RoleSettings(name="student", dims=dims, optimizer=optimizer),
        data_layout=Mesh.build(dims),
        store=StateDict(make_weights(case)),
    )
    request = make_request(case)

    def loss_fn(velocity: Tensor, request: Request) -> dict[str, Tensor]:
        return {"loss": loss_of(velocity, request.extra["target"])}

    def step() -> float:
        role.zero_grad()
        terms = role.forward_backward([request], loss_fn)
        role.step()
        return float(terms[0]["loss"])

    return step


def make_theirs(case: Case) -> Step:
    """The plain loop."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(**case.arch).train()
    model.load_state_dict(make_weights(case))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    request = make_request(case)

    def step() -> float:
        optimizer.zero_grad()
        velocity = model(
            hidden_states=request.latents_BCTHW,
            timestep=request.timestep,
            encoder_hidden_states=request.condition["text_embeds_BLD"],
            return_dict=False,
        )[0]
        loss = loss_of(velocity, request.extra["target"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        return float(loss.detach())

    return step
