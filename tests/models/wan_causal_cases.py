"""A tiny causal Wan, and diffusers' blocks under an explicit mask to compare it with.

Legend: B batch, S tokens, N heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from megagen.engine.role import Role
from megagen.engine.settings import RoleSettings
from megagen.models.base import Request
from megagen.models.wan_causal import WanCausalModel
from megagen.parallel.dims import ParallelDims
from megagen.parallel.mesh import Mesh
from tests.engine.cases import ADAMW, ARCH, DictStore, Weights

HEIGHT, WIDTH = 2, 6
GRID = (HEIGHT // 2, WIDTH // 2)
"""3 tokens a frame, which no number of ranks divides."""
TEXT = (5, 6)


@dataclass(frozen=True)
class Rule:
    """Which frames see which, said as plainly as can be."""

    size: int = 3
    first_alone: bool = False
    window: int = -1
    sink: int = 0
    is_relative: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {
            "num_frames_per_block": self.size,
            "independent_first_frame": self.first_alone,
            "local_attn_size": self.window,
            "sink_size": self.sink,
            "rope_cache_policy": "relativistic" if self.is_relative else "absolute",
        }

    def block(self, frame: int) -> int:
        if self.first_alone:
            return 0 if frame == 0 else 1 + (frame - 1) // self.size
        return frame // self.size

    def seen(self, frame: int, num_frames: int) -> list[int]:
        """Frames of the video that ``frame`` sees, in order."""
        own = [f for f in range(num_frames) if self.block(f) == self.block(frame)]
        past = list(range(own[0]))
        if self.window == -1 or len(past) + len(own) <= self.window:
            return past + own
        room = self.window - self.sink - len(own)
        return past[: self.sink] + past[self.sink :][len(past) - self.sink - room :] + own


@dataclass(frozen=True)
class Masked:
    """diffusers' attention processor with a mask ``[S, S]`` and rotations query frame by frame.

    Args:
        rule: which frames see which.
        num_frames: of the video; the sequence has them twice where ``has_clean``.
        has_clean: clean frames before noisy ones.
        stops: no gradient goes into the clean frames' keys and values.
    """

    rule: Rule
    num_frames: int
    has_clean: bool = False
    stops: bool = False

    def __call__(self, attn: Any, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k = attn.norm_q(attn.to_q(hidden)), attn.norm_k(attn.to_k(hidden))
        v = attn.to_v(hidden)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in (q, k, v))
        size = GRID[0] * GRID[1]
        if self.stops:
            clean = self.num_frames * size
            k, v = (torch.cat([x[:, :clean].detach(), x[:, clean:]], dim=1) for x in (k, v))
        total = hidden.size(1) // size
        out = []
        for query in range(total):
            mask = torch.zeros(total * size, dtype=torch.bool)
            places = torch.zeros(total, dtype=torch.float64)
            frames, where, own_place = self.visible(query)
            for frame, place in zip(frames, where, strict=True):
                mask[frame * size : (frame + 1) * size] = True
                places[frame] = place
            rows = slice(query * size, (query + 1) * size)
            turned = rotate(q[:, rows], torch.tensor([own_place]).double())
            scores = torch.einsum("bqnk,bsnk->bnqs", turned, rotate(k, places))
            scores = (scores / q.size(-1) ** 0.5).masked_fill(~mask, -torch.inf)
            out.append(torch.einsum("bnqs,bsnk->bqnk", scores.softmax(-1), v))
        return attn.to_out[0](torch.cat(out, dim=1).flatten(2))

    def visible(self, query: int) -> tuple[list[int], list[float], float]:
        """Frames of the sequence that one of it sees, their rotation, and the query's own."""
        frame = query % self.num_frames
        seen = self.rule.seen(frame, self.num_frames)
        # relativistic: by the place in the window
        where = [float(i) for i in range(len(seen))] if self.rule.is_relative else list(seen)
        own_place = where[seen.index(frame)]
        if self.has_clean and query >= self.num_frames:
            same = self.rule.block(frame)
            seen = [f + self.num_frames * (self.rule.block(f) == same) for f in seen]
        return seen, where, own_place


