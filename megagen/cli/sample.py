"""``megagen sample``: prompts to mp4 files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megagen.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from megagen.sampling.pipeline import SamplingOptions, VideoPipeline
    from megagen.sampling.source import SamplingSpec, Source


def sample(
    model: Annotated[str | None, typer.Option(help="Diffusers directory or hub id.")] = None,
    run: Annotated[Path | None, typer.Option(help="Output folder of a training run.")] = None,
    step: Annotated[int | None, typer.Option(help="Checkpoint of the run; default newest.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Dataset whose codec and text encoder to use, where MODEL says none."),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="May be given several times.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="Text file, a prompt a line.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="First frame, one or one a prompt (image-to-video).")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="Default: the model's own.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Default: as trained, else 81.")] = None,
    height: Annotated[int | None, typer.Option(help="Default: as trained, else 480.")] = None,
    width: Annotated[int | None, typer.Option(help="Default: as trained, else 832.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Solver steps; default the model's own, else 50.")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="1: no unconditional pass; default the model's own, else 5."),
    ] = None,
    guidance_scale_2: Annotated[
        float | None, typer.Option(help="Of the low-noise expert; default the same.")
    ] = None,
    shift: Annotated[float | None, typer.Option(help="Flow shift; default the model's.")] = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="unipc, euler, or sde (few-step students); default its own, else unipc."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Prompts sampled together.")] = 1,
    stream: Annotated[
        bool, typer.Option(help="Block by block, the file growing (causal networks).")
    ] = False,
    t_list: Annotated[
        str | None,
        typer.Option(help="A few-step student's timesteps, as 1000,750,500,250; default its own."),
    ] = None,
    sample_type: Annotated[
        str | None, typer.Option(help="With --stream: noise of a step down, sde (default) or ode.")
    ] = None,
    context_noise: Annotated[
        float | None, typer.Option(help="With --stream: timestep of finished blocks in the cache.")
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="Of --model; default as it says, else wan.")
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Of the files; default the model's.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the mp4 files.")] = Path("samples"),
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    nproc: Annotated[int, typer.Option(min=0, help="Ranks to start on this machine.")] = 0,
    tp_size: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    cp_size: Annotated[int, typer.Option(min=1, help="Context-parallel ranks.")] = 1,
    pp_size: Annotated[int, typer.Option(min=1, help="Pipeline stages.")] = 1,
) -> None:
    """Generate videos from trained weights.

    Examples: megagen sample --model runs/demo/teacher --prompt "a three moving left";
    megagen sample --run runs/wan --prompts-file prompts.txt --nproc 4 --tp-size 2;
    megagen sample --run runs/causal --prompt "rain" --stream --t-list 1000,750,500,250
    --guidance-scale 1. A few-step student knows its timesteps, its sampler and that it takes no
    guidance; options given here come first.
    """
    if (model is None) == (run is None):
        raise ConfigError("give either --model or --run.", where="megagen sample")
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"found {precision!r}; it is fp32 or bf16.", where="--precision")
    prompts = read_prompts(prompt or [], prompts_file)
    steps_down = _timesteps(t_list)

    from megagen.parallel.dims import ParallelDims
    from megagen.sampling import source as sources

    if run is not None:
        origin = sources.from_run(run, step, data)
    else:
        origin = sources.from_directory(str(model), data, family)
    dims = ParallelDims(tp_size=tp_size, cp_size=cp_size, pp_size=pp_size)
    for plugin in origin.plugins:
        plugin.check(dims, "megagen sample")
    chosen = way(origin.spec, steps, steps_down, sampler, guidance_scale)
    options = _options(
        origin.spec,
        num_frames=num_frames,
        height=height,
        width=width,
        guidance_scale_2=guidance_scale_2,
        shift=shift,
        negative_prompt=negative_prompt,
        seed=seed,
        batch_size=batch_size,
        stream=_stream_options(stream, chosen["t_list"], origin.spec, sample_type, context_noise),
        **(chosen | {"t_list": None} if stream else chosen),
    )
    images = read_images(image or [], len(prompts), options)
    rate = fps or origin.spec.fps or 16
    _start(nproc, dims, (origin, dims, precision, prompts, options, images, out, rate))


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """Prompts of the command line, then those of the file; empty lines are left out.

    Raises:
        ConfigError: there are none.
        DataError: the file cannot be read.
    """
    lines: list[str] = []
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"cannot be read ({error}).", remedy="Give a UTF-8 text file.", where=str(file)
            ) from None
    prompts = [text for text in (*given, *(line.strip() for line in lines)) if text]
    if not prompts:
        raise ConfigError("no prompt is given.", remedy="Add --prompt or --prompts-file.")
    return prompts


def read_images(
    files: list[Path], num_prompts: int, options: SamplingOptions
) -> list[Tensor] | None:
    """First frames in the video's size, uint8 ``[1, H, W, 3]``; one file serves all prompts."""
    if not files:
        return None
    if len(files) not in (1, num_prompts):
        raise ConfigError(
            f"{len(files)} images for {num_prompts} prompts.",
            remedy="Give one image, or one a prompt.",
            where="--image",
        )
    frames = [_read_image(file, options.height, options.width) for file in files]
    return frames * num_prompts if len(frames) == 1 else frames


