"""Reading and writing video files through PyAV (FFmpeg inside); frames are uint8 RGB THWC.

Legend: T frames, H W pixel height and width, C = 3.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.error import FFmpegError
from torch import Tensor

from megagen.core.errors import DataError

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts")
"""File endings (lower case) that ``megagen preprocess`` takes for videos."""


@dataclass(frozen=True)
class VideoInfo:
    """What the header of a video file says, before any decoding.

    Args:
        width, height: pixels as stored (a rotation flag is applied by ``read_video`` only).
        fps: average frames per second.
        num_frames: frames by the header; 0 where the container does not say.
    """

    width: int
    height: int
    fps: float
    num_frames: int


def probe_video(path: str | Path) -> VideoInfo:
    """Size, rate and frame count of a video from its header.

    Raises:
        DataError: no such file, empty, not a video.
    """
    try:
        with _open(path) as container:
            stream = container.streams.video[0]
            frames = stream.frames or _frames_by_duration(container, stream)
            return VideoInfo(stream.width, stream.height, _rate(stream), frames)
    except FFmpegError as error:
        raise _unreadable(path, error) from None


def read_video(
    path: str | Path,
    *,
    fps: float | None = None,
    start: int = 0,
    num_frames: int | None = None,
    min_frames: int = 1,
) -> tuple[Tensor, float]:
    """Decode a video, or a range of its frames at a chosen rate.

    Args:
        path: the file.
        fps: resample to this rate by the nearest frame in time; None keeps the file's frames.
        start: first frame to return, counted after resampling.
        num_frames: how many to return at most; None: up to the end.
        min_frames: fewer than this is an error.

    Returns:
        Frames, uint8 ``[T, H, W, 3]`` RGB on the CPU, and their rate in frames per second.

    Raises:
        DataError: missing, empty, not a video, truncated, or shorter than ``min_frames``.
    """
    stop = None if num_frames is None else start + num_frames
    frames: list[np.ndarray] = []
    try:
        with _open(path) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = _rate(stream)
            source = _decode(container, stream, path, rate)
            chosen = source if fps is None else _resample(source, fps, rate)
            for index, (_, frame) in enumerate(chosen):
                if stop is not None and index >= stop:
                    break
                if index >= start:
                    frames.append(_pixels(frame))
    except FFmpegError as error:
        raise _unreadable(path, error) from None
    if len(frames) < max(min_frames, 1):
        raise DataError(
            f"too short: {len(frames)} frames from frame {start} on"
            f"{'' if fps is None else f' at {fps:g} fps'}, at least {max(min_frames, 1)} wanted.",
            remedy="Use a longer clip, fewer frames or a lower rate.",
            where=str(path),
        )
    return torch.from_numpy(np.stack(frames)), float(fps if fps is not None else rate)


def write_video(
    path: str | Path, frames_THWC: Tensor | np.ndarray, fps: float, *, crf: int = 18
) -> Path:
    """Write frames as H.264 (yuv420p) into a file that appears whole or not at all.

    An odd height or width, which yuv420p cannot hold, gets its last row or column repeated once.

    Args:
        path: the target (``.mp4``, ``.mkv``, ``.mov``); its folder is made.
        frames_THWC: uint8 ``[T, H, W, 3]``, T >= 1.
        fps: frames per second, > 0.
        crf: quality, 0 (lossless up to the colour conversion) to 51.

    Raises:
        DataError: the folder cannot be written or the disk is full.
    """
    frames = to_frames(frames_THWC)
    if fps <= 0:
        raise ValueError(f"fps must be > 0, found {fps}")
    target = Path(path)
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.tmp{target.suffix or '.mp4'}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _encode(temporary, frames, Fraction(fps).limit_denominator(100_000), crf)
        temporary.replace(target)
    except (OSError, FFmpegError) as error:
        raise DataError(
            f"cannot write the video: {error}.",
            remedy="Check the free space and the permissions of the folder.",
            where=str(target),
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return target


def tile_clips(
    clips_THWC: Sequence[Tensor], *, columns: int, gap: int = 2, scale: int = 1
) -> Tensor:
    """Several clips side by side as one, row by row, on white.

    Args:
        clips_THWC: uint8 clips of one frame size; shorter ones hold their last frame.
        columns: clips per row.
        gap: white pixels between them.
        scale: each pixel is repeated this often in both directions (small clips).

    Returns:
        uint8 ``[T, H', W', 3]``.
    """
    length = max(clip.shape[0] for clip in clips_THWC)
    big = [c.repeat_interleave(scale, 1).repeat_interleave(scale, 2) for c in clips_THWC]
    height, width = big[0].shape[1:3]
    rows = -(-len(big) // columns)
    sheet = torch.full(
        (length, rows * (height + gap) - gap, columns * (width + gap) - gap, 3),
        255,
        dtype=torch.uint8,
    )
    for index, clip in enumerate(big):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        times = torch.arange(length).clamp(max=clip.shape[0] - 1)
        sheet[:, top : top + height, left : left + width] = clip[times]
    return sheet


def contact_sheet(
    clips_THWC: Sequence[Tensor], *, num_frames: int = 8, gap: int = 2, scale: int = 1
) -> Tensor:
    """A still picture of clips: one row a clip, ``num_frames`` frames evenly spaced in time.

    Returns:
        uint8 ``[H', W', 3]``.
    """
    stills = []
    for clip in clips_THWC:
        times = torch.linspace(0, clip.shape[0] - 1, num_frames).round().long()
        stills += [clip[t : t + 1] for t in times.tolist()]
    return tile_clips(stills, columns=num_frames, gap=gap, scale=scale)[0]


def _open(path: str | Path) -> Any:
    file = Path(path)
    if not file.is_file():
        raise DataError("no such video file.", remedy="Check the path.", where=str(path))
    if file.stat().st_size == 0:
        raise DataError("the file is empty (0 bytes).", remedy="Fetch it again.", where=str(path))
    container = av.open(str(file), metadata_errors="ignore")
    if not container.streams.video:
        container.close()
        raise DataError("the file has no video stream.", remedy="Remove it.", where=str(path))
    return container


def _unreadable(path: str | Path, error: Exception) -> DataError:
    return DataError(
        f"cannot be decoded, truncated or not a video ({error}).",
        remedy="Fetch or encode the file again.",
        where=str(path),
    )


def _rate(stream: Any) -> float:
    return float(stream.average_rate or stream.guessed_rate or 25)


def _frames_by_duration(container: Any, stream: Any) -> int:
    if stream.duration is not None and stream.time_base is not None:
        return round(float(stream.duration * stream.time_base) * _rate(stream))
    return round((container.duration or 0) / av.time_base * _rate(stream))


def _decode(
    container: Any, stream: Any, path: str | Path, rate: float
) -> Iterator[tuple[float, av.VideoFrame]]:
    """(time in seconds from the first frame, frame); an error at the end if frames are missing."""
    first: float | None = None
    count = packets = 0
    for packet in container.demux(stream):
        packets += packet.size > 0 and not packet.is_corrupt
        for frame in packet.decode():
            time = frame.time if frame.time is not None else count / rate
            first = time if first is None else first
            count += 1
            yield time - first, frame
    # Counted in packets: an edit list may rightly hide frames, but no packet of the index is lost.
    if packets < stream.frames:
        raise DataError(
            f"truncated: {packets} of the {stream.frames} frames that its header names are there.",
            remedy="Fetch or encode the file again.",
            where=str(path),
        )


def _resample(
    source: Iterator[tuple[float, av.VideoFrame]], fps: float, rate: float
) -> Iterator[tuple[float, av.VideoFrame]]:
    """For each time i / fps up to the end of the last frame, the source frame nearest to it."""
    if fps <= 0:
        raise ValueError(f"fps must be > 0, found {fps}")
    index, slack = 0, 1e-6
    before: tuple[float, av.VideoFrame] | None = None
    for time, frame in source:
        while before is not None and 2 * index / fps < before[0] + time - slack:
            yield before
            index += 1
        before = (time, frame)
    while before is not None and index / fps < before[0] + 1 / rate - slack:
        yield before
        index += 1


def _pixels(frame: av.VideoFrame) -> np.ndarray:
    pixels = frame.to_ndarray(format="rgb24")
    turns = round((frame.rotation or 0) / 90)
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


def to_frames(frames_THWC: Tensor | np.ndarray) -> np.ndarray:
    """Checked uint8 frames ``[T, H, W, 3]`` of even height and width."""
    frames = frames_THWC.cpu().numpy() if isinstance(frames_THWC, Tensor) else frames_THWC
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.shape[0]:
        raise ValueError(f"frames must be uint8 [T, H, W, 3], found {frames.dtype} {frames.shape}")
    odd = (frames.shape[1] % 2, frames.shape[2] % 2)
    if any(odd):
        frames = np.pad(frames, ((0, 0), (0, odd[0]), (0, odd[1]), (0, 0)), mode="edge")
    return np.ascontiguousarray(frames)


def _encode(path: Path, frames: np.ndarray, rate: Fraction, crf: int) -> None:
    options = {"movflags": "+faststart"} if path.suffix in (".mp4", ".mov", ".m4v") else {}
    with av.open(str(path), "w", container_options=options) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf)})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
