"""The exponential moving average of a network's weights, whole or sharded as the network is.

    theta_ema <- beta theta_ema + (1 - beta) theta

Polyak & Juditsky, "Acceleration of Stochastic Approximation by Averaging" (1992). The average is
elementwise, so that of a shard is the shard of the average, bit for bit: nothing has to be gathered
for it.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from megagen.fastgen.sharding import clean_name, copy_into, gather, is_sharded, local, reshard

if TYPE_CHECKING:
    from megagen.fastgen.config import EMAConfig

__all__ = ["ExponentialMovingAverage"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class IncompatibleKeys(NamedTuple):
    """What a state and an average do not have in common, as ``nn.Module.load_state_dict`` says."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class ExponentialMovingAverage:
    """The moving average ("shadow") of a module's parameters; its buffers are copied.

    With ``i`` the iteration, ``n`` the config's ``batch_size`` and its other fields by name:

    * ``constant``: ``beta = decay``;
    * ``power``: ``beta = (1 - 1 / max(i, 1))^(gamma + 1)`` (Karras et al.,
      arXiv 2312.02696, section 3.1);
    * ``halflife``: ``beta = 0.5^(n / max(h, 1e-8))`` with ``h = 1000 halflife_kimg``, at most
      ``i n rampup_ratio`` unless that is None (Karras et al., arXiv 2206.00364, appendix F).

    A shadow has its parameter's shape and device and the config's ``dtype`` (None: the
    parameter's); a buffer's keeps the buffer's dtype. Names are those of the module without
    ``_checkpoint_wrapped_module.``.

    A parameter that FSDP2 shards is gathered (one at a time) for a shadow of the whole on every
    rank with ``mode="full_tensor"``: every method that is given the model is then a collective.
    With ``mode="local_shard"`` a shadow is only this rank's shard and nothing communicates. With
    ``mode="full_tensor"`` and ``fsdp2=False`` shadows are DTensors, sharded too.

    Args:
        model: what to follow; not kept. The shadow starts as a copy of it.
        config: an ``EMAConfig``.

    Raises:
        ValueError: an unknown ``dtype`` in the config.

    Attributes:
        config: the config; its schedule is read at every update.
    """

    def __init__(self, model: nn.Module, config: EMAConfig) -> None:
        self.config = config
        self._gathers = config.mode == "full_tensor" and config.fsdp2
        self._gives_shards = config.mode != "full_tensor"
        self._iteration: int | None = None
        self._initialized = False
        reshard(model)
        dtype = _parse_dtype(config.dtype)
        with torch.no_grad():
            self._parameters = {
                clean_name(name): self._new_shadow(parameter, dtype)
                for name, parameter in model.named_parameters()
            }
            self._buffers = {
                clean_name(name): self._new_shadow(buffer, None)
                for name, buffer in model.named_buffers()
            }

    @property
    def iteration(self) -> int | None:
        """The last iteration given to ``update``, even one before ``start_iter``; None: none."""
        return self._iteration

    @property
    def initialized(self) -> bool:
        """Whether the next update averages; if not, it copies the live weights."""
        return self._initialized

    @torch.no_grad()
    def update(self, model: nn.Module, *, iteration: int) -> None:
        """``shadow <- shadow + (1 - beta) (live - shadow)``, live weights cast to shadow's dtype.

        Before ``start_iter`` nothing happens. At ``start_iter``, and at the first update of all,
        the live weights are copied. Buffers are always copied. Names unknown at construction are
        passed over. Live weights that already have the shadow's dtype are read where they are,
        others are cast a bounded piece at a time.

        Args:
            model: of the structure given at construction, and sharded as it was.
            iteration: ``i``, >= 0; the schedules expect to see it grow by one.

        Raises:
            ValueError: an unknown ``type`` in the config.
            RuntimeError: a parameter's shape (for ``local_shard``: its shard's) has changed.
        """
        self._iteration = iteration
        if iteration < self.config.start_iter:
            return
        reshard(model)
        if iteration == self.config.start_iter or not self._initialized:
            for shadow, live, name in self._pairs(model.named_parameters(), self._parameters):
                _copy(shadow, live, name)
            self._initialized = True
        else:
            average = _Average(1.0 - self._beta(iteration))
            for shadow, live, name in self._pairs(model.named_parameters(), self._parameters):
                _check_shape(shadow, live, name)
                average.add(shadow, live)
            average.finish()
        for shadow, live, name in self._pairs(model.named_buffers(), self._buffers):
            _copy(shadow, live, name)

    @torch.no_grad()
    def copy_to(self, target: nn.Module) -> None:
        """Write the average into ``target``, in the dtype and on the device of each parameter.

        The target may be plain or sharded, whatever the shadow is. Shards into an equally sharded
        module, and whole tensors into any, need no communication; shards into a plain module are
        gathered one parameter at a time, a collective of all their ranks. Names that only one side
        has are passed over.

        Args:
            target: a module of the structure that is followed, also that very module.

        Raises:
            RuntimeError: shapes differ.
        """
        reshard(target)
        for tensors, shadows in (
            (target.named_parameters(), self._parameters),
            (target.named_buffers(), self._buffers),
        ):
            for name, tensor in tensors:
                shadow = shadows.get(clean_name(name))
                if shadow is not None:
                    copy_into(tensor, shadow, name)

    @contextlib.contextmanager
    def swapped(
        self, model: nn.Module, *, device: torch.device | str | None = None
    ) -> Iterator[nn.Module]:
        """``model`` with the average for its weights as long as the context lasts.

        The live weights wait in a copy (one model in live dtypes; of a sharded model this rank's
        part) and are back bit for bit afterwards, also after an exception.

        Args:
            model: as for ``copy_to``.
            device: where the live weights wait; None: where they are.

        Yields:
            ``model``.

        Raises:
            RuntimeError: shapes differ.
        """
        reshard(model)
        with torch.no_grad():
            waiting = {
                name: local(tensor).to(device or tensor.device, copy=True)
                for name, tensor in _named_tensors(model)
            }
        try:
            self.copy_to(model)
            yield model
        finally:
            reshard(model)
            with torch.no_grad():
                for name, tensor in _named_tensors(model):
                    local(tensor).copy_(waiting.pop(name))

    @torch.no_grad()
    def state_dict(
        self,
        *,
        clone: bool = True,
        device: torch.device | str | None = None,
        as_dtensor: bool = False,
    ) -> dict[str, Tensor]:
        """The shadows of parameters and buffers by name, in one flat dict.

        Whole tensors with ``mode="full_tensor"``. With ``local_shard`` plain tensors of this rank's
        shards, to be saved rank by rank and loaded into the same sharding. ``as_dtensor`` gives
        those as DTensors instead: ``torch.distributed.checkpoint`` saves and loads them whatever
        the sharding, and ``full_tensor()`` of each makes them whole. The update's counter is in
        ``get_extra_state``.

        Args:
            clone: False returns the live shadows, which cost no memory but follow later updates:
                for what is saved at once, or loaded in place.
            device: where to put them, e.g. ``"cpu"``; None: where they are.
            as_dtensor: see above.
        """
        state: dict[str, Tensor] = {}
        for name, shadow in (*self._parameters.items(), *self._buffers.items()):
            given = local(shadow) if self._gives_shards and not as_dtensor else shadow
            state[name] = given.to(device or given.device, copy=clone)
        return state

    @torch.no_grad()
    def load_state_dict(
        self, state: Mapping[str, Tensor], strict: bool = False
    ) -> IncompatibleKeys:
        """Take over a saved average, in the dtypes and on the devices of the shadows.

        The next update averages (unless at ``start_iter``), it does not copy. A sharded shadow
        accepts this rank's shard, the whole tensor or a DTensor; a whole one the last two.

        Args:
            state: of ``state_dict``, in either mode.
            strict: raise where names differ; else only names both sides have are loaded.

        Returns:
            Names the state lacks (``missing_keys``), names only it has (``unexpected_keys``).

        Raises:
            RuntimeError: a shape that fits neither shard nor whole, or names that differ with
                ``strict``. Nothing has been loaded then.
        """
        shadows = {**self._parameters, **self._buffers}
        keys = IncompatibleKeys(
            [name for name in shadows if name not in state],
            [name for name in state if name not in shadows],
        )
        if strict and any(keys):
            raise RuntimeError(
                f"the average's state does not fit: missing {keys.missing_keys}, "
                f"unexpected {keys.unexpected_keys}."
            )
        known = {name: value for name, value in state.items() if name in shadows}
        for name, value in known.items():
            if value.shape not in (shadows[name].shape, local(shadows[name]).shape):
                _check_shape(shadows[name], value, name)
        for name, value in known.items():
            part = local(shadows[name])
            if value.shape == part.shape and not is_sharded(value):
                part.copy_(value)
            else:
                copy_into(shadows[name], value, name)
        self._initialized = True
        return keys

    def get_extra_state(self) -> dict[str, Any]:
        """What ``state_dict`` leaves out: ``iteration`` (int, None) and ``initialized`` (bool)."""
        return {"iteration": self._iteration, "initialized": self._initialized}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take over what ``get_extra_state`` returned; after ``load_state_dict``.

        Raises:
            KeyError: an entry is missing.
        """
        iteration, initialized = state["iteration"], state["initialized"]
        self._iteration = None if iteration is None else int(iteration)
        self._initialized = bool(initialized)

    def _beta(self, iteration: int) -> float:
        config = self.config
        if config.type == "constant":
            return config.decay
        if config.type == "power":
            return (1.0 - 1.0 / max(iteration, 1)) ** (config.gamma + 1.0)
        if config.type == "halflife":
            halflife = config.halflife_kimg * 1000.0
            if config.rampup_ratio is not None:
                halflife = min(halflife, iteration * config.batch_size * config.rampup_ratio)
            return 0.5 ** (config.batch_size / max(halflife, 1e-8))
        raise ValueError(f"unknown EMA type {config.type!r}")

    def _new_shadow(self, live: Tensor, dtype: torch.dtype | None) -> Tensor:
        """A copy of ``live`` that shares memory with nothing and holds on to no larger block."""
        read = gather(live.detach()) if self._gathers else live.detach()
        shadow = read.to(live.device, dtype or live.dtype)
        memory = local(shadow).untyped_storage()
        is_own = memory.data_ptr() != local(live).untyped_storage().data_ptr()
        if is_own and memory.nbytes() == local(shadow).nbytes:
            return shadow
        return shadow.clone()

    def _pairs(
        self, live: Iterator[tuple[str, Tensor]], shadows: dict[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor, str]]:
        """This rank's part of each shadow, what it averages, and the name."""
        for name, tensor in live:
            shadow = shadows.get(clean_name(name))
            if shadow is not None:
                read = gather(tensor) if self._gathers else local(tensor)
                yield local(shadow), read, name


