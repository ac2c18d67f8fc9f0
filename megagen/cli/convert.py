"""``megagen convert``: between diffusers directories and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from megagen.core.errors import ConfigError

if TYPE_CHECKING:
    from megagen.parallel.dims import ParallelDims

convert = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@convert.command("to-diffusers")
def to_diffusers(
    checkpoint: Annotated[Path, typer.Option(help="A step's directory, or a run folder.")],
    output: Annotated[Path, typer.Option(help="Directory to make.")],
    role: Annotated[str, typer.Option(help="Which network.")] = "student",
    weights: Annotated[
        str, typer.Option(help="auto (the average where there is one), weights or ema.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16, or stored.")] = "stored",
    base: Annotated[
        Path | None,
        typer.Option(help="Pipeline whose other parts to copy, or config.json to keep."),
    ] = None,
    max_shard_gb: Annotated[float, typer.Option(min=0.001, help="Largest file.")] = 5.0,
    lora: Annotated[
        str, typer.Option(help="A LoRA role: merged into its base, or the adapter alone.")
    ] = "merged",
    base_weights: Annotated[
        str | None,
        typer.Option(help="Base of a LoRA role, where it is not where the run found it."),
    ] = None,
) -> None:
    """A role of a checkpoint as a diffusers directory, one tensor in memory at a time."""
    if weights not in ("auto", "weights", "ema"):
        raise ConfigError(f"found {weights!r}; it is auto, weights or ema.", where="--weights")
    if dtype not in ("stored", "fp32", "bf16", "fp16"):
        raise ConfigError(f"found {dtype!r}; it is stored, fp32, bf16 or fp16.", where="--dtype")
    if lora not in ("merged", "adapter"):
        raise ConfigError(f"found {lora!r}; it is merged or adapter.", where="--lora")

    from megagen.checkpoint.convert import Export
    from megagen.checkpoint.convert import to_diffusers as run

    kind = None if weights == "auto" else cast(Literal["weights", "ema"], weights)
    target = run(
        Export(
            checkpoint,
            output,
            role,
            kind,
            None if dtype == "stored" else dtype,
            base,
            int(max_shard_gb * 10**9),
            cast(Literal["merged", "adapter"], lora),
            base_weights,
        )
    )
    if lora == "merged":
        _write_spec(checkpoint, target, role, base)
    print(target)


def _write_spec(checkpoint: Path, target: Path, role: str, base: Path | None) -> None:
    """``sampling.json``, so that ``megagen sample --model`` knows codec and text encoder."""
    from megagen.checkpoint.state import read_trainer
    from megagen.checkpoint.weights import find_checkpoint
    from megagen.config.schema import RunConfig
    from megagen.core.options import parse_options
    from megagen.sampling.source import run_spec, write_spec

    found = find_checkpoint(checkpoint)
    config = read_trainer(found, hashes=False).config if found is not None else {}
    if base is not None or not config:
        return  # a pipeline brings its own parts; converted weights say nothing
    spec = run_spec(parse_options(RunConfig, config, str(found)), role)
    if spec is not None:
        write_spec(target, spec)


@convert.command("from-diffusers")
def from_diffusers(
    model: Annotated[str, typer.Option(help="Diffusers directory or hub id.")],
    output: Annotated[Path, typer.Option(help="Run folder to make.")],
    family: Annotated[
        str | None, typer.Option(help="Model plugin; default as the model says, else wan.")
    ] = None,
    subfolder: Annotated[str | None, typer.Option(help="The transformer's folder.")] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Ranks to start here.")] = 1,
    tp_size: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    pp_size: Annotated[int, typer.Option(min=1, help="Pipeline stages.")] = 1,
) -> None:
    """The weights of a diffusers directory as a checkpoint, for models.<role>.init_from."""
    from megagen.cli.train import start_ranks
    from megagen.core.options import parse_options
    from megagen.core.registry import resolve
    from megagen.models import MODELS
    from megagen.parallel.dims import ParallelDims
    from megagen.sampling.source import find_family

    cls = resolve(family or find_family(Path(model)), MODELS, where="--family")
    keys = {"init_from": model, "subfolder": subfolder}
    plugin = cls(parse_options(cls.Options, keys, "convert"), where="convert")
    dims = ParallelDims(tp_size=tp_size, pp_size=pp_size)
    plugin.check(dims, "convert")
    dims.dp_size(nproc)
    code = start_ranks(nproc, _from_diffusers_here, plugin, model, output, dims)
    if code:
        raise SystemExit(code)


def _from_diffusers_here(plugin: Any, model: str, output: Path, dims: ParallelDims) -> int:
    from megagen.checkpoint.convert import from_diffusers as run
    from megagen.core import process

    target = run(plugin, model, output, dims)
    if process.is_main():
        print(target, flush=True)
    return 0
