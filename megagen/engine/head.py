"""A small network beside the roles, whole on every rank: the heads of a discriminator.

Its inputs are the same on every rank of a data rank, so its gradients are; their mean over all
ranks is the mean over the data. Weights and moments are fp32 and equal on all ranks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagen.core import process
from megagen.engine.lr import learning_rate
from megagen.engine.optimizer import StepInfo, has_weight_decay
from megagen.engine.settings import OptimizerSettings
from megagen.parallel.fused_adam import FusedAdam

MOMENTS = ("exp_avg", "exp_avg_sq")


class Head:
    """A trained module with its AdamW, clip and learning rate.

    Args:
        name: prefix of its tensors in checkpoints.
        module: initialised, the same on every rank; moved to this rank's device.
        settings: of the optimizer.
    """

    trainable = True

    def __init__(self, name: str, module: nn.Module, settings: OptimizerSettings) -> None:
        self.name, self.settings, self.num_updates = name, settings, 0
        self.module = module.to(process.device(), torch.float32)
        decays: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for key, parameter in self.module.named_parameters():
            decays[has_weight_decay(parameter, key)].append(parameter)
        groups = [
            {"params": parameters, "weight_decay": settings.weight_decay * does}
            for does, parameters in decays.items()
            if parameters
        ]
        self._adam = FusedAdam(groups, lr=0.0, betas=settings.betas, eps=settings.eps)
        for parameter in self.module.parameters():  # a checkpoint may come before the first update
            self._adam.state[parameter] = {key: torch.zeros_like(parameter) for key in MOMENTS}

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self._adam.zero_grad()

    @torch.no_grad()
    def step(self) -> StepInfo:
        """Average the gradients over all ranks, clip, update; skipped where one is not finite.

        Collective over all ranks.
        """
        gradients = self._mean_gradients()
        norm = float(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])))
        rate = learning_rate(self.settings, self.num_updates)
        if not math.isfinite(norm):  # the same on every rank
            return StepInfo(norm, rate, skipped=True)
        limit = self.settings.max_grad_norm
        if 0 < limit < norm:
            torch._foreach_mul_(gradients, limit / (norm + 1e-6))
        for group in self._adam.param_groups:
            group["lr"], group["step"] = rate, self.num_updates
        self._adam.step()
        self.num_updates += 1
        return StepInfo(norm, rate, skipped=False)

    def _mean_gradients(self) -> list[Tensor]:
        parameters = list(self.module.parameters())
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= process.world_size()
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return gradients

    # -- state -------------------------------------------------------------------------------------
    def sharded_state(self, is_loading: bool = False) -> dict[str, Any]:
        """Weights, moments and schedule for megatron-core's ``dist_checkpointing``."""
        from megatron.core.dist_checkpointing import ShardedTensor

        def entry(key: str, tensor: Tensor) -> Any:
            replica = (0, 0, process.rank())
            return ShardedTensor.from_rank_offsets(f"{self.name}.{key}", tensor, replica_id=replica)

        return {
            "tensors": {
                key: entry(key, tensor.detach()) for key, tensor in self._tensors().items()
            },
            "num_updates": self.num_updates,
        }

    @torch.no_grad()
    def load_state(self, loaded: dict[str, Any]) -> None:
        """What ``sharded_state(is_loading=True)`` gave, filled."""
        for key, tensor in self._tensors().items():
            tensor.copy_(loaded["tensors"][key])
        self.num_updates = int(loaded["num_updates"])

    def _tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for key, parameter in self.module.named_parameters():
            found[key] = parameter
            found |= {f"{kind}.{key}": self._adam.state[parameter][kind] for kind in MOMENTS}
        return found
