"""Qwen-Image: diffusers' network, small, with our hooks beside the published ones'."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megagen.fastgen.config import DMDConfig
from megagen.fastgen.discriminators import Discriminator_ImageDiT
from megagen.fastgen.features import drain
from megagen.fastgen.plugins import qwen_image

QWEN_WIDTH, TEXT, LAYERS = 16, 10, 4
INDICES = [2, 0, 2]


@pytest.fixture(scope="module")
def qwen_class() -> Any:
    return importlib.import_module("diffusers").QwenImageTransformer2DModel


def small_qwen(qwen_class: Any) -> nn.Module:
    network = qwen_class(
        in_channels=16,
        out_channels=4,
        num_layers=LAYERS,
        attention_head_dim=QWEN_WIDTH // 2,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        axes_dims_rope=(2, 2, 4),
    )
    return network.eval().requires_grad_(False)


@pytest.fixture
def published_qwen(published: Any) -> Any:
    return importlib.import_module(f"{published.__name__}.plugins.qwen_image")


@pytest.mark.parametrize("size", [(2, 3, 4, 6), (1, 4, 2, 2), (3, 1, 8, 4)])
def test_packing(published_qwen: Any, size: tuple[int, ...]) -> None:
    batch, _, height, width = size
    latents = torch.randn(size)
    packed = qwen_image.pack_latents(latents)
    assert torch.equal(packed, published_qwen.pack_latents(latents))
    assert torch.equal(qwen_image.unpack_latents(packed, height, width), latents)
    assert torch.equal(published_qwen.unpack_latents(packed, height, width), latents)
    strided = latents.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(qwen_image.pack_latents(strided), packed)
    shapes = qwen_image.build_img_shapes(batch, height, width)
    assert shapes == published_qwen.build_img_shapes(batch, height, width)


def test_packing_rejects_what_the_published_one_does(published_qwen: Any) -> None:
    for library in (qwen_image, published_qwen):
        for shape in ((2, 3, 4), (1, 2, 3, 4), (1, 2, 4, 3)):
            with pytest.raises(ValueError):
                library.pack_latents(torch.zeros(shape))
        for shape, height, width in (
            ((1, 4, 8, 1), 4, 4),
            ((1, 4, 6), 4, 4),
            ((1, 4, 8), 3, 4),
            ((1, 4, 8), 4, 6),
        ):
            with pytest.raises(ValueError):
                library.unpack_latents(torch.zeros(shape), height, width)
        with pytest.raises(ValueError):
            library.build_img_shapes(1, 4, 5)


def qwen_inputs() -> dict[str, Any]:
    mask = torch.ones(2, 5)
    mask[1, 3:] = 0
    return {
        "hidden_states": torch.randn(2, 4, 4, 6),
        "timestep": torch.tensor([0.2, 0.9]),
        "encoder_hidden_states": torch.randn(2, 5, TEXT),
        "encoder_hidden_states_mask": mask,
    }


def forward_packed(network: nn.Module, inputs: dict[str, Any]) -> Tensor:
    latents = inputs["hidden_states"]
    batch, _, height, width = latents.shape
    packed = {**inputs, "hidden_states": qwen_image.pack_latents(latents)}
    shapes = [[(1, height // 2, width // 2)]] * batch
    out = network(**packed, img_shapes=shapes, return_dict=False)[0]
    return qwen_image.unpack_latents(out, height, width)


def test_qwen_features_are_the_published_ones(qwen_class: Any, published_qwen: Any) -> None:
    ours = small_qwen(qwen_class)
    theirs = copy.deepcopy(ours)
    inputs = qwen_inputs()
    qwen_image.attach_feature_capture(ours, INDICES, 4, 6)
    published_qwen.attach_feature_capture(theirs, INDICES, 4, 6)
    forward_packed(ours, inputs)
    forward_packed(theirs, inputs)
    found = qwen_image.pop_captured_features(ours)
    assert found[0].shape == (2, QWEN_WIDTH, 2, 3)
    assert len(found) == len(theirs._fastgen_captured) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, theirs._fastgen_captured, strict=True))
    qwen_image.remove_feature_capture(ours)
    assert not any(module._forward_hooks for module in ours.modules())


def test_qwen_rejects_what_the_published_one_does(qwen_class: Any, published_qwen: Any) -> None:
    for library in (qwen_image, published_qwen):
        network = small_qwen(qwen_class)
        attach = library.attach_feature_capture
        for arguments, options, error in (
            (([0], 3, 4), {}, ValueError),
            (([0], 4, 5), {}, ValueError),
            (([0], 4, 4), {"blocks_attr": "blocks"}, AttributeError),
            (([0], 4, 4), {"blocks_attr": "img_in"}, TypeError),
            (([LAYERS], 4, 4), {}, IndexError),
            (([-1], 4, 4), {}, IndexError),
        ):
            with pytest.raises(error):
                attach(network, *arguments, **options)
        attach(network, [0], 4, 4)
        with pytest.raises(RuntimeError):
            forward_packed(network, qwen_inputs())  # of 4 x 6
        network.odd = nn.ModuleList([Returns({"image": torch.zeros(1)})])
        attach(network, [0], 4, 4, blocks_attr="odd")
        with pytest.raises(TypeError):
            network.odd[0]()
        library.remove_feature_capture(network)
        library.remove_feature_capture(network)
        assert drain(network) is None


class Returns(nn.Module):
    """A block that returns what it was made with."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self) -> Any:
        return self.output


