"""Streaming equals a plain loop over diffusers' blocks; files grow while videos are made."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor

from megagen.cli.main import main
from megagen.core.errors import ConfigError
from megagen.core.options import parse_options
from megagen.data.codecs import build_codec
from megagen.data.video import read_video
from megagen.data.video_stream import VideoStream
from megagen.models.base import Request
from megagen.parallel.dims import ParallelDims
from megagen.parallel.launch import run_ranks
from megagen.sampling import source
from megagen.sampling.pipeline import Piece, SamplingOptions
from megagen.sampling.streaming import StreamOptions, stream_latents
from tests.engine import cases
from tests.models.wan_causal_cases import Reference, Rule, make_request, make_role

RULE = Rule(2, first_alone=True, window=4, sink=1, is_relative=True)
NUM_FRAMES = 6
SDE = StreamOptions(t_list=[1000.0, 700.0, 250.0, 0.0], context_noise=60.0)
ODE = StreamOptions(sample_type="ode")


def fresh_noise(purpose: str, frames: range) -> Tensor:
    """A function of what it is for."""
    seed = int.from_bytes(purpose.encode(), "big") % 10_007 + frames.start
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, len(frames), 2, 6, generator=generator)


def by_loop(
    weights: cases.Weights,
    request: Request,
    other: Request | None,
    options: StreamOptions,
    scale: float,
    given: Tensor | None = None,
) -> Tensor:
    """The same video: every network pass one over the whole video, clean blocks filled in."""
    model, sigmas = Reference(weights, RULE), options.sigmas(3, 2.0)
    context = torch.zeros_like(request.latents_BCTHW)
    made = torch.zeros_like(context)
    done = 0
    if given is not None:
        done = given.size(2)
        made[:, :, :done] = given
        context[:, :, :done] = add_context(given, options, range(done))

    def velocity(x: Tensor, sigma: float, condition: Any) -> Tensor:
        full = torch.zeros_like(context)
        full[:, :, block.start : block.stop] = x
        named = {
            "text_embeds_BLD": condition["text_embeds_BLD"],
            "clean_latents_BCTHW": context,
            "clean_timestep": torch.full((2,), options.context_noise),
        }
        with torch.no_grad():
            whole = model(Request(full, torch.full((2,), 1000 * sigma), named))
        return whole[:, :, block.start : block.stop]

    for block in [range(0, 1), range(1, 3), range(3, 5), range(5, 6)]:
        if block.start < done:
            continue
        x = request.latents_BCTHW[:, :, block.start : block.stop]
        for k, (sigma, following) in enumerate(itertools.pairwise(sigmas), 1):
            v = velocity(x, sigma, request.condition)
            if other is not None:
                u = velocity(x, sigma, other.condition)
                v = u + scale * (v - u)
            x0 = x - sigma * v
            eps = x + (1 - sigma) * v
            if options.sample_type == "sde" and following:
                eps = fresh_noise(f"step/{k}", block)
            x = (1 - following) * x0 + following * eps
        made[:, :, block.start : block.stop] = x
        context[:, :, block.start : block.stop] = add_context(x, options, block)
    return made


def add_context(x0: Tensor, options: StreamOptions, frames: range) -> Tensor:
    level = options.context_noise / 1000
    return (1 - level) * x0 + level * fresh_noise("context", frames)


def stream(
    weights: cases.Weights,
    layout: dict[str, Any],
    request: Request,
    other: Request | None,
    options: StreamOptions,
    scale: float,
    given: Tensor | None = None,
) -> list[tuple[range, Tensor]]:
    role = make_role(weights, RULE, ParallelDims(**layout), trainable=False)
    blocks = stream_latents(
        role,
        options,
        noise_BCTHW=request.latents_BCTHW,
        fresh_noise=fresh_noise,
        sigmas=options.sigmas(3, 2.0),
        condition=request.condition,
        uncondition=None if other is None else other.condition,
        guidance_scale=scale,
        given_BCTHW=given,
    )
    return list(blocks)


LAYOUTS: list[tuple[dict[str, Any], StreamOptions, float]] = [
    ({}, SDE, 3.0),
    ({}, ODE, 1.0),
    ({"tp_size": 2, "sequence_parallel": True}, SDE, 3.0),
    ({"cp_size": 2}, ODE, 2.0),
    ({"pp_size": 2}, SDE, 2.0),
    ({"tp_size": 2, "pp_size": 2}, ODE, 1.0),
]


@pytest.mark.parametrize(("layout", "options", "scale"), LAYOUTS)
def test_streaming_equals_a_plain_loop(
    layout: dict[str, Any], options: StreamOptions, scale: float, seeded: torch.Generator
) -> None:
    weights = cases.random_weights(seeded.initial_seed())
    request = make_request(seeded, NUM_FRAMES)
    other = make_request(seeded, NUM_FRAMES) if scale != 1 else None
    expected = by_loop(weights, request, other, options, scale)
    num_ranks = ParallelDims(**layout).model_parallel_size
    for found in run_ranks(num_ranks, stream, weights, layout, request, other, options, scale):
        assert [block for block, _ in found] == [
            range(0, 1),
            range(1, 3),
            range(3, 5),
            range(5, 6),
        ]
        ours = torch.cat([x0 for _, x0 in found], dim=2)
        assert cases.relative(ours, expected) <= 1e-4  # of many steps; one network pass: 1e-5


def test_given_frames_are_continued(seeded: torch.Generator) -> None:
    weights, request = cases.random_weights(seeded.initial_seed()), make_request(seeded, NUM_FRAMES)
    given = torch.randn(2, 3, 3, 2, 6, generator=seeded)
    expected = by_loop(weights, request, None, SDE, 1.0, given)
    (found,) = run_ranks(1, stream, weights, {}, request, None, SDE, 1.0, given)
    assert [block for block, _ in found] == [range(3, 5), range(5, 6)]
    ours = torch.cat([x0 for _, x0 in found], dim=2)
    assert cases.relative(ours, expected[:, :, 3:]) <= 1e-4


def test_impossible_steps_are_refused() -> None:
    for steps in ([1000.0, 500.0], [500.0, 700.0, 0.0], [1200.0, 0.0], [0.0]):
        with pytest.raises(ConfigError, match="t_list"):
            parse_options(StreamOptions, {"t_list": steps}, "stream")


# -- from prompts to files -------------------------------------------------------------------------
CODEC = {"name": "space_to_depth", "patch": 2, "channels": 1}
TEXT = {"name": "hashed", "dim": 6, "max_length": 5}
PROMPTS = ("a dog", "rain that falls", "snow")
OPTIONS = SamplingOptions(
    num_frames=NUM_FRAMES, height=8, width=12, guidance_scale=2.0, seed=5, stream=SDE
)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """Random weights in diffusers' layout that say they are causal."""
    folder = tmp_path / "model"
    arch = {**cases.ARCH, "in_channels": 4, "out_channels": 4}
    generator = torch.Generator().manual_seed(7)
    model = WanTransformer3DModel(**arch)
    for parameter in model.parameters():
        scale = 0.5 if parameter.ndim == 1 else 0.7 / parameter[0].numel() ** 0.5
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(folder)
    config = folder / "config.json"
    text = config.read_text().rstrip().removesuffix("}").rstrip()
    causal = '{"num_frames_per_block": 2, "local_attn_size": 4, "sink_size": 1}'
    config.write_text(f'{text},\n  "_causal": {causal}\n}}\n')
    spec = source.SamplingSpec(codec=CODEC, text_encoder=TEXT, height=8, width=12, num_frames=6)
    source.write_spec(folder, spec)
    return folder


