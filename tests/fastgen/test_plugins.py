"""Wan and Qwen-Image: diffusers' networks, small, with our hooks beside theirs and none at all."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from megagen.fastgen import plugins
from megagen.fastgen.config import DMDConfig
from megagen.fastgen.discriminators import Discriminator_ImageDiT, Discriminator_VideoDiT
from megagen.fastgen.features import captured, drain
from megagen.fastgen.methods.dmd import DMDPipeline
from megagen.fastgen.plugins import qwen_image, wan22

WAN_WIDTH, QWEN_WIDTH, TEXT, LAYERS = 24, 16, 10, 4
INDICES = [2, 0, 2]


def exact(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


# -- Wan -------------------------------------------------------------------------------------------
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


# -- Qwen-Image ------------------------------------------------------------------------------------
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


# -- the package -----------------------------------------------------------------------------------
def test_the_package_has_the_published_names(published_qwen: Any) -> None:
    released = importlib.import_module(published_qwen.__package__)
    for name in published_qwen.__all__:
        assert hasattr(released, name) and getattr(plugins, name) is getattr(qwen_image, name)


def test_a_missing_package_is_passed_over_and_other_trouble_is_a_warning() -> None:
    with plugins._optional("family"):
        importlib.import_module("surely_not_installed_anywhere")
    with pytest.warns(UserWarning, match=r"family.*ZeroDivisionError"), plugins._optional("family"):
        raise ZeroDivisionError
    with pytest.raises(ModuleNotFoundError), plugins._optional("family"):
        importlib.import_module("megagen.fastgen.surely_not")
