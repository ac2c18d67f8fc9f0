"""Self-forcing and diffusion forcing in double precision, on diffusers' blocks under a mask.

No cache is used here: a block's pass is one over the whole video so far, whose noisy block sees the
clean frames before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megagen.core.options import parse_options
from megagen.core.streams import Streams
from megagen.data.batch import Batch
from megagen.engine.role import Role
from megagen.methods.self_forcing import SelfForcingMethod
from megagen.models.base import Request
from megagen.parallel.dims import ParallelDims
from tests.engine import cases
from tests.methods import dmd2_cases as dmd2
from tests.models import wan_causal_cases as causal
from tests.models.wan_causal_cases import Rule

SHAPE = (3, 5, causal.HEIGHT, causal.WIDTH)
NUM_BATCHES = 2
KIND = {"shape": SHAPE, "count": NUM_BATCHES}


def make_student(
    weights: cases.Weights, rule: Rule, dims: ParallelDims, data: ParallelDims, **settings: Any
) -> Role:
    """A trainable causal role with DMD2's optimizer of the tests."""
    return causal.make_role(weights, rule, dims, data=data, optimizer=dmd2.ADAMW, **settings)


def make_method(
    weights: Sequence[cases.Weights],
    data: ParallelDims,
    layouts: Sequence[ParallelDims],
    options: Mapping[str, Any],
    rule: Rule,
    schedule: str = "replay",
    **settings: Any,
) -> SelfForcingMethod:
    """Self-forcing over a causal student, and bidirectional teacher and critic."""
    student, teacher, critic = layouts
    plain = {"data": data, "score_schedule": schedule}
    roles = {
        "student": make_student(
            weights[0], rule, student, data, score_schedule=schedule, **settings
        ),
        "teacher": cases.make_role(weights[1], teacher, name="teacher", trainable=False, **plain),
        "critic": cases.make_role(
            weights[2], critic, name="critic", optimizer=dmd2.CRITIC, **plain, **settings
        ),
    }
    parsed = parse_options(SelfForcingMethod.Options, options, "method")
    SelfForcingMethod.check(parsed, {name: role.plugin for name, role in roles.items()})
    return SelfForcingMethod(roles, parsed, Streams(dmd2.SEED), dmd2.facts())


def causal_reference(net: cases.PlainModel, weights: cases.Weights, rule: Rule) -> Any:
    """``net``'s network as a function of a request; gradients end at clean keys and values."""
    reference = causal.Reference(weights, rule, stops=True)
    reference.model = net.model
    return reference


