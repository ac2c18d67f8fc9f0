"""Where a pipeline's parts come from: a diffusers directory, or a run's checkpoint.

Three forms of a directory are understood:
* a diffusers pipeline (``transformer/``, ``vae/``, ``text_encoder/``, ``tokenizer/``; with two
  experts also ``transformer_2/``): the VAE and text encoder in it are used;
* a bare transformer directory with ``sampling.json`` in it (``SamplingSpec``): what the codec and
  text encoder are, as megagen writes it beside models that have no VAE of their own;
* a run folder: ``run.yaml`` of the run and one of its checkpoints; codec and text encoder are those
  of its dataset. The moving average of the weights is taken where there is one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader

from megagen.checkpoint import commit
from megagen.checkpoint.diffusers import DiffusersStore, check_weights
from megagen.checkpoint.weights import Kind, open_role
from megagen.config.load import load_run_config
from megagen.config.schema import RunConfig
from megagen.core.errors import CheckpointError, ConfigError
from megagen.core.options import StrictOptions, parse_options
from megagen.core.registry import resolve
from megagen.data.codecs import build_codec
from megagen.data.image import ClipVision, ClipVisionOptions
from megagen.data.manifest import read_manifest
from megagen.data.text import build_text_encoder
from megagen.engine.role import Role, RoleSettings
from megagen.models import MODELS
from megagen.models.base import ModelPlugin, WeightStore
from megagen.models.hub import local_directory, read_json
from megagen.models.wan_causal.options import CONFIG_KEY as CAUSAL_KEY
from megagen.parallel.dims import ParallelDims
from megagen.parallel.mesh import Mesh
from megagen.sampling.flow import SamplerName, shift_sigma
from megagen.sampling.pipeline import VideoPipeline
from megagen.sampling.streaming import TimestepList

SPEC = "sampling.json"


class SamplingSpec(StrictOptions):
    """``sampling.json``: what a model's latents and text embeddings were made with.

    Attributes:
        codec, text_encoder: specs for ``build_codec`` and ``build_text_encoder``.
        num_frames, height, width: size it was trained on; the default of ``megagen sample``.
        fps: of its videos.
        flow_shift: of its sigma grid.
        negative_prompt: of its unconditional branch.
        t_list: timesteps of a few-step student, going down to a final 0; None: it has none.
        sampler: how it is sampled; None: nothing is said.
        guidance_scale: it is sampled with; None: nothing is said.
        context_noise: timestep at which a causal student's finished blocks are cached.
    """

    codec: dict[str, Any]
    text_encoder: dict[str, Any]
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    flow_shift: float | None = None
    negative_prompt: str = ""
    t_list: TimestepList | None = None
    sampler: SamplerName | None = None
    guidance_scale: float | None = None
    context_noise: float | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """What is known of a model before any process group or weight exists.

    Args:
        plugins: the network, or the high-noise and the low-noise expert.
        directories: their diffusers directories; empty for a run.
        spec: codec, text encoder, defaults.
        checkpoint: a run's checkpoint; None for directories.
        clip_vision: image encoder; None: the networks need none.
    """

    plugins: Sequence[ModelPlugin]
    directories: Sequence[Path]
    spec: SamplingSpec
    checkpoint: Path | None = None
    clip_vision: ClipVisionOptions | None = None


def from_directory(path: str, spec_from: Path | None = None, family: str | None = None) -> Source:
    """A diffusers pipeline, or a transformer with ``sampling.json``.

    Args:
        path: directory or hub id.
        spec_from: dataset directory or ``sampling.json`` that says the codec and the text encoder,
            where ``path`` does not.
        family: model plugin; None: as the directory says, else Wan.

    Raises:
        CheckpointError: the directory is not one of these.
        ConfigError: nothing says how to decode.
    """
    root = local_directory(path, ["*.json", "*/*"], where="--model")
    experts: list[str | None] = [None]
    if (root / "transformer_2" / "config.json").is_file():
        experts = ["high", "low"]
    spec = read_spec(spec_from or root)
    cls = resolve(family or find_family(root), MODELS, where="family")
    plugins = []
    for expert in experts:
        keys: dict[str, Any] = {"init_from": str(root), "expert": expert}
        if spec is not None and spec.flow_shift is not None:
            keys["flow_shift"] = spec.flow_shift
        plugins.append(cls(parse_options(cls.Options, keys, "model"), where="model"))
    spec = spec or _pipeline_spec(root)
    clip = (root / "image_encoder").is_dir()
    return Source(
        plugins,
        [plugin.directory for plugin in plugins],
        spec,
        clip_vision=ClipVisionOptions(path=str(root)) if clip else None,
    )


def from_run(run: Path, step: int | None = None, spec_from: Path | None = None) -> Source:
    """A run's student at a step (None: the newest whole checkpoint).

    Raises:
        CheckpointError: no run there, or no such checkpoint.
        ConfigError: nothing says how to decode.
    """
    path = run / "run.yaml"
    if not path.is_file():
        raise CheckpointError(
            "has no run.yaml.", remedy="Give the output_dir of a training run.", where=str(run)
        )
    config = load_run_config(path, {})
    role = config.models["student"]
    cls = resolve(role.target, MODELS, where="models.student._target_")
    shift = role.flow_shift or config.pipeline.flow_shift
    keys = {**role.model_options(), "flow_shift": shift}
    plugin = cls(parse_options(cls.Options, keys, "models.student"), where="models.student")
    spec = read_spec(spec_from) if spec_from else run_spec(config)
    if spec is None:
        raise _no_spec(spec_from or path)
    return Source([plugin], [], spec, checkpoint=find_checkpoint(run, step))


def find_checkpoint(run: Path, step: int | None) -> Path:
    """A checkpoint of a run, verified.

    Raises:
        CheckpointError: none there, or a corrupt one.
    """
    folder = run / "checkpoints"
    found = commit.newest_valid(folder) if step is None else folder / commit.step_name(step)
    if found is None or not found.is_dir():
        names = ", ".join(p.name for _, p in commit.steps(folder)) or "none"
        raise CheckpointError(
            f"has no checkpoint{'' if step is None else f' of step {step}'}; there are: {names}.",
            remedy="Choose another --step, or train first.",
            where=str(folder),
        )
    if step is not None:
        commit.verify(found)
    return found


def build_pipeline(source: Source, dims: ParallelDims, precision: str = "fp32") -> VideoPipeline:
    """Load the networks under a layout. Collective over all ranks.

    Raises:
        ConfigError: a network cannot be cut as ``dims`` says.
        CheckpointError: weights are missing or of another shape.
    """
    mesh = Mesh.build(dims)
    roles = []
    for number, plugin in enumerate(source.plugins):
        settings = RoleSettings("student", dims, trainable=False, precision=precision)  # type: ignore[arg-type]
        store: WeightStore
        if source.checkpoint is None:
            store = DiffusersStore(source.directories[number])
        else:
            store = _checkpoint_store(source.checkpoint, plugin)
        check_weights(plugin, store)
        roles.append(Role.build(plugin, settings, data_layout=mesh, store=store))
    spec = source.spec
    return VideoPipeline(
        roles,
        build_codec(spec.codec),
        build_text_encoder(spec.text_encoder),
        mesh,
        clip_vision=ClipVision(source.clip_vision) if source.clip_vision else None,
        negative_prompt=spec.negative_prompt,
    )


def read_spec(path: Path) -> SamplingSpec | None:
    """``sampling.json`` in a directory (or that file), or the specs of a dataset; None: neither."""
    file = path if path.is_file() else path / SPEC
    if file.is_file():
        return parse_options(SamplingSpec, read_json(file), str(file))
    manifest = read_manifest(path) if path.is_dir() else None
    if manifest is None:
        return None
    size = manifest.buckets[0]
    return SamplingSpec(
        codec=manifest.codec,
        text_encoder=manifest.text_encoder,
        num_frames=size.num_frames,
        height=size.height,
        width=size.width,
        fps=manifest.fps,
        negative_prompt=manifest.negative_prompt,
    )


def write_spec(directory: Path, spec: SamplingSpec) -> None:
    """Write ``sampling.json`` beside a model's weights."""
    text = json.dumps(spec.model_dump(mode="json", exclude_none=True), indent=1)
    (directory / SPEC).write_text(text + "\n")