def pieces(
    folder: Path, dims: ParallelDims, options: SamplingOptions = OPTIONS, image: bool = False
) -> tuple[list[Piece], dict[int, Tensor]]:
    pipeline = source.build_pipeline(source.from_directory(str(folder)), dims)
    images = [torch.full((1, 8, 12, 3), 200, dtype=torch.uint8)] * 3 if image else None
    return (
        list(pipeline.stream(PROMPTS, options, images)),
        dict(pipeline.generate(PROMPTS, options, images)),
    )


def joined(found: list[Piece]) -> dict[int, Tensor]:
    positions = dict.fromkeys(piece.position for piece in found)
    return {p: torch.cat([f.frames_THWC for f in found if f.position == p]) for p in positions}


def test_pieces_make_up_the_videos_under_every_layout(model_dir: Path) -> None:
    ((found, whole),) = run_ranks(1, pieces, model_dir, ParallelDims())
    assert [len(piece.frames_THWC) for piece in found] == [2] * 9
    assert [piece.is_last for piece in found] == [False, False, True] * 3
    assert all(a.seconds < b.seconds for a, b in itertools.pairwise(found[:3]))
    videos = joined(found)
    assert sorted(videos) == [0, 1, 2] and not torch.equal(videos[0], videos[1])
    for position, frames in whole.items():
        assert torch.equal(videos[position], frames)
    two = OPTIONS.model_copy(update={"batch_size": 2})
    for num_ranks, dims in ((2, ParallelDims()), (2, ParallelDims(pp_size=2))):
        again: dict[int, Tensor] = {}
        for part, _ in run_ranks(num_ranks, pieces, model_dir, dims, two):
            assert not again.keys() & joined(part).keys(), "a video was made twice"
            again |= joined(part)
        for position, frames in videos.items():
            assert (frames.int() - again[position].int()).abs().max() <= 1