def qwen_pipeline(qwen_class: Any, **options: Any) -> qwen_image.QwenImageDMDPipeline:
    student, teacher, fake_score = (small_qwen(qwen_class) for _ in range(3))
    config = options.pop("config", DMDConfig())
    return qwen_image.QwenImageDMDPipeline(
        student.requires_grad_(True), teacher, fake_score, config, **options
    )


def test_qwen_is_called_with_tokens(qwen_class: Any) -> None:
    pipeline = qwen_pipeline(qwen_class)
    inputs = qwen_inputs()
    unused = {"txt_seq_lens": [5, 3], "return_dict": True, "guidance": None, "img_shapes": []}
    wanted = forward_packed(pipeline.teacher, inputs)
    for network in (pipeline.teacher, Handed(pipeline.teacher)):
        assert torch.equal(pipeline._call_model(network, **inputs, **unused), wanted)
    with pytest.raises(ValueError):
        pipeline._call_model(pipeline.teacher, torch.randn(2, 4, 1, 4, 6), inputs["timestep"])


class Handed(nn.Module):
    """A wrapper that hands everything on, as data parallelism does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.module(*inputs, **options)


class Recorder(nn.Module):
    """Keeps its arguments, and returns its tokens as a tuple."""

    def note(self, given: dict[str, Any]) -> tuple[Tensor]:
        self.given = given
        return (given["hidden_states"],)


class Older(Recorder):
    """As diffusers up to 0.36: text lengths are asked for."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        img_shapes: Any = None,
        txt_seq_lens: list[int] | None = None,
        guidance: Tensor | None = None,
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        given = {
            name: value for name, value in locals().items() if name not in ("self", "__class__")
        }
        return self.note(given)


class Newer(Recorder):
    """Without text lengths, guidance and mask."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        img_shapes: Any,
        return_dict: bool,
    ) -> tuple[Tensor]:
        return self.note({"hidden_states": hidden_states})


class Anything(Recorder):
    def forward(self, **given: Any) -> tuple[Tensor]:
        return self.note(given)


@pytest.mark.parametrize("guidance", [None, 3.5])
@pytest.mark.parametrize("kind", [Older, Anything])
def test_qwen_arguments_are_the_published_ones(
    qwen_class: Any, published: Any, published_qwen: Any, kind: Any, guidance: float | None
) -> None:
    inputs = qwen_inputs()
    ours = qwen_pipeline(qwen_class, guidance=guidance)
    networks = (nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1))
    theirs = published_qwen.QwenImageDMDPipeline(
        *networks, published.DMDConfig(), guidance=guidance
    )
    network = kind()
    given = []
    for pipeline in (ours, theirs):
        assert torch.equal(pipeline._call_model(network, **inputs), inputs["hidden_states"])
        given.append({name: value for name, value in network.given.items() if value is not None})
    assert given[0].pop("txt_seq_lens") == given[1].pop("txt_seq_lens") == [5, 3]
    torch.testing.assert_close(given[0], given[1], rtol=0, atol=0)


def test_qwen_gives_what_forward_names(qwen_class: Any) -> None:
    inputs = qwen_inputs()
    pipeline = qwen_pipeline(qwen_class, guidance=2.0)
    with pytest.raises(TypeError, match="encoder_hidden_states_mask"):
        pipeline._call_model(Newer(), **inputs)  # a mask that would be lost
    del inputs["encoder_hidden_states_mask"]
    older = Older()
    pipeline._call_model(older, **inputs)
    assert older.given["txt_seq_lens"] == [5, 5]  # the whole text, where no mask says less
    pipeline = qwen_pipeline(qwen_class)
    latents = pipeline._call_model(Newer(), **inputs)
    assert torch.equal(latents, inputs["hidden_states"])


def test_qwen_distils_through_every_loss(qwen_class: Any) -> None:
    """Student, fake score, discriminator, with guidance by an embedding of another length."""
    config = DMDConfig(gan_loss_weight_gen=0.1, gan_r1_reg_weight=0.2, guidance_scale=3.0)
    discriminator = Discriminator_ImageDiT({1, 2}, LAYERS, QWEN_WIDTH)
    pipeline = qwen_pipeline(qwen_class, config=config, discriminator=discriminator)
    qwen_image.attach_feature_capture(pipeline.teacher, [1, 2], 4, 6)
    pipeline.fake_score.requires_grad_(True)
    inputs = qwen_inputs()
    arguments = {
        "latents": inputs["hidden_states"],
        "noise": torch.randn(2, 4, 4, 6),
        "encoder_hidden_states": inputs["encoder_hidden_states"],
        "encoder_hidden_states_mask": inputs["encoder_hidden_states_mask"],
    }
    negative = {
        "negative_encoder_hidden_states": torch.randn(2, 3, TEXT),
        "negative_encoder_hidden_states_mask": torch.ones(2, 3),
    }
    for which, network, extra in (
        ("student", pipeline.student, negative),
        ("fake_score", pipeline.fake_score, {}),
        ("discriminator", discriminator, {}),
    ):
        losses = getattr(pipeline, f"compute_{which}_loss")(**arguments, **extra)
        losses["total"].backward()
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        assert sum(float(g.norm()) for g in gradients) > 0, which
        assert all(torch.isfinite(g).all() for g in gradients)
    assert drain(pipeline.teacher) == []


def test_qwen_time_is_not_scaled(qwen_class: Any) -> None:
    with pytest.raises(ValueError, match="1000"):
        qwen_pipeline(qwen_class, config=DMDConfig(num_train_timesteps=1000))
