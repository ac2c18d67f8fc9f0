"""Videos become rows: exact, the same on any number of ranks and after being killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from megagen.cli.main import main
from megagen.core.errors import ConfigError, DataError
from megagen.data import preprocess as preprocessing
from megagen.data.buckets import fit_to_bucket, parse_bucket
from megagen.data.codecs import build_codec, to_unit
from megagen.data.preprocess import preprocess, preprocess_options
from megagen.data.text import build_text_encoder
from megagen.data.video import read_video
from tests.data.builders import options, stored, write_clips


def run(folder: Path, output: Path, **changes: Any) -> Any:
    return preprocess(preprocess_options(options(folder, output, **changes)))


def contents(output: Path) -> dict[str, bytes]:
    """Every visible file of a dataset."""
    files = (p for p in output.rglob("*") if p.is_file() and ".progress" not in p.parts)
    return {p.relative_to(output).as_posix(): p.read_bytes() for p in files}


def rows_of(output: Path) -> list[dict[str, Any]]:
    files = sorted(output.rglob("*.parquet"))
    return [row for path in files for row in pq.read_table(path).to_pylist()]


@pytest.fixture
def folder(tmp_path: Path, seeded: torch.Generator) -> Path:
    return write_clips(tmp_path / "clips", 14, seeded)


def test_rows_hold_exactly_what_the_video_holds(folder: Path, tmp_path: Path) -> None:
    manifest = run(folder, tmp_path / "data")
    rows = rows_of(tmp_path / "data")
    assert len(rows) == manifest.num_samples == 14
    codec, text = build_codec(manifest.codec), build_text_encoder(manifest.text_encoder)
    for row in rows:
        frames, rate = read_video(folder / row["file_name"])
        bucket = parse_bucket([row["num_frames"], row["height"], row["width"]])
        pixels = fit_to_bucket(to_unit(frames), bucket)
        assert torch.equal(stored(row, "vae_latent"), codec.encode(pixels[None])[0])
        assert torch.equal(codec.decode(stored(row, "vae_latent")[None])[0], pixels)
        embeds, mask = text.encode([row["caption"]])
        assert torch.equal(stored(row, "text_embedding"), embeds[0][mask[0]])
        assert row["caption"] == (folder / row["file_name"]).with_suffix(".txt").read_text()
        assert (row["fps"], row["duration_sec"]) == (rate, row["num_frames"] / rate)
    latents = torch.cat([stored(row, "vae_latent").flatten(1) for row in rows], 1).double()
    mean, std = torch.tensor(manifest.latent_mean), torch.tensor(manifest.latent_std)
    torch.testing.assert_close(mean.double(), latents.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(std.double(), latents.std(1, correction=0), rtol=1e-6, atol=1e-6)
    unconditional = load_file(tmp_path / "data" / "unconditional.safetensors")
    expected = text.encode(["", "blurry"])[0]
    assert torch.equal(torch.stack([unconditional["empty"], unconditional["negative"]]), expected)


def test_any_number_of_ranks_gives_the_same_files(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "one")
    parsed = preprocess_options(options(folder, tmp_path / "three"))
    finished = [preprocess(parsed, rank=rank, num_ranks=3) for rank in (2, 0, 1)]
    assert [manifest is not None for manifest in finished] == [False, False, True]
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def test_killed_and_resumed_equals_uninterrupted(folder: Path, tmp_path: Path) -> None:
    (folder / "clip003.mp4").write_bytes(b"")  # the quarantine list is resumed, too
    run(folder, tmp_path / "whole")
    target = tmp_path / "killed"
    parsed = preprocess_options(options(folder, target))
    for num_clips in (6, 1, 5):  # killed in the midst of parts; (1: no progress at all)
        assert _killed_after(parsed, num_clips) == -signal.SIGKILL
        assert not (target / "dataset.json").exists()
    done = contents(target)
    assert any(name.endswith(".parquet") for name in done)
    times = {name: (target / name).stat().st_mtime_ns for name in done if "parquet" in name}
    leftover = target / "8x24x24" / ".part-00003.parquet.123.tmp"
    leftover.parent.mkdir(exist_ok=True)
    leftover.write_bytes(b"half")
    assert preprocess(parsed) is not None
    assert contents(target) == contents(tmp_path / "whole")
    assert {name: (target / name).stat().st_mtime_ns for name in times} == times


def _killed_after(parsed: Any, num_clips: int) -> int | None:
    """Exit code of a process that kills itself after some clips."""
    seen = 0

    def on_clip() -> None:
        nonlocal seen
        seen += 1
        if seen == num_clips:
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(
        target=preprocess, args=(parsed,), kwargs={"on_clip": on_clip}
    )
    process.start()
    process.join(60)
    return process.exitcode


def test_bad_clips_go_to_quarantine_and_the_rest_goes_on(folder: Path, tmp_path: Path) -> None:
    cut = (folder / "clip000.mp4").read_bytes()
    (folder / "clip000.mp4").write_bytes(cut[: len(cut) // 2])
    (folder / "clip001.mp4").write_bytes(b"")
    (folder / "clip002.txt").unlink()
    (folder / "clip003.txt").write_text(" ")
    long = ["13x24x32", "12x32x24", "9x24x24"]
    manifest = run(folder, tmp_path / "data", buckets=long)
    entries = [json.loads(s) for s in (tmp_path / "data/quarantine.jsonl").read_text().splitlines()]
    reasons = {entry["file_name"]: entry["reason"] for entry in entries}
    landscape = {f"clip{i:03d}.mp4" for i in (6, 12)} | {"more/clip009.mp4"}  # 8 frames only
    assert reasons == {
        "clip000.mp4": "unreadable",
        "clip001.mp4": "unreadable",
        "clip002.mp4": "no_caption",
        "clip003.mp4": "no_caption",
        **dict.fromkeys(landscape, "too_short"),
    }
    assert "truncated" in entries[0]["detail"]
    assert all("13" in e["detail"] for e in entries if e["reason"] == "too_short")
    assert manifest.num_samples == 14 - 7 == len(rows_of(tmp_path / "data"))
    assert manifest.quarantine_reasons == {"no_caption": 2, "too_short": 3, "unreadable": 2}


def test_too_many_bad_clips_is_an_error(folder: Path, tmp_path: Path) -> None:
    for i in range(3):
        (folder / f"clip{i:03d}.mp4").write_bytes(b"")
    with pytest.raises(DataError, match=r"3 of 14 clips.*clip000\.mp4.*0 bytes"):
        run(folder, tmp_path / "strict", max_bad_share=0.2)
    assert not (tmp_path / "strict" / "dataset.json").exists()
    assert run(folder, tmp_path / "strict", max_bad_share=0.3).num_samples == 11
    for path in folder.rglob("*.mp4"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="14 of 14"):
        run(folder, tmp_path / "none", max_bad_share=1)


def test_an_illegal_size_is_refused_before_any_work(folder: Path, tmp_path: Path) -> None:
    codec = {"name": "space_to_depth", "patch": 4, "temporal": 4}
    with pytest.raises(ConfigError, match=r"num_frames 10 .*nearest legal: 8 and 12"):
        run(folder, tmp_path / "data", codec=codec, buckets=[], num_frames=10, height=24, width=24)
    assert not (tmp_path / "data").exists()
    with pytest.raises(ConfigError, match="either buckets"):
        run(folder, tmp_path / "data", num_frames=8)
    with pytest.raises(ConfigError, match=r"text_encoder.*did you mean 'hashed'"):
        run(folder, tmp_path / "data", text_encoder="hash")


def test_other_options_or_clips_do_not_mix(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "data")
    before = contents(tmp_path / "data")
    with pytest.raises(DataError, match="another negative_prompt: 'blurry' then, 'ugly' now"):
        run(folder, tmp_path / "data", negative_prompt="ugly")
    (folder / "clip000.txt").write_text("another caption")
    with pytest.raises(DataError, match="another list of clips"):
        run(folder, tmp_path / "data")
    assert contents(tmp_path / "data") == before


def test_first_frame_latents(folder: Path, tmp_path: Path) -> None:
    manifest = run(folder, tmp_path / "data", first_frame=True)
    assert manifest.tensors == ["vae_latent", "text_embedding", "first_frame_latent"]
    for row in rows_of(tmp_path / "data"):
        latents, first = stored(row, "vae_latent"), stored(row, "first_frame_latent")
        assert torch.equal(first[:, 0], latents[:, 0])
        assert not first[:, 1:].any()


def test_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, tmp_path / "api")
    config = tmp_path / "preprocess.yaml"
    config.write_text(
        f"input_dir: {folder}\ncodec: space_to_depth\ntext_encoder: {{name: hashed, dim: 8}}\n"
        "buckets: [8x24x32, 4x24x32, [12, 32, 24], 8x24x24]\nnegative_prompt: blurry\n"
    )
    flags = ["--codec.patch", "4", "--text_encoder.max_length", "7", "--samples-per-file", "4"]
    command = ["preprocess", "--config", str(config), *flags, "--num-threads", "1"]
    with pytest.raises(SystemExit) as done:
        main([*command, "--output-dir", str(tmp_path / "cli"), "--nproc", "2"])
    assert done.value.code == 0
    assert contents(tmp_path / "cli") == contents(tmp_path / "api")
    captured = capsys.readouterr()
    assert "14 samples" in captured.out
    assert captured.err == ""  # a progress bar is for terminals
    with pytest.raises(SystemExit) as failed:
        main([*command, "--output-dir", str(tmp_path / "x"), "--codec.pach", "2"])
    assert failed.value.code == 2
    error = capsys.readouterr().err
    assert "codec.pach: unknown key; did you mean 'patch'?" in error
    assert "Traceback" not in error


def test_an_error_on_a_rank_reaches_the_user(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--codec", "space_to_depth", "--text-encoder", "hashed", "--nproc", "2"]
    sizes = ["--num-frames", "8", "--height", "25", "--width", "24"]
    data = ["--input-dir", str(folder), "--output-dir", str(tmp_path / "x")]
    with pytest.raises(SystemExit) as failed:
        main(["preprocess", *flags, *sizes, *data])
    assert failed.value.code == 2
    assert "height 25 is no multiple of the codec's 2 pixels" in capsys.readouterr().err


def test_a_killed_rank_stops_the_others_and_the_next_run_goes_on(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def die_in_rank_1(work: Any, index: int, *rest: Any) -> dict[str, Any]:
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return do_part(work, index, *rest)

    do_part = preprocessing._do_part
    config = tmp_path / "p.json"  # JSON is YAML
    config.write_text(json.dumps(options(folder, tmp_path / "data")))
    command = ["preprocess", "--config", str(config), "--nproc", "2"]
    monkeypatch.setattr(preprocessing, "_do_part", die_in_rank_1)
    with pytest.raises(SystemExit) as failed:
        main(command)
    assert failed.value.code == 2
    assert "rank 1 ended with signal 9" in capsys.readouterr().err
    assert not (tmp_path / "data" / "dataset.json").exists()
    monkeypatch.undo()
    with pytest.raises(SystemExit) as done:
        main(command)
    assert done.value.code == 0
    run(folder, tmp_path / "whole")
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")
