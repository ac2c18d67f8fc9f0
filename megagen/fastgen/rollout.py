"""A few-step student run along its schedule: in training up to one rung, in sampling to the end.

A schedule ``t_list`` = [t_0, ..., t_{n-1}, 0] decreases from noise to data. A step turns x at t_k
into an estimate of x0 and noises that again to t_{k+1}: with fresh noise (``sde``: consistency
sampling, Song et al., arXiv 2303.01469, algorithm 1) or with the noise that the estimate implies
(``ode``: an Euler step of the flow).

The network is a function ``predict_x0(x_t, t) -> x0`` with ``x_t`` ``[B, ...]`` and ``t`` ``[B]``
float32, so the same code serves a module, a pipeline and a network spread over many processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megagen.fastgen.flow_matching import add_noise, x0_to_eps

__all__ = ["first_input", "next_input", "sample", "simulate"]

PredictX0 = Callable[[Tensor, Tensor], Tensor]
DrawNoise = Callable[[Tensor], Tensor]
"""(a tensor) -> standard normal noise like it."""


def first_input(noise: Tensor, t: float) -> Tensor:
    """``t * noise``: what a student sees at the head of its schedule, in noise's dtype."""
    return (noise.double() * float(t)).to(noise.dtype)


def next_input(
    x0: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor, sample_type: str, draw_noise: DrawNoise
) -> Tensor:
    """``x_t`` at the next rung.

    Args:
        x0: the estimate made from ``x_t``, ``[B, ...]``.
        x_t: like ``x0``.
        t: ``[B]``, where ``x_t`` stands.
        t_next: ``[B]``, the next rung.
        sample_type: ``sde`` or ``ode``.
        draw_noise: of ``sde``.

    Raises:
        ValueError: another ``sample_type``.
    """
    if sample_type == "ode":
        eps = x0_to_eps(x0, x_t, t)
    elif sample_type == "sde":
        eps = draw_noise(x_t)
    else:
        raise ValueError(f"student_sample_type must be 'sde' or 'ode', found {sample_type!r}")
    return add_noise(x0, eps, t_next)


@torch.no_grad()
def simulate(
    predict_x0: PredictX0,
    start: Tensor,
    t_list: Sequence[float],
    rung: int,
    sample_type: str,
    draw_noise: DrawNoise,
) -> Tensor:
    """The x0 that a student holds after its first ``rung`` steps (DMD2's backward simulation).

    Yin et al., arXiv 2405.14867, section 4.5: training inputs come from the student's own earlier
    steps, as they will in sampling.

    Args:
        predict_x0: the student.
        start: its input at ``t_list[0]``, ``[B, ...]``.
        t_list: decreasing, ending in 0.
        rung: steps to take, in 1..len(t_list) - 1.
        sample_type: ``sde`` or ``ode``.
        draw_noise: of ``sde``.

    Returns:
        x0 like ``start``, without a graph.

    Raises:
        ValueError: ``rung`` or ``sample_type`` is out of range.
    """
    if not 1 <= rung < len(t_list):
        raise ValueError(f"rung must be in 1..{len(t_list) - 1}, found {rung}")
    x_t = start
    for step in range(rung):
        t = _times(start, t_list[step])
        x0 = predict_x0(x_t, t)
        if step < rung - 1:
            t_next = _times(start, t_list[step + 1])
            x_t = next_input(x0, x_t, t, t_next, sample_type, draw_noise)
    return x0


def sample(
    predict_x0: PredictX0,
    noise: Tensor,
    t_list: Sequence[float],
    sample_type: str,
    draw_noise: DrawNoise,
) -> Tensor:
    """A sample of a few-step student: all steps of its schedule.

    Args:
        predict_x0: the student.
        noise: standard normal, ``[B, ...]``.
        t_list: decreasing in (0, 1], ending in 0.
        sample_type: ``sde`` or ``ode``.
        draw_noise: of ``sde``.

    Returns:
        x0 like ``noise``, without a graph.

    Raises:
        ValueError: ``t_list`` has no step or does not end in 0.
    """
    if len(t_list) < 2 or t_list[-1] != 0.0:
        raise ValueError(f"t_list needs at least one time and a final 0.0, found {list(t_list)}")
    start = first_input(noise, t_list[0])
    return simulate(predict_x0, start, t_list, len(t_list) - 1, sample_type, draw_noise)


def _times(like: Tensor, t: float) -> Tensor:
    return torch.full((like.shape[0],), float(t), device=like.device, dtype=torch.float32)
