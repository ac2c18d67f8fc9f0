"""One network under one parallel layout, and what an algorithm may ask of it.

Every verb takes the micro-batches of this rank's data rank and is collective over all ranks of the
run. Legend: B batch, C channels, T H W latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from megagen.checkpoint.fill import fill
from megagen.core.log import warn_once
from megagen.engine import build, features, lora, modes, state
from megagen.engine.delivery import Delivery
from megagen.engine.ema import EMA
from megagen.engine.features import FeatureLoss
from megagen.engine.kv_cache import CacheRef
from megagen.engine.optimizer import Optimizer, StepInfo
from megagen.engine.schedule import Pipeline
from megagen.engine.settings import EMASettings, OptimizerSettings, RoleSettings
from megagen.models.base import ModelPlugin, Request, WeightStore
from megagen.parallel.mesh import Mesh

__all__ = ["EMASettings", "FeatureLoss", "OptimizerSettings", "Role", "RoleSettings", "StepInfo"]

LossTerms = Mapping[str, Tensor]
"""Scalars; ``loss`` is what is differentiated, the mean over the micro-batch."""
LossFn = Callable[[Tensor, Request], LossTerms]
TargetLossFn = Callable[[Tensor, Request, Any], LossTerms]
TargetsFn = Callable[[list[Tensor]], Sequence[Any]]


class Role:
    """A network with its schedule and, where it is trainable, gradients, optimizer and average.

    Args:
        plugin: of the network.
        settings: what it was built from.
        mesh: its layout.
        chunks: this rank's pipeline chunks, unwrapped.
        config: its TransformerConfig.
        data_layout: which rank holds which requests.
    """

    def __init__(
        self,
        plugin: ModelPlugin,
        settings: RoleSettings,
        mesh: Mesh,
        chunks: Sequence[nn.Module],
        config: Any,
        data_layout: Mesh,
    ) -> None:
        self.plugin, self.settings, self.mesh = plugin, settings, mesh
        self.chunks, self.config = list(chunks), config
        self._is_finite, self._has_gradients = True, False
        self._ddp: list[Any] = []
        self.optimizer: Optimizer | None = None
        self.ema: EMA | None = None
        self.adapter_reference: Mapping[str, Any] | None = None  # what checkpoints say of the base
        if settings.trainable:
            self._make_trainable()
        else:
            for chunk in self.chunks:
                chunk.requires_grad_(False)
        self._pipeline = Pipeline(plugin, self._ddp or self.chunks, config, mesh)
        self._delivery = Delivery(data_layout, self._pipeline)
        self.begin_step(None)

    @staticmethod
    def build(
        plugin: ModelPlugin,
        settings: RoleSettings,
        *,
        data_layout: Mesh,
        store: WeightStore,
        adapters: WeightStore | None = None,
        base: Role | None = None,
    ) -> Role:
        """A role with the weights of ``store``. Collective over all ranks of the run.

        Args:
            plugin: of the network.
            settings: layout, precision, optimizer...
            data_layout: the run's layout, in which requests are given.
            store: where the weights come from.
            adapters: where those of ``settings.lora`` come from.
            base: role whose base weights this one uses instead of a copy of its own.

        Raises:
            ConfigError: the network cannot be cut as ``settings.dims`` says, or not as ``base`` is.
        """
        plugin.check(settings.dims, f"models.{settings.name}.distributed")
        mesh = Mesh.build(settings.dims)
        config = build.make_config(plugin, settings)
        lent = base.chunks if base is not None else None
        chunks = build.make_chunks(plugin, settings, config, mesh, lent)
        if lent is None:
            fill(plugin, chunks, mesh.pg.tp, store)
        if settings.lora is not None:
            assert adapters is not None, f"{settings.name} has adapters without a store of them"
            lora.fill_adapters(plugin, chunks, mesh.pg.tp, settings.lora, adapters)
        return Role(plugin, settings, mesh, chunks, config, data_layout)

    def _make_trainable(self) -> None:
        settings = self.settings
        assert settings.optimizer is not None, f"{settings.name} is trainable without an optimizer"
        if settings.lora is not None:
            lora.freeze_base(self.chunks)
        self._ddp = build.wrap_ddp(self.chunks, settings, self.config, self.mesh)
        self.optimizer = Optimizer(
            self._ddp,
            settings.optimizer,
            self.mesh,
            is_bf16=settings.precision == "bf16",
            overlap_param_gather=settings.overlap_param_gather,
        )
        if settings.ema is not None:
            self.ema = EMA(settings.ema, self.chunks, self.optimizer, self.mesh, self.sync_weights)

    # -- facts -------------------------------------------------------------------------------------
    @property
    def name(self) -> str:
        """The role's name."""
        return self.settings.name

    @property
    def trainable(self) -> bool:
        """Whether it has gradients and an optimizer."""
        return self.settings.trainable

    @property
    def num_updates(self) -> int:
        """Updates done so far, skipped ones not counted."""
        return self.optimizer.num_updates if self.optimizer is not None else 0

    @property
    def sparsity(self) -> float | None:
        """Of sparse attention in the passes to come; None: attention is dense by construction."""
        return self._delivery.sparsity

    def begin_step(self, step: int | None) -> None:
        """The passes to come belong to a step of the run; None: to what its schedules end at."""
        vsa = self.plugin.vsa
        self._delivery.sparsity = None if vsa is None else vsa.at(step)

    # -- passes without gradients of the weights ---------------------------------------------------
    def predict(self, requests: Sequence[Request]) -> list[Tensor]:
        """Velocities ``eps - x0``, fp32 ``[B, C, T, H, W]``, one per request, without gradient."""
        given = self._delivery.collect(requests)
        work = [self.plugin.inputs(request) for request in given]
        with modes.evaluating(self.chunks):
            found = self._pipeline.forward(work, lambda out, i: self._velocity(out, given[i]))
        return self._delivery.predictions(found, given, requests)

    def extend_cache(self, requests: Sequence[Request]) -> list[CacheRef]:
        """What a causal network keeps after each request's frames: its cache and theirs behind.

        Forward only, without gradient. A request without cache begins a video. The old caches stay
        as they are; see ``engine/kv_cache.py`` for a rollout.

        Raises:
            ConfigError: the network is not causal.
        """
        given = self._delivery.collect_recording(requests)
        work = [self.plugin.inputs(request) for request in given]
        with modes.evaluating(self.chunks):
            self._pipeline.forward(work, lambda out, i: None)
        found = [self.plugin.extended_cache(request) for request in given]
        return self._delivery.caches(found, requests)

    def features(self, requests: Sequence[Request], blocks: Sequence[int]) -> list[list[Tensor]]:
        """For each request the outputs of ``blocks``, sorted; what lies behind them is not run.

        Whole fp32 ``[B, D, T', H', W']`` on the token grid, without gradient, on every rank.

        Raises:
            ConfigError: no block is given, or one that the network does not have.
        """
        wanted = features.in_order(self.plugin, blocks)
        work = [self.plugin.inputs(request) for request in self._delivery.collect(requests)]
        with modes.evaluating(self.chunks):
            found = features.capture(self._pipeline, work, wanted)
        return self._delivery.features(found, requests)

    def input_gradient(
        self,
        requests: Sequence[Request],
        loss_fn: LossFn | None = None,
        *,
        feature_loss: FeatureLoss | None = None,
    ) -> list[Tensor]:
        """d loss / d ``latents_BCTHW`` through the network, in fp32; weights get no gradient.

        Args:
            requests: one micro-batch each.
            loss_fn: (velocity, request) -> terms, on the last stage; the latents that it sees in
                the request are constants. None: what lies behind the last block of
                ``feature_loss`` is not run.
            feature_loss: is added; its ``losses`` are filled.

        Raises:
            ConfigError: ``feature_loss`` names no block, or one that the network does not have.
        """
        assert loss_fn is not None or feature_loss is not None, "no loss"
        given = self._pipeline.padded(self._delivery.collect(requests))
        count = len(self._delivery.weights(len(requests)))
        leaves = [r.latents_BCTHW.detach().float().requires_grad_() for r in given]
        pairs = zip(given, leaves, strict=True)
        work = [self.plugin.inputs(r.with_(latents_BCTHW=leaf)) for r, leaf in pairs]
        # the schedule takes the mean over micro-batches and multiplies by cp
        scale = len(work) / self.mesh.dims.cp_size
        taps = features.loss_taps(
            feature_loss, self._pipeline, given[:count], stops=loss_fn is None
        )

        def on_output(output: Tensor, index: int) -> tuple[Tensor, None]:
            if loss_fn is None:
                return output[:0].float().sum(), None  # zero, and so is its gradient
            terms = loss_fn(self._velocity(output, given[index]), given[index])
            return terms["loss"] * scale, None

        with modes.frozen(self.chunks, self._ddp):
            self._pipeline.forward_backward(work, on_output, taps)
        if feature_loss is not None and taps is not None:
            feature_loss.losses = self._delivery.objects(taps.losses(), len(requests))
        return self._delivery.input_gradients(leaves[:count], requests)

    # -- training ----------------------------------------------------------------------------------
    def zero_grad(self) -> None:
        """Forget all gradients; before the first backward pass of an update."""
        assert self.optimizer is not None
        for chunk in self._ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._is_finite, self._has_gradients = True, False

    def forward_backward(
        self, requests: Sequence[Request], loss_fn: LossFn, *, more_to_come: bool = False
    ) -> list[dict[str, Tensor]]:
        """Add the gradient of the mean loss over all requests of the run.

        Args:
            requests: this data rank's micro-batches.
            loss_fn: (velocity, request) -> terms, on the last stage.
            more_to_come: another backward pass follows before ``step``.

        Returns:
            The terms of each request (detached fp32 scalars), on every rank.
        """
        return self._backward(requests, loss_fn, None, more_to_come)

    def forward_score_backward(
        self,
        requests: Sequence[Request],
        targets_fn: TargetsFn,
        loss_fn: TargetLossFn,
        *,
        more_to_come: bool = False,
    ) -> list[dict[str, Tensor]]:
        """Add the gradient of a loss whose targets depend on this role's own predictions.

        Args:
            requests: this data rank's micro-batches.
            targets_fn: predictions of ``requests`` (detached) -> one target each (tensors, or
                containers of them); runs on every rank and may ask other roles.
            loss_fn: (velocity, request, target) -> terms, on the last stage.
            more_to_come: another backward pass follows before ``step``.

        Returns:
            The terms of each request (detached fp32 scalars), on every rank.
        """
        if self.settings.score_schedule == "hold" and not self._pipeline.is_interleaved:
            return self._hold(requests, targets_fn, loss_fn, more_to_come)
        if self.settings.score_schedule == "hold":
            warn_once(__name__, f"{self.name}: virtual stages cannot hold; forwards are replayed")
        targets = self._delivery.collect_targets(list(targets_fn(self.predict(requests))))
        return self._backward(requests, loss_fn, targets, more_to_come)

    def step(self) -> StepInfo:
        """Reduce the gradients, clip, update weights and average.

        A non-finite loss or gradient on any rank skips the update everywhere: weights, moments,
        schedule and average stay as they are.
        """
        from megatron.core.distributed import finalize_model_grads

        assert self.optimizer is not None and self._has_gradients, "step without a backward pass"
        finalize_model_grads(self._ddp, None, pg_collection=self.mesh.pg)
        info = self.optimizer.step(self._is_finite)
        if not info.skipped and self.ema is not None:
            self.ema.update()
        self._has_gradients = False
        return info

    # -- weights and state -------------------------------------------------------------------------
    def sync_weights(self) -> None:
        """Make the parameters of ``chunks`` current; before reading them from outside."""
        if self.settings.overlap_param_gather:
            for chunk in self._ddp:
                chunk.start_param_sync(force_sync=True)

    def reload_weights(self) -> None:
        """Take the parameters of ``chunks`` as they are now; after setting them from outside."""
        if self.optimizer is not None:
            self.optimizer.reload_weights()
        if self.ema is not None:
            self.ema.reset()

    def sharded_state(self, is_loading: bool = False) -> dict[str, Any]:
        """Weights, optimizer, schedule and average for megatron-core's ``dist_checkpointing``."""
        self.sync_weights()
        return state.sharded_state(self, is_loading=is_loading)

    def load_state(self, loaded: dict[str, Any]) -> None:
        """What ``sharded_state(is_loading=True)`` gave, filled by ``dist_checkpointing.load``."""
        state.load_state(self, loaded)

    # -- parts of the verbs ------------------------------------------------------------------------
    def _backward(
        self,
        requests: Sequence[Request],
        loss_fn: Callable[..., LossTerms],
        targets: Sequence[Any] | None,
        more_to_come: bool,
    ) -> list[dict[str, Tensor]]:
        given = self._delivery.collect(requests)
        self._pipeline.check_divides(len(given), self.name)
        weights = self._delivery.weights(len(requests))

        def on_output(output: Tensor, index: int) -> tuple[Tensor, dict[str, float]]:
            extra = () if targets is None else (targets[index],)
            terms = loss_fn(self._velocity(output, given[index]), given[index], *extra)
            return terms["loss"] * weights[index], _floats(terms)

        work = self._work(given)
        with modes.no_sync(self._ddp, self.config, active=more_to_come):
            reports = self._pipeline.forward_backward(work, on_output)
        return self._report(reports, len(requests))

    def _hold(
        self,
        requests: Sequence[Request],
        targets_fn: TargetsFn,
        loss_fn: TargetLossFn,
        more_to_come: bool,
    ) -> list[dict[str, Tensor]]:
        given = self._delivery.collect(requests)
        work = self._work(given)
        weights = self._delivery.weights(len(requests))
        with modes.no_sync(self._ddp, self.config, active=more_to_come):
            held = self._pipeline.hold_forward(work)
            velocities: list[Tensor] = []
            if self._pipeline.has_prediction:
                outputs = zip(held.outputs, given, strict=True)
                velocities = [self._velocity(output, request) for output, request in outputs]
            found = [velocity.detach() for velocity in velocities]
            predictions = self._delivery.predictions(found, given, requests)
            targets = self._delivery.collect_targets(list(targets_fn(predictions)))
            losses, reports = [], []
            for index, velocity in enumerate(velocities):
                terms = loss_fn(velocity, given[index], targets[index])
                losses.append(terms["loss"] * weights[index])
                reports.append(_floats(terms))
            self._pipeline.hold_backward(work, held, losses)
        return self._report(reports, len(requests))

    def _work(self, given: Sequence[Request]) -> list[Request]:
        """The network's inputs of a pass with gradients.

        Above a frozen embedding nothing would ask for one, and recomputed blocks and stages without
        an adapter would build no graph: the latents ask.
        """
        if self.settings.lora is not None:
            leaves = [request.latents_BCTHW.detach().requires_grad_() for request in given]
            pairs = zip(given, leaves, strict=True)
            given = [request.with_(latents_BCTHW=leaf) for request, leaf in pairs]
        return [self.plugin.inputs(request) for request in given]

    def _velocity(self, output: Tensor, request: Request) -> Tensor:
        return self.plugin.velocity(output.float(), request)

    def _report(
        self, reports: Sequence[dict[str, float]], num_requests: int
    ) -> list[dict[str, Tensor]]:
        """The last stage's terms on every rank; remembers whether all were finite."""
        self._has_gradients = True
        terms, is_finite = self._delivery.terms(reports, num_requests)
        self._is_finite &= is_finite
        return terms


def _floats(terms: LossTerms) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in terms.items()}
