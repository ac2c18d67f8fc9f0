"""Discriminators: the image one beside the published one, the video ones beside plain formulas."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagen.fastgen import discriminators, video_discriminators
from megagen.fastgen.discriminator_base import num_groups
from megagen.fastgen.discriminators import (
    Discriminator,
    Discriminator_ImageDiT,
    Discriminator_VideoDiT,
)
from megagen.fastgen.losses import gan_disc_loss, gan_gen_loss

HEADS = pytest.mark.parametrize("head", list(video_discriminators.HEADS))
GRIDS = [(1, 1, 1), (1, 3, 2), (4, 1, 5), (3, 4, 6)]


def features(count: int, *shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(count)]


def video(head: str, dtype: torch.dtype = torch.float64, **options: Any) -> Discriminator_VideoDiT:
    options = {"feature_indices": {1, 4}, "num_blocks": 6, "inner_dim": 20, "width": 16} | options
    return Discriminator_VideoDiT(head=head, **options).to(dtype)


# -- beside the published one ----------------------------------------------------------------------
@pytest.fixture
def published_discriminators(published: Any) -> Any:
    return importlib.import_module(f"{published.__name__}.discriminators")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inner_dim", [16, 72, 80])
def test_image_logits_and_gradients(
    published_discriminators: Any, dtype: torch.dtype, inner_dim: int
) -> None:
    theirs = published_discriminators.Discriminator_ImageDiT({2, 5, 99}, 7, inner_dim).to(dtype)
    ours = Discriminator_ImageDiT({2, 5, 99}, 7, inner_dim).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    assert ours.feature_indices == theirs.feature_indices == {2, 5}
    inputs = features(2, 3, inner_dim, 6, 4, dtype=dtype)
    found, wanted = ours(inputs), theirs(inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    weight = torch.randn_like(wanted)
    sought = [*inputs, *ours.parameters()], [*inputs, *theirs.parameters()]
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), sought[0]),
        torch.autograd.grad((wanted * weight).sum(), sought[1]),
        strict=True,
    ):
        assert float((a - b).norm()) <= 1e-6 * float(b.norm())


def test_image_initialisation_is_the_published_one(published_discriminators: Any) -> None:
    made = {}
    for library in (published_discriminators.Discriminator_ImageDiT, Discriminator_ImageDiT):
        torch.manual_seed(5)
        made[library] = library({1, 2}, 3, 24).state_dict()
    theirs, ours = made.values()
    assert list(theirs) == list(ours)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_image_defaults_and_errors(published_discriminators: Any) -> None:
    for library in (published_discriminators, discriminators):
        with torch.device("meta"):
            default = library.Discriminator_ImageDiT()
        assert default.feature_indices == {28} and default.inner_dim == 3072
        assert sum(p.numel() for p in default.parameters()) == 75_503_617
        small = library.Discriminator_ImageDiT({0, 1}, 2, 16)
        assert small.num_features == 2
        feature = torch.randn(1, 16, 4, 4)
        for wrong in ([feature], (feature, feature), [feature] * 3):
            with pytest.raises(ValueError, match="2 feature"):
                small(wrong)
        with pytest.raises(NotImplementedError):
            library.Discriminator({1})([feature])
    assert Discriminator({1}).feature_indices == {1} and Discriminator().feature_indices is None


@pytest.mark.parametrize("channels", [4, 8, 12, 32, 33, 40, 48, 66, 96, 1536, 2560])
def test_groups(published_discriminators: Any, channels: int) -> None:
    with torch.device("meta"):
        theirs = published_discriminators.Discriminator_ImageDiT({0}, 1, 2 * channels)
    assert num_groups(channels) == theirs.cls_pred_heads[0][1].num_groups


def test_groups_always_divide() -> None:
    assert all(channels % num_groups(channels) == 0 for channels in range(1, 200))
    assert [num_groups(channels) for channels in (1, 13, 26)] == [1, 1, 2]


# -- one head a feature ----------------------------------------------------------------------------
def each_kind() -> list[tuple[str, Any, list[Tensor]]]:
    shape = (2, 20, 3, 4, 6)
    found = [(head, video(head), features(2, *shape)) for head in video_discriminators.HEADS]
    image = Discriminator_ImageDiT({0, 3}, 4, 20).double()
    return [*found, ("image", image, features(2, 2, 20, 4, 6))]


def test_heads_one_by_one_are_the_whole() -> None:
    for name, discriminator, inputs in each_kind():
        whole = discriminator(inputs)
        parts = [discriminator.forward_head(k, feature) for k, feature in enumerate(inputs)]
        assert tuple(part.shape[1] for part in parts) == discriminator.heads_per_feature, name
        assert torch.equal(whole, torch.cat(parts, dim=1)), name
        assert len(discriminator.heads) == 2 == discriminator.num_features
        torch.testing.assert_close(discriminator.heads[1](inputs[1]), parts[1])
        with pytest.raises(IndexError):
            discriminator.forward_head(2, inputs[0])


def test_a_generator_pins_the_weights() -> None:
    """Whatever torch's default generator did, which is left alone; no two heads are alike."""
    before = torch.get_rng_state()

    def made(seed: int, kind: Any, **options: Any) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return kind({0, 1}, 3, 24, generator=generator, **options).state_dict()

    kinds = [(Discriminator_VideoDiT, {"head": head}) for head in video_discriminators.HEADS]
    for kind, options in [*kinds, (Discriminator_ImageDiT, {})]:
        first, again, other = (
            made(1, kind, **options),
            made(1, kind, **options),
            made(2, kind, **options),
        )
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not any(
            torch.equal(first[name], other[name])
            for name in first
            if first[name].unique().numel() > 1
        )
        weights = [
            name for name in first if name.startswith("cls_pred_heads.0.") and first[name].ndim > 1
        ]
        assert weights
        for name in weights:
            assert not torch.equal(first[name], first[name.replace(".0.", ".1.", 1)])
    assert torch.equal(torch.get_rng_state(), before)


