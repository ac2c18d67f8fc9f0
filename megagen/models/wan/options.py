"""Options of ``WanModel`` and how they become a shape: a preset, a dict of keys, or a directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from megagen.core.errors import CheckpointError, ConfigError, suggest
from megagen.core.options import StrictOptions, parse_options
from megagen.core.vsa import CONFIG_KEY as VSA_KEY
from megagen.core.vsa import VSAOptions
from megagen.models.hub import component_directory, read_json
from megagen.models.wan.architecture import (
    LATENT_CONSTANTS,
    PRESETS,
    Preset,
    WanArchitecture,
)


class WanOptions(StrictOptions):
    """``models.<role>`` keys of Wan.

    Args:
        architecture: a preset's name (``t2v-1.3b``...), or keys of diffusers' config, with
            ``latents_mean`` and ``latents_std`` beside. None: from ``init_from``.
        init_from: diffusers directory or hub id of the weights; None: fresh weights.
        subfolder: the transformer's folder in it. Default ``transformer``, or ``transformer_2`` for
            the low-noise expert.
        expert: which of two experts this network is.
        boundary_ratio: sigma at which the high-noise expert hands over; default from the preset or
            ``model_index.json``.
        flow_shift: timestep shift; default from the preset or the scheduler's config, else 3.
        expand_timesteps: a given first frame enters as tokens at timestep 0 (TI2V-5B); default from
            the preset or ``model_index.json``.
        vsa: sparse self-attention; it is given as ``attention.vsa``, and otherwise what
            ``init_from`` was trained with.
    """

    architecture: dict[str, Any] | str | None = None
    init_from: str | None = None
    subfolder: str | None = None
    expert: Literal["high", "low"] | None = None
    boundary_ratio: float | None = Field(None, gt=0, lt=1)
    flow_shift: float | None = Field(None, gt=0)
    expand_timesteps: bool | None = None
    vsa: dict[str, Any] | None = None

    def sparse_attention(self, directory: Path | None, where: str) -> VSAOptions | None:
        """What is given, else what ``directory``'s ``config.json`` says; None: dense attention."""
        if self.vsa is not None:
            return parse_options(VSAOptions, self.vsa, f"{where}.attention.vsa")
        file = directory / "config.json" if directory is not None else None
        if file is None or not file.is_file():
            return None
        found = read_json(file).get(VSA_KEY)
        return None if found is None else parse_options(VSAOptions, found, f"{file}: {VSA_KEY}")


@dataclass(frozen=True)
class Resolved:
    """What the options come to.

    Args:
        architecture: shapes.
        preset: conventions, options and files taken into account.
        latents_mean: per channel, None: 0.
        latents_std: per channel, None: 1.
    """

    architecture: WanArchitecture
    preset: Preset
    latents_mean: list[float] | None
    latents_std: list[float] | None


def resolve_options(options: WanOptions, where: str) -> Resolved:
    """Read the directory's small files and settle every value.

    Raises:
        ConfigError: unknown preset or key, neither architecture nor weights, no boundary for an
            expert.
        CheckpointError: the directory or its ``config.json`` cannot be used.
    """
    if options.architecture is None and options.init_from is None:
        raise ConfigError(
            "neither architecture nor init_from is given.",
            remedy=f"Name a preset ({', '.join(PRESETS)}), give an architecture, or a directory.",
            where=where,
        )
    preset = _named_preset(options.architecture, f"{where}.architecture")
    directory = find_directory(options, ["config.json"], where)
    if directory is not None:
        preset = _from_files(preset, directory)
    keys, source = _keys(options, preset, directory, where)
    architecture = parse_options(WanArchitecture, keys, source)
    preset = Preset(
        flow_shift=_first(options.flow_shift, preset.flow_shift),
        boundary_ratio=_first(options.boundary_ratio, preset.boundary_ratio),
        expand_timesteps=_first(options.expand_timesteps, preset.expand_timesteps),
    )
    if options.expert is not None and preset.boundary_ratio is None:
        raise ConfigError(
            f"expert is {options.expert!r}, but no boundary between the experts is known.",
            remedy="Give boundary_ratio (0.875 for T2V-A14B, 0.9 for I2V-A14B).",
            where=f"{where}.boundary_ratio",
        )
    return Resolved(architecture, preset, *_latent_constants(architecture, keys, directory))


