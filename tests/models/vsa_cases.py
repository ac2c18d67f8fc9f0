"""diffusers' Wan with sparse attention said as plainly as can be: dense scores under masks.

Legend: B batch, S tokens, N heads, K head dim, n tiles.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

STEM = "diffusion_pytorch_model.safetensors"
TILE = (2, 2, 2)
VSA: dict[str, Any] = {"sparsity": 0.6, "tile": list(TILE), "kernels": "reference"}
"""Of 3 x 3 x 5 tokens: 12 tiles of 1 to 8, of which a tile sees 5."""


def tiles(runs: Sequence[int], rows: int, columns: int, tile: Sequence[int] = TILE) -> Tensor:
    """Number of the tile of each token, in raster order; tiles cross no border between runs."""
    numbers: dict[tuple[int, ...], int] = {}
    found = []
    places = [(run, t) for run, length in enumerate(runs) for t in range(length)]
    for run, t in places:
        for h in range(rows):
            for w in range(columns):
                place = (run, t // tile[0], h // tile[1], w // tile[2])
                found.append(numbers.setdefault(place, len(numbers)))
    return torch.tensor(found)


def sparse(
    q_BNSK: Tensor,
    k_BNSK: Tensor,
    v_BNSK: Tensor,
    gate_BNSK: Tensor,
    q_tiles: Tensor,
    k_tiles: Tensor,
    sparsity: float,
) -> Tensor:
    """Sparse attention from its formulas, in the tensors' type."""
    count = int(k_tiles.max()) + 1
    keep = max(1, math.ceil((1 - sparsity) * count - 1e-6))
    to_q, to_k = (F.one_hot(t).to(q_BNSK) for t in (q_tiles, k_tiles))

    def mean(x: Tensor, one_hot: Tensor) -> Tensor:
        return torch.einsum("bnsk,st->bntk", x, one_hot / one_hot.sum(0))

    scale = q_BNSK.size(-1) ** -0.5
    scores = mean(q_BNSK, to_q) @ mean(k_BNSK, to_k).transpose(-1, -2) * scale
    coarse = scores.softmax(-1) @ mean(v_BNSK, to_k)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(-1, scores.topk(keep, dim=-1).indices, True)
    mask = chosen[..., q_tiles, :][..., k_tiles]
    fine = (q_BNSK @ k_BNSK.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    return fine.softmax(-1) @ v_BNSK + gate_BNSK * coarse[..., q_tiles, :]


class Sparse:
    """diffusers' attention processor.

    Args:
        weight, bias: of the gate.
        numbers: tile of each token.
        sparsity: of it.
    """

    def __init__(self, weight: Tensor, bias: Tensor, numbers: Tensor, sparsity: float) -> None:
        self.weight, self.bias = weight, bias
        self.numbers, self.sparsity = numbers, sparsity

    def __call__(self, attn: Any, hidden: Tensor, states: Any, mask: Any, rotary: Any) -> Tensor:
        q, k, v = attn.norm_q(attn.to_q(hidden)), attn.norm_k(attn.to_k(hidden)), attn.to_v(hidden)
        gate = F.linear(hidden, self.weight, self.bias)
        q, k, v, gate = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v, gate))
        q, k = (rotate(x, *rotary) for x in (q, k))
        out = sparse(q, k, v, gate, self.numbers, self.numbers, self.sparsity)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def rotate(x_BNSK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """diffusers' rotation by its own tables ``[1, S, 1, K]``."""
    cos, sin = (t[..., ::2].transpose(1, 2) for t in (cos, sin))
    even, odd = x_BNSK.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class SparseModel(torch.nn.Module):
    """diffusers' Wan with ``Sparse`` self-attention and gates of its own.

    Args:
        model: the dense one.
        gates: ``blocks.N.to_gate_compress.{weight,bias}``.
        grid: tokens of a sample.
        sparsity: of attention.
    """

    def __init__(
        self,
        model: WanTransformer3DModel,
        gates: Mapping[str, Tensor],
        grid: Sequence[int],
        sparsity: float,
    ) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.gates = {n: torch.nn.Parameter(g.clone()) for n, g in gates.items()}
        numbers = tiles([grid[0]], grid[1], grid[2])
        for i, block in enumerate(model.blocks):
            own = (self.gates[f"blocks.{i}.to_gate_compress.{k}"] for k in ("weight", "bias"))
            block.attn1.set_processor(Sparse(*own, numbers, sparsity))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        yield from self.model.named_parameters()
        yield from self.gates.items()


def make_gates(arch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    """Random gates."""
    size = arch["num_attention_heads"] * arch["attention_head_dim"]
    gates = {}
    for i in range(arch["num_layers"]):
        weight = torch.randn(size, size, generator=generator) / size**0.5
        gates[f"blocks.{i}.to_gate_compress.weight"] = weight
        gates[f"blocks.{i}.to_gate_compress.bias"] = torch.randn(size, generator=generator) * 0.5
    return gates


def add_to_directory(
    directory: Path, gates: Mapping[str, Tensor], vsa: Mapping[str, Any] | None = None
) -> None:
    """Gates beside a diffusers model's weights, and what its ``config.json`` says of them."""
    save_file({**load_file(directory / STEM), **gates}, directory / STEM)
    if vsa is not None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "_vsa": dict(vsa)}))
