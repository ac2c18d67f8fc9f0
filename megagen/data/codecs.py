"""Codecs: pixels to the latents a model is trained on, and back.

Legend: B batch, C channels, T frames, H W height and width (of pixels or of latents).

Latents are *raw*: what the codec gives, before a model's normalisation (that is its plugin's).
A codec is described by a JSON spec ``{"name": ..., options...}`` that is stored with a dataset, so
that sampling can rebuild the codec the dataset was made with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from megagen.core.errors import ConfigError, suggest
from megagen.core.options import StrictOptions, parse_options
from megagen.core.registry import resolve

CODECS: dict[str, str] = {
    "space_to_depth": "megagen.data.codecs:SpaceToDepth",
    "wan_vae": "megagen.data.codec_wan:WanVae",
}


class Codec(ABC):
    """Pixels in [-1, 1] to raw latents and back.

    Attributes:
        name: its key in ``CODECS``.
        options: its parsed options.
        spatial: pixels per latent in height and in width.
        temporal: frames per latent frame.
        latent_channels: C of the latents.
    """

    name: ClassVar[str]
    Options: ClassVar[type[StrictOptions]]
    options: StrictOptions
    spatial: int
    temporal: int
    latent_channels: int

    def spec(self) -> dict[str, Any]:
        """JSON from which ``build_codec`` makes this codec again."""
        return {"name": self.name, **self.options.model_dump(mode="json")}

    @abstractmethod
    def frames_rule(self, num_frames: int) -> bool:
        """Whether a clip of so many pixel frames can be encoded."""

    @abstractmethod
    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a legal number of pixel frames."""

    @abstractmethod
    def pixel_frames(self, latent_frames: int) -> int:
        """Pixel frames that so many latent frames decode to."""

    @abstractmethod
    def encode(self, video_BCTHW: Tensor) -> Tensor:
        """RGB fp32 in [-1, 1] to raw latents, fp32 on the CPU."""

    @abstractmethod
    def decode(self, latents_BCTHW: Tensor) -> Tensor:
        """Raw latents to RGB fp32 in [-1, 1] on the CPU."""

    def block_decoder(self) -> Callable[[Tensor], Tensor]:
        """A function that decodes one clip's latents block by block, in order.

        Called on consecutive latent frames ``[B, C, T, H, W]`` it gives their pixels as ``decode``
        of the whole clip would.

        Raises:
            ConfigError: the codec needs later frames to decode a frame.
        """
        raise ConfigError(
            f"the codec {self.name!r} does not decode block by block.",
            remedy="Sample whole videos (without --stream).",
            where="codec",
        )

    def normalize(self, latents_BCTHW: Tensor) -> Tensor:
        """The latents as the codec's own models are trained on them. Default: raw."""
        return latents_BCTHW

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """``(C, T, H, W)`` of the latents of a clip of this size."""
        return (
            self.latent_channels,
            self.latent_frames(num_frames),
            height // self.spatial,
            width // self.spatial,
        )

    def check_size(self, num_frames: int, height: int, width: int, where: str) -> None:
        """Raise ``ConfigError`` naming the nearest legal values where a size cannot be encoded."""
        if num_frames < 1 or not self.frames_rule(num_frames):
            legal = self._legal_frames_near(num_frames)
            raise ConfigError(
                f"num_frames {num_frames} does not fit the codec {self.name!r};",
                remedy=f"nearest legal: {' and '.join(map(str, legal))}.",
                where=where,
            )
        for key, size in (("height", height), ("width", width)):
            if size < self.spatial or size % self.spatial:
                below = size // self.spatial * self.spatial
                legal = [n for n in (below, below + self.spatial) if n > 0]
                raise ConfigError(
                    f"{key} {size} is no multiple of the codec's {self.spatial} pixels;",
                    remedy=f"nearest legal: {' and '.join(map(str, legal))}.",
                    where=where,
                )

    def _legal_frames_near(self, num_frames: int) -> list[int]:
        below = next((n for n in range(num_frames, 0, -1) if self.frames_rule(n)), None)
        above = next(n for n in range(max(num_frames, 1), num_frames + 1000) if self.frames_rule(n))
        return [above] if below is None else [below, above]


def build_codec(spec: Mapping[str, Any], where: str = "codec") -> Codec:
    """The codec that a spec describes.

    Raises:
        ConfigError: unknown name or option.
        DataError: its weights are not there.
    """
    codec: Codec = build_from_spec(spec, CODECS, where)
    return codec