def find_directory(options: WanOptions, patterns: Sequence[str], where: str) -> Path | None:
    """The transformer's directory, None for fresh weights; ``patterns`` are fetched from a hub."""
    if options.init_from is None:
        return None
    folder = "transformer_2" if options.expert == "low" else "transformer"
    return component_directory(
        options.init_from, options.subfolder, folder, patterns, where=f"{where}.init_from"
    )


def _named_preset(architecture: Mapping[str, Any] | str | None, where: str) -> Preset:
    if not isinstance(architecture, str):
        return Preset()
    if architecture not in PRESETS:
        raise ConfigError(
            f"unknown preset {architecture!r};", remedy=suggest(architecture, PRESETS), where=where
        )
    return PRESETS[architecture]


def _keys(
    options: WanOptions, preset: Preset, directory: Path | None, where: str
) -> tuple[dict[str, Any], str]:
    """The architecture's keys and their origin; a directory's ``config.json`` must agree."""
    if isinstance(options.architecture, Mapping):
        keys, source = dict(options.architecture), f"{where}.architecture"
    else:
        keys, source = dict(preset.architecture), f"{where}.architecture"
    if directory is None:
        return keys, source
    path = directory / "config.json"
    config = read_json(path)
    name = config.get("_class_name", "WanTransformer3DModel")
    if name != "WanTransformer3DModel":
        raise CheckpointError(
            f"is the config of a {name}, not of a WanTransformer3DModel.",
            remedy="Choose the plugin of that family, or correct init_from.",
            where=str(path),
        )
    found = {key: value for key, value in config.items() if not key.startswith("_")}
    if options.architecture is None:
        return found, str(path)
    given = parse_options(WanArchitecture, keys, source).diffusers_config()
    have = parse_options(WanArchitecture, found, str(path)).diffusers_config()
    for key, value in given.items():
        if have[key] != value:
            raise ConfigError(
                f"is {value!r}, but {path} says {have[key]!r}.",
                remedy="Leave architecture out, or correct init_from.",
                where=f"{source}.{key}" if isinstance(options.architecture, Mapping) else source,
            )
    return keys, source


def _from_files(preset: Preset, directory: Path) -> Preset:
    """The preset with what a pipeline directory around the transformer says."""
    index, scheduler = (
        directory.parent / "model_index.json",
        directory.parent / "scheduler" / "scheduler_config.json",
    )
    pipeline = read_json(index) if index.is_file() else {}
    schedule = read_json(scheduler) if scheduler.is_file() else {}
    return Preset(
        preset.architecture,
        _first(schedule.get("flow_shift"), preset.flow_shift),
        _first(pipeline.get("boundary_ratio"), preset.boundary_ratio),
        _first(pipeline.get("expand_timesteps"), preset.expand_timesteps),
    )


def _latent_constants(
    architecture: WanArchitecture, keys: Mapping[str, Any], directory: Path | None
) -> tuple[list[float] | None, list[float] | None]:
    known = LATENT_CONSTANTS.get(architecture.out_channels, (None, None))
    vae = directory.parent / "vae" / "config.json" if directory is not None else None
    config = read_json(vae) if vae is not None and vae.is_file() else {}
    if config.get("z_dim") == architecture.out_channels:
        known = (config.get("latents_mean", known[0]), config.get("latents_std", known[1]))
    mean = architecture.latents_mean if "latents_mean" in keys else known[0]
    std = architecture.latents_std if "latents_std" in keys else known[1]
    if "latents_mean" in keys and "latents_std" not in keys and mean is None:
        std = None  # latents_mean: null alone asks for latents as they are
    return mean, std


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value
