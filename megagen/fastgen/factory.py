"""The fake score of distribution matching: a trainable network that starts as the teacher.

Yin et al., "One-step Diffusion with Distribution Matching Distillation" (arXiv 2311.18828,
section 3.2). A teacher that fits into memory twice is copied by ``create_fake_score``; a larger
one is not:

    fake_score = create_fake_score_meta(teacher)              # no memory for parameters yet
    for block in fake_score.blocks:
        fully_shard(block)
    fully_shard(fake_score)
    load_fake_score_weights(fake_score, teacher)              # each rank fills its shards
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakTensorKeyDictionary

from megagen.fastgen.sharding import is_sharded
from megagen.fastgen.transfer import load_weights, plain_name

__all__ = ["create_fake_score", "create_fake_score_meta", "load_fake_score_weights"]

Module = TypeVar("Module", bound=nn.Module)


def create_fake_score(teacher: Module, *, deep_copy: bool = True) -> Module:
    """A copy of ``teacher`` in training mode, all of its parameters requiring a gradient.

    Args:
        teacher: with its weights loaded.
        deep_copy: False returns the very teacher, unfrozen: for callers who hold another teacher.

    Raises:
        RuntimeError: a deep copy of a module that FSDP wraps: any of its modules has FSDP1's
            ``_fsdp_wrapped_module``, or any parameter is a DTensor. Their copies would share hooks
            and shards with the teacher; use ``create_fake_score_meta``.
    """
    if deep_copy and _is_wrapped(teacher):
        raise RuntimeError(
            "create_fake_score cannot deep-copy a teacher that FSDP has wrapped. Use "
            "create_fake_score_meta, shard the result, then load_fake_score_weights."
        )
    return _trainable(copy.deepcopy(teacher) if deep_copy else teacher)


def create_fake_score_meta(
    build: Callable[[], nn.Module] | nn.Module,
    *,
    teacher_state: nn.Module | Mapping[str, Tensor] | None = None,
    shard: Callable[[nn.Module], object] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    from_rank0: bool = False,
) -> nn.Module:
    """A fake score whose parameters take no memory until it has been sharded.

    Parameters are made on the meta device. Buffers and plain tensors (tables of rotations, say)
    are computed on the CPU as always, so that those no checkpoint has are right. Torch's random
    state is left as it was.

    Args:
        build: a constructor without arguments; or the teacher, sharded or not, whose class is
            built anew from its ``config`` (diffusers, transformers). What was changed in the
            teacher after its construction is not repeated, its parameters' dtypes excepted.
        teacher_state: the weights, as for ``load_fake_score_weights``. None: the caller loads
            them, after sharding.
        shard: called with the module before the weights are loaded, e.g. applies ``fully_shard``.
        dtype: of the parameters; None: those of the teacher given as ``build`` or
            ``teacher_state``, else as constructed. Give float32 to train a bf16 teacher's copy
            under FSDP2's mixed precision.
        device: where to put what ``load_fake_score_weights`` makes.
        from_rank0: as for ``load_fake_score_weights``.

    Returns:
        The module, in training mode, all parameters requiring a gradient: on the meta device
        (buffers aside) without ``teacher_state``, else with the teacher's weights.

    Raises:
        TypeError: ``build`` is a module without a ``config`` to build it from.
        RuntimeError: the weights do not fit.
    """
    with _parameters_on_meta():
        fake_score = _from_config(build) if isinstance(build, nn.Module) else build()
    teachers = (build, None if from_rank0 else teacher_state)
    like = next((teacher for teacher in teachers if isinstance(teacher, nn.Module)), None)
    _set_dtypes(fake_score, dtype, like)
    _trainable(fake_score)
    if shard is not None:
        shard(fake_score)
    if teacher_state is not None:
        load_fake_score_weights(fake_score, teacher_state, device=device, from_rank0=from_rank0)
    return fake_score


def load_fake_score_weights(
    fake_score: nn.Module,
    teacher: nn.Module | Mapping[str, Tensor],
    *,
    strict: bool = True,
    device: torch.device | str | None = None,
    from_rank0: bool = False,
) -> nn.Module:
    """Give ``fake_score`` the teacher's weights and buffers, one tensor at a time.

    What is on the meta device is materialised first. Values are cast to the fake score's dtypes.
    Where both are sharded alike, every rank copies its own shards; a teacher sharded otherwise is
    resharded or gathered, one parameter at a time; of whole tensors every rank cuts out its part.

    Args:
        fake_score: plain or sharded by FSDP2, with parameters on the meta device or not.
        teacher: the module, plain or sharded by FSDP2; or its state dict with whole tensors or
            DTensors. A mapping is asked for one entry after another, so it may read them from disk.
            Prefixes of activation checkpointing and torch.compile in names do not matter.
        strict: raise on names that only one of them has; else the fake score keeps the values it
            has, and only what would be left without any raises. Buffers that no state dict holds
            (``persistent=False``) may always be lacking.
        device: where to materialise; None: the mesh's device for shards (FSDP2's
            ``CPUOffloadPolicy`` needs ``"cpu"``), else the teacher's.
        from_rank0: only global rank 0 reads ``teacher``, whole tensors, and sends them to all;
            what the others give as ``teacher`` (e.g. ``{}``) is ignored.

    Returns:
        ``fake_score``.

    Raises:
        RuntimeError: names differ (see ``strict``), nothing has been loaded then; or shapes differ.
        ValueError: ``from_rank0`` and rank 0's teacher is sharded.
    """
    load_weights(fake_score, teacher, strict=strict, device=device, from_rank0=from_rank0)
    return fake_score


def _is_wrapped(module: nn.Module) -> bool:
    return any(hasattr(part, "_fsdp_wrapped_module") for part in module.modules()) or any(
        is_sharded(parameter) for parameter in module.parameters()
    )


def _trainable(module: Module) -> Module:
    module.train()
    module.requires_grad_(True)
    return module


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters go to the meta device the moment a module takes them, before they are filled.

    Under ``torch.device("meta")`` buffers and plain tensor attributes would lose their values too.
    """
    moved: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def hook(_module: nn.Module, _name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter.is_meta or nn.parameter.is_lazy(parameter):
            return None
        if parameter not in moved:  # a shared one stays shared
            empty = torch.empty_like(parameter, device="meta")
            moved[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        return moved[parameter]

    handle = register_module_parameter_registration_hook(hook)  # type: ignore[arg-type]
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            yield
    finally:
        handle.remove()


def _from_config(teacher: nn.Module) -> nn.Module:
    teacher = getattr(teacher, "_orig_mod", teacher)  # torch.compile
    config = getattr(teacher, "config", None)
    if config is None:
        raise TypeError(
            f"{type(teacher).__name__} has no config to build a fake score from; give "
            "create_fake_score_meta a function that constructs one"
        )
    kind = type(teacher)
    if any(is_sharded(parameter) for parameter in teacher.parameters()):
        from torch.distributed.fsdp import FSDPModule  # fully_shard derives a class from both

        kind = next(base for base in kind.__mro__ if not issubclass(base, FSDPModule))
    if hasattr(kind, "from_config"):
        return kind.from_config(config)
    return kind(copy.deepcopy(config))


def _set_dtypes(module: nn.Module, dtype: torch.dtype | None, like: nn.Module | None) -> None:
    named = [] if like is None else like.named_parameters(remove_duplicate=False)
    given = {plain_name(name): parameter.dtype for name, parameter in named}
    for name, parameter in module.named_parameters():
        wanted = dtype or given.get(name, parameter.dtype)
        if parameter.is_floating_point() and wanted.is_floating_point:
            parameter.data = parameter.data.to(wanted)
