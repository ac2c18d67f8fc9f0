"""The loop: steps, metrics, callbacks, checkpoints. It knows no algorithm and no layout."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
import torch.distributed as dist

import megagen
from megagen.callbacks.base import Callback
from megagen.checkpoint import commit, state
from megagen.checkpoint.adapters import check_reference
from megagen.config.load import to_yaml
from megagen.config.schema import RunConfig
from megagen.core import process
from megagen.core.errors import CheckpointError, MegagenError
from megagen.core.log import get_logger
from megagen.core.registry import target_of
from megagen.core.streams import Streams
from megagen.data.batch import Batch
from megagen.engine.role import Role
from megagen.methods.base import StepResult, TrainingMethod
from megagen.models.base import ModelPlugin, Passes
from megagen.parallel.mesh import Mesh
from megagen.throughput import Throughput
from megagen.tracking.tracker import Trackers

log = get_logger(__name__)


class BatchSource(Protocol):
    """Gives this data rank's micro-batches of a step, as a pure function of the step."""

    def step_batches(self, step: int) -> list[Batch]: ...


class TrainingDiverged(MegagenError):
    """Losses or gradients stayed non-finite for too many steps in a row."""


@dataclass
class Run:
    """Everything that a run consists of, built from its config.

    Args:
        config: the checked config.
        mesh: the run's data layout.
        streams: seeded streams.
        roles: networks by name.
        method: the algorithm.
        loader: micro-batches by step.
        callbacks: hooks by name.
    """

    config: RunConfig
    mesh: Mesh
    streams: Streams
    roles: Mapping[str, Role]
    method: TrainingMethod
    loader: BatchSource
    callbacks: Mapping[str, Callback]


