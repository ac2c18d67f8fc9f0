"""Learning-rate schedules as pure functions of the number of updates done.

With s updates done, w of warm-up, N in all and progress p = (s - w) / (N - w), the rate is the
peak times: ``linear`` 1 - p; ``cosine`` (1 + cos(pi p)) / 2; ``cosine_with_restarts`` (n cycles)
(1 + cos(pi ((n p) mod 1))) / 2, 0 from p = 1 on; ``cosine_with_min_lr`` the larger of the cosine
and the floor; ``polynomial`` (e + (1 - e) (1 - p)^k) with e = end / peak. While s < w it is s /
w, for every schedule but ``constant`` and ``piecewise_constant``. These are diffusers' schedules.
"""

from __future__ import annotations

import math

from megagen.core.errors import ConfigError
from megagen.engine.settings import OptimizerSettings


def learning_rate(settings: OptimizerSettings, num_updates: int) -> float:
    """The rate of the update that follows ``num_updates`` others."""
    return settings.learning_rate * factor(settings, num_updates)


def factor(settings: OptimizerSettings, num_updates: int) -> float:
    """The rate as a multiple of the peak."""
    kind, warmup = settings.lr_scheduler, settings.lr_warmup_steps
    if kind == "constant":
        return 1.0
    if kind == "piecewise_constant":
        return _piecewise(settings.lr_step_rules, num_updates)
    if num_updates < warmup:
        return num_updates / warmup
    if kind == "constant_with_warmup":
        return 1.0
    progress = (num_updates - warmup) / max(1, settings.total_steps - warmup)
    return _decay(settings, min(progress, 1.0))


def _decay(settings: OptimizerSettings, progress: float) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    if settings.lr_scheduler == "linear":
        return 1 - progress
    if settings.lr_scheduler == "cosine":
        return cosine
    if settings.lr_scheduler == "cosine_with_min_lr":
        return max(settings.min_lr_ratio, cosine)
    if settings.lr_scheduler == "cosine_with_restarts":
        if progress >= 1:
            return 0.0
        return 0.5 * (1 + math.cos(math.pi * ((settings.lr_num_cycles * progress) % 1)))
    end = settings.lr_end / settings.learning_rate
    return end + (1 - end) * (1 - progress) ** settings.lr_power


def _piecewise(rules: str, num_updates: int) -> float:
    """``"1:10,0.1:20,0.01"``: x1 before update 10, x0.1 before update 20, then x0.01."""
    *steps, last = parse_step_rules(rules)
    for value, until in steps:
        if until is not None and num_updates < until:
            return value
    return last[0]


def parse_step_rules(rules: str) -> list[tuple[float, int | None]]:
    """``(factor, first update it does not hold for)`` of each rule; the last holds for ever.

    Raises:
        ConfigError: the text is no list of ``factor:update`` that ends with a factor.
    """
    *head, last = rules.split(",")
    try:
        parsed: list[tuple[float, int | None]] = []
        for rule in head:
            value, until = rule.split(":")
            parsed.append((float(value), int(until)))
        return [*parsed, (float(last), None)]
    except ValueError:
        raise ConfigError(
            f"found {rules!r}.",
            remedy="Write factor:update,...,factor, as in 1:10,0.1:20,0.01.",
            where="training.optimizer.lr_step_rules",
        ) from None