class Reference(dmd2.Reference):
    """DMD2 on rollouts."""

    def __init__(
        self, weights: Sequence[cases.Weights], options: Mapping[str, Any], rule: Rule
    ) -> None:
        super().__init__(weights, {"rollout_mode": "simulate", **options})
        self.rule = rule
        self.velocity_of = causal_reference(self.student, weights[0], rule)

    def batches(self, step: int) -> list[Batch]:
        return dmd2.batches(step, **KIND)

    def frames(self, rollout: str, step: int) -> int:
        """Of the step's videos."""
        scored = SHAPE[1]
        most = (self.o.get("num_training_frames", scored) - scored) // self.rule.size
        generator = self.streams.generator(f"{rollout}/length", step, -1)
        return scored + self.rule.size * int(torch.randint(0, most + 1, (), generator=generator))

    def exits(self, rollout: str, number: int, step: int, batch: Batch) -> list[int]:
        if self.o.get("last_step_only"):
            return [len(self.steps) - 1] * cases.BATCH
        if self.o.get("same_step_across_blocks"):
            return self.chosen(rollout, step, batch)
        return self.chosen(f"{rollout}/block/{number}", step, batch)

    def whole(self, context: Tensor, noisy: Tensor, t_BT: Tensor, batch: Batch) -> Tensor:
        """x0 of all frames, each block's noisy ones beside the context before it."""
        condition = {
            "text_embeds_BLD": batch.condition["text_embeds_BLD"].double(),
            "clean_latents_BCTHW": context,
            "clean_timestep": torch.full((cases.BATCH,), self.o.get("context_noise", 0.0)),
        }
        velocity = self.velocity_of(Request(noisy, t_BT, condition))
        return noisy - t_BT.double()[:, None, :, None, None] / 1000 * velocity

    def sample(self, loss: str, step: int, batch: Batch) -> Tensor:
        rollout = f"{loss}/rollout"
        with torch.no_grad():
            context, x0, noisy, t_BT = self.roll(rollout, step, batch)
        given, frames = self.o.get("given_frames", 0), x0.shape[2]
        found = torch.cat(
            [x0[:, :, :given], self.whole(context, noisy, t_BT, batch)[:, :, given:]], dim=2
        )
        begin = frames - SHAPE[1]
        start = begin + self.o.get("start_gradient_frame", 0)
        first = [min(f for f in range(frames) if self.rule.block(f) == b) for b in self.blocks(x0)]
        cut = min(f for f in first if f >= max(start, given))
        return torch.cat([found[:, :, :cut].detach(), found[:, :, cut:]], dim=2)[:, :, begin:]

    def blocks(self, x0: Tensor) -> list[int]:
        return sorted({self.rule.block(f) for f in range(x0.shape[2])})

    def roll(self, rollout: str, step: int, batch: Batch) -> tuple[Tensor, ...]:
        """The context as it is cached, the video, and what went into each block's exit pass."""
        frames, given = self.frames(rollout, step), self.o.get("given_frames", 0)
        context, x0, noisy = torch.zeros(
            3, cases.BATCH, SHAPE[0], frames, *SHAPE[2:], dtype=torch.float64
        )
        t_BT = torch.zeros(cases.BATCH, frames)
        if given:
            assert batch.latents_BCTHW is not None
            self.finish(
                rollout, step, batch, range(given), batch.latents_BCTHW[:, :, :given], x0, context
            )
        of_block: dict[int, list[int]] = {}
        for frame in range(given, frames):
            of_block.setdefault(self.rule.block(frame), []).append(frame)
        for number, own in enumerate(of_block.values()):
            block = range(own[0], own[-1] + 1)
            chosen = self.exits(rollout, number, step, batch)
            walk = self.walk(
                f"{rollout}/block/{number}", step, batch, block, max(chosen), context, noisy, t_BT
            )
            for i, j in enumerate(chosen):
                noisy[i, :, block.start : block.stop] = walk[j][i]
                t_BT[i, block.start : block.stop] = self.steps[j]
            made = self.of_block(block, context, noisy, t_BT, batch)
            self.finish(rollout, step, batch, block, made, x0, context)
        return context, x0, noisy, t_BT

    def walk(
        self,
        purpose: str,
        step: int,
        batch: Batch,
        block: range,
        last: int,
        context: Tensor,
        noisy: Tensor,
        t_BT: Tensor,
    ) -> list[Tensor]:
        """A block's inputs at the steps 0 to ``last``."""
        shape, part = (SHAPE[0], len(block), *SHAPE[2:]), slice(block.start, block.stop)
        x = self.normal(f"{purpose}/noise/0", step, batch, shape) * self.steps[0] / 1000
        inputs = [x]
        for k in range(last):
            noisy[:, :, part], t_BT[:, part] = x, self.steps[k]
            x0 = self.of_block(block, context, noisy, t_BT, batch)
            s, below = self.steps[k] / 1000, self.steps[k + 1] / 1000
            eps = (x - (1 - s) * x0) / s
            if self.o["student_sample_type"] == "sde":
                eps = self.normal(f"{purpose}/noise/{k + 1}", step, batch, shape)
            x = (1 - below) * x0 + below * eps
            inputs.append(x)
        return inputs

    def of_block(
        self, block: range, context: Tensor, noisy: Tensor, t_BT: Tensor, batch: Batch
    ) -> Tensor:
        """x0 of a block; what comes later does not matter and is left out."""
        end = block.stop
        whole = self.whole(context[:, :, :end], noisy[:, :, :end], t_BT[:, :end], batch)
        return whole[:, :, block.start :]

    def finish(
        self,
        rollout: str,
        step: int,
        batch: Batch,
        block: range,
        made: Tensor,
        x0: Tensor,
        context: Tensor,
    ) -> None:
        """Write a block into the video and into the context."""
        part, level = slice(block.start, block.stop), self.o.get("context_noise", 0.0) / 1000
        x0[:, :, part] = context[:, :, part] = made
        if level:
            shape = (SHAPE[0], len(block), *SHAPE[2:])
            eps = self.normal(f"{rollout}/context/{block.start}", step, batch, shape)
            context[:, :, part] = (1 - level) * x0[:, :, part] + level * eps
