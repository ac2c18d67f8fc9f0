"""Wan: diffusers' network, small, with our hooks beside it and none at all."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from megagen.fastgen.config import DMDConfig
from megagen.fastgen.discriminators import Discriminator_VideoDiT
from megagen.fastgen.features import captured, drain
from megagen.fastgen.methods.dmd import DMDPipeline
from megagen.fastgen.plugins import wan22

WAN_WIDTH, TEXT, LAYERS = 24, 10, 4
INDICES = [2, 0, 2]


def exact(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def wan_class() -> Any:
    return importlib.import_module("diffusers").WanTransformer3DModel


@pytest.fixture
def wan(wan_class: Any) -> nn.Module:
    return small_wan(wan_class)


def small_wan(wan_class: Any) -> nn.Module:
    network = wan_class(
        num_attention_heads=2,
        attention_head_dim=WAN_WIDTH // 2,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT,
        freq_dim=8,
        ffn_dim=32,
        num_layers=LAYERS,
        rope_max_seq_len=32,
    )
    return network.double().eval().requires_grad_(False)


def wan_inputs(*size: int) -> dict[str, Tensor]:
    """Latents ``[2, 4, *size]`` that need a gradient, times and texts."""
    return {
        "hidden_states": torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True),
        "timestep": torch.tensor([120.0, 830.0], dtype=torch.float64),
        "encoder_hidden_states": torch.randn(2, 5, TEXT, dtype=torch.float64),
    }


def block_outputs(network: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Tokens after every block, by the network's parts and no hook."""
    hidden = inputs["hidden_states"]
    rotations = network.rope(hidden)
    tokens = network.patch_embedding(hidden).flatten(2).transpose(1, 2)
    _, modulation, text, _ = network.condition_embedder(
        inputs["timestep"], inputs["encoder_hidden_states"], None
    )
    found = []
    for block in network.blocks:
        tokens = block.forward(tokens, text, modulation.unflatten(1, (6, -1)), rotations)
        found.append(tokens)
    return found


def on_grid(tokens: Tensor, time: int, height: int, width: int) -> Tensor:
    return torch.stack(
        [
            tokens[:, (t * height + h) * width + w]
            for t in range(time)
            for h in range(height)
            for w in range(width)
        ],
        dim=2,
    ).reshape(tokens.shape[0], tokens.shape[2], time, height, width)


def test_wan_features_are_the_blocks_outputs(wan: nn.Module) -> None:
    wan22.attach_feature_capture(wan, INDICES)
    inputs = wan_inputs(3, 4, 6)
    wan(**inputs)
    outputs = block_outputs(wan, inputs)
    found = wan22.pop_captured_features(wan)
    assert found[0].shape == (2, 3 * 2 * 3, WAN_WIDTH)
    exact(found, [outputs[0], outputs[2]])
    assert wan22.pop_captured_features(wan) == []


@pytest.mark.parametrize("grid", ["auto", (3, 2, 5)])
def test_wan_features_on_the_grid(wan: nn.Module, grid: Any) -> None:
    wan22.attach_feature_capture(wan, [1], grid=grid)
    for time, height, width in [(3, 2, 5), (1, 4, 3)]:
        inputs = wan_inputs(time, 2 * height, 2 * width)
        if grid != "auto" and (time, height, width) != grid:
            with pytest.raises(RuntimeError, match="3 x 2 x 5"):
                wan(**inputs)
            continue
        wan(**inputs)
        wanted = on_grid(block_outputs(wan, inputs)[1], time, height, width)
        exact(wan22.pop_captured_features(wan), [wanted])


