"""What distillation losses share: the networks, how they are called, and the student's sampler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megagen.fastgen import rollout
from megagen.fastgen.config import DistillationConfig, DMDExtensions
from megagen.fastgen.draws import Draws
from megagen.fastgen.features import drain
from megagen.fastgen.network import first_tensor, from_x0, to_x0
from megagen.fastgen.timesteps import sample_timesteps

__all__ = ["DistillationPipeline"]


class DistillationPipeline:
    """References to a student and its teacher, with what every method asks of them.

    It is no module and owns nothing: optimizers, sharding, device placement and ``train()`` of the
    student are the caller's. The teacher is set to ``eval()`` and frozen.

    A network is called as ``model(hidden_states=x_t, timestep=t, encoder_hidden_states=...,
    **kwargs)`` with ``x_t`` ``[B, ...]`` and returns a tensor, a tuple or an object with
    ``.sample``; override ``_call_model`` for others.

    Args:
        student: the network that is distilled.
        teacher: the network that it learns from.
        config: prediction space, timesteps, schedule.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, config: DistillationConfig) -> None:
        self.student = student
        self.teacher = teacher.eval().requires_grad_(False)
        self.config = config

    # -- facts -------------------------------------------------------------------------------------
    @property
    def device(self) -> torch.device:
        """Device of the student's first parameter; the CPU where it has none."""
        first = next(self.student.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the student's first parameter; float32 where it has none."""
        first = next(self.student.parameters(), None)
        return torch.float32 if first is None else first.dtype

    @property
    def extensions(self) -> DMDExtensions:
        """The config's ``extensions``; all off where it has none."""
        return getattr(self.config, "extensions", None) or DMDExtensions()

    # -- draws -------------------------------------------------------------------------------------
    def sample_timesteps(
        self,
        n: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """``[n]`` training times in [0, 1], distributed as ``config.sample_t_cfg`` says.

        Args:
            n: how many, >= 0.
            device: where; None: the student's.
            dtype: in which they are drawn and returned.
            generator: of the draw; None: the device's default.

        Raises:
            ValueError: an unknown distribution, or a lognormal with ``p_std <= 0``.
        """
        return sample_timesteps(
            n,
            self.config.sample_t_cfg,
            device=device or self.device,
            dtype=dtype,
            generator=generator,
        )

    # -- sampling ----------------------------------------------------------------------------------
    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        model: nn.Module | None = None,
        t_list: list[float] | None = None,
        sample_type: str | None = None,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """Clean latents from noise in ``student_sample_steps`` steps of the student.

        ``sde`` noises each estimate anew (Song et al., arXiv 2303.01469, algorithm 1), ``ode``
        follows the flow (Euler).

        Args:
            noise: standard normal, ``[B, ...]``.
            encoder_hidden_states: conditioning, ``[B, L, D]``.
            model: another network than the student (its average, the teacher).
            t_list: schedule, decreasing in (0, 1] and ending in 0; None: the config's, for one step
                ``[max_t, 0]``.
            sample_type: ``sde`` or ``ode``; None: the config's.
            generator: of the noise between the steps of ``sde``.
            **model_kwargs: further arguments of the network.

        Returns:
            ``x0`` like ``noise``.

        Raises:
            ValueError: several steps and no ``t_list``, a ``t_list`` that does not end in 0, an
                unknown ``sample_type``.
        """
        network = model if model is not None else self.student

        def predict_x0(x_t: Tensor, t: Tensor) -> Tensor:
            x0 = self._predict_x0(network, x_t, t, encoder_hidden_states, **model_kwargs)
            drain(network)  # features are of no use here, and would pile up
            return x0

        return rollout.sample(
            predict_x0,
            noise,
            t_list if t_list is not None else self._schedule(),
            sample_type or self.config.student_sample_type,
            Draws(generator).normal,
        )

    def _schedule(self) -> list[float]:
        timing = self.config.sample_t_cfg
        if timing.t_list is not None:
            return timing.t_list
        if self.config.student_sample_steps == 1:
            return [timing.max_t, 0.0]
        raise ValueError(
            f"student_sample_steps is {self.config.student_sample_steps}, which needs "
            "sample_t_cfg.t_list: one time per step and a final 0.0"
        )

    # -- networks ----------------------------------------------------------------------------------
    def _call_model(
        self,
        model: nn.Module,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """The network's raw prediction ``[B, ...]`` at ``timestep`` in [0, 1].

        With ``config.num_train_timesteps`` N the network sees ``N t``, in hidden_states' dtype
        unless ``extensions.exact_timesteps``.

        Raises:
            TypeError: the network returned something unknown.
        """
        steps = self.config.num_train_timesteps
        if steps is not None:
            timestep = timestep * float(steps)
            if not self.extensions.exact_timesteps:
                timestep = timestep.to(hidden_states.dtype)
        call = {**model_kwargs, "hidden_states": hidden_states, "timestep": timestep}
        if encoder_hidden_states is not None:
            call["encoder_hidden_states"] = encoder_hidden_states
        return first_tensor(model(**call))

    def _predict_x0(
        self,
        model: nn.Module,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        native_pred_type: str | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """The network's x0; ``native_pred_type`` is what it predicts (the config's if None)."""
        raw = self._call_model(
            model, hidden_states, timestep, encoder_hidden_states, **model_kwargs
        )
        return self._raw_to_x0(
            raw, hidden_states, timestep, native_pred_type=native_pred_type or self.config.pred_type
        )

    def _raw_to_x0(self, raw: Tensor, x_t: Tensor, t: Tensor, *, native_pred_type: str) -> Tensor:
        return to_x0(raw, x_t, t, native_pred_type, consistent=self.extensions.consistent_v)

    def _x0_to_raw(self, x0: Tensor, x_t: Tensor, t: Tensor, *, target_pred_type: str) -> Tensor:
        return from_x0(x0, x_t, t, target_pred_type, consistent=self.extensions.consistent_v)

    def _convert_pred(
        self, raw: Tensor, x_t: Tensor, t: Tensor, *, from_pred_type: str, to_pred_type: str
    ) -> Tensor:
        if from_pred_type == to_pred_type:
            return raw
        x0 = self._raw_to_x0(raw, x_t, t, native_pred_type=from_pred_type)
        return self._x0_to_raw(x0, x_t, t, target_pred_type=to_pred_type)
