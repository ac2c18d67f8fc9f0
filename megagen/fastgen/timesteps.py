"""Where on the path from data (t = 0) to noise (t = 1) a training step stands.

Uniform; logit-normal and shifted (Esser et al., arXiv 2403.03206, section 3.1 and eq. 23);
log-normal (Karras et al., arXiv 2206.00364, section 5), here cut off at both ends; a uniform choice
from a grid. B: batch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from megagen.fastgen.config import SampleTimestepConfig

_GRID_POINTS = 1000
_SMALLEST_LOG_ARGUMENT = 1e-12


class _Source:
    """Draws in ``dtype`` on the generator's device (without one: on ``device``), then moves."""

    def __init__(
        self, device: torch.device | str, dtype: torch.dtype, generator: torch.Generator | None
    ) -> None:
        self.device, self.dtype, self.generator = device, dtype, generator
        self.origin = device if generator is None else generator.device

    def uniform(self, n: int) -> Tensor:
        u = torch.rand(n, device=self.origin, dtype=self.dtype, generator=self.generator)
        return u.to(self.device)

    def normal(self, n: int) -> Tensor:
        z = torch.randn(n, device=self.origin, dtype=self.dtype, generator=self.generator)
        return z.to(self.device)

    def index(self, n: int, below: int) -> Tensor:
        i = torch.randint(0, below, (n,), device=self.origin, generator=self.generator)
        return i.to(self.device)


def _uniform(n: int, cfg: SampleTimestepConfig, source: _Source) -> Tensor:
    return source.uniform(n) * (cfg.max_t - cfg.min_t) + cfg.min_t


def _shifted(n: int, cfg: SampleTimestepConfig, source: _Source) -> Tensor:
    t = _uniform(n, cfg, source)
    return t * cfg.shift / (t * (cfg.shift - 1.0) + 1.0)


def _logitnormal(n: int, cfg: SampleTimestepConfig, source: _Source) -> Tensor:
    z = source.normal(n) * cfg.p_std + cfg.p_mean
    return torch.sigmoid(z) * (cfg.max_t - cfg.min_t) + cfg.min_t


def _lognormal(n: int, cfg: SampleTimestepConfig, source: _Source) -> Tensor:
    """Inversion of the normal CDF between the two cuts, which exactly truncates the normal.

    float64 and, without a generator, the CPU whatever the device: the tails need the digits.
    """
    origin = "cpu" if source.generator is None else source.origin
    wide = _Source(origin, torch.float64, source.generator)
    mean, std, low, high = (
        torch.tensor(value, dtype=torch.float64, device=origin)
        for value in (
            cfg.p_mean,
            cfg.p_std,
            math.log(max(cfg.min_t, _SMALLEST_LOG_ARGUMENT)),
            math.log(cfg.max_t),
        )
    )
    normal = torch.distributions.Normal(mean, std)
    below, above = normal.cdf(low), normal.cdf(high)
    t = normal.icdf(wide.uniform(n) * (above - below) + below).exp()
    return t.to(device=source.device, dtype=source.dtype)


def _polynomial(n: int, cfg: SampleTimestepConfig, source: _Source) -> Tensor:
    grid = torch.linspace(
        cfg.min_t, cfg.max_t, _GRID_POINTS, device=source.device, dtype=source.dtype
    )
    return grid[source.index(n, _GRID_POINTS)]


_DISTRIBUTIONS: dict[str, Callable[[int, SampleTimestepConfig, _Source], Tensor]] = {
    "uniform": _uniform,
    "shifted": _shifted,
    "logitnormal": _logitnormal,
    "lognormal": _lognormal,
    "polynomial": _polynomial,
}


def sample_timesteps(
    n: int,
    cfg: SampleTimestepConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``n`` independent training times, distributed as ``cfg.time_dist_type`` says.

    With ``m = min_t``, ``M = max_t``, ``u ~ U(0, 1)``, ``z ~ N(0, 1)``, and always clamped to
    ``[m, M]`` in the end:

    ============  ==============================================================================
    uniform       ``m + (M - m) u``
    shifted       ``s t' / (1 + (s - 1) t')`` with ``t'`` uniform; what the shift pushes past M
                  lies exactly at M (0.4 % for the defaults)
    logitnormal   ``m + (M - m) sigmoid(p_std z + p_mean)``
    lognormal     ``exp`` of a normal(p_mean, p_std) truncated to ``[log m, log M]``
    polynomial    one of 1000 points evenly spread over ``[m, M]``
    ============  ==============================================================================

    Args:
        n: how many, >= 0.
        cfg: the distribution and its bounds, ``0 <= m < M <= 1``.
        device: where the result lies.
        dtype: of the draws and the result. The bounds are rounded to it: in float32 the largest t
            of a maximum 0.999 is the float32 next to it, which is a little larger.
        generator: where the draws come from, on the generator's own device; None is torch's
            default generator of ``device`` (of the CPU for lognormal).

    Returns:
        ``[n]``.

    Raises:
        ValueError: an unknown distribution, or a lognormal with ``p_std <= 0``.
    """
    if cfg.time_dist_type not in _DISTRIBUTIONS:
        known = ", ".join(_DISTRIBUTIONS)
        raise ValueError(f"unknown time_dist_type {cfg.time_dist_type!r}: one of {known}")
    t = _DISTRIBUTIONS[cfg.time_dist_type](n, cfg, _Source(device, dtype, generator))
    return t.clamp(cfg.min_t, cfg.max_t)


def sample_from_t_list(
    n: int,
    t_list: Sequence[float],
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``n`` times, each picked uniformly and independently from ``t_list[:-1]``.

    The list is the schedule along which a few-step student samples; a time drawn from it trains
    the student at one of its own rungs. The final 0 is the data and nothing to be denoised.

    Args:
        n: how many, >= 0.
        t_list: at least two times, the last one 0.
        device: where the result lies.
        dtype: of the result.
        generator: where the draws come from, on the generator's own device; None is torch's
            default generator of ``device``.

    Returns:
        ``[n]``.

    Raises:
        AssertionError: a shorter list, or one that does not end in 0.
    """
    assert len(t_list) >= 2, f"t_list needs two times at least, found {t_list}"
    assert t_list[-1] == 0.0, f"t_list has to end in 0, found {t_list}"
    rungs = torch.tensor(t_list, device=device, dtype=dtype)
    return rungs[_Source(device, dtype, generator).index(n, len(t_list) - 1)]