@HEADS
def test_a_generator_draws_as_torch_initialises(head: str) -> None:
    """Equal means and spreads of every parameter, over enough numbers to tell."""
    options = {"inner_dim": 256, "width": 64, "feature_indices": range(6)}
    given = video(head, generator=torch.Generator().manual_seed(torch.initial_seed()), **options)
    default = video(head, **options)
    ours, theirs = given.state_dict(), default.state_dict()
    for (name, a), (_, b) in zip(ours.items(), theirs.items(), strict=True):
        if a.numel() > 2000:
            torch.testing.assert_close(a.std(), b.std(), rtol=0.05, atol=0, msg=name)
            assert abs(float(a.mean())) < 0.1 * float(a.std()), name
            assert float(a.abs().max()) <= 1.02 * float(b.abs().max()), name
        elif b.unique().numel() == 1 < b.numel():
            assert torch.equal(a, b), name


# -- the heads of videos ---------------------------------------------------------------------------
@HEADS
@pytest.mark.parametrize("grid", GRIDS)
def test_any_grid_gives_finite_logits_and_gradients(head: str, grid: tuple[int, int, int]) -> None:
    discriminator = video(head)
    inputs = features(2, 3, 20, *grid)
    logits = discriminator(inputs)
    assert logits.shape == (3, sum(discriminator.heads_per_feature))
    assert float(logits.detach().std(dim=0).min()) > 0, "samples are told apart"
    loss = gan_disc_loss(logits, -logits) + gan_gen_loss(logits)
    gradients = torch.autograd.grad(loss, [*inputs, *discriminator.parameters()])
    assert all(torch.isfinite(g).all() for g in gradients)
    assert all(float(g.norm()) > 0 for g in gradients[:2])


def convolution(x: Tensor, layer: nn.Sequential, over: str) -> Tensor:
    """A factorised layer by 2D or 1D convolutions of frames or of pixels, norm and activation."""
    conv, norm = layer[0], layer[1]
    batch, _, frames, height, width = x.shape
    if over == "frames":
        flat = x.transpose(1, 2).flatten(0, 1)
        flat = F.conv2d(flat, conv.weight[:, :, 0], conv.bias, stride=2, padding=1)
        x = flat.unflatten(0, (batch, frames)).transpose(1, 2)
    else:
        flat = x.permute(0, 3, 4, 1, 2).flatten(0, 2)
        flat = F.conv1d(flat, conv.weight[..., 0, 0], conv.bias, padding=1)
        x = flat.unflatten(0, (batch, height, width)).permute(0, 3, 4, 1, 2)
    x = F.group_norm(x, norm.num_groups, norm.weight, norm.bias)
    return torch.where(x > 0, x, 0.2 * x)


def pointwise(x: Tensor, conv: nn.Module) -> Tensor:
    return torch.einsum("bdthw,kd->bkthw", x, conv.weight[:, :, 0, 0, 0]) + conv.bias.view(
        1, -1, 1, 1, 1
    )


def logit(x: Tensor, last: nn.Module) -> Tensor:
    return F.linear(x.movedim(1, -1), last.logit.weight, last.logit.bias).mean(dim=(1, 2, 3))


