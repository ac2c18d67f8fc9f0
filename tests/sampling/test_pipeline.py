"""Sampling through roles: equal to diffusers' network and schedulers, under every layout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from torch import Tensor

from megagen.cli.sample import file_name, read_images, read_prompts
from megagen.core.errors import CheckpointError, ConfigError, DataError
from megagen.core.streams import Streams
from megagen.data.codecs import build_codec
from megagen.data.text import build_text_encoder
from megagen.parallel.dims import ParallelDims
from megagen.parallel.launch import run_ranks
from megagen.sampling import source
from megagen.sampling.pipeline import SamplingOptions, batches

CODEC = {"name": "space_to_depth", "patch": 2, "channels": 1}
TEXT = {"name": "hashed", "dim": 6, "max_length": 5}
ARCH: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 6,
    "freq_dim": 16,
    "ffn_dim": 48,
    "num_layers": 4,
    "rope_max_seq_len": 32,
}
PROMPTS = ("a dog", "a cat that sleeps", "rain")
OPTIONS = SamplingOptions(
    num_frames=3, height=8, width=12, num_steps=4, guidance_scale=3.0, shift=2.0, seed=5
)


def write_model(folder: Path, **changes: Any) -> Path:
    """Random weights in diffusers' layout with ``sampling.json`` beside."""
    generator = torch.Generator().manual_seed(7)
    model = WanTransformer3DModel(**{**ARCH, **changes})
    for parameter in model.parameters():
        scale = 0.5 if parameter.ndim == 1 else 0.7 / parameter[0].numel() ** 0.5
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(folder)
    source.write_spec(folder, source.SamplingSpec(codec=CODEC, text_encoder=TEXT, height=8))
    return folder


def in_one_rank(body: Callable[..., None]) -> Callable[..., None]:
    """Run a test in a forked rank: a process group in pytest's own process would outlive it."""

    @functools.wraps(body)
    def run(*args: Any, **kwargs: Any) -> None:
        run_ranks(1, functools.partial(body, *args, **kwargs))

    return run


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def by_diffusers(folder: Path, position: int, first: Tensor | None = None) -> Tensor:
    """One prompt's latents by diffusers' network and its UniPC scheduler, guidance by hand."""
    model = WanTransformer3DModel.from_pretrained(folder)
    text = build_text_encoder(TEXT)
    cond, uncond = (text.encode([t])[0] for t in (PROMPTS[position], ""))
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=OPTIONS.shift
    )
    # megagen's grid: evenly spaced from 1 to 0 before the shift
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, OPTIONS.num_steps + 1)[:-1].numpy())
    x = Streams(OPTIONS.seed).normal("sample", 0, [position], (4, 3, 4, 6))
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        network_input = x if first is None else torch.cat([x, first], dim=1)
        with torch.no_grad():
            c, u = (
                model(network_input, 1000 * sigma[None], e, return_dict=False)[0]
                for e in (cond, uncond)
            )
        x = scheduler.step(u + OPTIONS.guidance_scale * (c - u), timestep, x, return_dict=False)[0]
    return x


def videos(
    folder: Path, dims: ParallelDims, options: SamplingOptions = OPTIONS
) -> dict[int, Tensor]:
    pipeline = source.build_pipeline(source.from_directory(str(folder)), dims)
    return dict(pipeline.generate(PROMPTS, options))


@in_one_rank
def test_latents_equal_those_of_diffusers_network_and_scheduler(model_dir: Path) -> None:
    pipeline = source.build_pipeline(source.from_directory(str(model_dir)), ParallelDims())
    for position in range(2):
        ours = pipeline.latents([PROMPTS[position]], [position], OPTIONS)
        expected = by_diffusers(model_dir, position)
        assert (ours - expected).norm() / expected.norm() < 2e-4


@in_one_rank
def test_videos_do_not_depend_on_the_batch_size(model_dir: Path) -> None:
    one = videos(model_dir, ParallelDims())
    assert sorted(one) == [0, 1, 2] and one[0].shape == (3, 8, 12, 3)
    assert not torch.equal(one[0], one[1])
    three = videos(model_dir, ParallelDims(), OPTIONS.model_copy(update={"batch_size": 2}))
    for position, frames in one.items():
        assert (frames.int() - three[position].int()).abs().max() <= 1


@in_one_rank
def test_a_few_step_student_walks_down_its_own_timesteps(model_dir: Path) -> None:
    pipeline = source.build_pipeline(source.from_directory(str(model_dir)), ParallelDims())
    few = {"sampler": "sde", "t_list": [1000.0, 700.0, 200.0, 0.0], "guidance_scale": 1.0}
    options = OPTIONS.model_copy(update=few)
    ours = pipeline.latents(PROMPTS[:2], [0, 1], options)
    model = WanTransformer3DModel.from_pretrained(model_dir)
    text = build_text_encoder(TEXT).encode(PROMPTS[:2])[0]
    streams, shape = Streams(OPTIONS.seed), ours.shape[1:]
    x = streams.normal("sample", 0, [0, 1], shape)
    for k, (t, following) in enumerate(((1000.0, 0.7), (700.0, 0.2), (200.0, 0.0)), 1):
        with torch.no_grad():
            v = model(x, torch.full((2,), t), text, return_dict=False)[0]
        eps = streams.normal(f"sample/step/{k}", 0, [0, 1], shape)
        x = (1 - following) * (x - t / 1000 * v) + following * eps
    expected = pipeline.roles[0].plugin.denormalize(x)
    assert (ours - expected).norm() / expected.norm() < 1e-4
    alone = pipeline.latents(PROMPTS[1:2], [1], options)
    torch.testing.assert_close(alone, ours[1:], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "num_ranks, dims",
    [
        (2, ParallelDims(tp_size=2)),
        (2, ParallelDims(cp_size=2)),
        (2, ParallelDims(pp_size=2)),
        (2, ParallelDims()),
        (4, ParallelDims(tp_size=2)),
    ],
    ids=["tp2", "cp2", "pp2", "dp2", "tp2xdp2"],
)
def test_videos_do_not_depend_on_the_layout(
    model_dir: Path, num_ranks: int, dims: ParallelDims
) -> None:
    (expected,) = run_ranks(1, videos, model_dir, ParallelDims())
    found: dict[int, Tensor] = {}
    for part in run_ranks(num_ranks, videos, model_dir, dims):
        assert not found.keys() & part.keys(), "a video was made twice"
        found |= part
    assert sorted(found) == [0, 1, 2]
    for position, frames in expected.items():
        assert (frames.int() - found[position].int()).abs().max() <= 1


