"""Captions are found beside the clips, and clips go to the right buckets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megagen.core.errors import ConfigError, DataError
from megagen.data.buckets import Bucket, check_buckets, choose_bucket, fit_to_bucket, parse_bucket
from megagen.data.codecs import build_codec
from megagen.data.sources import find_clips


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def captions(root: Path) -> dict[str, str | None]:
    return {clip.file_name: clip.caption for clip in find_clips(root)}


def test_sidecars_at_any_depth(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.MOV", "deep/er/c.webm", "notes.md", ".hidden/d.mp4")
    (tmp_path / "a.txt").write_text("  an a \n")
    (tmp_path / "deep/er/c.txt").write_text("a c")
    (tmp_path / "b.txt").write_text(" \n")
    assert captions(tmp_path) == {"a.mp4": "an a", "b.MOV": None, "deep/er/c.webm": "a c"}
    assert [clip.id for clip in find_clips(tmp_path)] == ["a", "b", "deep/er/c"]


def test_metadata_files_and_their_aliases(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "sub/b.mp4", "sub/videos/c.mp4", "d.mp4", "d.mov")
    (tmp_path / "captions.csv").write_text('file_name,caption\na.mp4,"one, two"\nlost.mp4,gone\n')
    lines = [{"path": "b.mp4", "cap": ["first", "second"]}, {"path": "c.mp4", "cap": "third"}]
    (tmp_path / "sub/videos2caption.json").write_text(json.dumps(lines))
    (tmp_path / "metadata.jsonl").write_text('{"video": "d.mp4", "text": "fourth"}\n\n')
    assert captions(tmp_path) == {
        "a.mp4": "one, two",
        "sub/b.mp4": "first",
        "sub/videos/c.mp4": "third",
        "d.mp4": "fourth",
        "d.mov": None,
        "lost.mp4": "gone",  # named but absent: preprocessing will put it in quarantine
    }
    assert {"d.mp4", "d.mov"} < {clip.id for clip in find_clips(tmp_path)}  # ids stay unique


def test_metadata_that_cannot_be_understood_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    path = tmp_path / "captions.csv"
    path.write_text("name,words\na.mp4,x\n")
    with pytest.raises(DataError, match=r"captions\.csv.*'name', 'words'.*file_name"):
        find_clips(tmp_path)
    path.write_text("file_name,caption\n../../etc/passwd.mp4,x\n")
    with pytest.raises(DataError, match="outside"):
        find_clips(tmp_path)
    path.unlink()
    (tmp_path / "metadata.jsonl").write_text("{broken\n")
    with pytest.raises(DataError, match=r"metadata\.jsonl: cannot be read"):
        find_clips(tmp_path)


def test_no_folder_and_no_videos(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        find_clips(tmp_path / "absent")
    with pytest.raises(DataError, match="no video"):
        find_clips(tmp_path)


def test_bucket_of_nearest_aspect_then_most_frames() -> None:
    buckets = [Bucket(81, 480, 832), Bucket(33, 480, 832), Bucket(49, 832, 480), Bucket(9, 96, 168)]

    def chosen(frames: int, height: int, width: int) -> str:
        return choose_bucket(buckets, frames, height, width, "clip").name

    assert chosen(100, 720, 1280) == "81x480x832"
    assert chosen(80, 1080, 1920) == "33x480x832"
    assert chosen(20, 480, 832) == "9x96x168"  # another size of the same aspect
    assert chosen(500, 1920, 1080) == "49x832x480"
    with pytest.raises(DataError, match=r"too short: 32 frames.*needs 33"):
        choose_bucket(buckets[:3], 32, 480, 832, "clip")
    sized = [Bucket(9, 64, 64), Bucket(9, 128, 128), Bucket(9, 256, 256)]
    assert choose_bucket(sized, 9, 130, 130, "clip") == sized[1]  # the largest without enlarging
    assert choose_bucket(sized, 9, 32, 32, "clip") == sized[0]


def test_fit_crops_the_centre_and_keeps_exact_sizes(seeded: torch.Generator) -> None:
    video = torch.rand(3, 10, 24, 32, generator=seeded) * 2 - 1
    assert torch.equal(fit_to_bucket(video, Bucket(8, 24, 32)), video[:, :8])
    assert torch.equal(fit_to_bucket(video, Bucket(10, 24, 24)), video[:, :, :, 4:28])
    smaller = fit_to_bucket(video, Bucket(10, 12, 12))
    area = F.avg_pool2d(video, 2)[:, :, :, 2:14]
    assert smaller.shape == (3, 10, 12, 12)
    assert (smaller - area).abs().mean() < 0.2 * video.abs().mean()
    ramp = torch.linspace(-1, 1, 48).expand(3, 1, 24, 48)
    halved = fit_to_bucket(ramp, Bucket(1, 12, 24))
    expected = F.avg_pool2d(ramp, 2)
    torch.testing.assert_close(halved[..., 3:-3], expected[..., 3:-3], rtol=0, atol=1e-5)


def test_bucket_forms_and_checks() -> None:
    same = ["81x480x832", [81, 480, 832], {"num_frames": 81, "height": 480, "width": 832}]
    assert {parse_bucket(value) for value in same} == {Bucket(81, 480, 832)}
    for wrong in ("81x480", [81, 480], {"frames": 81}, 3):
        with pytest.raises(ValueError, match="no bucket"):
            parse_bucket(wrong)
    codec = build_codec({"name": "space_to_depth", "patch": 8, "temporal": 4})
    with pytest.raises(ConfigError, match=r"buckets\[1\]: num_frames 30.*28 and 32"):
        check_buckets([Bucket(32, 16, 16), Bucket(30, 16, 16)], codec, "buckets")
    with pytest.raises(ConfigError, match="twice"):
        check_buckets([Bucket(32, 16, 16)] * 2, codec, "buckets")
