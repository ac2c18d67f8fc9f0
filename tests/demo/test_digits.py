"""Clips show what their captions say, survive H.264, and keep held-out handwriting apart."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import pytest
import torch

from megagen.core.streams import Streams
from megagen.data.video import read_video
from megagen.demo import digits
from megagen.demo.clips import asked, parse_caption


def test_no_held_out_image_is_trained_on() -> None:
    train, _ = digits.load_images("train")
    held, _ = digits.load_images("held_out")
    assert len(train) + len(held) == 1797
    seen = {image.numpy().tobytes() for image in train}
    assert not any(image.numpy().tobytes() in seen for image in held)


@pytest.mark.parametrize("direction", range(4))
def test_each_frame_is_the_one_before_moved_one_pixel(direction: int) -> None:
    images, _ = digits.load_images("train")
    clips = digits.move(
        digits.enlarge(images[:20]),
        torch.full((20,), direction),
        torch.rand(20, 2, generator=torch.Generator().manual_seed(0)),
    )
    step = list(digits.DIRECTIONS.values())[direction]
    for t in range(digits.NUM_FRAMES - 1):
        moved = clips[:, t].roll(step, dims=(-2, -1))
        torch.testing.assert_close(clips[:, t + 1], moved)
    # nothing leaves the frame
    torch.testing.assert_close(clips.sum((-2, -1)).std(1), torch.zeros(20), atol=1e-3, rtol=0)


def test_clips_cover_all_digits_directions_and_places() -> None:
    clips = digits.make_clips("train", 2874, Streams(1))
    assert clips.digits_N.unique().tolist() == list(range(10))
    assert clips.directions_N.bincount().min() > 500
    used = clips.frames_NTHW.amax((0, 1)) > 0.1
    assert all(edge.any() for edge in (used[0], used[-1], used[:, 2], used[:, -3]))
    shown = (clips.digits_N, clips.directions_N, clips.wordings_N)
    assert clips.captions[0] == digits.caption(*(int(x[0]) for x in shown))


@pytest.mark.parametrize(("split", "count"), [("train", 40), ("held_out", 120)])
def test_no_caption_is_in_both_splits(split: digits.Split, count: int) -> None:
    clips = digits.make_clips(split, 6000, Streams(1))
    other: digits.Split = "train" if split == "held_out" else "held_out"
    captions = set(clips.captions)
    assert len(captions) == count
    assert captions == set(asked(400, split).captions)
    assert captions.isdisjoint(asked(400, other).captions)


def test_a_caption_reads_as_a_sentence() -> None:
    assert digits.caption(3, 0) == "a three moving left"
    assert digits.caption(3, 0, 2) == "three left"


@pytest.mark.parametrize("wording", range(len(digits.WORDINGS)))
def test_a_caption_is_understood(wording: int) -> None:
    for shown in itertools.product(range(10), range(4)):
        assert parse_caption(digits.caption(*shown, wording)) == (*shown, wording)


def test_clips_are_a_function_of_seed_and_epoch() -> None:
    first = digits.make_clips("train", 50, Streams(1), epoch=2)
    again = digits.make_clips("train", 50, Streams(1), epoch=2)
    other = digits.make_clips("train", 50, Streams(1), epoch=3)
    assert torch.equal(first.frames_NTHW, again.frames_NTHW)
    assert not torch.equal(first.frames_NTHW, other.frames_NTHW)


def test_mp4_files_hold_the_clips(tmp_path: Path) -> None:
    clips = digits.make_clips("held_out", 12, Streams(2))
    digits.write_clips(clips, tmp_path)
    with (tmp_path / "captions.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [row["caption"] for row in rows] == clips.captions
    for row, frames in zip(rows, clips.frames_NTHW, strict=True):
        video, fps = read_video(tmp_path / row["file_name"])
        assert fps == digits.VIDEO_FPS
        torch.testing.assert_close(digits.from_video(video.numpy()), frames, atol=0.03, rtol=0)
