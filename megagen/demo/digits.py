"""Moving handwritten digits: scikit-learn's ``load_digits`` as short captioned clips.

1797 digits of 8x8 pixels written by 43 people (UCI "Optical Recognition of Handwritten Digits"). A
clip shows one of them, enlarged smoothly, moving one pixel a frame. Images are split once into
training and held-out ones, and so are the captions: held-out clips show held-out handwriting and
are described in words that no training caption has.

Legend: N clips or images, T frames, H W height and width, all clips grey in [0, 1].
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megagen.core.errors import SetupError
from megagen.core.streams import Streams

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
"""Name to step in pixels a frame, (rows, columns)."""

WORDINGS = ("a {} moving {}", "{} moving {}", "{} {}", "a {} {}")
"""Sentences about a digit and a direction; the first is the training's, the others held out."""

Split = Literal["train", "held_out"]

NUM_FRAMES, FRAME_SIZE, DIGIT_SIZE = 8, 16, 9
VIDEO_SCALE = 4  # mp4 files are this much larger than the model's frames: H.264 keeps them crisp
VIDEO_FPS = 8
NUM_HELD_OUT = 360


@dataclass(frozen=True)
class Clips:
    """Clips with what they show.

    Args:
        frames_NTHW: grey levels in [0, 1], fp32.
        digits_N: 0..9, int64.
        directions_N: index into ``DIRECTIONS``, int64.
        wordings_N: index into ``WORDINGS``, int64.
    """

    frames_NTHW: Tensor
    digits_N: Tensor
    directions_N: Tensor
    wordings_N: Tensor

    @property
    def captions(self) -> list[str]:
        """One sentence a clip."""
        shown = (self.digits_N, self.directions_N, self.wordings_N)
        return [caption(*which) for which in zip(*(x.tolist() for x in shown), strict=True)]

    def __len__(self) -> int:
        return len(self.digits_N)

    def __getitem__(self, which: slice | Tensor) -> Clips:
        """Some of them."""
        fields = (self.frames_NTHW, self.digits_N, self.directions_N, self.wordings_N)
        return Clips(*(x[which] for x in fields))


def caption(digit: int, direction: int, wording: int = 0) -> str:
    """The sentence for a clip: ``caption(3, 0)`` is "a three moving left"."""
    return WORDINGS[wording].format(WORDS[digit], tuple(DIRECTIONS)[direction])


def load_images(split: Split, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images ``[N, 8, 8]`` in [0, 1] and labels ``[N]`` of one part of the fixed split.

    Raises:
        SetupError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise SetupError(
            "scikit-learn is not installed; the demo's digits come with it.",
            remedy="Run: pip install 'megagen[demo]'",
        ) from None
    bunch = load_digits()
    order = Streams(seed).permutation("digits_split", len(bunch.target))
    chosen = order[NUM_HELD_OUT:] if split == "train" else order[:NUM_HELD_OUT]
    images = torch.from_numpy(np.asarray(bunch.images, dtype=np.float32) / 16.0)
    return images[chosen], torch.from_numpy(bunch.target).long()[chosen]


def enlarge(images_NHW: Tensor, size: int = DIGIT_SIZE) -> Tensor:
    """Smoothly enlarged digits ``[N, size, size]`` in [0, 1] with crisp strokes."""
    large = F.interpolate(images_NHW[:, None], (size, size), mode="bicubic")[:, 0].clamp(0, 1)
    return large * large * (3 - 2 * large)  # smoothstep: steeper edges, ends stay at 0 and 1


def move(images_NHW: Tensor, directions_N: Tensor, starts_N2: Tensor) -> Tensor:
    """Clips ``[N, T, H, W]`` of the images moving one pixel a frame.

    Args:
        images_NHW: enlarged digits.
        directions_N: index into ``DIRECTIONS``.
        starts_N2: uniform in [0, 1): where between the outermost start positions (row, column).
    """
    size, travel = images_NHW.shape[-1], NUM_FRAMES - 1
    steps_N2 = torch.tensor(list(DIRECTIONS.values()))[directions_N]
    room_N2 = FRAME_SIZE - size - travel * steps_N2.abs()
    first_N2 = (starts_N2 * (room_N2 + 1)).long() + travel * (steps_N2 < 0)
    frames = images_NHW.new_zeros(len(images_NHW), NUM_FRAMES, FRAME_SIZE, FRAME_SIZE)
    for n, (first, step) in enumerate(zip(first_N2.tolist(), steps_N2.tolist(), strict=True)):
        for t in range(NUM_FRAMES):
            row, column = first[0] + t * step[0], first[1] + t * step[1]
            frames[n, t, row : row + size, column : column + size] = images_NHW[n]
    return frames


def split_wordings(split: Split, turn_N: Tensor) -> Tensor:
    """Wordings of a split, ``turn_N`` counting through them; ``[N]``."""
    if split == "train":
        return torch.zeros_like(turn_N)
    return 1 + turn_N % (len(WORDINGS) - 1)


def make_clips(split: Split, num_clips: int, streams: Streams, epoch: int = 0) -> Clips:
    """``num_clips`` clips round all images of the split, its directions in turn, random starts."""
    images, labels = load_images(split)
    position = torch.arange(num_clips)
    order = streams.permutation("digits_order", len(images), split, epoch)
    chosen = order[position % len(images)]
    # every image meets every direction once in len(DIRECTIONS) rounds
    directions = (position // len(images) + chosen) % len(DIRECTIONS)
    generator = streams.generator("digits_start", split, epoch)
    starts_N2 = torch.rand(num_clips, 2, generator=generator)
    frames = move(enlarge(images)[chosen], directions, starts_N2)
    return Clips(frames, labels[chosen], directions, split_wordings(split, position))


def to_video(frames_THW: Tensor) -> np.ndarray:
    """Frames for an mp4 file, uint8 ``[T, H, W, 3]``, enlarged ``VIDEO_SCALE`` times."""
    grey = (frames_THW.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    large = grey.repeat(VIDEO_SCALE, axis=1).repeat(VIDEO_SCALE, axis=2)
    return np.repeat(large[..., None], 3, axis=3)


def from_video(frames_THWC: np.ndarray) -> Tensor:
    """Inverse of ``to_video`` up to what H.264 lost: grey levels ``[T, H, W]`` in [0, 1]."""
    grey_THW = torch.from_numpy(frames_THWC).float().mean(-1) / 255
    return F.avg_pool2d(grey_THW[:, None], VIDEO_SCALE)[:, 0]


def write_clips(clips: Clips, folder: Path, names: Sequence[str] | None = None) -> None:
    """Write ``folder/*.mp4`` and ``folder/captions.csv`` (columns ``file_name``, ``caption``)."""
    from megagen.data.video import write_video

    folder.mkdir(parents=True, exist_ok=True)
    files = [f"{n}.mp4" for n in names or [f"clip_{i:05d}" for i in range(len(clips))]]
    with ThreadPoolExecutor(2) as pool:  # the encoder releases the interpreter lock
        videos = map(to_video, clips.frames_NTHW)
        list(
            pool.map(
                lambda file, video: write_video(folder / file, video, VIDEO_FPS), files, videos
            )
        )
    with (folder / "captions.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["file_name", "caption"])
        writer.writerows(zip(files, clips.captions, strict=True))
