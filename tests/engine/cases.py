"""A tiny Wan, its data, and a plain torch loop over diffusers' own class to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from megagen.engine.optimizer import has_weight_decay
from megagen.engine.role import Role
from megagen.engine.settings import OptimizerSettings, RoleSettings
from megagen.models.base import Request
from megagen.models.wan import WanModel
from megagen.parallel.dims import ParallelDims
from megagen.parallel.mesh import Mesh

ARCH: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": 6,
    "freq_dim": 8,
    "ffn_dim": 24,
    "num_layers": 4,
}
SIZE = (3, 2, 10)
"""Latent frames, height, width: 15 tokens, which no number of ranks divides."""
BATCH = 2
NUM_REQUESTS = 4
"""Micro-batches of one update, over all data ranks."""
ADAMW = OptimizerSettings(
    # Adam divides by the gradient's own size: with the usual eps an element whose gradient is mere
    # rounding moves by a whole step, either way
    learning_rate=1e-2,
    betas=(0.9, 0.95),
    eps=1e-4,
    weight_decay=0.1,
    max_grad_norm=0.5,
    total_steps=100,
)

Weights = Mapping[str, Tensor]


def random_weights(seed: int) -> dict[str, Tensor]:
    """Every tensor of the network random, those that start at 0 or 1 included."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in WanTransformer3DModel(**ARCH).state_dict().items():
        scale = 0.5 if tensor.ndim == 1 or "table" in name else 0.7 / tensor[0].numel() ** 0.5
        weights[name] = torch.randn(tensor.shape, generator=generator) * scale
        if "norm" in name and name.endswith("weight"):
            weights[name] += 1.0
    return weights


def make_requests(
    step: int, count: int = NUM_REQUESTS, *, size: tuple[int, int, int] = SIZE
) -> list[Request]:
    """All micro-batches of one update; a function of the step."""
    generator = torch.Generator().manual_seed(1000 + step)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return [
        Request(
            latents_BCTHW=normal(BATCH, 3, *size),
            timestep=torch.rand(BATCH, generator=generator) * 1000,
            condition={"text_embeds_BLD": normal(BATCH, 5, 6)},
            extra={"target": normal(BATCH, 3, *size)},
        )
        for _ in range(count)
    ]


def own_part(requests: Sequence[Request], mesh: Mesh) -> list[Request]:
    """The micro-batches of this rank's data rank."""
    share = len(requests) // mesh.dp_size
    return list(requests[mesh.dp_rank * share : (mesh.dp_rank + 1) * share])


def squared_error(velocity: Tensor, request: Request) -> dict[str, Tensor]:
    """Mean squared distance to the request's target."""
    return {"loss": (velocity - request.extra["target"]).square().mean()}


@dataclass(frozen=True)
class DictStore:
    """Named tensors in memory."""

    tensors: Weights

    def names(self) -> Iterator[str]:
        return iter(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str, dim: int | None, part: int, num_parts: int) -> Tensor:
        tensor = self.tensors[name]
        return tensor if dim is None else tensor.chunk(num_parts, dim)[part]


def make_plugin(**options: Any) -> WanModel:
    """The tiny Wan, latents unscaled."""
    architecture = {**ARCH, "latents_mean": None, "latents_std": None}
    return WanModel(WanModel.Options(architecture=architecture, **options))


def make_role(
    weights: Weights,
    dims: ParallelDims,
    *,
    data: ParallelDims | None = None,
    name: str = "student",
    **settings: Any,
) -> Role:
    """In a rank: a role with ``weights``; trainable unless told otherwise."""
    if settings.get("trainable", True):
        settings.setdefault("optimizer", ADAMW)
    return Role.build(
        make_plugin(),
        RoleSettings(name=name, dims=dims, **settings),
        data_layout=Mesh.build(dims if data is None else data),
        store=DictStore(weights),
    )


