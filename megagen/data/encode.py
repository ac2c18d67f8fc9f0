"""From one clip to one row: decode, fit to its bucket, encode, describe.

Legend: B batch, C channels, T frames, H W height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from megagen.core.errors import DataError
from megagen.data.buckets import Bucket, choose_bucket, fit_to_bucket
from megagen.data.codecs import Codec, to_unit
from megagen.data.image import ClipVision
from megagen.data.schema import CLIP, FIRST_FRAME, LATENT, TEXT, pack_tensor
from megagen.data.sources import Clip
from megagen.data.text import TextEncoder
from megagen.data.video import read_video


@dataclass(frozen=True)
class Pixels:
    """A decoded clip in its bucket: fp32 ``[3, T, H, W]`` in [-1, 1], or why it cannot be used."""

    clip: Clip
    bucket: Bucket | None = None
    video_CTHW: Tensor | None = None
    fps: float = 0.0
    reason: str = ""
    detail: str = ""


@dataclass
class Encoded:
    """Rows of some clips by bucket, the clips left out, and sums over the latents.

    Attributes:
        latent_sums: per channel: number of values, sum, sum of squares, fp64 ``[3, C]``.
    """

    rows: dict[Bucket, list[dict[str, Any]]] = field(default_factory=dict)
    quarantined: list[dict[str, str]] = field(default_factory=list)
    latent_sums: Tensor | None = None


def load_clip(clip: Clip, buckets: Sequence[Bucket], fps: float | None) -> Pixels:
    """Decode a clip and fit it to its bucket; what is wrong with it is told, not raised."""
    if clip.caption is None:
        return Pixels(clip, reason="no_caption", detail="no caption file or entry, or an empty one")
    try:
        frames, rate = read_video(
            clip.path, fps=fps, num_frames=max(bucket.num_frames for bucket in buckets)
        )
    except DataError as error:
        return Pixels(clip, reason="unreadable", detail=str(error))
    try:
        num_frames, height, width, _ = frames.shape
        bucket = choose_bucket(buckets, num_frames, height, width, clip.file_name)
    except DataError as error:
        return Pixels(clip, reason="too_short", detail=str(error))
    return Pixels(clip, bucket, fit_to_bucket(to_unit(frames[: bucket.num_frames]), bucket), rate)


class Encoder:
    """Turns clips into rows, the same whatever else is encoded beside them.

    Args:
        codec: pixels to latents.
        text: captions to embeddings.
        buckets: sizes to choose from.
        fps: rate the clips are brought to; None: each keeps its own.
        first_frame: add the columns of image-to-video.
        clip_vision: where its features are wanted.
        num_threads: clips decoded ahead.
    """

    def __init__(
        self,
        codec: Codec,
        text: TextEncoder,
        buckets: Sequence[Bucket],
        *,
        fps: float | None = None,
        first_frame: bool = False,
        clip_vision: ClipVision | None = None,
        num_threads: int = 1,
    ) -> None:
        self.codec, self.text, self.buckets, self.fps = codec, text, tuple(buckets), fps
        self.first_frame, self.clip_vision, self.num_threads = first_frame, clip_vision, num_threads

    @property
    def tensors(self) -> list[str]:
        """Names of the tensors in a row."""
        extra = [FIRST_FRAME] if self.first_frame else []
        return [LATENT, TEXT, *extra, *([CLIP] if self.clip_vision else [])]

    def encode(self, clips: Sequence[Clip], on_clip: Callable[[], None] = lambda: None) -> Encoded:
        """Rows of ``clips``, in their order; ``on_clip`` is called after each."""
        result = Encoded()

        def load(clip: Clip) -> Pixels:
            return load_clip(clip, self.buckets, self.fps)

        with ThreadPoolExecutor(self.num_threads) as pool:
            for pixels in run_ahead(pool, load, clips, self.num_threads):
                self._add(result, pixels)
                on_clip()
        return result

    def _add(self, result: Encoded, pixels: Pixels) -> None:
        reason, detail = pixels.reason, pixels.detail
        if pixels.video_CTHW is not None and pixels.bucket is not None:
            latents_CTHW = self.codec.encode(pixels.video_CTHW[None])[0]
            if torch.isfinite(latents_CTHW).all():
                row = self._row(pixels, pixels.video_CTHW, pixels.bucket, latents_CTHW)
                result.rows.setdefault(pixels.bucket, []).append(row)
                result.latent_sums = _sums(latents_CTHW, result.latent_sums)
                return
            reason, detail = "not_finite", "the codec gave latents with NaN or infinity"
        entry = {"file_name": pixels.clip.file_name, "reason": reason, "detail": detail}
        result.quarantined.append(entry)

    def _row(
        self, pixels: Pixels, video_CTHW: Tensor, bucket: Bucket, latents_CTHW: Tensor
    ) -> dict[str, Any]:
        clip = pixels.clip
        embeds_BLD, mask_BL = self.text.encode([clip.caption or ""])
        row = {
            "id": clip.id,
            **pack_tensor(LATENT, latents_CTHW),
            **pack_tensor(TEXT, embeds_BLD[0, : int(mask_BL[0].sum())]),
            "file_name": clip.file_name,
            "caption": clip.caption,
            "media_type": "video",
            "width": bucket.width,
            "height": bucket.height,
            "num_frames": bucket.num_frames,
            "duration_sec": bucket.num_frames / pixels.fps,
            "fps": pixels.fps,
        }
        if self.first_frame:
            still = torch.zeros_like(video_CTHW)
            still[:, 0] = video_CTHW[:, 0]
            latents = self.codec.normalize(self.codec.encode(still[None]))[0]
            row |= pack_tensor(FIRST_FRAME, latents)
        if self.clip_vision:
            row |= pack_tensor(CLIP, self.clip_vision.encode(video_CTHW[None, :, 0])[0])
        return row


Item = TypeVar("Item")
Result = TypeVar("Result")


def run_ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Sequence[Item], ahead: int
) -> Iterator[Result]:
    """``map`` in order with at most ``ahead`` results waiting."""
    waiting: list[Future[Result]] = []
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.pop(0).result()
    while waiting:
        yield waiting.pop(0).result()


def _sums(latents_CTHW: Tensor, before: Tensor | None) -> Tensor:
    values = latents_CTHW.double().flatten(1)
    count = torch.full((values.shape[0],), float(values.shape[1]), dtype=torch.float64)
    sums = torch.stack([count, values.sum(1), values.square().sum(1)])
    return sums if before is None else before + sums
