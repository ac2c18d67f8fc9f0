"""Passes of one network over its pipeline stages, on megatron-core's schedules.

``forward_backward`` runs no pipelining, 1F1B or interleaved 1F1B (Narayanan et al. 2021), by
layout; ``hold_forward`` and ``hold_backward`` run all forwards, then all backwards (GPipe), on
megatron-core's own steps, so that a loss may depend on what others say about the predictions.

The loss convention: the last stage holds the whole prediction on each CP rank, the loss is
multiplied by cp and divided by the number of micro-batches, and DDP divides by dp x cp.
Legend: B batch, C channels, T H W latent size, S tokens, D hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagen.core.errors import ConfigError
from megagen.models.base import BlockTap, ModelPlugin, Request
from megagen.parallel.mesh import Mesh

OnOutput = Callable[[Tensor, int], tuple[Tensor, Any]]
"""(raw prediction, micro-batch number) -> (loss, what to report)."""
TapFn = Callable[[int], BlockTap]
"""Micro-batch number -> what sees its blocks' outputs."""


def padded_tokens(num_tokens: int, mesh: Mesh) -> int:
    """Tokens after padding to equal shards over CP (and over TP under sequence parallelism)."""
    parts = mesh.dims.cp_size * (mesh.dims.tp_size if mesh.dims.sequence_parallel else 1)
    return -(-num_tokens // parts) * parts


@dataclass
class Held:
    """Micro-batches whose forward is done and whose backward is not.

    Args:
        inputs: what each one got from the stage before.
        outputs: what each one made: hidden states, on the last stage the raw prediction.
    """

    inputs: list[list[Tensor | None]]
    outputs: list[Tensor]


class Pipeline:
    """Runs a network's chunks, wrapped in DDP or not.

    Args:
        plugin: of the network.
        chunks: this rank's chunks in pipeline order.
        config: the network's own TransformerConfig.
        mesh: the network's layout.
    """

    def __init__(
        self, plugin: ModelPlugin, chunks: Sequence[nn.Module], config: Any, mesh: Mesh
    ) -> None:
        from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

        self.plugin, self.chunks, self.config, self.mesh = plugin, list(chunks), config, mesh
        self._p2p = P2PCommunicator(mesh.pg.pp, config)

    @property
    def is_interleaved(self) -> bool:
        """Whether each rank holds several chunks."""
        return self.mesh.dims.num_chunks > 1

    @property
    def has_prediction(self) -> bool:
        """Whether this rank holds the last chunk."""
        return self.mesh.is_last_stage

    def forward(
        self,
        requests: Sequence[Request],
        report: Callable[[Tensor, int], Any],
        tap: TapFn | None = None,
    ) -> list:
        """Forward only: ``report`` of each prediction, on the last stage; [] elsewhere."""
        padded = self.padded(requests)

        def on_output(index: int) -> Callable[..., Any]:
            number = min(index, len(requests) - 1)  # those put behind the end repeat the last
            return lambda output, non_loss_data=True: report(output, number)

        with torch.no_grad():
            found = self._run(padded, on_output, tap, forward_only=True, collect_non_loss_data=True)
        return found[: len(requests)]

    def forward_backward(
        self, requests: Sequence[Request], on_output: OnOutput, tap: TapFn | None = None
    ) -> list:
        """Forward and backward of each micro-batch; the reports, on the last stage; [] elsewhere.

        The gradient is that of the mean loss over ``requests``.
        """

        def loss_function(index: int) -> Callable[[Tensor], tuple[Tensor, Any]]:
            return lambda output: on_output(output, index)

        return self._run(requests, loss_function, tap, forward_only=False)

    def from_stage(self, tensors: list[Tensor], stage: int) -> None:
        """Replace ``tensors`` by those of a pipeline stage, in one message."""
        group = self.mesh.pg.pp
        if group.size() == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.broadcast(flat, src=dist.get_global_rank(group, stage), group=group)
        parts = flat.split([tensor.numel() for tensor in tensors])
        tensors[:] = [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]

    def padded(self, requests: Sequence[Request]) -> list[Request]:
        """The last request repeated until the interleaved schedule can take the list."""
        missing = -len(requests) % self.mesh.dims.pp_size if self.is_interleaved else 0
        return [*requests, *[requests[-1]] * missing]

    def check_divides(self, num_requests: int, name: str) -> None:
        """Raise ``ConfigError`` if the interleaved schedule cannot train on so many."""
        if self.is_interleaved and num_requests % self.mesh.dims.pp_size:
            raise ConfigError(
                f"{num_requests} micro-batches for {name!r} do not divide by pp_size "
                f"{self.mesh.dims.pp_size}, which the interleaved schedule needs.",
                remedy="Change training.data.global_batch_size, or drop virtual_pp_size.",
                where="training.data.global_batch_size",
            )

    def whole_gradient(self, leaf: Tensor) -> Tensor:
        """Of an input of all tokens; each rank has the gradient through its own: their sum.

        On stages that do not see the input it is zero.
        """
        gradient = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
        for group, is_shared in (
            (self.mesh.pg.cp, self.mesh.dims.cp_size > 1),
            (self.mesh.pg.tp, self.mesh.dims.sequence_parallel and self.mesh.dims.tp_size > 1),
        ):
            if is_shared:
                dist.all_reduce(gradient, group=group)
        return gradient

    def _run(
        self,
        requests: Sequence[Request],
        loss_function: Callable[[int], Callable[..., Any]],
        tap: TapFn | None,
        **options: Any,
    ) -> list:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        dims = self.mesh.dims
        run = get_forward_backward_func(
            dims.pp_size, dims.num_chunks if self.is_interleaved else None
        )

        def step(numbered: Iterator[tuple[int, Request]], chunk: nn.Module) -> Any:
            index, request = next(numbered)
            output = chunk(request) if tap is None else chunk(request, tap=tap(index))
            return output, loss_function(index)

        shapes = [self._shape(request) for request in requests]
        iterators = [enumerate(requests) for _ in self.chunks]
        with self._shapes_vary(len(set(shapes)) > 1):
            return run(
                forward_step_func=step,
                data_iterator=iterators,
                model=self.chunks,
                num_microbatches=len(requests),
                seq_length=shapes[0][0],
                micro_batch_size=shapes[0][1],
                p2p_communicator=self._p2p,
                pg_collection=self.mesh.pg,
                **options,
            )

    def _shape(self, request: Request) -> tuple[int, int]:
        """(padded tokens, batch)."""
        latents = request.latents_BCTHW
        return padded_tokens(self.plugin.num_tokens(latents.shape), self.mesh), latents.shape[0]

    @contextlib.contextmanager
    def _shapes_vary(self, vary: bool) -> Iterator[None]:
        """Have the stages tell each other the shape of every tensor for the duration."""
        self.config.variable_seq_lengths = vary
        try:
            yield
        finally:
            self.config.variable_seq_lengths = False

    # -- all forwards, then all backwards ----------------------------------------------------------
    def hold_forward(self, requests: Sequence[Request]) -> Held:
        """Forward of every micro-batch through this rank's one chunk, graphs kept."""
        from megatron.core.pipeline_parallel.schedules import forward_step

        assert not self.is_interleaved, "hold is for one chunk a rank"
        held = Held([], [])
        first, last = self.mesh.is_first_stage, self.mesh.is_last_stage
        for index, request in enumerate(requests):
            received = _as_list(self._p2p.recv_forward(self._tensor_shapes(request), first))
            outputs, _ = forward_step(
                lambda data, chunk: (chunk(next(data)), None),
                iter([request]),
                self.chunks[0],
                len(requests),
                received,
                [],
                self.config,
                self.mesh.dims.cp_size,
                current_microbatch=index,
                is_last_stage=last,
            )
            self._p2p.send_forward(outputs, last)
            held.inputs.append(received)
            held.outputs.append(outputs[0])
        return held

    def hold_backward(
        self, requests: Sequence[Request], held: Held, losses: Sequence[Tensor]
    ) -> None:
        """Backward of every held micro-batch; ``losses`` on the last stage, else empty.

        The gradient is that of the mean loss.
        """
        from megatron.core.pipeline_parallel.schedules import backward_step
        from megatron.core.utils import get_model_type

        first, last = self.mesh.is_first_stage, self.mesh.is_last_stage
        scale = self.mesh.dims.cp_size / len(requests)
        no_sync = self.config.no_sync_func or contextlib.nullcontext
        for index, request in enumerate(requests):
            output = [losses[index] * scale if last else held.outputs[index]]
            received = self._p2p.recv_backward(self._tensor_shapes(request), last)
            is_final = index == len(requests) - 1
            with contextlib.nullcontext() if is_final else no_sync():
                gradient = backward_step(
                    held.inputs[index],
                    output,
                    _as_list(received),
                    get_model_type(self.chunks[0]),
                    self.config,
                )
            self._p2p.send_backward(gradient, first)

    def _tensor_shapes(self, request: Request) -> list[tuple[int, int, int]]:
        dims, (tokens, batch) = self.mesh.dims, self._shape(request)
        parts = dims.cp_size * (dims.tp_size if dims.sequence_parallel else 1)
        return [(tokens // parts, batch, self.config.hidden_size)]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