def find_family(root: Path) -> str:
    """The plugin of a diffusers directory: causal networks say so in their ``config.json``."""
    files = [root / "transformer" / "config.json", root / "config.json"]
    config = next((read_json(file) for file in files if file.is_file()), {})
    return "wan_causal" if CAUSAL_KEY in config else "wan"


def _pipeline_spec(root: Path) -> SamplingSpec:
    """The VAE and text encoder of a diffusers pipeline directory."""
    if not (root / "vae").is_dir() or not (root / "text_encoder").is_dir():
        raise _no_spec(root)
    return SamplingSpec(
        codec={"name": "wan_vae", "path": str(root)},
        text_encoder={"name": "umt5", "path": str(root)},
        fps=16,
    )


def run_spec(config: RunConfig, role: str = "student") -> SamplingSpec | None:
    """The specs of the run's config, else of its dataset; a student's with its own timesteps."""
    data = next(iter(config.training.data.sources()), None)
    spec = read_spec(Path(data)) if data else None
    given: dict[str, Any] = {
        key: value
        for key, value in (
            ("codec", config.pipeline.codec),
            ("text_encoder", config.pipeline.text_encoder),
            ("negative_prompt", config.pipeline.negative_prompt),
        )
        if value is not None
    }
    if role == "student":
        shift = config.models[role].flow_shift or config.pipeline.flow_shift
        given |= few_step_way(config.method.own_options(), shift)
    if spec is not None:
        return spec.model_copy(update=given)
    return SamplingSpec(**given) if {"codec", "text_encoder"} <= given.keys() else None


