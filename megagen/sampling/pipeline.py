"""Texts (and images) to videos: conditions, latents, pixels.

Prompts are dealt out over the data ranks; every other parallel degree works together on each one.
The noise of prompt i is a function of (seed, i), so a video does not depend on layout, batch size
or on what else is sampled.

Legend: B batch, C channels, T frames, H W height and width, L tokens, D features.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from megagen.core import process
from megagen.core.errors import ConfigError
from megagen.core.options import StrictOptions
from megagen.core.streams import Streams
from megagen.data.codecs import Codec, to_pixels, to_unit
from megagen.data.image import ClipVision
from megagen.data.text import TextEncoder
from megagen.engine.role import Role
from megagen.parallel.mesh import Mesh
from megagen.sampling.flow import SamplerName
from megagen.sampling.latents import Condition, sample_latents
from megagen.sampling.streaming import (
    StreamOptions,
    TimestepList,
    check_causal,
    stream_latents,
)


class SamplingOptions(StrictOptions):
    """How to sample.

    Attributes:
        num_frames, height, width: of the video, in pixels.
        num_steps: solver steps.
        guidance_scale: 1 makes no unconditional pass.
        guidance_scale_2: of the second (low-noise) expert; None: the same.
        shift: of the sigma grid; None: the model's.
        sampler: ``unipc``, ``euler`` or ``sde`` (fresh noise at every step, as few-step students
            are trained by default).
        t_list: a few-step student's timesteps in 0..1000 going down to a final 0; None:
            ``num_steps`` evenly spaced ones, shifted.
        negative_prompt: text of the unconditional branch; None: the source's own.
        seed: of the noise.
        batch_size: prompts sampled together by one data rank.
        stream: block by block with a causal network; None: all frames at once.
    """

    num_frames: int = Field(ge=1)
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    num_steps: int = Field(default=50, ge=1)
    guidance_scale: float = Field(default=5.0, ge=0)
    guidance_scale_2: float | None = Field(default=None, ge=0)
    shift: float | None = Field(default=None, gt=0)
    sampler: SamplerName = "unipc"
    t_list: TimestepList | None = None
    negative_prompt: str | None = None
    seed: int = 0
    batch_size: int = Field(default=1, ge=1)
    stream: StreamOptions | None = None


@dataclass(frozen=True)
class Piece:
    """Frames of a video that is being made.

    Args:
        position: number of the prompt.
        frames_THWC: uint8, those that follow the frames of the piece before.
        seconds: since work on the prompt began.
        is_last: the video is whole.
    """

    position: int
    frames_THWC: Tensor
    seconds: float
    is_last: bool


@dataclass(frozen=True)
class VideoPipeline:
    """Networks with the codec and the encoders they were trained with.

    Args:
        roles: one network, or the high-noise and the low-noise expert.
        codec: latents to pixels.
        text_encoder: prompts to embeddings.
        data_layout: which rank works on which prompts.
        clip_vision: image encoder of Wan 2.1 image-to-video networks.
        negative_prompt: text of the unconditional branch.
    """

    roles: Sequence[Role]
    codec: Codec
    text_encoder: TextEncoder
    data_layout: Mesh
    clip_vision: ClipVision | None = None
    negative_prompt: str = ""

    def generate(
        self,
        prompts: Sequence[str],
        options: SamplingOptions,
        images_THWC: Sequence[Tensor] | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Sample all prompts. Collective: every rank iterates to the end.

        Args:
            prompts: one video each.
            options: size, solver, seed.
            images_THWC: first frames, uint8 ``[1, height, width, 3]``, one a prompt.

        Yields:
            On the first rank of each data rank: (number of the prompt, uint8 ``[T, H, W, 3]``).
            Other ranks yield nothing.

        Raises:
            ConfigError: a size that codec or network cannot have, an image missing or too many.
        """
        self._check(options, images_THWC)
        layout = self.data_layout
        seen: set[int] = set()
        for positions in batches(len(prompts), layout.dp_rank, layout.dp_size, options.batch_size):
            chosen = [prompts[p] for p in positions]
            images = None if images_THWC is None else [images_THWC[p] for p in positions]
            latents_BCTHW = self.latents(chosen, positions, options, images)
            if layout.tp_rank == layout.cp_rank == layout.pp_rank == 0:
                for position, video_CTHW in zip(
                    positions, self.codec.decode(latents_BCTHW), strict=True
                ):
                    if position not in seen and position % layout.dp_size == layout.dp_rank:
                        seen.add(position)
                        yield position, to_pixels(video_CTHW)

    def stream(
        self,
        prompts: Sequence[str],
        options: SamplingOptions,
        images_THWC: Sequence[Tensor] | None = None,
    ) -> Iterator[Piece]:
        """Sample all prompts and hand out their frames as they are made. Collective.

        Args:
            prompts: one video each.
            options: as for ``generate``; ``stream`` says how.
            images_THWC: as for ``generate``; a text-to-video network continues them.

        Yields:
            What ``generate`` yields, in pieces.

        Raises:
            ConfigError: as ``generate``; the network or the codec works on whole videos only.
        """
        self._check(options, images_THWC)
        layout = self.data_layout
        is_writer = layout.tp_rank == layout.cp_rank == layout.pp_rank == 0
        seen: set[int] = set()
        for positions in batches(len(prompts), layout.dp_rank, layout.dp_size, options.batch_size):
            begun = time.perf_counter()
            decode = self.codec.block_decoder()
            images = None if images_THWC is None else [images_THWC[p] for p in positions]
            chosen = [prompts[p] for p in positions]
            for block, latents_BCTHW in self.blocks(chosen, positions, options, images):
                if not is_writer:
                    continue
                is_last = block.stop == self.codec.latent_frames(options.num_frames)
                videos = zip(positions, decode(latents_BCTHW), strict=True)
                new = {p: v for p, v in videos if p not in seen}
                for position, video_CTHW in new.items():
                    if position % layout.dp_size == layout.dp_rank:
                        seconds = time.perf_counter() - begun
                        yield Piece(position, to_pixels(video_CTHW), seconds, is_last)
            seen.update(positions)

    def blocks(
        self,
        prompts: Sequence[str],
        positions: Sequence[int],
        options: SamplingOptions,
        images_THWC: Sequence[Tensor] | None = None,
    ) -> Iterator[tuple[range, Tensor]]:
        """(latent frames, raw latents ``[B, C, T, H, W]``) of some prompts, block by block."""
        role, device = self._streaming_role(options), process.device()
        assert options.stream is not None
        shape = self.codec.latent_shape(options.num_frames, options.height, options.width)
        streams = Streams(options.seed)

        def fresh_noise(purpose: str, frames: range) -> Tensor:
            part = (shape[0], len(frames), *shape[2:])
            return streams.normal(f"sample/{purpose}", frames.start, positions, part).to(device)

        known = self._image_condition(images_THWC, options) if images_THWC else {}
        first = known.get("first_frame_latents_BCTHW")
        given = None if first is None or _expands(role) else known.pop("first_frame_latents_BCTHW")
        if given is not None:
            yield range(given.size(2)), role.plugin.denormalize(given).cpu()
        shift = role.plugin.flow_shift if options.shift is None else options.shift
        for block, x0_BCTHW in stream_latents(
            role,
            options.stream,
            noise_BCTHW=streams.normal("sample", 0, positions, shape).to(device),
            fresh_noise=fresh_noise,
            sigmas=options.stream.sigmas(options.num_steps, shift),
            condition=_to(device, {**self._text_condition(prompts), **known}),
            uncondition=_to(device, {**self._negative(options, len(prompts)), **known}),
            guidance_scale=options.guidance_scale,
            given_BCTHW=None if given is None else given.to(device),
        ):
            if first is not None and given is None and block.start == 0:
                x0_BCTHW = torch.cat([first.to(device), x0_BCTHW[:, :, first.shape[2] :]], dim=2)
            yield block, role.plugin.denormalize(x0_BCTHW).cpu()

    def _streaming_role(self, options: SamplingOptions) -> Role:
        if len(self.roles) > 1:
            raise ConfigError(
                "there are two experts, each of which would need a cache of its own.",
                remedy="Sample whole videos (without --stream).",
                where="stream",
            )
        check_causal(self.roles[0])
        return self.roles[0]

    def latents(
        self,
        prompts: Sequence[str],
        positions: Sequence[int],
        options: SamplingOptions,
        images_THWC: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Raw latents ``[B, C, T, H, W]`` of some prompts, on every rank of the data rank."""
        if options.stream is not None:
            made = self.blocks(prompts, positions, options, images_THWC)
            return torch.cat([latents for _, latents in made], dim=2)
        shape = self.codec.latent_shape(options.num_frames, options.height, options.width)
        streams = Streams(options.seed)
        noise = streams.normal("sample", 0, positions, shape)
        given = self._image_condition(images_THWC, options) if images_THWC else {}
        first_scale, second_scale = options.guidance_scale, options.guidance_scale_2
        scales = [first_scale, first_scale if second_scale is None else second_scale]
        device = process.device()
        x0_BCTHW = sample_latents(
            self.roles,
            noise_BCTHW=noise.to(device),
            condition=_to(device, {**self._text_condition(prompts), **given}),
            uncondition=_to(device, {**self._negative(options, len(prompts)), **given}),
            num_steps=options.num_steps,
            guidance_scale=scales[: len(self.roles)],
            shift=options.shift,
            sampler=options.sampler,
            t_list=options.t_list,
            fresh_noise=lambda k: streams.normal(f"sample/step/{k}", 0, positions, shape).to(
                device
            ),
        )
        if "first_frame_latents_BCTHW" in given:
            first = given["first_frame_latents_BCTHW"].to(device)
            x0_BCTHW = torch.cat([first, x0_BCTHW[:, :, first.shape[2] :]], dim=2)
        return self.roles[0].plugin.denormalize(x0_BCTHW).cpu()

    def _text_condition(self, prompts: Sequence[str]) -> Condition:
        return {"text_embeds_BLD": self.text_encoder.encode(prompts)[0]}

    def _negative(self, options: SamplingOptions, count: int) -> Condition:
        negative = options.negative_prompt
        text = self.negative_prompt if negative is None else negative
        embeds_1LD = self._text_condition([text])["text_embeds_BLD"]
        return {"text_embeds_BLD": embeds_1LD.expand(count, -1, -1)}

    def _image_condition(
        self, images_THWC: Sequence[Tensor], options: SamplingOptions
    ) -> dict[str, Tensor]:
        """What an image-to-video network is told of the first frame, as its data was made."""
        plugin = self.roles[0].plugin
        first_BCTHW = torch.stack([to_unit(image) for image in images_THWC])
        if takes_first_frame(self.roles[0], options) is None:
            latents = plugin.normalize(self.codec.encode(first_BCTHW))
            return {"first_frame_latents_BCTHW": latents}
        still = first_BCTHW.new_zeros(
            *first_BCTHW.shape[:2], options.num_frames, *first_BCTHW.shape[3:]
        )
        still[:, :, :1] = first_BCTHW
        condition = {"condition_latents_BCTHW": plugin.normalize(self.codec.encode(still))}
        if self.clip_vision is not None:
            condition["image_embeds_BLD"] = self.clip_vision.encode(first_BCTHW[:, :, 0])
        return condition

    def _check(self, options: SamplingOptions, images_THWC: Sequence[Tensor] | None) -> None:
        self.codec.check_size(options.num_frames, options.height, options.width, "sample")
        takes_image = takes_first_frame(self.roles[0], options)
        if takes_image is True and images_THWC is None:
            raise ConfigError(
                "the network is image-to-video and no image is given.",
                remedy="Add --image FILE.",
                where="image",
            )
        if takes_image is False and images_THWC is not None:
            raise ConfigError(
                "the network is text-to-video and takes no image.",
                remedy="Drop --image, or choose an image-to-video model.",
                where="image",
            )


def takes_first_frame(role: Role, options: SamplingOptions) -> bool | None:
    """Whether the network needs a first frame (True), cannot take one (False), or may (None).

    In a stream a text-to-video network may: it continues the frame.
    """
    config = role.plugin.diffusers_config()
    if _expands(role):
        return None
    if config["in_channels"] > config["out_channels"]:
        return True
    return None if options.stream is not None else False


def _expands(role: Role) -> bool:
    """Whether a given first frame enters as tokens at timestep 0."""
    return bool(getattr(role.plugin, "expand_timesteps", False))


def batches(count: int, data_rank: int, data_size: int, batch_size: int) -> list[list[int]]:
    """The positions of one data rank, in batches, as many on every rank (the last ones repeat).

    >>> batches(5, data_rank=1, data_size=2, batch_size=2)
    [[1, 3], [3, 3]]
    """
    own = list(range(data_rank, count, data_size))
    most = -(-count // data_size)
    own += [own[-1] if own else count - 1] * (most - len(own))
    parts = [own[i : i + batch_size] for i in range(0, most, batch_size)]
    return [part + [part[-1]] * (len(parts[0]) - len(part)) for part in parts]


def _to(device: torch.device, condition: Condition) -> Condition:
    return {name: tensor.to(device) for name, tensor in condition.items()}