def test_a_stream_continues_an_image(model_dir: Path) -> None:
    ((found, whole),) = run_ranks(1, pieces, model_dir, ParallelDims(), OPTIONS, True)
    assert [len(piece.frames_THWC) for piece in found[:4]] == [1, 2, 2, 1]
    for position, frames in joined(found).items():
        assert (frames[0] == 200).all() and not (frames[1] == 200).all()
        assert torch.equal(frames, whole[position])


def test_a_bidirectional_network_does_not_stream(model_dir: Path) -> None:
    config = model_dir / "config.json"
    config.write_text(config.read_text().replace("_causal", "_other"))
    with pytest.raises(Exception, match="wan_causal"):
        run_ranks(1, pieces, model_dir, ParallelDims())


def test_the_command_writes_files_and_says_how_fast(
    model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", "--model", str(model_dir), "--prompt", "a dog", "--prompt", "rain"]
    command += ["--out", str(tmp_path / "out"), "--nproc", "2", "--pp-size", "2", "--fps", "8"]
    steps = ["--t-list", "1000,500", "--guidance-scale", "1"]
    assert exit_code([*command, *steps, "--stream"]) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if "frames/s" in line]
    assert len(lines) == 2
    assert re.search(r"0001-rain\.mp4  rain  6 frames, [\d.]+ frames/s, first after", lines[1])
    video, rate = read_video(tmp_path / "out" / "0001-rain.mp4")
    assert video.shape == (6, 8, 12, 3) and rate == 8
    assert exit_code([*command, *steps, "--context-noise", "20"]) == 2
    assert "Add --stream" in capfd.readouterr().err


def exit_code(words: list[str]) -> int:
    """Of the command line."""
    with pytest.raises(SystemExit) as stopped:
        main(words)
    return int(stopped.value.code or 0)


# -- parts -----------------------------------------------------------------------------------------
def test_a_growing_file_can_be_read(tmp_path: Path, seeded: torch.Generator) -> None:
    levels = torch.arange(9, dtype=torch.uint8) * 25
    frames = levels[:, None, None, None].expand(9, 34, 47, 3)
    path = tmp_path / "deep" / "a.mp4"
    with VideoStream(path, 8, crf=1) as file:
        for start, stop in ((0, 4), (4, 9)):
            file.write(frames[start:stop])
            with av.open(str(path)) as container:  # not closed yet
                count = sum(1 for _ in container.decode(video=0))
            assert count >= stop - 1
    read, rate = read_video(path)
    assert rate == 8 and read.shape == (9, 34, 48, 3) and file.num_frames == 9
    assert [round(v / 25) for v in read.float().mean((1, 2, 3)).tolist()] == list(range(9))


@pytest.mark.parametrize("patch", [None, 2])
def test_the_wan_vae_decodes_block_by_block(
    tmp_path: Path, seeded: torch.Generator, patch: int | None
) -> None:
    config: dict[str, Any] = {"in_channels": 12, "out_channels": 12, "patch_size": patch}
    torch.manual_seed(seeded.initial_seed())
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        **(config if patch else {}),
    )
    vae.save_pretrained(tmp_path / "vae")
    codec = build_codec({"name": "wan_vae", "path": str(tmp_path)})
    first, second = (torch.randn(2, 4, 5, 4, 4, generator=seeded) for _ in range(2))
    decoders = [codec.block_decoder() for _ in range(2)]
    parts: list[list[Tensor]] = [[], []]
    for start, stop in ((0, 1), (1, 3), (3, 5)):  # two clips at once do not disturb each other
        for video, latents, decode in zip(parts, (first, second), decoders, strict=True):
            video.append(decode(latents[:, :, start:stop]))
    for video, latents in zip(parts, (first, second), strict=True):
        assert [part.size(2) for part in video] == [1, 8, 8]
        torch.testing.assert_close(torch.cat(video, dim=2), codec.decode(latents))
    tiled = build_codec({"name": "wan_vae", "path": str(tmp_path), "tiling": True})
    with pytest.raises(ConfigError, match=re.escape("codec.tiling")):
        tiled.block_decoder()
