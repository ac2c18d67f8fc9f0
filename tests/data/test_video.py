"""Videos go out and come back; what cannot be decoded is named."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megagen.core.errors import DataError
from megagen.data.video import contact_sheet, probe_video, read_video, tile_clips, write_video


def smooth(generator: torch.Generator, frames: int, height: int, width: int) -> Tensor:
    """Frames whose colours change slowly in space, as H.264 likes them."""
    coarse = torch.rand(frames, 3, 3, 3, generator=generator) * 255
    fine = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)
    return fine.round().to(torch.uint8).permute(0, 2, 3, 1)


@pytest.mark.parametrize("fps", [8, 16.0, 30000 / 1001])
def test_frames_and_rate_come_back(tmp_path: Path, seeded: torch.Generator, fps: float) -> None:
    frames = smooth(seeded, 9, 64, 96)
    path = write_video(tmp_path / "deep" / "a.mp4", frames, fps, crf=4)
    read, rate = read_video(path)
    assert read.dtype == torch.uint8
    assert read.shape == frames.shape
    assert (read.float() - frames.float()).abs().mean() < 3  # 4:2:0 colour and H.264
    assert rate == pytest.approx(fps)
    info = probe_video(path)
    assert (info.width, info.height, info.num_frames) == (96, 64, 9)
    assert info.fps == pytest.approx(fps)
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]


def test_range_and_resampling_pick_the_nearest_frames(tmp_path: Path) -> None:
    levels = torch.arange(20, dtype=torch.uint8) * 12
    frames = levels[:, None, None, None].expand(20, 32, 32, 3)
    path = write_video(tmp_path / "ramp.mp4", frames, 20, crf=0)

    def indices(video: Tensor) -> list[int]:
        return [round(v / 12) for v in video.float().mean((1, 2, 3)).tolist()]

    assert indices(read_video(path)[0]) == list(range(20))
    assert indices(read_video(path, start=3, num_frames=4)[0]) == [3, 4, 5, 6]
    half, rate = read_video(path, fps=10)
    assert rate == 10
    assert indices(half) == list(range(0, 20, 2))
    assert indices(read_video(path, fps=5, start=1, num_frames=2)[0]) == [4, 8]
    doubled = indices(read_video(path, fps=40)[0])
    assert len(doubled) == 40
    assert all(abs(index - i / 2) <= 0.5 for i, index in enumerate(doubled))


def test_odd_sizes_gain_one_line(tmp_path: Path, seeded: torch.Generator) -> None:
    frames = smooth(seeded, 2, 33, 47)
    read, _ = read_video(write_video(tmp_path / "odd.mp4", frames, 8, crf=4))
    assert read.shape == (2, 34, 48, 3)
    assert (read[:, :33, :47].float() - frames.float()).abs().mean() < 4


def test_rotation_flag_is_applied(tmp_path: Path) -> None:
    frames = torch.zeros(2, 32, 64, 3, dtype=torch.uint8)
    frames[:, :, 32:] = 255  # white on the right
    path = write_video(tmp_path / "phone.mp4", frames, 8)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # version 0: the display matrix is 40 bytes in
    quarter_turn = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)  # clockwise, as phones write
    data[matrix : matrix + 36] = struct.pack(">9i", *quarter_turn)
    path.write_bytes(data)
    read, _ = read_video(path)
    assert read.shape == (2, 64, 32, 3)
    assert read[:, 40:].float().mean() > 200  # right turns to bottom
    assert read[:, :24].float().mean() < 50


@pytest.mark.parametrize("share", [0.02, 0.4, 0.8, 0.99])
def test_truncated_file_is_named(tmp_path: Path, seeded: torch.Generator, share: float) -> None:
    noise = torch.randint(0, 256, (30, 64, 64, 3), generator=seeded).to(torch.uint8)
    path = write_video(tmp_path / "cut.mp4", noise, 8)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DataError, match=r"cut\.mp4.*truncated"):
        read_video(path)


def test_not_a_video(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video " * 100)
    with pytest.raises(DataError, match="empty"):
        read_video(tmp_path / "empty.mp4")
    with pytest.raises(DataError, match="cannot be decoded"):
        read_video(tmp_path / "text.mp4")
    with pytest.raises(DataError, match="no such"):
        probe_video(tmp_path / "absent.mp4")


def test_too_short_says_how_short(tmp_path: Path, seeded: torch.Generator) -> None:
    path = write_video(tmp_path / "short.mp4", smooth(seeded, 5, 32, 32), 8)
    with pytest.raises(DataError, match=r"5 frames.*at least 9"):
        read_video(path, min_frames=9)


def test_failed_write_leaves_the_old_file(tmp_path: Path, seeded: torch.Generator) -> None:
    path = write_video(tmp_path / "a.mp4", smooth(seeded, 3, 32, 32), 8)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="uint8"):
        write_video(path, torch.zeros(3, 32, 32, 3), 8)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write"):
        write_video(tmp_path / "file" / "b.mp4", smooth(seeded, 3, 32, 32), 8)
    assert path.read_bytes() == before


def test_sheets_place_clips_row_by_row() -> None:
    clips = [torch.full((n, 4, 6, 3), 10 * n, dtype=torch.uint8) for n in (1, 2, 3)]
    sheet = tile_clips(clips, columns=2, gap=2, scale=2)
    assert sheet.shape == (3, 18, 26, 3)
    assert (sheet[:, :8, :12] == 10).all()  # the short clip holds its last frame
    assert (sheet[:, :8, 14:] == 20).all()
    assert (sheet[:, 10:, :12] == 30).all()
    assert (sheet[:, :, 12:14] == 255).all()
    assert contact_sheet(clips, num_frames=4, gap=0).shape == (12, 24, 3)
