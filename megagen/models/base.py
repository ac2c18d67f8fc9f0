"""What the engine, the methods and the sampler know of a network.

Legend: B batch, C channels, T latent frames, H W latent height and width, S tokens, D hidden size.

Conventions of the whole project: velocity ``v = eps - x0``, ``sigma = t / 1000``,
``x_t = (1 - sigma) x0 + sigma eps``. What a checkpoint does otherwise (sign, timestep scale, extra
input channels, normalisation of latents) is undone in its plugin and nowhere else.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from megagen.core.errors import ConfigError
from megagen.core.options import StrictOptions
from megagen.core.vsa import VSAOptions
from megagen.models.cache import KVCache
from megagen.parallel.dims import ParallelDims


@dataclass(frozen=True)
class Request:
    """One micro-batch for one network, the same on every rank of its model-parallel group.

    Args:
        latents_BCTHW: the network's input ``x_t``, normalised latents.
        timestep: ``[B]``, per frame ``[B, T]`` or per token ``[B, S]``, in 0..1000, fp32.
        condition: named tensors whose first axis is B: ``text_embeds_BLD`` [B, L, text_dim] and
            what the family adds (``image_embeds_BLD``, ``condition_latents_BCTHW``...).
        extra: whatever a loss function wants beside (targets, weights); the engine does not read
            it.
        cache: what a causal network keeps of the frames before these, as ``Role.extend_cache``
            gave it; None: these frames are the first.
        sparsity: share of the tiles that sparse attention leaves out, set by the role from its
            schedule; None: what the schedule ends at.
    """

    latents_BCTHW: Tensor
    timestep: Tensor
    condition: Mapping[str, Tensor]
    extra: Mapping[str, Any] = field(default_factory=dict)
    cache: Any = None
    sparsity: float | None = None

    def with_(self, **changes: Any) -> Request:
        """A copy with some fields replaced."""
        return replace(self, **changes)


class BlockTap(Protocol):
    """Sees the outputs of a network's blocks during one pass."""

    def __call__(self, block: int, hidden_SBD: Tensor) -> None:
        """Called behind each block (counted from 0 over all stages) with this rank's tokens."""

    def is_over(self, block: int) -> bool:
        """Whether ``block`` and all behind it need not run; the head counts as a block."""


class Passes(NamedTuple):
    """Passes of each sample through a network in a step, on average over steps.

    Args:
        forward: without gradient.
        training: with it.
        cached: micro-batches of a data rank whose keys and values are held at once; at most all.
        is_scored: other networks are asked between a training pass's forward and its backward.
        by_block: a training pass is one block of frames, which continues a cache.
        video_frames: latent frames of the longest video that is made; None: a sample's.
    """

    forward: float = 0.0
    training: float = 0.0
    cached: float = 0.0
    is_scored: bool = False
    by_block: bool = False
    video_frames: int | None = None

    def in_forwards(self, *, is_adapted: bool) -> float:
        """The work in forward passes: a training pass is three, two where the base is frozen."""
        return self.forward + (2 if is_adapted else 3) * self.training


class Network(Protocol):
    """One pipeline chunk of a network: a ``MegatronModule`` with these members beside."""

    pre_process: bool
    post_process: bool

    def set_input_tensor(self, tensor: Any) -> None:
        """Megatron's schedule hands over the hidden states of the stage before."""

    def __call__(self, request: Request, tap: BlockTap | None = None) -> Tensor:
        """Hidden states ``[S_local, B, D]``, or on the last chunk the raw ``[B, C, T, H, W]``.

        Where ``tap`` says that the pass is over, the hidden states so far; never the very tensor
        that came from the stage before.

        The last chunk's prediction is whole: gathered over CP (and SP), differentiably, so that a
        loss sees the same tensor on every CP rank. Its backward gives each CP rank the gradient of
        its own tokens once.
        """