def _read_image(file: Path, height: int, width: int) -> Tensor:
    import numpy as np
    import torch
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file) as picture:
            fitted = ImageOps.fit(picture.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(
            f"cannot be read as an image ({error}).", remedy="Give a PNG or JPEG.", where=str(file)
        ) from None
    return torch.from_numpy(np.asarray(fitted).copy())[None]


def _options(spec: SamplingSpec, **given: Any) -> SamplingOptions:
    from megagen.core.options import parse_options
    from megagen.sampling.pipeline import SamplingOptions

    for name, default in (("num_frames", 81), ("height", 480), ("width", 832)):
        if given[name] is None:
            given[name] = getattr(spec, name) or default
    return parse_options(SamplingOptions, given, "megagen sample")


def way(
    spec: SamplingSpec,
    steps: int | None,
    t_list: list[float] | None,
    sampler: str | None,
    guidance_scale: float | None,
) -> dict[str, Any]:
    """Keys of ``SamplingOptions``: what is given, else as the model says, else the defaults.

    A number of steps stands against the model's own list of them.
    """
    if t_list is None and steps is None:
        t_list = spec.t_list
    if guidance_scale is None:
        guidance_scale = 5.0 if spec.guidance_scale is None else spec.guidance_scale
    return {
        "num_steps": 50 if steps is None else steps,
        "t_list": t_list,
        "sampler": sampler or spec.sampler or "unipc",
        "guidance_scale": guidance_scale,
    }


def _start(nproc: int, dims: Any, arguments: tuple[Any, ...]) -> None:
    """In ranks forked here, or in this process as the rank that it is."""
    import os

    from megagen.cli.train import start_ranks
    from megagen.parallel.launch import init_distributed, shutdown

    joined = int(os.environ.get("WORLD_SIZE", "1"))
    if nproc > 1 and joined > 1:
        raise ConfigError("is given, but torchrun started the ranks.", where="--nproc")
    dims.dp_size(max(nproc, joined))
    if nproc > 1:
        code = start_ranks(nproc, _sample_here, *arguments)
        if code:
            raise SystemExit(code)
        return
    init_distributed()
    _sample_here(*arguments)
    shutdown()


def _sample_here(
    origin: Source,
    dims: Any,
    precision: str,
    prompts: list[str],
    options: SamplingOptions,
    images: list[Tensor] | None,
    out: Path,
    fps: float,
) -> int:
    """What each rank does."""
    from megagen.data.video import write_video
    from megagen.sampling.source import build_pipeline

    pipeline = build_pipeline(origin, dims, precision)
    if options.stream is not None:
        _stream_here(pipeline, prompts, options, images, out, fps)
        return 0
    for position, frames_THWC in pipeline.generate(prompts, options, images):
        path = write_video(out / file_name(position, prompts[position]), frames_THWC, fps)
        print(f"{path}  {prompts[position]}", flush=True)
    return 0


def _stream_here(
    pipeline: VideoPipeline,
    prompts: list[str],
    options: SamplingOptions,
    images: list[Tensor] | None,
    out: Path,
    fps: float,
) -> None:
    """Files grow with every block; how fast is said once one is whole."""
    from megagen.data.video_stream import VideoStream

    files: dict[int, VideoStream] = {}
    begun: dict[int, float] = {}
    try:
        for piece in pipeline.stream(prompts, options, images):
            number = piece.position
            if number not in files:
                files[number] = VideoStream(out / file_name(number, prompts[number]), fps)
                begun[number] = piece.seconds
            file = files[number]
            file.write(piece.frames_THWC)
            if piece.is_last:
                file.close()
                print(
                    f"{file.path}  {prompts[number]}  {file.num_frames} frames, "
                    f"{file.num_frames / piece.seconds:.2f} frames/s, "
                    f"first after {begun[number]:.2f} s",
                    flush=True,
                )
    finally:
        for file in files.values():
            file.close()


def _stream_options(
    stream: bool,
    t_list: list[float] | None,
    spec: SamplingSpec,
    sample_type: str | None,
    context_noise: float | None,
) -> dict[str, Any] | None:
    """Of ``SamplingOptions.stream``; None for whole videos, which these options do not concern."""
    given = {"sample_type": sample_type, "context_noise": context_noise}
    given = {name: value for name, value in given.items() if value is not None}
    if stream:
        own: dict[str, Any] = {"t_list": t_list}
        if spec.sampler is not None:
            own["sample_type"] = "sde" if spec.sampler == "sde" else "ode"
        if spec.context_noise is not None:
            own["context_noise"] = spec.context_noise
        return own | given
    if given:
        raise ConfigError(
            f"is {next(iter(given.values()))!r}, which concerns streams alone.",
            remedy="Add --stream; for steps of whole videos give --sampler euler or sde.",
            where=f"--{next(iter(given)).replace('_', '-')}",
        )
    return None


def _timesteps(given: str | None) -> list[float] | None:
    """``--t-list`` with its final 0."""
    if given is None:
        return None
    try:
        steps = [float(part) for part in given.split(",")]
    except ValueError:
        raise ConfigError(
            f"found {given!r}.", remedy="Give numbers, as 1000,750,500,250.", where="--t-list"
        ) from None
    return steps if steps[-1] == 0 else [*steps, 0.0]


def file_name(position: int, prompt: str) -> str:
    """``0003-a-three-moving-left.mp4``."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].strip("-")
    return f"{position:04d}-{words or 'video'}.mp4"
