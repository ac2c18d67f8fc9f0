"""Wan's parameters and their names in the diffusers layout.

Legend: D hidden, F feed-forward, N heads, K head dim, p patch volume.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megagen.models.adapters import is_adapter
from megagen.models.base import WeightSource
from megagen.models.wan.architecture import WanArchitecture

Shape = tuple[int, ...]

GATE = "to_gate_compress"
"""A block's linear that gates the coarse branch of video sparse attention (FastVideo's name)."""


def tensor_shapes(arch: WanArchitecture, *, has_gate: bool = False) -> dict[str, Shape]:
    """Every tensor of ``WanTransformer3DModel`` with its shape, in diffusers' order.

    Args:
        arch: sizes.
        has_gate: blocks have the gate of sparse attention, which diffusers does not know, under
            FastVideo's name.
    """
    hidden, out = arch.hidden_size, arch.out_channels * arch.patch_volume
    shapes: dict[str, Shape] = {"scale_shift_table": (1, 2, hidden)}
    shapes["patch_embedding.weight"] = (hidden, arch.in_channels, *arch.patch_size)
    shapes["patch_embedding.bias"] = (hidden,)
    embedder = "condition_embedder"
    shapes |= _linear(f"{embedder}.time_embedder.linear_1", hidden, arch.freq_dim)
    shapes |= _linear(f"{embedder}.time_embedder.linear_2", hidden, hidden)
    shapes |= _linear(f"{embedder}.time_proj", 6 * hidden, hidden)
    shapes |= _linear(f"{embedder}.text_embedder.linear_1", hidden, arch.text_dim)
    shapes |= _linear(f"{embedder}.text_embedder.linear_2", hidden, hidden)
    if arch.image_dim is not None:
        image = f"{embedder}.image_embedder"
        if arch.pos_embed_seq_len is not None:
            shapes[f"{image}.pos_embed"] = (1, arch.pos_embed_seq_len, arch.image_dim)
        shapes |= _norm(f"{image}.norm1", arch.image_dim)
        shapes |= _linear(f"{image}.ff.net.0.proj", arch.image_dim, arch.image_dim)
        shapes |= _linear(f"{image}.ff.net.2", hidden, arch.image_dim)
        shapes |= _norm(f"{image}.norm2", hidden)
    for layer in range(arch.num_layers):
        block = f"blocks.{layer}"
        shapes |= _block_shapes(block, arch)
        if has_gate:
            shapes |= _linear(f"{block}.{GATE}", hidden, hidden)
    return shapes | _linear("proj_out", out, hidden)


def _block_shapes(block: str, arch: WanArchitecture) -> dict[str, Shape]:
    hidden = arch.hidden_size
    shapes: dict[str, Shape] = {f"{block}.scale_shift_table": (1, 6, hidden)}
    for attention in ("attn1", "attn2"):
        for linear in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes |= _linear(f"{block}.{attention}.{linear}", hidden, hidden)
        for norm in ("norm_q", "norm_k"):
            shapes[f"{block}.{attention}.{norm}.weight"] = (hidden,)
    if arch.added_kv_proj_dim is not None:
        for linear in ("add_k_proj", "add_v_proj"):
            shapes |= _linear(f"{block}.attn2.{linear}", hidden, arch.added_kv_proj_dim)
        shapes[f"{block}.attn2.norm_added_k.weight"] = (hidden,)
    if arch.cross_attn_norm:
        shapes |= _norm(f"{block}.norm2", hidden)
    shapes |= _linear(f"{block}.ffn.net.0.proj", arch.ffn_dim, hidden)
    return shapes | _linear(f"{block}.ffn.net.2", hidden, arch.ffn_dim)


def _linear(name: str, out_features: int, in_features: int) -> dict[str, Shape]:
    return {f"{name}.weight": (out_features, in_features), f"{name}.bias": (out_features,)}


def _norm(name: str, size: int) -> dict[str, Shape]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


# Module of ours: (its sources in diffusers, the axis of their weights that TP cuts). A row-parallel
# linear's bias (axis 1) is replicated.
BLOCK_MODULES: dict[str, tuple[tuple[str, ...], int | None]] = {
    "attn1.linear_qkv": (("attn1.to_q", "attn1.to_k", "attn1.to_v"), 0),
    "attn1.linear_gate": ((GATE,), 0),
    "attn1.linear_proj": (("attn1.to_out.0",), 1),
    "attn1.norm_q": (("attn1.norm_q",), 0),
    "attn1.norm_k": (("attn1.norm_k",), 0),
    "attn2.linear_q": (("attn2.to_q",), 0),
    "attn2.linear_kv": (("attn2.to_k", "attn2.to_v"), 0),
    "attn2.linear_kv_image": (("attn2.add_k_proj", "attn2.add_v_proj"), 0),
    "attn2.linear_proj": (("attn2.to_out.0",), 1),
    "attn2.norm_q": (("attn2.norm_q",), 0),
    "attn2.norm_k": (("attn2.norm_k",), 0),
    "attn2.norm_k_image": (("attn2.norm_added_k",), 0),
    "norm2": (("norm2",), None),
    "mlp.fc1": (("ffn.net.0.proj",), 0),
    "mlp.fc2": (("ffn.net.2",), 1),
}
IMAGE_MODULES = {"linear_1": "ff.net.0.proj", "linear_2": "ff.net.2"}


def weight_sources(
    chunk: nn.Module, arch: WanArchitecture, shapes: dict[str, Shape]
) -> dict[str, WeightSource]:
    """For each parameter of a chunk, adapters' apart: its source in the diffusers layout."""
    names = [name for name, _ in chunk.named_parameters() if not is_adapter(name)]
    return {name: weight_source(name, arch, shapes) for name in names}