@pytest.mark.parametrize("grid", GRIDS)
def test_factorised_is_space_then_time(grid: tuple[int, int, int]) -> None:
    discriminator = video("factorized")
    inputs = features(2, 3, 20, *grid)
    wanted = []
    for head, x in zip(discriminator.heads, inputs, strict=True):
        x = convolution(pointwise(x, head[0]), head[1], "frames")
        wanted.append(logit(convolution(x, head[2], "pixels"), head[3]))
    torch.testing.assert_close(
        discriminator(inputs), torch.cat(wanted, dim=1), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("grid", GRIDS)
def test_branches_are_space_and_time_apart(grid: tuple[int, int, int]) -> None:
    discriminator = video("branches")
    inputs = features(2, 3, 20, *grid)
    wanted = []
    for head, x in zip(discriminator.heads, inputs, strict=True):
        reduced = pointwise(x, head.reduce)
        for branch, over in ((head.space, "frames"), (head.time, "pixels")):
            wanted.append(logit(convolution(reduced, branch[0], over), branch[1]))
    torch.testing.assert_close(
        discriminator(inputs), torch.cat(wanted, dim=1), rtol=1e-9, atol=1e-9
    )


def test_conv3d_sees_what_factors_do() -> None:
    """A 3 x 3 x 3 kernel that is a product of factors is their convolutions in a row."""
    discriminator = video("conv3d")
    head = discriminator.heads[0]
    (x,) = features(1, 2, 20, 4, 5, 6)
    conv, norm = head[1][0], head[1][1]
    space, time = torch.randn(16, 16, 3, 3).double(), torch.randn(3).double()
    conv.weight.data = space[:, :, None] * time.view(3, 1, 1)
    reduced = pointwise(x, head[0])
    frames = F.conv2d(reduced.transpose(1, 2).flatten(0, 1), space, stride=2, padding=1).unflatten(
        0, (2, 4)
    )
    padded = F.pad(frames, (0, 0, 0, 0, 0, 0, 1, 1))
    y = sum(time[k] * padded[:, k : k + 4] for k in range(3)).transpose(1, 2)  # type: ignore[union-attr]
    y = y + conv.bias.view(1, -1, 1, 1, 1)
    y = F.leaky_relu(F.group_norm(y, norm.num_groups, norm.weight, norm.bias), 0.2)
    torch.testing.assert_close(discriminator.forward_head(0, x), logit(y, head[2]))


def test_attention_pools_tokens_in_any_order() -> None:
    discriminator = video("attention", width=128)
    head = discriminator.heads[0]
    assert head.num_heads == 2
    (x,) = features(1, 2, 20, 3, 4, 2)
    tokens = x.flatten(2).transpose(1, 2)
    normed = F.layer_norm(tokens, (20,), head.norm.weight, head.norm.bias)
    keys, values = head.key(normed), head.value(normed)
    query, gathered = head.query.weight[:, 0], []
    for part in (slice(0, 64), slice(64, 128)):
        weight = torch.softmax(keys[..., part] @ query[part] / 8, dim=1)
        gathered.append(torch.einsum("bn,bnd->bd", weight, values[..., part]))
    wanted = head.judge(torch.cat(gathered, dim=1))
    torch.testing.assert_close(discriminator.forward_head(0, x), wanted)
    shuffled = tokens[:, torch.randperm(tokens.shape[1])]
    torch.testing.assert_close(discriminator.forward_head(0, shuffled), wanted)


def test_the_order_of_frames_counts() -> None:
    for head in ("factorized", "conv3d", "branches"):
        discriminator = video(head)
        inputs = features(2, 2, 20, 4, 3, 3)
        moved = [feature[:, :, [2, 0, 3, 1]] for feature in inputs]
        change = (discriminator(inputs) - discriminator(moved)).abs().detach()
        if head == "branches":  # the first of its two logits judges frames one by one
            assert float(change[:, ::2].max()) < 1e-9
            change = change[:, 1::2]
        assert float(change.max()) > 1e-6, head


@pytest.mark.parametrize(
    ("head", "millions"),
    [("factorized", 2.099), ("conv3d", 3.081), ("branches", 2.099), ("attention", 2.699)],
)
def test_a_head_of_the_largest_wan_is_small(head: str, millions: float) -> None:
    with torch.device("meta"):
        made = Discriminator_VideoDiT({20}, 40, 5120, head=head)
    assert sum(p.numel() for p in made.parameters()) / 1e6 == pytest.approx(millions, abs=1e-3)


def test_video_defaults_dtypes_and_errors() -> None:
    default = Discriminator_VideoDiT(width=8)
    assert default.feature_indices == {15} and default.inner_dim == 1536
    half = video("factorized", dtype=torch.bfloat16)
    assert half(features(2, 1, 20, 2, 2, 2)).dtype == torch.bfloat16
    for options, message in (
        ({"feature_indices": {6}}, r"\[0, 6\)"),
        ({"feature_indices": {-1, 2}}, "-1"),
        ({"feature_indices": set()}, "none at all"),
        ({"width": 0}, "width"),
        ({"head": "conv4d"}, "factorized, conv3d"),
        ({"head": "attention", "width": 129}, "129"),
    ):
        with pytest.raises(ValueError, match=message):
            video(**({"head": "factorized"} | options))
    discriminator = video("factorized")
    (good,) = features(1, 2, 20, 2, 3, 4)
    with pytest.raises(ValueError, match="2 features"):
        discriminator([good])
    for shape in ((2, 24, 20), (2, 19, 2, 3, 4), (20,)):
        with pytest.raises(ValueError, match="feature 1"):
            discriminator([good, torch.randn(shape)])