def rotate(x: Tensor, frames: Tensor) -> Tensor:
    """RoPE of ``[B, frames x rows x columns, N, K]`` in fp64, frames at given places."""
    dim = x.size(-1)
    spatial = 2 * (dim // 6)
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in GRID)
    places = torch.cartesian_prod(frames, rows, columns)
    angles = []
    for column, part in enumerate((dim - 2 * spatial, spatial, spatial)):
        frequency = 10000.0 ** -(torch.arange(0, part, 2, dtype=torch.float64) / part)
        angles.append(places[:, column, None] * frequency)
    angle = torch.cat(angles, dim=1)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.polar(torch.ones_like(angle), angle)[None, :, None]
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


class Reference:
    """diffusers' Wan with ``Masked`` self-attention.

    Args:
        weights: in diffusers' names.
        rule: which frames see which.
        stops: no gradient goes into clean frames' keys and values.
    """

    def __init__(self, weights: Weights, rule: Rule, *, stops: bool = False) -> None:
        self.model = WanTransformer3DModel(**ARCH)
        self.model.load_state_dict(dict(weights))
        self.rule, self.stops = rule, stops

    def __call__(self, request: Request) -> Tensor:
        """Velocity of a whole video, teacher-forced where the request has clean frames."""
        latents, timestep = request.latents_BCTHW, request.timestep
        frames = latents.size(2)
        timestep = timestep[:, None].expand(-1, frames) if timestep.ndim == 1 else timestep
        clean = request.condition.get("clean_latents_BCTHW")
        if clean is not None:
            latents = torch.cat([clean, latents], dim=2)
            known = request.condition.get("clean_timestep", torch.zeros(len(clean)))
            timestep = torch.cat([known[:, None].expand(-1, frames), timestep], dim=1)
        for block in self.model.blocks:
            block.attn1.set_processor(Masked(self.rule, frames, clean is not None, self.stops))
        tokens = timestep.repeat_interleave(GRID[0] * GRID[1], dim=1)
        text = request.condition["text_embeds_BLD"]
        return self.model(latents, tokens, text, return_dict=False)[0][:, :, -frames:]

    def gradients(self) -> dict[str, Tensor]:
        """Of every parameter."""
        return {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


def make_request(
    generator: torch.Generator, num_frames: int, *, batch: int = 2, has_clean: bool = False
) -> Request:
    """Random latents, one timestep a frame, and what a loss compares with."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shape = (batch, ARCH["in_channels"], num_frames, HEIGHT, WIDTH)
    condition = {"text_embeds_BLD": normal(batch, *TEXT)}
    if has_clean:
        condition["clean_latents_BCTHW"] = normal(*shape)
        condition["clean_timestep"] = torch.rand(batch, generator=generator) * 100
    return Request(
        latents_BCTHW=normal(*shape),
        timestep=torch.rand(batch, num_frames, generator=generator) * 1000,
        condition=condition,
        extra={"target": normal(*shape)},
    )


def make_plugin(rule: Rule, **architecture: Any) -> WanCausalModel:
    """The tiny Wan under a rule, latents unscaled."""
    keys = {**ARCH, "latents_mean": None, "latents_std": None, **architecture}
    return WanCausalModel(WanCausalModel.Options(architecture=keys, **rule.options))


def make_role(
    weights: Weights,
    rule: Rule,
    dims: ParallelDims,
    *,
    data: ParallelDims | None = None,
    **settings: Any,
) -> Role:
    """In a rank: a role with ``weights``; trainable unless told otherwise."""
    if settings.get("trainable", True):
        # whole gradients on every rank
        settings.setdefault("optimizer", replace(ADAMW, use_distributed_optimizer=False))
    return Role.build(
        make_plugin(rule),
        RoleSettings(name="student", dims=dims, **settings),
        data_layout=Mesh.build(dims if data is None else data),
        store=DictStore(weights),
    )


def frames_of(request: Request, frames: range, **changes: Any) -> Request:
    """A request of some frames; conditions that are videos stay whole."""
    part = slice(frames.start, frames.stop)
    condition: Mapping[str, Tensor] = {
        name: value for name, value in request.condition.items() if not name.startswith("clean")
    }
    return request.with_(
        latents_BCTHW=request.latents_BCTHW[:, :, part],
        timestep=request.timestep[:, part],
        condition=condition,
        extra={name: value[:, :, part] for name, value in request.extra.items()},
        **changes,
    )


def whole_video(parts: Sequence[Tensor]) -> Tensor:
    """Blocks one after the other."""
    return torch.cat(list(parts), dim=2)