def few_step_way(method: Mapping[str, Any], shift: float | None) -> dict[str, Any]:
    """How the student of a method is sampled, as keys of ``SamplingSpec``; none of its own: {}.

    Args:
        method: options of the run's method.
        shift: the student's, for lists of places on the unshifted grid (``warp_denoising_step``).
    """
    steps = [float(t) for t in method.get("t_list") or method.get("dmd_denoising_steps") or ()]
    if not steps:
        return {}
    if method.get("warp_denoising_step"):
        if shift is None:
            return {}
        steps = [1000 * shift_sigma(t / 1000, shift) for t in steps]
    # paths of a teacher are those of its ODE; other students step by fresh noise unless told
    default = "ode" if "teacher_path_cache" in method else "sde"
    is_sde = method.get("student_sample_type", default) == "sde"
    found: dict[str, Any] = {
        "t_list": [*steps, 0.0] if steps[-1] else steps,
        "sampler": "sde" if is_sde else "euler",
        "guidance_scale": 1.0,
    }
    if "context_noise" in method:
        found["context_noise"] = float(method["context_noise"])
    return found


def _no_spec(path: Path) -> ConfigError:
    return ConfigError(
        "says nothing of a codec and a text encoder.",
        remedy=f"Give a diffusers pipeline with vae/ and text_encoder/, a directory with {SPEC}, "
        "or --data with the dataset that the model was trained on.",
        where=str(path),
    )


def _checkpoint_store(checkpoint: Path, plugin: ModelPlugin) -> WeightStore:
    """The student's moving average where the checkpoint has one, else its weights."""
    reader = FileSystemReader(str(checkpoint / "state"))
    stored = reader.read_metadata().state_dict_metadata
    kind: Kind = "ema" if any(key.startswith("student.ema.") for key in stored) else "weights"
    return open_role(checkpoint, plugin, "student", kind)
