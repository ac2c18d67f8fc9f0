"""Consistency distillation written down once more, in double precision, in one process.

On diffusers' own class, causal networks under a mask. Nothing of megagen's methods is used here but
the names under which random numbers are drawn.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megagen.core.options import parse_options
from megagen.core.registry import resolve
from megagen.core.streams import Streams
from megagen.data.batch import Batch
from megagen.engine.role import Role
from megagen.engine.settings import EMASettings, RoleSettings
from megagen.methods import METHODS
from megagen.models.base import Request
from megagen.parallel.dims import ParallelDims
from megagen.parallel.mesh import Mesh
from tests.engine import cases
from tests.methods import causal_cases
from tests.methods import dmd2_cases as dmd2
from tests.models import wan_causal_cases as causal
from tests.models.wan_causal_cases import Rule

SHIFT = 3.0
DECAY = 0.7


def kind(rule: Rule | None) -> dict[str, Any]:
    """What batches are made with."""
    return causal_cases.KIND if rule else {}


def make_method(
    weights: Sequence[cases.Weights],
    data: ParallelDims,
    layouts: Sequence[ParallelDims],
    options: Mapping[str, Any],
    rule: Rule | None,
    **settings: Any,
) -> Any:
    """In a rank: the method over a student and a teacher, both causal where there is a rule."""
    plugins = [causal.make_plugin(rule) if rule else cases.make_plugin() for _ in range(2)]
    has_ema = options.get("target_weights", "ema") == "ema"
    own = {
        "student": {
            "optimizer": dmd2.ADAMW,
            "ema": EMASettings(decay=DECAY) if has_ema else None,
            **settings,
        },
        "teacher": {"trainable": False},
    }
    roles = {}
    for (name, keys), tensors, plugin, dims in zip(
        own.items(), weights, plugins, layouts, strict=False
    ):
        plugin.flow_shift = SHIFT
        roles[name] = Role.build(
            plugin,
            RoleSettings(name=name, dims=dims, **keys),
            data_layout=Mesh.build(data),
            store=cases.DictStore(tensors),
        )
    cls = resolve("consistency_causal" if rule else "consistency", METHODS)
    parsed = parse_options(cls.Options, options, "method")
    cls.check(parsed, {name: role.plugin for name, role in roles.items()})
    return cls(roles, parsed, Streams(dmd2.SEED), dmd2.facts())


class Reference:
    """The two networks, the average, and the algorithm.

    Args:
        weights: of student and teacher.
        options: of the method.
        rule: blocks of causal networks; None: they see all frames.
    """

    def __init__(
        self, weights: Sequence[cases.Weights], options: Mapping[str, Any], rule: Rule | None
    ) -> None:
        self.o, self.rule, self.streams = options, rule, Streams(dmd2.SEED)
        self.student, self.teacher = (cases.PlainModel(w, dmd2.ADAMW) for w in weights[:2])
        for net in (self.student, self.teacher):
            net.model.double()
        self.average = copy.deepcopy(self.student.weights())
        self.masked = causal.Reference(weights[0], rule) if rule else None
        steps, shift = options["grid_steps"], options.get("grid_flow_shift", SHIFT)
        even = [1 - i / steps for i in range(steps + 1)]
        # the networks see float32
        self.grid = [float(torch.tensor(1000 * shift * u / (1 + (shift - 1) * u))) for u in even]

    # -- networks ----------------------------------------------------------------------------------
    def velocity(
        self, net: cases.PlainModel, x: Tensor, t_BT: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        """Of all frames at their timesteps."""
        if self.masked is None:
            text = condition["text_embeds_BLD"]
            return net.model(x, t_BT[:, 0], text, return_dict=False)[0]
        self.masked.model = net.model
        return self.masked(Request(x, t_BT, condition))

    def end(self, x: Tensor, t_BT: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """The student's f."""
        return x - level(t_BT) * self.velocity(self.student, x, t_BT, condition)

    def guided(self, x: Tensor, t_BT: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """The teacher's velocity."""
        v, scale = (
            self.velocity(self.teacher, x, t_BT, condition),
            self.o.get("teacher_guidance_scale", 1.0),
        )
        if scale == 1:
            return v
        negative = torch.zeros_like(condition["text_embeds_BLD"])
        negative[:, :4] = dmd2.facts().unconditional["negative"]
        u = self.velocity(self.teacher, x, t_BT, {**condition, "text_embeds_BLD": negative})
        return u + scale * (v - u)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The student has its average's weights."""
        if self.o.get("target_weights", "ema") == "student":
            yield
            return
        own = self.student.weights()
        self.student.model.load_state_dict(self.average)
        yield
        self.student.model.load_state_dict(own)

    # -- random numbers ----------------------------------------------------------------------------
    def normal(self, purpose: str, step: int, batch: Batch) -> Tensor:
        return torch.stack(
            [
                torch.randn(batch.latent_shape, generator=self.streams.generator(purpose, step, p))
                for p in batch.positions
            ]
        ).double()

    def places(self, step: int, batch: Batch) -> Tensor:
        """Place of the grid of each frame of each sample."""
        frames = range(batch.latent_shape[1])
        blocks = [self.rule.block(f) if self.rule else 0 for f in frames]
        drawn = 1 if self.o.get("same_step_across_blocks") else max(blocks) + 1
        count = self.o["grid_steps"] - self.o["skip_steps"] + 1
        one = {"step": -1, "micro_batch": batch.positions[0]}
        rows = []
        for position in batch.positions:
            key = one.get(self.o.get("student_step_per", "sample"), position)
            generator = self.streams.generator("consistency/place", step, key)
            found = torch.randint(0, count, (drawn,), generator=generator)
            rows.append([int(found[min(b, drawn - 1)]) for b in blocks])
        return torch.tensor(rows)

    # -- the algorithm -----------------------------------------------------------------------------
    def step_down(self, x: Tensor, t: Tensor, below: Tensor, condition: Any) -> Tensor:
        """The teacher's."""
        h = level(below) - level(t)
        v = self.guided(x, t, condition)
        euler = x + h * v
        if self.o.get("solver", "euler") == "euler":
            return euler
        w = self.guided(euler, below, condition)
        return torch.where(level(below) > 0, x + h * (v + w) / 2, euler)

    def loss(self, step: int, batch: Batch) -> Tensor:
        assert batch.latents_BCTHW is not None
        x0, eps = batch.latents_BCTHW.double(), self.normal("noise", step, batch)
        condition = {"text_embeds_BLD": batch.condition["text_embeds_BLD"].double()}
        if self.rule:
            noise = self.o.get("context_noise", 0.0)
            context = self.normal("context_noise", step, batch)
            condition["clean_latents_BCTHW"] = (1 - noise / 1000) * x0 + noise / 1000 * context
            condition["clean_timestep"] = torch.full((len(x0),), noise)
        place, grid = self.places(step, batch), torch.tensor(self.grid)
        t, below = grid[place], grid[place + self.o["skip_steps"]]
        x = (1 - level(t)) * x0 + level(t) * eps
        with torch.no_grad():
            lower = self.step_down(x, t, below, condition)
            with self.averaged():
                target = self.end(lower, below, condition)
        error_BT = (self.end(x, t, condition) - target).square().mean((1, 3, 4))
        return (self.weight(place) * self.distance(error_BT)).mean()

    def distance(self, error_BT: Tensor) -> Tensor:
        """Of each frame's block or, where there are none, of the video."""
        if self.o.get("distance", "l2") == "l2":
            return error_BT
        frames, c = range(error_BT.shape[1]), self.o["huber_c"]
        found = []
        for frame in frames:
            same = [
                f for f in frames if not self.rule or self.rule.block(f) == self.rule.block(frame)
            ]
            found.append((error_BT[:, same].mean(1) + c**2).sqrt() - c)
        return torch.stack(found, dim=1)

    def weight(self, place_BT: Tensor) -> Tensor:
        if self.o.get("loss_weighting", "none") == "none":
            return torch.ones(place_BT.shape, dtype=torch.float64)
        skip = self.o["skip_steps"]
        pairs = zip(self.grid, self.grid[skip:], strict=False)
        inverse = torch.tensor([1 / (a - b) for a, b in pairs], dtype=torch.float64)
        return (inverse / inverse.mean())[place_BT]

    def step(self, step: int) -> dict[str, Any]:
        """One update."""
        everyone, total = dmd2.batches(step, **kind(self.rule)), 0.0
        with dmd2.true_double():
            for batch in everyone:
                loss = self.loss(step, batch) / len(everyone)
                loss.backward()
                total += loss.item()
        gradients = {n: g.clone() for n, g in self.student.gradients().items()}
        norm = self.student.step()
        for name, value in self.student.weights().items():
            self.average[name] = DECAY * self.average[name] + (1 - DECAY) * value
        return {"loss/total": total, "student": gradients, "grad_norm/student": norm}


def level(t_BT: Tensor) -> Tensor:
    """Noise levels ready to broadcast against latents."""
    return t_BT.double()[:, None, :, None, None] / 1000