def whole(role: Role, value: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
    """``value`` of every parameter of this rank's stages in diffusers' names, whole over TP."""
    found: dict[str, Tensor] = {}
    for chunk in role.chunks:
        for name, source in role.plugin.weights(chunk).items():
            parameter = chunk.get_parameter(name)
            tensor = value(parameter).detach().float().contiguous()
            if getattr(parameter, "tensor_model_parallel", False) and role.mesh.dims.tp_size > 1:
                parts = [torch.empty_like(tensor) for _ in range(role.mesh.dims.tp_size)]
                dist.all_gather(parts, tensor, group=role.mesh.pg.tp)
                tensor = torch.cat(parts, parameter.partition_dim)
            parts = [part.clone() for part in source.split(tensor)]
            found |= dict(zip(source.names, parts, strict=True))
    return found


def merge(parts: Sequence[Weights]) -> dict[str, Tensor]:
    """What the stages of several ranks hold, as one; copies must agree bitwise."""
    found: dict[str, Tensor] = {}
    for part in parts:
        for name, tensor in part.items():
            assert name not in found or torch.equal(found[name], tensor), f"{name} differs"
            found[name] = tensor
    return found


def worst(found: Weights, expected: Weights) -> float:
    """Largest relative L2 error of any tensor."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    return max(relative(found[name], expected[name]) for name in expected)


def worst_gradient(found: Weights, expected: Weights) -> float:
    """Largest L2 error of any gradient, relative to it plus a thousandth of all of them.

    What a bias of keys gets is a sum that nearly cancels (adding one vector to all keys changes
    scores alike), so its rounding is that of the summands.
    """
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    whole_norm = sum(g.double().square().sum().item() for g in expected.values()) ** 0.5
    return max(
        (found[name].double() - grad.double()).norm().item()
        / (grad.double().norm().item() + 1e-3 * whole_norm)
        for name, grad in expected.items()
    )


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative L2 error."""
    norm = expected.double().norm().item()
    return (found.double() - expected.double()).norm().item() / max(norm, 1e-12)


def close(found: Sequence[float], expected: Sequence[float], tolerance: float = 1e-5) -> None:
    """Assert that two curves agree to a relative tolerance at every point."""
    assert len(found) == len(expected)
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert abs(a - b) <= tolerance * abs(b), f"step {step}: {found} against {expected}"


def without_kinks(module: nn.Module) -> None:
    """A smooth function for each LeakyReLU: at its kink, rounding turns into another gradient."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.LeakyReLU):
                setattr(parent, name, nn.SiLU())


# -- the plain torch side -----------------------------------------------------------------------
class PlainModel:
    """diffusers' Wan with AdamW, no weight decay on what has none, and clipping by global norm."""

    def __init__(self, weights: Weights, settings: OptimizerSettings = ADAMW) -> None:
        self.model = WanTransformer3DModel(**ARCH)
        self.model.load_state_dict(dict(weights))
        self.settings = settings
        named = list(self.model.named_parameters())
        groups = [
            {
                "params": [p for n, p in named if has_decay(p, n) == decays],
                "weight_decay": settings.weight_decay if decays else 0.0,
            }
            for decays in (True, False)
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps
        )

    def __call__(self, request: Request) -> Tensor:
        text = request.condition["text_embeds_BLD"]
        return self.model(request.latents_BCTHW, request.timestep, text, return_dict=False)[0]

    def gradients(self) -> dict[str, Tensor]:
        """Of every parameter."""
        return {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}

    def weights(self) -> dict[str, Tensor]:
        """Copies of every parameter."""
        return {n: p.detach().clone() for n, p in self.model.named_parameters()}

    def step(self) -> float:
        """Clip and update; the gradient norm before clipping."""
        limit = self.settings.max_grad_norm or float("inf")
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


def has_decay(parameter: Tensor, name: str) -> bool:
    """Matrices, but not the modulation tables."""
    assert has_weight_decay(parameter, name) == (parameter.ndim > 1 and "table" not in name)
    return parameter.ndim > 1 and "table" not in name


def plain_curve(weights: Weights, num_steps: int) -> tuple[list[float], list[float], Weights]:
    """Losses and gradient norms of the plain loop, and the weights at its end."""
    plain = PlainModel(weights)
    losses, norms = [], []
    for step in range(num_steps):
        requests = make_requests(step)
        total = 0.0
        for request in requests:
            loss = squared_error(plain(request), request)["loss"] / len(requests)
            loss.backward()
            total += loss.item()
        losses.append(total)
        norms.append(plain.step())
    return losses, norms, plain.weights()


# -- the megagen side, run in ranks -------------------------------------------------------------
def update(role: Role, step: int, data: Mesh | None = None, **options: Any) -> tuple[float, float]:
    """One update on the micro-batches of ``step``: loss over all data ranks, gradient norm."""
    own = own_part(make_requests(step, **options), data or role.mesh)
    role.zero_grad()
    terms = role.forward_backward(own, squared_error)
    loss = torch.stack([t["loss"] for t in terms]).mean()
    dist.all_reduce(loss)
    return float(loss) / dist.get_world_size(), role.step().grad_norm


def curve(
    weights: Weights, dims: ParallelDims, num_steps: int, **settings: Any
) -> tuple[list[float], list[float], Weights]:
    """Losses, gradient norms and final weights of this rank's stages under ``dims``."""
    role = make_role(weights, dims, **settings)
    points = [update(role, step) for step in range(num_steps)]
    role.sync_weights()
    losses, norms = ([point[i] for point in points] for i in range(2))
    return losses, norms, whole(role, lambda p: p)