class Trainer:
    """Runs a ``Run`` from its newest checkpoint, or from the start, to its last step.

    Args:
        run: what to train.
        make_trackers: called on rank 0 with the steps done so far.
        on_phase: fault-injection and test hook, called with a named point and the step.
    """

    def __init__(
        self,
        run: Run,
        make_trackers: Callable[[int], Trackers],
        on_phase: Callable[[str, int], None] | None = None,
    ) -> None:
        self.run_parts, self.config = run, run.config
        self.output_dir = Path(run.config.training.checkpoint.output_dir)
        self.step = 0
        self.trackers = Trackers([], [])
        self._make_trackers = make_trackers
        self._on_phase = on_phase or (lambda point, step: None)
        self._skipped_in_a_row = 0
        self._stop_requested = False
        self._saved_step = -1

    # -- the loop ----------------------------------------------------------------------------------
    def run(self) -> None:
        """Train. Returns after the last step, or after a requested stop (``STOPPED.json``).

        Raises:
            CheckpointError: the run folder cannot be resumed as the config says.
            TrainingDiverged: too many skipped steps in a row.
        """
        config = self.config.training
        self._prepare()
        self._listen_for_stop()
        self._resume()
        if process.is_main():
            self._write_run_yaml()
            self.trackers = self._make_trackers(self.step)
        throughput = Throughput(self._work(), process.device())
        self._begin_step()
        for callback in self.run_parts.callbacks.values():
            callback.on_train_start(self)
        stopped = False
        while self.step < config.loop.max_train_steps and not stopped:
            batches = self.run_parts.loader.step_batches(self.step)
            sparsity = self._begin_step()
            throughput.start(batches, sparsity)
            result = self.run_parts.method.train_step(batches, self.step)
            self._on_phase("after_update", self.step)
            self.step += 1
            metrics, stopped = self._reduce(result)
            metrics |= throughput.stop(self.run_parts.mesh.dp_size)
            metrics |= {f"vsa_sparsity/{name}": share for name, share in sparsity.items()}
            self._record(metrics)
            self._guard(result)
            for callback in self.run_parts.callbacks.values():
                callback.on_training_step_end(self, metrics)
            self._save_if_due(stopped)
        self._finish(stopped)

    def _prepare(self) -> None:
        """What the method does before the first step; a stop signal ends it, to be taken up."""
        self.run_parts.roles = self.run_parts.method.prepare()
        dist.all_reduce(torch.zeros((), device=process.device()))  # every rank is done

    def _work(self) -> dict[str, tuple[ModelPlugin, float]]:
        """Of each role, the student first: its model, and the forward passes a step amounts to."""
        parts = self.run_parts
        options = parts.method.options
        asked = parts.method.passes(options)
        names = ["student", *(name for name in parts.roles if name != "student")]
        return {
            name: (
                parts.roles[name].plugin,
                asked.get(name, Passes()).in_forwards(
                    is_adapted=parts.roles[name].settings.lora is not None
                ),
            )
            for name in names
        }

    def _begin_step(self) -> dict[str, float]:
        """Tell the roles the step; the sparsity of those whose attention is sparse."""
        for role in self.run_parts.roles.values():
            role.begin_step(self.step)
        found = {name: role.sparsity for name, role in self.run_parts.roles.items()}
        return {name: share for name, share in found.items() if share is not None}

    def _reduce(self, result: StepResult) -> tuple[dict[str, float], bool]:
        """Average losses over data ranks; agree whether anybody was asked to stop."""
        names = sorted(n for n in result.metrics if n.startswith("loss/"))
        values = [result.metrics[n] for n in names] + [float(self._stop_requested)]
        total = torch.tensor(values, dtype=torch.float64, device=process.device())
        dist.all_reduce(total)
        total /= process.world_size()
        averaged = dict(zip(names, total[:-1].tolist(), strict=True))
        rest = {k: v for k, v in result.metrics.items() if k not in averaged}
        return averaged | rest, bool(total[-1] > 0)

    def _record(self, metrics: Mapping[str, float]) -> None:
        self.trackers.log_metrics(metrics, self.step)
        loop = self.config.training.loop
        if self.step % loop.log_every_steps == 0 or self.step == loop.max_train_steps:
            shown = [k for k in metrics if k.startswith(("loss/", "grad_norm/", "lr/"))]
            shown.append("step_time_sec")
            text = "  ".join(f"{k} {metrics[k]:.5g}" for k in shown)
            log.info("step %d/%d  %s", self.step, loop.max_train_steps, text)

    def _guard(self, result: StepResult) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if result.skipped else 0
        if result.skipped:
            log.warning(
                "step %d: non-finite loss or gradient, update of %s skipped",
                self.step,
                ", ".join(result.skipped),
            )
        limit = self.config.training.loop.max_skipped_steps
        if self._skipped_in_a_row >= limit:
            raise TrainingDiverged(
                f"losses or gradients were not finite for {limit} steps in a row, up to step "
                f"{self.step}.",
                remedy="Lower the learning rate or resume from an earlier checkpoint.",
            )

    # -- stopping ------------------------------------------------------------------------------
    def _listen_for_stop(self) -> None:
        """SIGTERM and SIGUSR2 ask for a save at the next step boundary; the second one is final."""

        def request(signum: int, frame: FrameType | None) -> None:
            self._stop_requested = True
            signal.signal(signum, signal.SIG_DFL)

        try:
            for signum in (signal.SIGTERM, signal.SIGUSR2):
                signal.signal(signum, request)
        except ValueError:
            log.debug("not in the main thread: stop signals are not handled")

    def _finish(self, stopped: bool) -> None:
        checkpoint = self.config.training.checkpoint
        for callback in self.run_parts.callbacks.values():
            callback.on_train_end(self)
        if checkpoint.save_at_end or stopped:
            self.save()
        if process.is_main():
            marker = self.output_dir / "STOPPED.json"
            marker.unlink(missing_ok=True)
            if stopped and self.step < self.config.training.loop.max_train_steps:
                marker.write_text(json.dumps({"reason": "signal", "step": self.step}))
        self.trackers.close()

    # -- checkpoints -------------------------------------------------------------------------------
    @property
    def checkpoints_dir(self) -> Path:
        """``output_dir/checkpoints``."""
        return self.output_dir / "checkpoints"

    def _save_if_due(self, stopped: bool) -> None:
        every = self.config.training.checkpoint.training_state_checkpointing_steps
        if stopped or (every and self.step % every == 0):
            self.save()

    def save(self) -> None:
        """Write and commit a checkpoint of the current step, once."""
        if self._saved_step == self.step:
            return
        target = self.checkpoints_dir / commit.step_name(self.step)
        state.save(target, self._trainer_state(), self._stateful())
        self._saved_step = self.step
        if process.is_main():
            commit.prune(
                self.checkpoints_dir, self.config.training.checkpoint.checkpoints_total_limit
            )
        self._on_phase("after_save", self.step)
        log.info("saved %s", target)

    def _stateful(self) -> dict[str, state.Stateful]:
        """Roles, and what the method trains beside them."""
        return {**self.run_parts.roles, **self.run_parts.method.heads}

    def _trainer_state(self) -> state.TrainerState:
        return state.TrainerState(
            step=self.step,
            seed=self.config.training.seed,
            version=megagen.__version__,
            world_size=process.world_size(),
            config=self.config.model_dump(mode="json", by_alias=True),
            models={
                name: {"_target_": target_of(role.plugin), **role.plugin.portable_options()}
                for name, role in self.run_parts.roles.items()
            },
            adapters={
                name: role.adapter_reference
                for name, role in self.run_parts.roles.items()
                if role.adapter_reference is not None
            },
        )

    def _resume(self) -> None:
        chosen = agree_on_main(self._choose_checkpoint)
        if chosen is None:
            return
        directory = Path(chosen)
        trainer_state = state.read_trainer(directory, hashes=False)  # rank 0 has compared them
        if trainer_state.seed != self.config.training.seed:
            raise CheckpointError(
                f"was trained with seed {trainer_state.seed}, this run has training.seed "
                f"{self.config.training.seed}.",
                remedy="Keep the seed: noise and data order follow from it.",
                where=chosen,
            )
        self._check_optimizer(trainer_state, chosen)
        for name, role in self.run_parts.roles.items():
            if role.trainable:
                saved = trainer_state.adapters.get(name)
                check_reference(saved, role.adapter_reference, name, chosen)
        state.load(directory, self._stateful())
        self.step = self._saved_step = trainer_state.step
        log.info("resumed %s", directory)

    def _check_optimizer(self, saved: state.TrainerState, where: str) -> None:
        """Sharded and whole optimizer states are stored in different forms."""
        key = "use_distributed_optimizer"
        for name, role in self.run_parts.roles.items():
            models, training = (saved.config.get(part, {}) for part in ("models", "training"))
            of_run = training.get("distributed", {})
            was = (models.get(name, {}).get("distributed") or of_run).get(key)
            now = self.config.role_distributed(name).use_distributed_optimizer
            if role.trainable and was is not None and was != now:
                raise CheckpointError(
                    f"was written with {key}: {was} for {name}, this run has {now}.",
                    remedy=f"Resume with {key}: {was} in its distributed section.",
                    where=where,
                )

    def _choose_checkpoint(self) -> str | None:
        """The directory to resume from, verified; None for a fresh start. Rank 0 alone looks."""
        choice = self.config.training.checkpoint.resume_from_checkpoint
        self.checkpoints_dir.mkdir(parents=True, exist_ok=True)
        commit.recover(self.checkpoints_dir)
        if choice == "latest":
            found = commit.newest_valid(self.checkpoints_dir)
            return str(found) if found else None
        if choice:
            named = Path(choice) if Path(choice).is_dir() else self.checkpoints_dir / choice
            if not named.is_dir():
                raise CheckpointError(
                    f"no checkpoint {choice!r}.",
                    remedy=f"Give 'latest', or one of: {self._step_names()}.",
                    where="training.checkpoint.resume_from_checkpoint",
                )
            commit.verify(named)
            return str(named)
        if commit.steps(self.checkpoints_dir):
            raise CheckpointError(
                f"holds checkpoints already ({self._step_names()}), and resume_from_checkpoint "
                "is empty.",
                remedy="Choose another output_dir, or resume_from_checkpoint: latest.",
                where=str(self.output_dir),
            )
        return None

    def _step_names(self) -> str:
        return ", ".join(p.name for _, p in commit.steps(self.checkpoints_dir)) or "none there"

    def _write_run_yaml(self) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        (self.output_dir / "run.yaml").write_text(to_yaml(self.config))


def agree_on_main(look: Callable[[], Any]) -> Any:
    """Run ``look`` on rank 0 and give its result, or its error, to every rank."""
    outcome: list[Any] = [None, None]
    if process.is_main():
        try:
            outcome[0] = look()
        except MegagenError as error:
            outcome[1] = error
    if dist.is_initialized() and process.world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