@dataclass(frozen=True)
class WeightSource:
    """Where one tensor of a chunk comes from in the diffusers layout.

    A local parameter is made of one or more named tensors of the checkpoint (``to_q``, ``to_k``,
    ``to_v`` make ``linear_qkv``). ``assemble`` maps the *shards* that this TP rank needs to the
    local parameter, ``split`` maps the *full* parameter back to the full named tensors.

    Args:
        names: diffusers names, in the order of ``assemble``'s arguments.
        shapes: their full shapes, in the same order.
        tp_dim: axis of the named tensors that TP cuts into equal parts, None where replicated.
        assemble: shards -> local parameter.
        split: full parameter (after gathering over TP along ``partition_dim``) -> full named
            tensors.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    tp_dim: int | None
    assemble: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]


class ModelPlugin(ABC):
    """A family of checkpoints: builds its network and speaks its conventions.

    One instance per role. It holds no weights and does no communication.
    """

    family: ClassVar[str]
    is_causal: ClassVar[bool] = False
    Options: ClassVar[type[StrictOptions]]

    # -- shape ---------------------------------------------------------------------------------
    num_layers: int
    num_heads: int
    hidden_size: int
    ffn_size: int
    flow_shift: float
    in_channels: int  # of the latents, not of the network's input
    out_channels: int
    vsa: VSAOptions | None = None  # sparse self-attention; None: dense

    @abstractmethod
    def check(self, dims: ParallelDims, where: str) -> None:
        """Raise ``ConfigError`` naming ``where`` if the network cannot be cut as ``dims`` says."""

    @abstractmethod
    def transformer_config(self, dims: ParallelDims, **overrides: Any) -> Any:
        """A fresh ``megatron.core`` ``TransformerConfig`` for this network under ``dims``.

        ``overrides`` are the role's: precision, recompute, ``transformer_impl``, fp8...
        """

    @abstractmethod
    def build_chunk(
        self,
        config: Any,
        pg: Any,
        *,
        layers: range,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
        attention_backend: str,
    ) -> nn.Module:
        """One pipeline chunk of ``layers`` (global, 0-based), uninitialised (see ``weights``)."""

    @abstractmethod
    def token_grid(self, latent_shape: Sequence[int]) -> tuple[int, int, int]:
        """Tokens along (frame, row, column) of latents ``[..., T, H, W]``."""

    def num_tokens(self, latent_shape: Sequence[int]) -> int:
        """Tokens S of latents ``[..., T, H, W]`` before any padding."""
        return math.prod(self.token_grid(latent_shape))

    def blocks(self, num_frames: int, start: int = 0) -> list[range]:
        """Frames ``start`` to ``start + num_frames`` cut into what is made together: here all."""
        return [range(start, start + num_frames)]

    # -- weights ---------------------------------------------------------------------------------
    @abstractmethod
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the diffusers checkpoint and its shape, in the order they are written."""

    def may_start_at_zero(self, name: str) -> bool:
        """Whether weights that hold none of such tensors give zeros for them; default: no."""
        return False

    @abstractmethod
    def weights(self, chunk: nn.Module) -> dict[str, WeightSource]:
        """For each parameter of ``chunk``, adapters' apart: its source in the diffusers layout."""

    @abstractmethod
    def weight_source(self, name: str) -> WeightSource:
        """The source of the parameter called ``name`` in any chunk of this network."""

    @abstractmethod
    def portable_options(self) -> dict[str, Any]:
        """Options that build an equal plugin with no file at hand (kept in checkpoints)."""

    @abstractmethod
    def diffusers_config(self) -> dict[str, Any]:
        """The ``config.json`` of the diffusers transformer directory."""

    @abstractmethod
    def initial_tensor(self, name: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """A freshly initialised diffusers tensor, by the rule of diffusers' own class."""

    # -- conventions -------------------------------------------------------------------------------
    def inputs(self, request: Request) -> Request:
        """The request as the network wants it (timestep, extra channels). Default: unchanged."""
        return request

    def velocity(self, prediction_BCTHW: Tensor, request: Request) -> Tensor:
        """The network's raw prediction as velocity ``eps - x0``. Default: unchanged."""
        return prediction_BCTHW

    @abstractmethod
    def normalize(self, latents_BCTHW: Tensor) -> Tensor:
        """Raw codec output to the latents the network was trained on."""

    @abstractmethod
    def denormalize(self, latents_BCTHW: Tensor) -> Tensor:
        """Inverse of ``normalize``."""

    def extended_cache(self, request: Request) -> KVCache:
        """``request.cache`` with what its record holds of the request's frames.

        Raises:
            ConfigError: the network is not causal.
        """
        raise ConfigError(
            f"a network of the family {self.family!r} sees all frames at once and keeps no cache.",
            remedy="Choose a causal one (wan_causal).",
        )

    @property
    def timestep_range(self) -> tuple[float, float]:
        """(low, high] of the timesteps that this network serves, in 0..1000 (experts: a part)."""
        return (0.0, 1000.0)

    # -- figures -------------------------------------------------------------------------------
    @abstractmethod
    def flops(
        self, latent_shape: Sequence[int], text_len: int, sparsity: float | None = None
    ) -> float:
        """Multiply-adds x 2 of one forward pass of one sample.

        Args:
            latent_shape: ``[..., T, H, W]``.
            text_len: text tokens.
            sparsity: of sparse attention; None: what its schedule ends at.
        """

    @abstractmethod
    def num_parameters(self) -> int:
        """Parameters of the whole network."""


TensorReader = Callable[[str, int | None, int, int], Tensor]
"""``read(name, tp_dim, part, num_parts)``: part ``part`` of ``num_parts`` along ``tp_dim``."""


class WeightStore(Protocol):
    """Named tensors that can be read shard by shard (a diffusers directory, an initialiser)."""

    def names(self) -> Iterator[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, dim: int | None, part: int, num_parts: int) -> Tensor: ...


WeightsPath = str | Path
