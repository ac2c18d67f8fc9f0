"""Options, conventions and figures of ``WanModel``; no network is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode

from megagen.core.errors import CheckpointError, ConfigError, DataError
from megagen.models.base import Request
from megagen.models.wan import WanModel
from megagen.models.wan.architecture import PRESETS
from megagen.parallel.dims import ParallelDims
from tests.models.wan_cases import CASES, TINY, make_request, reference_model

# num_parameters of the published checkpoints, in millions
PUBLISHED = {
    "t2v-1.3b": 1419,
    "t2v-14b": 14288,
    "i2v-14b": 16395,
    "ti2v-5b": 5000,
    "i2v-a14b": 14289,
}


def _plugin(**options: Any) -> WanModel:
    return WanModel(WanModel.Options(**options))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_diffusers_tensors(preset: str) -> None:
    plugin = _plugin(architecture=preset)
    config = plugin.diffusers_config()
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert plugin.tensor_shapes() == shapes
    assert plugin.num_parameters() == sum(p.numel() for p in model.parameters())
    if preset in PUBLISHED:
        assert round(plugin.num_parameters() / 1e6) == PUBLISHED[preset]


@pytest.mark.parametrize("case", CASES)
def test_flops_are_those_of_diffusers(case: str, generator: torch.Generator) -> None:
    arch = CASES[case]
    request = make_request(arch, generator, size=(4, 6, 10))
    model = reference_model(arch, generator)
    image = request.condition.get("image_embeds_BLD")
    if image is not None and "pos_embed_seq_len" in arch:
        image = image.reshape(2, -1, image.size(-1))
    counter = FlopCounterMode(display=False)
    with (
        counter,
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model(request.latents_BCTHW, request.timestep, request.condition["text_embeds_BLD"], image)
    plugin = _plugin(architecture=arch)
    text_len = request.condition["text_embeds_BLD"].size(1)
    found = plugin.flops(request.latents_BCTHW.shape, text_len)
    if image is not None and "pos_embed_seq_len" not in arch:  # a CLIP image has 257 tokens, not 5
        lacking = 257 - image.size(1)
        hidden, dim = plugin.hidden_size, arch["image_dim"]
        tokens = plugin.num_tokens(request.latents_BCTHW.shape)
        block = 2 * hidden * hidden + 2 * tokens * hidden
        found -= 2 * lacking * (plugin.num_layers * block + dim * (dim + hidden))
    assert found == counter.get_total_flops()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architecture": {**TINY, "num_layer": 2}}, ["num_layer", "did you mean 'num_layers'"]),
        ({"architecture": {**TINY, "num_layers": 0}}, ["num_layers", "0"]),
        ({"architecture": {**TINY, "attention_head_dim": 15}}, ["attention_head_dim", "15"]),
        ({"architecture": {**TINY, "image_dim": 8}}, ["added_kv_proj_dim"]),
        ({"architecture": {**TINY, "latents_mean": [0.0]}}, ["latents_mean", "4 channels"]),
        ({"architecture": "t2v-1.3"}, ["did you mean 't2v-1.3b'"]),
        ({}, ["neither architecture nor init_from"]),
        ({"architecture": TINY, "expert": "high"}, ["boundary_ratio", "0.875"]),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        _plugin(**options)
    for word in ["models.student", *words]:
        assert word in str(caught.value)


def test_directory_and_architecture_must_agree(tmp_path: Path, generator: torch.Generator) -> None:
    reference_model(TINY, generator).save_pretrained(tmp_path)
    assert _plugin(init_from=str(tmp_path), architecture=TINY).num_layers == 3
    with pytest.raises(ConfigError, match=r"architecture\.ffn_dim: is 80, but .* says 72"):
        _plugin(init_from=str(tmp_path), architecture={**TINY, "ffn_dim": 80})
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "Other"}))
    with pytest.raises(CheckpointError, match="Other"):
        _plugin(init_from=str(tmp_path))
    config.write_text("{")
    with pytest.raises(CheckpointError, match="JSON"):
        _plugin(init_from=str(tmp_path))
    with pytest.raises(CheckpointError, match="no directory"):
        _plugin(init_from=str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="the hub does not give it"):  # tests are offline
        _plugin(init_from="nobody/nothing")


def test_pipeline_directory(tmp_path: Path, generator: torch.Generator) -> None:
    arch = {**TINY, "out_channels": 3, "in_channels": 3}
    for folder in ("transformer", "transformer_2"):
        reference_model(arch, generator).save_pretrained(tmp_path / folder)
    for name, value in {
        "model_index.json": {"boundary_ratio": 0.9, "expand_timesteps": True},
        "vae/config.json": {"z_dim": 3, "latents_mean": [1, 2, 3], "latents_std": [2, 4, 8]},
        "scheduler/scheduler_config.json": {"flow_shift": 5.0},
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(value))
    low = _plugin(init_from=str(tmp_path), expert="low")
    assert low.directory == tmp_path / "transformer_2" and low.timestep_range == (0.0, 900.0)
    assert (low.flow_shift, low.expand_timesteps) == (5.0, True)
    high = _plugin(init_from=str(tmp_path), expert="high", flow_shift=7)
    assert high.directory == tmp_path / "transformer" and high.timestep_range == (900.0, 1000.0)
    assert high.flow_shift == 7
    latents = torch.randn(2, 3, 1, 2, 2, generator=generator)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1, 1) for v in ([1.0, 2, 3], [2.0, 4, 8]))
    assert torch.allclose(high.normalize(latents), (latents - mean) / std)
    assert torch.allclose(high.denormalize(high.normalize(latents)), latents, atol=1e-6)
    with pytest.raises(CheckpointError, match="elsewhere"):
        _plugin(init_from=str(tmp_path), subfolder="elsewhere")


def test_a14b_experts() -> None:
    assert _plugin(architecture="t2v-a14b", expert="high").timestep_range == (875.0, 1000.0)
    assert _plugin(architecture="i2v-a14b", expert="low").timestep_range == (0.0, 900.0)
    assert _plugin(architecture="t2v-a14b").timestep_range == (0.0, 1000.0)
    own = _plugin(architecture="t2v-a14b", expert="high", boundary_ratio=0.5)
    assert own.timestep_range == (500.0, 1000.0)


def test_latent_constants() -> None:
    ones = torch.ones(1, 16, 1, 1, 1)
    wan = _plugin(architecture="t2v-1.3b").normalize(ones).flatten()
    assert wan[0].item() == pytest.approx((1 + 0.7571) / 2.8184)
    plain = _plugin(architecture={"latents_mean": None}).normalize(ones)
    assert torch.equal(plain, ones)
    unknown = torch.ones(1, 4, 1, 1, 1)
    assert torch.equal(_plugin(architecture=TINY).normalize(unknown), unknown)
    last = _plugin(architecture="ti2v-5b").normalize(torch.ones(1, 48, 1, 1, 1)).flatten()[-1]
    assert last.item() == pytest.approx((1 + 0.0667) / 0.7744)


@pytest.mark.parametrize(
    ("dims", "words"),
    [
        ({"tp_size": 3}, ["here.tp_size: is 3", "num_attention_heads 4", "Allowed: 1, 2, 4."]),
        ({"tp_size": 2, "cp_size": 4}, ["here.cp_size: is 4", "2 a rank", "1, 2", "all_gather"]),
        (
            {"cp_size": 8, "cp_comm_type": "a2a+p2p", "cp_a2a_size": 8},
            ["here.cp_a2a_size: is 8", "1, 2, 4"],
        ),
        ({"pp_size": 4}, ["here.pp_size: is 4", "3 layers"]),
        ({"virtual_pp_size": 2}, ["here.virtual_pp_size", "one pipeline stage"]),
        ({"pp_size": 2, "pipeline_layers": (3, 0)}, ["here.pipeline_layers", "[3, 0]", "2 stages"]),
    ],
)
def test_layouts_that_do_not_fit(dims: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        _plugin(architecture=TINY).check(ParallelDims(**dims), "here")
    for word in words:
        assert word in str(caught.value)


def test_layouts_that_fit() -> None:
    plugin = _plugin(architecture=TINY)
    plugin.check(ParallelDims(cp_size=3, cp_comm_type="p2p"), "here")
    plugin.check(ParallelDims(cp_size=8, cp_comm_type="a2a+p2p", cp_a2a_size=2, tp_size=2), "here")
    plugin.check(ParallelDims(pp_size=2, pipeline_layers=(2, 1)), "here")


def _request(plugin: WanModel, generator: torch.Generator, **condition: torch.Tensor) -> Request:
    latents = torch.randn(2, plugin.out_channels, 3, 4, 4, generator=generator)
    return Request(latents, torch.tensor([500.0, 20.0]), condition)


def test_image_channels(generator: torch.Generator) -> None:
    plugin = _plugin(architecture=CASES["i2v"])  # 12 channels: 4 latent, 4 mask, 4 image
    image = torch.randn(2, 4, 3, 4, 4, generator=generator)
    request = plugin.inputs(_request(plugin, generator, condition_latents_BCTHW=image))
    mask = request.latents_BCTHW[:, 4:8]
    assert torch.equal(request.latents_BCTHW[:, 8:], image)
    assert mask[:, :, 0].eq(1).all() and mask[:, :, 1:].eq(0).all()
    own_mask = torch.cat([torch.rand(2, 4, 3, 4, 4, generator=generator), image], dim=1)
    request = plugin.inputs(_request(plugin, generator, condition_latents_BCTHW=own_mask))
    assert torch.equal(request.latents_BCTHW[:, 4:], own_mask)
    with pytest.raises(DataError, match="condition_latents_BCTHW"):
        plugin.inputs(_request(plugin, generator))
    with pytest.raises(DataError, match="condition_latents_BCTHW is"):
        plugin.inputs(_request(plugin, generator, condition_latents_BCTHW=image[:, :, :1]))


def test_first_frame_tokens(generator: torch.Generator) -> None:
    plugin = _plugin(architecture=CASES["ti2v"], expand_timesteps=True)
    first = torch.randn(2, 6, 1, 4, 4, generator=generator)
    before = _request(plugin, generator, first_frame_latents_BCTHW=first)
    request = plugin.inputs(before)
    assert torch.equal(request.latents_BCTHW[:, :, :1], first)
    assert torch.equal(request.latents_BCTHW[:, :, 1:], before.latents_BCTHW[:, :, 1:])
    assert request.timestep.tolist() == [[0.0, 500.0, 500.0], [0.0, 20.0, 20.0]]
    per_token = before.with_(timestep=before.timestep[:, None].expand(2, 12))
    assert plugin.inputs(per_token).timestep[1].tolist() == [0.0] * 4 + [20.0] * 8
    without = _request(plugin, generator)
    assert plugin.inputs(without) is without
