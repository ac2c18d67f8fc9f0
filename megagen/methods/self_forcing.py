"""Self-forcing: DMD2 for a causal student, on videos that it makes as it will in use.

Huang et al., arXiv 2506.08009, algorithm 1. A video is made block by block on a cache of the blocks
before. Each block walks down the student's timesteps to its exit step j and ends there:

    for each block:  x <- eps;  for k < j:  x <- (1 - s') x0(x, t_k) + s' eps';  out <- x0(x, t_j)
                     cache <- cache + keys and values of out, clean or with context noise

The whole video is noised and scored as in DMD2. The gradient reaches the pass of each block's exit
step, and stops at its cache: so it is one more request per block, worked off after the scores.

Legend: B batch, C channels, T latent frames, H W latent size, K steps of the student.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megagen.core import process
from megagen.core.errors import ConfigError
from megagen.data.batch import Batch
from megagen.engine.kv_cache import CacheRef
from megagen.methods.diffusion_forcing import block_size
from megagen.methods.dmd2 import DMD2Method, Draw
from megagen.methods.few_step import RolloutDraw, noised, predict_x0, x0_of
from megagen.methods.self_forcing_options import SelfForcingOptions
from megagen.models.base import Request


@dataclass(frozen=True)
class BlocksDraw:
    """All random numbers of one micro-batch's rollout, and what it starts from.

    Args:
        condition: of the micro-batch.
        num_scored: last frames that are scored.
        given_BCTHW: the video's first frames; None: it begins with noise.
        blocks: frames of each block.
        rollouts: of each block.
        contexts: noise of what goes into the cache, in order; none where it goes in clean.
    """

    condition: Mapping[str, Tensor]
    num_scored: int
    given_BCTHW: Tensor | None
    blocks: tuple[range, ...]
    rollouts: tuple[RolloutDraw, ...]
    contexts: tuple[Tensor, ...]


@dataclass(frozen=True)
class Video:
    """One micro-batch's rollout.

    Args:
        x0_BCTHW: the scored frames.
        inputs: the student's input at each block's exit step, with the cache that it saw.
    """

    x0_BCTHW: Tensor
    inputs: tuple[Request, ...]


class SelfForcingMethod(DMD2Method):
    """DMD2 on the student's autoregressive rollouts."""

    Options = SelfForcingOptions
    options: SelfForcingOptions

    @classmethod
    def needs_latents(cls, options: Any) -> bool:
        """Where the first frames are given, or samples are compared with data."""
        return options.given_frames > 0 or super().needs_latents(options)

    # -- random numbers ----------------------------------------------------------------------------
    def draw_rollout(self, batch: Batch, step: int, purpose: str) -> BlocksDraw:
        """Length of the video, exit steps and noise of its blocks, noise of its caches."""
        o, positions = self.options, batch.positions
        channels, num_scored, height, width = batch.latent_shape
        num_frames = self.draw_length(num_scored, step, purpose)
        blocks = self.student.plugin.blocks(num_frames - o.given_frames, o.given_frames)
        given = self.data(batch)[:, :, : o.given_frames] if o.given_frames else None
        shared = self.shared_exit(positions, step, purpose)
        rollouts, contexts = [], []
        for number, block in enumerate(blocks):
            shape = (channels, len(block), height, width)
            start = (step, positions, batch.condition, shape, shared)
            rollouts.append(self.rollout.draw(self.streams, f"{purpose}/block/{number}", *start))
        for part in [range(o.given_frames), *blocks[:-1]] if o.context_noise > 0 else []:
            if part:
                shape = (channels, len(part), height, width)
                eps = self.streams.normal(f"{purpose}/context/{part.start}", step, positions, shape)
                contexts.append(eps.to(process.device()))
        return BlocksDraw(
            batch.condition, num_scored, given, tuple(blocks), tuple(rollouts), tuple(contexts)
        )

    def draw_length(self, num_scored: int, step: int, purpose: str) -> int:
        """Frames of the step's videos: the same on every data rank."""
        longest = self.options.num_training_frames or num_scored
        if longest < num_scored or num_scored <= self.options.given_frames:
            raise ConfigError(
                f"samples have {num_scored} latent frames; num_training_frames is {longest}, "
                f"given_frames {self.options.given_frames}.",
                remedy="A rollout has at least as many frames as a sample, which more are made of "
                "than given.",
                where="method",
            )
        size = block_size(self.student.plugin)
        more = (longest - num_scored) // size + 1
        drawn = self.streams.integers(f"{purpose}/length", step, [-1], 0, more)
        return num_scored + size * int(drawn)

    def shared_exit(self, positions: Sequence[int], step: int, purpose: str) -> Tensor | None:
        """The exit step of all blocks of each sample; None: each block has its own."""
        if self.options.last_step_only:
            return torch.full((len(positions),), len(self.rollout.timesteps) - 1)
        if self.options.same_step_across_blocks:
            return self.rollout.draw_step(self.streams, purpose, step, positions)
        return None

    # -- the rollout -------------------------------------------------------------------------------
    def roll(self, draws: Sequence[BlocksDraw]) -> list[Video]:
        """The student's videos, without gradient; all micro-batches side by side."""
        made: list[list[Tensor]] = [[] for _ in draws]
        inputs: list[list[Request]] = [[] for _ in draws]
        caches: list[CacheRef | None] = [None] * len(draws)
        given = [draw.given_BCTHW for draw in draws if draw.given_BCTHW is not None]
        if given:
            made = [[frames] for frames in given]
            caches = self.remember(given, draws, caches, 0)
        num_blocks = len(draws[0].blocks)
        for number in range(num_blocks):
            rollouts = [draw.rollouts[number] for draw in draws]
            exits = self.rollout.inputs(self.student, rollouts, caches)
            x0s = predict_x0(self.student, exits)
            for frames, kept, x0, request in zip(made, inputs, x0s, exits, strict=True):
                frames.append(x0)
                kept.append(request)
            if number < num_blocks - 1:
                caches = self.remember(x0s, draws, caches, number + bool(given))
        return [
            Video(torch.cat(frames, dim=2)[:, :, -draw.num_scored :], tuple(kept))
            for frames, kept, draw in zip(made, inputs, draws, strict=True)
        ]

    def remember(
        self,
        x0s: Sequence[Tensor],
        draws: Sequence[BlocksDraw],
        caches: Sequence[CacheRef | None],
        number: int,
    ) -> list[CacheRef | None]:
        """The caches with the frames just made, as later blocks see them."""
        requests = []
        for x0, draw, cache in zip(x0s, draws, caches, strict=True):
            eps = draw.contexts[number] if draw.contexts else torch.zeros_like(x0)
            timestep_B = x0.new_full((len(x0),), self.options.context_noise)
            requests.append(noised(x0, eps, timestep_B, draw.condition).with_(cache=cache))
        return list(self.student.extend_cache(requests))

    # -- what DMD2 asks for ------------------------------------------------------------------------
    def generate(self, draws: Sequence[Draw]) -> list[Tensor]:
        """The student's videos x0, without gradient."""
        groups = [self.roll([draw.rollout for draw in group]) for group in self.groups(draws)]
        return [video.x0_BCTHW for videos in groups for video in videos]

    def student_pass(self, draws: Sequence[Draw]) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
        """All groups' gradients; losses and samples of every micro-batch."""
        losses: list[dict[str, Tensor]] = []
        samples: list[Tensor] = []
        self.student.zero_grad()
        for group in self.groups(draws):
            found = self.group_pass(group, len(draws), len(draws) - len(samples) - len(group))
            losses += found[0]
            samples += found[1]
        return losses, samples

    def groups(self, draws: Sequence[Draw]) -> list[Sequence[Draw]]:
        """Micro-batches that are worked on together."""
        size = self.options.micro_batches_at_once or len(draws)
        return [draws[start : start + size] for start in range(0, len(draws), size)]

    def group_pass(
        self, draws: Sequence[Draw], num_draws: int, num_left: int
    ) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
        """Rollout, scores of the whole videos, and the gradient at each block's exit step.

        Args:
            draws: of the group.
            num_draws: of all groups: the loss is the mean over them.
            num_left: of the groups behind this one.
        """
        rollouts = [draw.rollout for draw in draws]
        videos = self.roll(rollouts)
        samples = [video.x0_BCTHW for video in videos]
        targets = self.score(samples, [rollout.condition for rollout in rollouts], draws)
        losses, requests = [], []
        for rollout, video, target in zip(rollouts, videos, targets, strict=True):
            x0 = video.x0_BCTHW.detach().requires_grad_()
            terms = self.sample_loss(x0, target)
            (gradient,) = torch.autograd.grad(terms["loss"], x0)
            gradient *= len(draws) / num_draws
            requests += self.trained_blocks(rollout, video, gradient)
            losses.append({name: value.detach() for name, value in terms.items()})
        self.student.forward_backward(requests, block_loss, more_to_come=num_left > 0)
        return losses, samples

    def trained_blocks(self, draw: BlocksDraw, video: Video, gradient: Tensor) -> list[Request]:
        """The inputs of the blocks that the loss reaches, each with its part of the gradient."""
        o, scored = self.options, draw.num_scored
        begin = draw.blocks[-1].stop - scored
        first_seen = begin + scored - min(o.gradient_frames or scored, scored)
        trained = [
            number
            for number, block in enumerate(draw.blocks)
            if block.start >= begin + o.start_gradient_frame and block.stop > first_seen
        ]
        if not trained:
            raise ConfigError(
                f"is {o.start_gradient_frame}, and no block of {scored} frames starts there or "
                "later.",
                remedy="Choose an earlier frame.",
                where="method.start_gradient_frame",
            )
        found = []
        for number in trained:
            block = draw.blocks[number]
            part = gradient[:, :, block.start - begin : block.stop - begin]
            # the role takes the mean over requests: the sum over blocks is wanted
            extra = {"gradient": len(trained) * part}
            found.append(video.inputs[number].with_(extra=extra))
        return found


def block_loss(velocity: Tensor, request: Request) -> dict[str, Tensor]:
    """``<x0, stop(g)>`` of one block."""
    return {"loss": (x0_of(velocity, request) * request.extra["gradient"]).sum()}
