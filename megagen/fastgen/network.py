"""Calling a transformer of diffusers' kind, and reading its prediction as x0.

The four prediction spaces under ``x_t = (1 - t) x0 + t eps``: ``x0``, ``eps``,
``flow`` = eps - x0, and ``v``, which the released losses read as ``flow`` wherever they invert it.
``consistent=True`` gives ``v`` its own meaning, ``(1 - t) eps - t x0`` (Salimans and Ho, arXiv
2202.00512), in both directions.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megagen.fastgen.flow_matching import (
    add_noise,
    pred_noise_to_pred_x0,
    pred_x0_from_flow,
    x0_to_eps,
    x0_to_flow,
)
from megagen.fastgen.utils import expand_like

__all__ = ["first_tensor", "from_x0", "to_x0"]


def first_tensor(output: Any) -> Tensor:
    """The prediction in what a transformer returned: a tensor, a tuple's first item, ``.sample``.

    Raises:
        TypeError: none of these.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple):
        return output[0]
    if hasattr(output, "sample"):
        return output.sample
    raise TypeError(
        f"a model returned {type(output).__name__}, which holds no prediction that is known: give "
        "a tensor, a tuple that begins with it or an object with .sample, or override _call_model"
    )


def to_x0(raw: Tensor, x_t: Tensor, t: Tensor, pred_type: str, *, consistent: bool) -> Tensor:
    """The x0 that a prediction implies.

    Args:
        raw: the prediction, ``[B, ...]``.
        x_t: the network's input, like ``raw``.
        t: ``[B]`` or per frame, in [0, 1].
        pred_type: ``x0``, ``eps``, ``flow`` or ``v``.
        consistent: read ``v`` as (1 - t) eps - t x0 rather than as ``flow``.

    Raises:
        ValueError: unknown ``pred_type``.
    """
    if pred_type == "x0":
        return raw
    if pred_type == "eps":
        return pred_noise_to_pred_x0(raw, x_t, t)
    if pred_type == "v" and consistent:
        time = expand_like(t, x_t).double()
        x0 = ((1 - time) * x_t.double() - time * raw.double()) / ((1 - time) ** 2 + time**2)
        return x0.to(x_t.dtype)
    if pred_type in ("flow", "v"):
        return pred_x0_from_flow(raw, x_t, t)
    raise ValueError(f"unknown pred_type {pred_type!r}; take 'x0', 'eps', 'flow' or 'v'")


def from_x0(x0: Tensor, x_t: Tensor, t: Tensor, pred_type: str, *, consistent: bool) -> Tensor:
    """The prediction that an x0 implies; the inverse of ``to_x0``, with its arguments.

    Raises:
        ValueError: unknown ``pred_type``.
    """
    if pred_type == "x0":
        return x0
    if pred_type == "eps":
        return x0_to_eps(x0, x_t, t)
    if pred_type == "v" and consistent:
        return add_noise(x0_to_eps(x0, x_t, t), -x0, t)
    if pred_type in ("flow", "v"):
        return x0_to_flow(x0, x_t, t)
    raise ValueError(f"unknown pred_type {pred_type!r}; take 'x0', 'eps', 'flow' or 'v'")
