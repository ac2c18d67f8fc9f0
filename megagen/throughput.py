"""Time, tokens, FLOP/s and memory of a step."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence

import torch

from megagen.core import process
from megagen.data.batch import Batch
from megagen.models.base import ModelPlugin

PEAK_BF16_TFLOPS = {
    "A100": 312.0,
    "H100": 989.0,
    "H200": 989.0,
    "H800": 989.0,
    "B200": 2250.0,
    "GB200": 2500.0,
    "GB300": 2500.0,
}
"""Dense bf16 peak of a GPU by a part of its name, TFLOP/s, from the vendor's data sheets."""


class Throughput:
    """Measures one step after the other.

    FLOPs are the usual model-FLOPs count over the step's samples: a training pass is three forward
    passes, two where the weights themselves have no gradients (LoRA). Recomputation does not raise
    it. Where roles are not asked alike in every step, the average over steps counts.

    Args:
        work: of each role its model and the forward passes that a step amounts to; tokens are
            those of the first.
        device: this rank's device.
    """

    def __init__(self, work: Mapping[str, tuple[ModelPlugin, float]], device: torch.device) -> None:
        self._work, self._device = dict(work), device
        self._start = 0.0
        self._tokens, self._flops = 0, 0.0
        self._peak = _peak_tflops(device)

    def start(self, batches: Sequence[Batch], sparsity: Mapping[str, float] | None = None) -> None:
        """Begin a step.

        Args:
            batches: this data rank's micro-batches.
            sparsity: of the roles whose attention is sparse.
        """
        self._tokens, self._flops = 0, 0.0
        first, _ = next(iter(self._work.values()))
        for batch in batches:
            text = batch.condition.get("text_embeds_BLD")
            text_len = text.shape[1] if text is not None else 0
            count, shape = len(batch.positions), batch.latent_shape
            self._tokens += count * first.num_tokens(shape)
            for name, (plugin, passes) in self._work.items():
                share = (sparsity or {}).get(name)
                self._flops += passes * count * plugin.flops(shape, text_len, share)
        self._start = time.perf_counter()

    def stop(self, num_data_ranks: int) -> dict[str, float]:
        """End the step.

        Returns:
            ``step_time_sec``, ``tokens_per_sec`` (whole run), ``tflops_per_gpu``,
            ``max_memory_gb`` of this rank and, on a GPU whose peak is known, ``mfu`` in 0..1.
        """
        if self._device.type != "cpu":
            torch.get_device_module(self._device).synchronize()
        seconds = time.perf_counter() - self._start
        tflops = self._flops * num_data_ranks / process.world_size() / seconds / 1e12
        figures = {
            "step_time_sec": seconds,
            "tokens_per_sec": self._tokens * num_data_ranks / seconds,
            "tflops_per_gpu": tflops,
            "max_memory_gb": max_memory_bytes(self._device) / 1e9,
        }
        if self._peak:
            figures["mfu"] = tflops / self._peak
        return figures


def max_memory_bytes(device: torch.device) -> int:
    """Peak memory of this rank so far: allocated on the GPU, or resident on the CPU, in bytes."""
    if device.type != "cpu":
        return int(torch.get_device_module(device).max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _peak_tflops(device: torch.device) -> float | None:
    if device.type == "cpu":
        return None
    name = torch.get_device_module(device).get_device_name(device)
    matches = [k for k in PEAK_BF16_TFLOPS if k in name]
    return PEAK_BF16_TFLOPS[max(matches, key=len)] if matches else None