def build_from_spec(spec: Mapping[str, Any], table: Mapping[str, str], where: str) -> Any:
    """``table[spec["name"]]`` made with the other keys of ``spec`` as its options."""
    cls, options = check_spec(spec, table, where)
    return cls(options)


def check_spec(spec: Mapping[str, Any], table: Mapping[str, str], where: str) -> tuple[Any, Any]:
    """The class that ``spec`` names and its parsed options; nothing is loaded.

    Raises:
        ConfigError: unknown name or option.
    """
    options = dict(spec)
    name = options.pop("name", None)
    if name not in table:
        raise ConfigError(
            f"unknown name {name!r};", remedy=suggest(str(name), table), where=f"{where}.name"
        )
    cls = resolve(name, table, where=where)
    return cls, parse_options(cls.Options, options, where)


class SpaceToDepthOptions(StrictOptions):
    """Options of ``SpaceToDepth``.

    Attributes:
        patch: pixels per latent in height and width.
        temporal: frames per latent frame.
        channels: 3 keeps the colours; 1 keeps their mean, and decodes to grey.
        offset: pixel value in [-1, 1] that becomes 0.
        scale: pixel difference from it that becomes 1; with the mean and standard deviation of the
            pixels here, latents are centred and of unit variance.
    """

    patch: int = Field(2, ge=1)
    temporal: int = Field(1, ge=1)
    channels: Literal[1, 3] = 3
    offset: float = Field(0.0, ge=-1, le=1)
    scale: float = Field(1.0, gt=0)


class SpaceToDepth(Codec):
    """Pixels moved into channels: exact both ways (of grey clips where channels is 1), no weights.

    Channel ``((c * temporal + dt) * patch + dy) * patch + dx`` of latent ``(t, y, x)`` is colour c
    of pixel ``(t * temporal + dt, y * patch + dy, x * patch + dx)``.
    """

    name = "space_to_depth"
    Options = SpaceToDepthOptions
    options: SpaceToDepthOptions

    def __init__(self, options: SpaceToDepthOptions) -> None:
        self.options = options
        self.spatial, self.temporal = options.patch, options.temporal
        self.latent_channels = options.channels * options.temporal * options.patch**2
        self._channels = options.channels

    def frames_rule(self, num_frames: int) -> bool:
        """A whole number of latent frames."""
        return num_frames % self.temporal == 0

    def latent_frames(self, num_frames: int) -> int:
        """``num_frames / temporal``."""
        return num_frames // self.temporal

    def pixel_frames(self, latent_frames: int) -> int:
        """``latent_frames * temporal``."""
        return latent_frames * self.temporal

    def encode(self, video_BCTHW: Tensor) -> Tensor:
        """See the class."""
        if self._channels == 1:
            video_BCTHW = video_BCTHW.mean(1, keepdim=True)
        B, C, T, H, W = video_BCTHW.shape
        p, q = self.spatial, self.temporal
        blocks = video_BCTHW.reshape(B, C, T // q, q, H // p, p, W // p, p)
        moved = blocks.permute(0, 1, 3, 5, 7, 2, 4, 6)
        latents = moved.reshape(B, C * q * p * p, T // q, H // p, W // p).float().cpu()
        return (latents - self.options.offset) / self.options.scale

    def decode(self, latents_BCTHW: Tensor) -> Tensor:
        """Inverse of ``encode``; values are cut to [-1, 1]."""
        latents_BCTHW = latents_BCTHW * self.options.scale + self.options.offset
        B, _, T, H, W = latents_BCTHW.shape
        p, q = self.spatial, self.temporal
        blocks = latents_BCTHW.reshape(B, -1, q, p, p, T, H, W).permute(0, 1, 5, 2, 6, 3, 7, 4)
        video_BCTHW = blocks.reshape(B, -1, T * q, H * p, W * p)
        return video_BCTHW.expand(-1, 3, -1, -1, -1).float().clamp(-1, 1).cpu()

    def block_decoder(self) -> Callable[[Tensor], Tensor]:
        """``decode``: no latent frame depends on another."""
        return self.decode


def to_unit(frames_THWC: Tensor) -> Tensor:
    """uint8 frames ``[T, H, W, 3]`` to fp32 ``[3, T, H, W]`` in [-1, 1]: ``x / 127.5 - 1``."""
    return frames_THWC.permute(3, 0, 1, 2).float().div(127.5).sub(1)


def to_pixels(video_CTHW: Tensor) -> Tensor:
    """fp32 ``[3, T, H, W]`` in [-1, 1] to uint8 ``[T, H, W, 3]``, rounded and cut to range."""
    levels = video_CTHW.float().add(1).mul(127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu()