def weight_source(name: str, arch: WanArchitecture, shapes: dict[str, Shape]) -> WeightSource:
    """The source of the parameter that is called ``name`` in any chunk."""
    block = re.fullmatch(r"(blocks\.\d+)\.(.+)\.(weight|bias)", name)
    if name.endswith("scale_shift_table.weight"):
        return _plain(name.removesuffix(".weight"), None, shapes)
    if block is None:
        image = re.fullmatch(r"(condition_embedder\.image_embedder)\.(\w+)\.(\w+)", name)
        if image is not None:
            module = IMAGE_MODULES.get(image[2], image[2])
            return _plain(f"{image[1]}.{module}.{image[3]}", None, shapes)
        if name == "patch_embedding.weight":
            return _patch(name, shapes)
        return _plain(name, None, shapes)
    sources, tp_dim = BLOCK_MODULES[block[2]]
    names = tuple(f"{block[1]}.{source}.{block[3]}" for source in sources)
    if block[3] == "bias" and tp_dim == 1:
        tp_dim = None
    if len(names) == 1:
        return _plain(names[0], tp_dim, shapes)
    return _fused(names, arch.attention_head_dim, shapes)


def _plain(name: str, tp_dim: int | None, shapes: dict[str, Shape]) -> WeightSource:
    return WeightSource(
        (name,), (shapes[name],), tp_dim, lambda shards: shards[0], lambda full: [full]
    )


def _patch(name: str, shapes: dict[str, Shape]) -> WeightSource:
    """A Conv3d whose stride is its kernel, as the linear that it is."""
    shape = shapes[name]
    return WeightSource(
        (name,),
        (shape,),
        None,
        lambda shards: shards[0].reshape(shape[0], math.prod(shape[1:])),
        lambda full: [full.reshape(shape)],
    )


def _fused(names: tuple[str, ...], head_dim: int, shapes: dict[str, Shape]) -> WeightSource:
    """Head-interleaved: ``[N, (q, k, v), K, ...]``, so that TP cuts whole heads."""

    def assemble(shards: Sequence[Tensor]) -> Tensor:
        return torch.stack([s.unflatten(0, (-1, head_dim)) for s in shards], dim=1).flatten(0, 2)

    def split(full: Tensor) -> Sequence[Tensor]:
        parts = full.unflatten(0, (-1, len(names), head_dim)).unbind(1)
        return [part.flatten(0, 1) for part in parts]

    return WeightSource(names, tuple(shapes[name] for name in names), 0, assemble, split)
