"""Buckets: the sizes that clips are cut to, so that a batch is of one shape.

Legend: T frames, H W pixel height and width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from megagen.core.errors import ConfigError, DataError
from megagen.data.codecs import Codec

SAME_ASPECT = 0.05  # of the logarithm of width / height


@dataclass(frozen=True, order=True)
class Bucket:
    """One size: pixel frames, height, width."""

    num_frames: int
    height: int
    width: int

    @property
    def name(self) -> str:
        """``"81x480x832"``, also the bucket's folder in a dataset."""
        return f"{self.num_frames}x{self.height}x{self.width}"

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.width / self.height


def parse_bucket(value: Any) -> Bucket:
    """A bucket from ``"81x480x832"``, ``[81, 480, 832]`` or a mapping with the field names.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, Bucket):
        return value
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+)x(\d+)x(\d+)", value.strip())):
        value = [int(n) for n in match.groups()]
    if isinstance(value, dict) and set(value) == {"num_frames", "height", "width"}:
        value = [value["num_frames"], value["height"], value["width"]]
    if isinstance(value, list | tuple) and len(value) == 3 and all(type(n) is int for n in value):
        return Bucket(*value)
    raise ValueError(f"{value!r} is no bucket: write FRAMESxHEIGHTxWIDTH, as in 81x480x832")


def check_buckets(buckets: Sequence[Bucket], codec: Codec, where: str) -> None:
    """Raise ``ConfigError`` where the codec cannot encode a bucket, or one stands twice."""
    for index, bucket in enumerate(buckets):
        codec.check_size(bucket.num_frames, bucket.height, bucket.width, f"{where}[{index}]")
        if bucket in buckets[:index]:
            raise ConfigError(f"{bucket.name} stands twice;", remedy="Keep one.", where=where)


def choose_bucket(
    buckets: Sequence[Bucket], num_frames: int, height: int, width: int, where: str
) -> Bucket:
    """The bucket of a clip: nearest aspect, then most frames that the clip fills.

    Aspects within 5% of the nearest count as near, too (480x832 and 720x1280 are both "16:9"). Of
    several such buckets the largest that needs no enlarging wins, else the smallest.

    Args:
        num_frames: frames the clip has at the dataset's rate.
        height, width: pixels of the clip.
        where: the file, for the error.

    Raises:
        DataError: the clip is too short for every bucket of its aspect.
    """
    aspect = math.log(width / height)
    distance = {b: abs(math.log(b.aspect) - aspect) for b in buckets}
    near = [b for b in buckets if distance[b] <= min(distance.values()) + SAME_ASPECT]
    filled = [b for b in near if b.num_frames <= num_frames]
    if not filled:
        raise DataError(
            f"too short: {num_frames} frames, its bucket needs {min(b.num_frames for b in near)}.",
            remedy="Use a longer clip, or add a bucket of fewer frames.",
            where=where,
        )
    longest = max(b.num_frames for b in filled)
    sized = sorted((b for b in filled if b.num_frames == longest), key=lambda b: b.height * b.width)
    fitting = [b for b in sized if b.height <= height and b.width <= width]
    return fitting[-1] if fitting else sized[0]


def fit_to_bucket(video_CTHW: Tensor, bucket: Bucket) -> Tensor:
    """The first frames of a clip, resized to cover the bucket and cropped at its centre.

    A clip of the bucket's own size comes back with the same numbers.

    Args:
        video_CTHW: fp32, at least ``bucket.num_frames`` frames.

    Returns:
        fp32 ``[C, bucket.num_frames, bucket.height, bucket.width]``.
    """
    video = video_CTHW[:, : bucket.num_frames]
    height, width = video.shape[2:]
    if (height, width) == (bucket.height, bucket.width):
        return video
    scale = max(bucket.height / height, bucket.width / width)
    size = (max(bucket.height, round(height * scale)), max(bucket.width, round(width * scale)))
    resized = F.interpolate(
        video.transpose(0, 1), size=size, mode="bicubic", antialias=True, align_corners=False
    ).clamp(-1, 1)
    top, left = (size[0] - bucket.height) // 2, (size[1] - bucket.width) // 2
    cropped = resized[:, :, top : top + bucket.height, left : left + bucket.width]
    return cropped.transpose(0, 1).contiguous()
