"""The keys of a run config, with their defaults and ranges.

Names follow FastVideo's where it has one. Each component's own options sit in its class
(``FineTuneMethod.Options``, ``WanModel.Options``, ``ValidationCallback.Options``...): the sections
``models.<role>``, ``method`` and ``callbacks.<name>`` here keep what is theirs for them to check.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from megagen.config.lora import LoraOptions
from megagen.core.options import Betas, StrictOptions
from megagen.core.vsa import VSAOptions
from megagen.data.options import DataOptions
from megagen.parallel.dims import CPCommType, ParallelDims

Precision = Literal["fp32", "bf16"]
Recompute = Literal["none", "selective", "full"]
LRScheduler = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "piecewise_constant",
]


class DistributedOptions(StrictOptions):
    """``training.distributed`` and ``models.<role>.distributed``: one layout over the run's ranks.

    Attributes:
        tp_size: tensor-parallel ranks.
        cp_size: context-parallel ranks.
        pp_size: pipeline stages.
        virtual_pp_size: chunks per stage (interleaved schedule).
        sequence_parallel: Megatron sequence parallelism; needs tp_size > 1.
        cp_comm_type: a2a (Ulysses), all_gather, p2p (ring) or a2a+p2p.
        cp_a2a_size: Ulysses degree of a2a+p2p.
        pipeline_layers: layers of each (virtual) stage, for an uneven split.
        use_distributed_optimizer: shard optimizer states over data-parallel ranks (ZeRO-1).
        overlap_grad_reduce: reduce gradient buckets during the backward pass.
        overlap_param_gather: gather updated parameters during the next forward pass.
        grad_reduce_in_fp32: accumulate and reduce gradients in fp32.
        num_gpus: FastVideo's key; where given, it must equal the number of ranks started.
        timeout_minutes: limit of one collective.
    """

    tp_size: int = Field(1, ge=1)
    cp_size: int = Field(1, ge=1)
    pp_size: int = Field(1, ge=1)
    virtual_pp_size: int | None = Field(None, ge=1)
    sequence_parallel: bool = False
    cp_comm_type: CPCommType = "a2a"
    cp_a2a_size: int | None = Field(None, ge=1)
    pipeline_layers: tuple[int, ...] | None = None
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    grad_reduce_in_fp32: bool = True
    num_gpus: int | None = Field(None, ge=1)
    timeout_minutes: float = Field(10.0, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> DistributedOptions:
        if self.sequence_parallel and self.tp_size == 1:
            raise ValueError(
                "sequence_parallel shards over TP ranks: set tp_size > 1, or turn it off"
            )
        if (self.virtual_pp_size or 1) > 1 and self.pp_size == 1:
            raise ValueError("virtual_pp_size needs pp_size > 1")
        if self.overlap_param_gather and not (
            self.use_distributed_optimizer and self.overlap_grad_reduce
        ):
            raise ValueError(
                "overlap_param_gather needs use_distributed_optimizer and overlap_grad_reduce"
            )
        if self.cp_comm_type == "a2a+p2p" and self.cp_size % (self.cp_a2a_size or 2):
            raise ValueError("cp_a2a_size must divide cp_size")
        return self

    def dims(self) -> ParallelDims:
        """The degrees, as the engine wants them."""
        return ParallelDims(
            tp_size=self.tp_size,
            cp_size=self.cp_size,
            pp_size=self.pp_size,
            virtual_pp_size=self.virtual_pp_size,
            sequence_parallel=self.sequence_parallel,
            cp_comm_type=self.cp_comm_type,
            cp_a2a_size=self.cp_a2a_size,
            pipeline_layers=self.pipeline_layers,
        )


class AttentionOptions(StrictOptions):
    """``models.<role>.attention``: how attention is computed.

    Attributes:
        backend: dense: torch's ``sdpa``, on CUDA also ``flash`` (flash-attn) or ``te`` (Transformer
            Engine). ``vsa``: self-attention is sparse, see ``vsa``.
        vsa: video sparse attention; needs backend ``vsa``. A network whose weights were trained
            with it (``init_from``) has it in any case, as they had it where this is left out.
    """

    backend: Literal["sdpa", "flash", "te", "vsa"] = "sdpa"
    vsa: VSAOptions | None = None

    @model_validator(mode="after")
    def _consistent(self) -> AttentionOptions:
        if self.backend == "vsa" and self.vsa is None:
            raise ValueError(
                "backend vsa needs a section vsa with its sparsity: vsa: {sparsity: 0.9}"
            )
        if self.backend != "vsa" and self.vsa is not None:
            raise ValueError(f"vsa is given, but backend is {self.backend}: set backend to vsa")
        return self

    @property
    def dense_backend(self) -> str:
        """Of attention that is not sparse."""
        return self.backend if self.vsa is None else self.vsa.dense_backend


class RoleOptimizerOptions(StrictOptions):
    """``models.<role>.optimizer``: what one role does otherwise than ``training.optimizer``.

    Attributes:
        learning_rate: peak rate, > 0.
        betas: Adam's two decay rates.
        eps: Adam's epsilon.
        weight_decay: decoupled decay.
        lr_scheduler: shape of the schedule, which runs over this role's own updates.
        lr_warmup_steps: of linear warm-up, in updates of this role.
        lr_num_cycles: hard restarts of ``cosine_with_restarts``.
        lr_power: power of ``polynomial``.
        lr_end: end rate of ``polynomial``.
        min_lr_ratio: floor of ``cosine_with_min_lr``.
        lr_step_rules: rules of ``piecewise_constant``, in updates of this role.
        max_grad_norm: clip by the global norm; 0: no clipping; None: ``callbacks.grad_clip``'s.
    """

    learning_rate: float | None = Field(None, gt=0)
    betas: Betas | None = None
    eps: float | None = Field(None, gt=0)
    weight_decay: float | None = Field(None, ge=0)
    lr_scheduler: LRScheduler | None = None
    lr_warmup_steps: int | None = Field(None, ge=0)
    lr_num_cycles: float | None = Field(None, gt=0)
    lr_power: float | None = Field(None, gt=0)
    lr_end: float | None = Field(None, ge=0)
    min_lr_ratio: float | None = Field(None, ge=0, le=1)
    lr_step_rules: str | None = None
    max_grad_norm: float | None = Field(None, ge=0)


class RoleOptions(StrictOptions):
    """``models.<role>``: what the engine reads; every other key belongs to the model's own options.

    Attributes:
        target: ``_target_``: the model class, dotted or a short name (``wan``).
        trainable: whether the role has gradients and an optimizer.
        flow_shift: the role's timestep shift, > 0; None: ``pipeline.flow_shift``.
        distributed: this role's own layout; None: ``training.distributed``.
        precision: None: ``training.precision``.
        recompute: activation recomputation; None: ``training.recompute``.
        attention: how attention is computed, dense or sparse.
        transformer_impl: megatron-core's local linears and norms, or Transformer Engine's.
        fp8: run Transformer Engine's linears in fp8 (needs ``transformer_engine``).
        optimizer: what this role's optimizer does otherwise than ``training.optimizer``.
        lora: train adapters on the frozen network; None: train the network itself.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=(), populate_by_name=True)

    target: str = Field(alias="_target_")
    trainable: bool = True
    flow_shift: float | None = Field(None, gt=0)
    distributed: DistributedOptions | None = None
    precision: Precision | None = None
    recompute: Recompute | None = None
    attention: AttentionOptions = AttentionOptions()
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    fp8: bool = False
    optimizer: RoleOptimizerOptions = RoleOptimizerOptions()
    lora: LoraOptions | None = None

    @model_validator(mode="after")
    def _fp8_needs_te(self) -> RoleOptions:
        if self.fp8 and self.transformer_impl != "transformer_engine":
            raise ValueError("fp8 needs transformer_impl: transformer_engine")
        return self

    @model_validator(mode="after")
    def _vsa_is_of_attention(self) -> RoleOptions:
        if "vsa" in (self.model_extra or {}):
            raise ValueError("vsa is a key of attention: attention: {backend: vsa, vsa: {...}}")
        return self

    def model_options(self) -> dict[str, Any]:
        """What the model class takes: the keys that belong to it, and ``attention.vsa``."""
        options = dict(self.model_extra or {})
        if self.attention.vsa is not None:
            options["vsa"] = self.attention.vsa.model_dump()
        return options