@in_one_rank
def test_an_image_to_video_network_sees_the_first_frame(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "i2v", in_channels=12)
    pipeline = source.build_pipeline(source.from_directory(str(folder)), ParallelDims())
    image = torch.randint(0, 256, (1, 8, 12, 3), generator=torch.Generator().manual_seed(1))
    image = image.to(torch.uint8)
    ours = pipeline.latents([PROMPTS[0]], [0], OPTIONS, [image])
    still = torch.zeros(1, 3, 3, 8, 12)
    still[:, :, :1] = image.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    mask = torch.zeros(1, 4, 3, 4, 6)
    mask[:, :, 0] = 1
    given = torch.cat([mask, build_codec(CODEC).encode(still)], dim=1)
    expected = by_diffusers(folder, 0, given)
    assert (ours - expected).norm() / expected.norm() < 2e-4
    with pytest.raises(ConfigError, match="image"):
        next(pipeline.generate(PROMPTS, OPTIONS))


@in_one_rank
def test_a_first_frame_network_keeps_the_frame_it_was_given(model_dir: Path) -> None:
    found = source.from_directory(str(model_dir))
    found.plugins[0].expand_timesteps = True
    pipeline = source.build_pipeline(found, ParallelDims())
    image = torch.full((1, 8, 12, 3), 200, dtype=torch.uint8)
    latents = pipeline.latents([PROMPTS[0]], [0], OPTIONS, [image])
    first = build_codec(CODEC).encode(image.permute(3, 0, 1, 2)[None].float() / 127.5 - 1)
    torch.testing.assert_close(latents[:, :, :1], first)
    without = pipeline.latents([PROMPTS[0]], [0], OPTIONS)
    assert not torch.allclose(latents[:, :, 1:], without[:, :, 1:], atol=1e-2)


@in_one_rank
def test_two_experts_each_serve_their_timesteps(tmp_path: Path) -> None:
    root = tmp_path / "pipeline"
    for name in ("transformer", "transformer_2"):
        write_model(root / name)
    (root / "model_index.json").write_text('{"boundary_ratio": 0.7}')
    source.write_spec(root, source.SamplingSpec(codec=CODEC, text_encoder=TEXT))
    found = source.from_directory(str(root))
    assert [p.timestep_range for p in found.plugins] == [(700.0, 1000.0), (0.0, 700.0)]
    pipeline = source.build_pipeline(found, ParallelDims())
    both = pipeline.latents([PROMPTS[0]], [0], OPTIONS)
    # the two hold the same weights: together they are the one network
    alone = replace(pipeline, roles=pipeline.roles[:1])
    alone.roles[0].plugin.options = alone.roles[0].plugin.options.model_copy(
        update={"expert": None}
    )
    torch.testing.assert_close(both, alone.latents([PROMPTS[0]], [0], OPTIONS))


@in_one_rank
def test_a_size_that_the_codec_cannot_have_is_refused(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"height 9.*8 and 10"):
        videos(model_dir, ParallelDims(), OPTIONS.model_copy(update={"height": 9}))


def test_a_directory_without_codec_says_what_to_give(model_dir: Path) -> None:
    (model_dir / source.SPEC).unlink()
    with pytest.raises(ConfigError, match="--data"):
        source.from_directory(str(model_dir))


def test_a_model_that_is_nowhere_is_named() -> None:
    with pytest.raises(CheckpointError, match="no/where/at-all"):
        source.from_directory("no/where/at-all")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"run\.yaml"):
        source.from_run(tmp_path)


def test_all_data_ranks_make_as_many_batches() -> None:
    for count in range(1, 9):
        for size in (1, 2, 3):
            parts = [batches(count, rank, 3, size) for rank in range(3)]
            assert len({len(p) for p in parts}) == 1
            assert {i for p in parts for b in p for i in b} == set(range(count))


def test_prompts_come_from_options_and_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n  two \n")
    assert read_prompts(["zero"], file) == ["zero", "one", "two"]
    with pytest.raises(ConfigError, match="--prompt"):
        read_prompts([], None)
    with pytest.raises(DataError, match="nowhere"):
        read_prompts([], tmp_path / "nowhere.txt")
    assert file_name(3, "A cat, asleep!") == "0003-a-cat-asleep.mp4"


def test_images_are_fitted_and_broken_ones_named(tmp_path: Path) -> None:
    from PIL import Image

    file = tmp_path / "frame.png"
    Image.new("RGB", (40, 20), (10, 20, 30)).save(file)
    images = read_images([file], 3, OPTIONS)
    assert images is not None and len(images) == 3
    assert images[0].shape == (1, 8, 12, 3) and images[0][0, 0, 0].tolist() == [10, 20, 30]
    (tmp_path / "bad.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"bad\.png"):
        read_images([tmp_path / "bad.png"], 1, OPTIONS)
    with pytest.raises(ConfigError, match="2 images for 3 prompts"):
        read_images([file, file], 3, OPTIONS)
