"""AdamW with the state layout of TE's and Apex's FusedAdam, for every machine that has neither.

megatron-core's fallback to ``torch.optim.AdamW`` cannot resume under its distributed optimizer,
with or without a GPU: torch keeps ``step`` as a tensor in each parameter's state, FusedAdam as a
number in the param group, and only the second is handled throughout. With this class all machines
take the same optimizer and checkpoint code. Loshchilov and Hutter, "Decoupled Weight Decay
Regularization", Algorithm 2.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from megagen.parallel.cpu_platform import replace


class FusedAdam(torch.optim.Optimizer):
    """AdamW (or Adam) by torch's fused kernels, in place, without temporaries.

    Args:
        params: parameters or param groups.
        lr: learning rate.
        betas: decay of the first and second moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, or added to the gradient where ``adam_w_mode`` is False.
        adam_w_mode: AdamW rather than Adam.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        kernel = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            group["step"] = group.get("step", 0) + 1
            for p in params:
                if not self.state[p]:
                    self.state[p] = {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
            step = torch.full((), float(group["step"]), device=params[0].device)
            kernel(
                params,
                [_gradient(p) for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [step] * len(params),
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def _constant(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def install() -> bool:
    """Give megatron-core this FusedAdam where neither TE's nor Apex's is importable.

    Returns:
        Whether this class is in use.
    """
    optimizer = importlib.import_module("megatron.core.optimizer")
    if optimizer.Adam is FusedAdam:
        return True
    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return False
    for module, name, value in (
        ("optimizer", "Adam", FusedAdam),
        ("optimizer", "USING_PYTORCH_OPTIMIZER", False),
        ("optimizer.distrib_optimizer", "Adam", FusedAdam),
        ("optimizer.distrib_optimizer", "HAVE_APEX_OR_TE", True),
        ("optimizer.distrib_optimizer", "USING_APEX_OPTIMIZER", True),
    ):
        replace(module, name, _constant(value))
    return True