class _Average:
    """``shadow += weight (live - shadow)`` of many pairs, in few calls and little memory.

    Live tensors of another dtype or device are cast a piece at a time, large enough to be few and
    small enough to stay in the CPU's cache between the cast and the average.
    """

    def __init__(self, weight: float) -> None:
        self._weight = weight
        self._pending: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]]
        self._pending = defaultdict(lambda: ([], []))
        self._num_elements = 0

    def add(self, shadow: Tensor, live: Tensor) -> None:
        key = (shadow.device, shadow.dtype, live.device, live.dtype)
        limit = 2**18 if shadow.device.type == "cpu" else 2**24
        is_cast = key[:2] != key[2:]
        if is_cast and shadow.numel() > limit and shadow.is_contiguous() and live.is_contiguous():
            shadows, lives = shadow.view(-1).split(limit), live.view(-1).split(limit)
        else:
            shadows, lives = (shadow,), (live,)
        for piece, source in zip(shadows, lives, strict=True):
            pending = self._pending[key]
            pending[0].append(piece)
            pending[1].append(source)
            self._num_elements += piece.numel()
            if self._num_elements >= limit:
                self.finish()

    def finish(self) -> None:
        for (device, dtype, *other), (shadows, lives) in self._pending.items():
            if other != [device, dtype]:
                casts = [torch.empty_like(shadow) for shadow in shadows]
                torch._foreach_copy_(casts, lives)
                lives = casts
            torch._foreach_lerp_(shadows, lives, self._weight)
        self._pending.clear()
        self._num_elements = 0


def _copy(shadow: Tensor, live: Tensor, name: str) -> None:
    _check_shape(shadow, live, name)
    shadow.copy_(live)


def _check_shape(shadow: Tensor, live: Tensor, name: str) -> None:
    if shadow.shape != live.shape:
        raise RuntimeError(
            f"{name}: the average has shape {tuple(shadow.shape)}, found {tuple(live.shape)}."
        )


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _parse_dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in _DTYPES:
        raise ValueError(f"unsupported EMA dtype {name!r}; allowed: {sorted(_DTYPES)} or None")
    return None if name is None else _DTYPES[name]