def test_wan_on_the_grid_in_a_copy_and_removed(wan: nn.Module) -> None:
    wan22.attach_feature_capture(wan, [1], grid="auto")
    other = copy.deepcopy(wan)
    small, large = wan_inputs(1, 2, 2), wan_inputs(2, 4, 4)
    wan(**small)
    with captured(other) as taken:
        other(**large)
    exact(wan22.pop_captured_features(wan), [on_grid(block_outputs(wan, small)[1], 1, 1, 1)])
    exact(taken.features, [on_grid(block_outputs(wan, large)[1], 2, 2, 2)])
    wan22.remove_feature_capture(wan)
    wan22.remove_feature_capture(wan)
    assert not any(module._forward_hooks for module in wan.modules())
    with pytest.raises(RuntimeError, match="attach_feature_capture"):
        wan22.pop_captured_features(wan)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_wan_under_gradient_checkpointing(wan: nn.Module, reentrant: bool) -> None:
    """Sizes change between the forwards, and both are run again in backward."""
    wan.enable_gradient_checkpointing(
        lambda block, *inputs: checkpoint(block, *inputs, use_reentrant=reentrant)
    )
    wan22.attach_feature_capture(wan, INDICES, grid="auto")
    given = [wan_inputs(1, 2, 4), wan_inputs(2, 4, 2)]
    with set_checkpoint_early_stop(False):
        losses = [wan(**inputs).sample.sum() for inputs in given]
    features = wan22.pop_captured_features(wan)
    sum(losses).backward()  # type: ignore[union-attr]
    assert wan22.pop_captured_features(wan) == []
    wan.disable_gradient_checkpointing()
    for k, (inputs, grid) in enumerate(zip(given, [(1, 1, 2), (2, 2, 1)], strict=True)):
        outputs = block_outputs(wan, inputs)
        exact(features[2 * k : 2 * k + 2], [on_grid(outputs[n], *grid) for n in (0, 2)])


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=str)
@pytest.mark.parametrize("early_exit", [False, True])
def test_wan_gradient_of_features(
    wan: nn.Module, checkpointing: bool | None, early_exit: bool
) -> None:
    """Equal to the whole graph's, and the blocks behind the last feature have no part in it.

    ``checkpointing``: none, non-reentrant, reentrant.
    """
    inputs = wan_inputs(2, 4, 4)
    x = inputs["hidden_states"]
    outputs = block_outputs(wan, inputs)
    (wanted,) = torch.autograd.grad(outputs[0].pow(2).sum() + outputs[2].sin().sum(), x)
    calls = []
    for block in wan.blocks:
        block.register_forward_pre_hook(lambda block, _inputs: calls.append(block))
    if checkpointing is not None:
        wan.enable_gradient_checkpointing(
            lambda block, *inputs: checkpoint(block, *inputs, use_reentrant=checkpointing)
        )
    wan22.attach_feature_capture(wan, INDICES, grid="auto")
    early_exit = early_exit and not checkpointing
    out = None
    with captured(wan, early_exit=early_exit, needs_grad=True) as taken:
        out = wan(**inputs).sample
    assert calls == list(wan.blocks)[: 3 if early_exit else 4]
    assert out is None if early_exit else out.requires_grad is bool(checkpointing)
    assert taken.features is not None
    first, last = taken.features
    del out
    (first.pow(2).sum() + last.sin().sum()).backward()
    torch.testing.assert_close(x.grad, wanted, rtol=1e-10, atol=1e-10)
    assert drain(wan) == []


def test_wan_keeps_nothing_of_the_blocks_behind_the_last(wan: nn.Module) -> None:
    wan22.attach_feature_capture(wan, [0])
    inputs = wan_inputs(2, 4, 4)
    kept = {}
    for stop in (True, False):
        saved: list[int] = []

        def pack(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with captured(wan, stop_gradient=stop) as taken:
                out = wan(**inputs).sample
            del out
        kept[stop] = len(saved)
        assert taken.features is not None
    assert kept[True] < 0.5 * kept[False]  # one of four blocks


def test_wan_rejects(wan: nn.Module) -> None:
    attach = wan22.attach_feature_capture
    with pytest.raises(AttributeError, match="layers"):
        attach(wan, [0], blocks_attr="layers")
    with pytest.raises(TypeError, match="rope"):
        attach(wan, [0], blocks_attr="rope")
    for index in (-1, LAYERS):
        with pytest.raises(IndexError, match=str(index)):
            attach(wan, [index])
    with pytest.raises(AttributeError, match="patch_attr"):
        attach(wan, [0], grid="auto", patch_attr="embedding")
    for grid in ("automatic", (1, 2), (0, 2, 2)):
        with pytest.raises(ValueError, match="grid"):
            attach(wan, [0], grid=grid)


@pytest.mark.parametrize("head", ["factorized", "attention"])
def test_wan_distils_against_a_video_discriminator(wan_class: Any, head: str) -> None:
    networks = {name: small_wan(wan_class) for name in ("student", "teacher", "fake_score")}
    networks["student"].requires_grad_(True)
    wan22.attach_feature_capture(networks["teacher"], [1, 3], grid="auto")
    discriminator = Discriminator_VideoDiT([1, 3], LAYERS, WAN_WIDTH, head=head, width=16).double()
    config = DMDConfig(gan_loss_weight_gen=0.5, num_train_timesteps=1000)
    pipeline = DMDPipeline(**networks, config=config, discriminator=discriminator)
    for size in [(1, 4, 4), (2, 2, 6)]:
        inputs = wan_inputs(*size)
        latents, text = inputs["hidden_states"].detach(), inputs["encoder_hidden_states"]
        losses = pipeline.compute_student_loss(latents, torch.randn_like(latents), text)
        gradient = torch.autograd.grad(losses["gan_gen"], [*networks["student"].parameters()])
        assert sum(float(g.norm()) for g in gradient) > 0
        judged = pipeline.compute_discriminator_loss(latents, torch.randn_like(latents), text)
        judged["total"].backward()
    assert all(float(p.grad.abs().max()) > 0 for p in discriminator.parameters())