class Component(StrictOptions):
    """A section with a ``_target_`` whose other keys belong to that class (method, callbacks).

    Attributes:
        target: ``_target_``: the class, dotted or a short name.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=(), populate_by_name=True)

    target: str | None = Field(None, alias="_target_")

    def own_options(self) -> dict[str, Any]:
        """The keys that belong to the class."""
        return dict(self.model_extra or {})


class OptimizerOptions(StrictOptions):
    """``training.optimizer``: AdamW and its learning-rate schedule.

    Attributes:
        learning_rate: peak rate, > 0.
        betas: Adam's two decay rates; "0.9,0.999" is understood.
        eps: Adam's epsilon.
        weight_decay: decoupled decay; none on norms, biases and modulation tables.
        lr_scheduler: shape of the schedule.
        lr_warmup_steps: linear warm-up steps.
        lr_num_cycles: hard restarts of ``cosine_with_restarts``.
        lr_power: power of ``polynomial``.
        lr_end: end rate of ``polynomial``.
        min_lr_ratio: floor of ``cosine_with_min_lr`` as a share of the peak; 0 is 0.
        lr_step_rules: ``piecewise_constant``: "1:10,0.1:20,0.01" is x1 until step 10, x0.1 until
            step 20, then x0.01.
    """

    learning_rate: float = Field(gt=0)
    betas: Betas = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    lr_scheduler: LRScheduler = "constant"
    lr_warmup_steps: int = Field(0, ge=0)
    lr_num_cycles: float = Field(1.0, gt=0)
    lr_power: float = Field(1.0, gt=0)
    lr_end: float = Field(1e-7, ge=0)
    min_lr_ratio: float = Field(0.5, ge=0, le=1)
    lr_step_rules: str = ""


class LoopOptions(StrictOptions):
    """``training.loop``: how long, and how often things are said.

    Attributes:
        max_train_steps: optimizer steps of the whole run.
        gradient_accumulation_steps: FastVideo's key; where given it must equal
            global_batch_size / (micro_batch_size x data-parallel ranks).
        log_every_steps: console line every so many steps (``metrics.jsonl`` has every step).
        max_skipped_steps: stop after so many skipped (non-finite) updates in a row.
    """

    max_train_steps: int = Field(ge=1)
    gradient_accumulation_steps: int | None = Field(None, ge=1)
    log_every_steps: int = Field(10, ge=1)
    max_skipped_steps: int = Field(5, ge=1)


class CheckpointOptions(StrictOptions):
    """``training.checkpoint``: the run folder and its checkpoints.

    Attributes:
        output_dir: the run folder.
        resume_from_checkpoint: ``latest`` (also where there is none yet), a step's directory, or ""
            to start anew: a folder that already holds checkpoints is then refused.
        training_state_checkpointing_steps: save every so many steps; 0: only at the end.
        checkpoints_total_limit: keep the newest so many; 0: all.
        save_at_end: save after the last step.
    """

    output_dir: str
    resume_from_checkpoint: str = "latest"
    training_state_checkpointing_steps: int = Field(0, ge=0)
    checkpoints_total_limit: int = Field(0, ge=0)
    save_at_end: bool = True


class TrackerOptions(StrictOptions):
    """``training.tracker``: where metrics go beside ``metrics.jsonl``.

    Attributes:
        trackers: ``tensorboard``, ``wandb``; one that fails is dropped with a warning.
        project_name: of wandb.
        run_name: of wandb; "": its own choice.
        entity: of wandb.
    """

    trackers: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)
    project_name: str = "megagen"
    run_name: str = ""
    entity: str = ""


class TrainingOptions(StrictOptions):
    """``training``: everything that is not a network or an algorithm.

    Attributes:
        distributed: the run's layout.
        data: dataset and batches.
        optimizer: of every trained role.
        loop: how long.
        checkpoint: run folder and checkpoints.
        tracker: where metrics go.
        precision: bf16 keeps fp32 masters in the optimizer; roles may choose their own.
        recompute: activations computed again in the backward pass: none, selective (core attention
            and the feed-forward's activation), full (whole blocks).
        score_schedule: how losses that need a role's own prediction meet pipeline stages: replay
            repeats its forward pass, hold keeps all micro-batches' graphs.
        seed: of every random number of the run.
    """

    distributed: DistributedOptions = DistributedOptions()
    data: DataOptions
    optimizer: OptimizerOptions
    loop: LoopOptions
    checkpoint: CheckpointOptions
    tracker: TrackerOptions = TrackerOptions()
    precision: Precision = "bf16"
    recompute: Recompute = "none"
    score_schedule: Literal["replay", "hold"] = "replay"
    seed: int = 0


class PipelineOptions(StrictOptions):
    """``pipeline``: what turns latents into videos and texts into conditions, for validation.

    Attributes:
        flow_shift: the run's timestep shift, > 0; roles may override it. None: each model's own
            (its scheduler config's or preset's, else 3).
        codec: codec spec; None: the one that the dataset was made with.
        text_encoder: text encoder spec; None: the one that the dataset was made with.
        negative_prompt: the unconditional prompt of guidance; None: the dataset's.
    """

    flow_shift: float | None = Field(None, gt=0)
    codec: dict[str, Any] | None = None
    text_encoder: dict[str, Any] | None = None
    negative_prompt: str | None = None


class RunConfig(StrictOptions):
    """A whole run.

    Attributes:
        models: networks by role name; ``student`` is the one that is trained.
        method: the algorithm.
        training: layout, data, optimizer, loop, checkpoints.
        callbacks: ema, grad_clip, validation, or classes of your own by ``_target_``.
        pipeline: timestep shift, codec and text encoder.
    """

    models: dict[str, RoleOptions]
    method: Component
    training: TrainingOptions
    callbacks: dict[str, Component] = Field(default_factory=dict)
    pipeline: PipelineOptions = PipelineOptions()

    def role_distributed(self, name: str) -> DistributedOptions:
        """The layout of role ``name``."""
        return self.models[name].distributed or self.training.distributed

    def role_lora(self, name: str) -> LoraOptions | None:
        """The ``lora`` section of role ``name`` where it is enabled."""
        found = self.models[name].lora
        return found if found is not None and found.enable else None

    def base_sharers(self) -> list[str]:
        """The roles on one copy of base weights, its owner first: the student, else the first."""
        sections = {name: self.role_lora(name) for name in self.models}
        found = [name for name, lora in sections.items() if lora is not None and lora.share_base]
        return sorted(found, key=lambda name: name != "student")
