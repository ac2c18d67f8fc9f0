"""``megagen preprocess``: flags and config file, its ranks, its progress bar."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megagen.core.errors import ConfigError, DataError, MegagenError

if TYPE_CHECKING:
    from megagen.data.manifest import Manifest
    from megagen.data.preprocess import PreprocessOptions, Work


def preprocess(
    ctx: typer.Context,
    config: Annotated[Path | None, typer.Option(help="YAML file with these options.")] = None,
    input_dir: Annotated[str | None, typer.Option(help="Folder of videos and captions.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Text file, a prompt a line: a dataset of texts alone.")
    ] = None,
    output_dir: Annotated[str | None, typer.Option(help="Dataset directory to write.")] = None,
    codec: Annotated[str | None, typer.Option(help="space_to_depth or wan_vae.")] = None,
    text_encoder: Annotated[str | None, typer.Option(help="hashed or umt5.")] = None,
    buckets: Annotated[
        str | None, typer.Option(help="Sizes FRAMESxHEIGHTxWIDTH, separated by commas.")
    ] = None,
    num_frames: Annotated[int | None, typer.Option(help="One fixed size: frames.")] = None,
    height: Annotated[int | None, typer.Option(help="One fixed size: pixel height.")] = None,
    width: Annotated[int | None, typer.Option(help="One fixed size: pixel width.")] = None,
    fps: Annotated[float | None, typer.Option(help="Rate to bring clips to.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="Stored as an embedding.")] = None,
    first_frame: Annotated[
        bool | None, typer.Option(help="Add the first frame's latent (image-to-video).")
    ] = None,
    samples_per_file: Annotated[int | None, typer.Option(help="Clips per parquet file.")] = None,
    max_bad_share: Annotated[float | None, typer.Option(help="Unusable share allowed.")] = None,
    num_threads: Annotated[int | None, typer.Option(help="Clips decoded ahead per rank.")] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Ranks to start on this machine.")] = 1,
) -> None:
    """Turn a folder of videos into a dataset of latents and text embeddings.

    With --prompts FILE in place of --input-dir, a dataset of text embeddings alone; of the options
    below, the text encoder's, --negative-prompt and --samples-per-file count there.

    Options of the codec and the text encoder are dotted: --codec.patch 4, --codec.path DIR,
    --text_encoder.path DIR. A run that was stopped goes on when the same command is given again.
    """
    flags = {key: value for key, value in ctx.params.items() if key not in ("config", "nproc")}
    data = _merge(config, {k: v for k, v in flags.items() if v is not None}, ctx.args)
    if data.get("prompts"):
        _encode_prompts(data, "" if config is None else str(config))
        return
    started = "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1
    if started and nproc > 1:
        raise ConfigError("nproc is given, but torchrun started the ranks.", remedy="Drop --nproc.")

    from megagen.core import process
    from megagen.data.preprocess import plan, preprocess_options
    from megagen.data.preprocess import preprocess as run

    options = preprocess_options(data, "" if config is None else str(config))
    begin = time.monotonic()
    if started:
        manifest = run(options, rank=process.rank(), num_ranks=process.world_size())
    elif nproc > 1:
        manifest = _run_ranks(options, nproc)
    else:
        manifest = _with_bar(plan(options), lambda on_clip: run(options, on_clip=on_clip))
    if manifest is not None:
        typer.echo(_summary(options.output_dir, manifest, time.monotonic() - begin))


def _encode_prompts(data: dict[str, Any], where: str) -> None:
    from megagen.data.prompts import encode_prompts, prompt_options

    options = prompt_options(data, where)
    begin = time.monotonic()
    count = encode_prompts(options)
    typer.echo(f"{count} prompts in {options.output_dir} ({time.monotonic() - begin:.1f} s)")


def _merge(config: Path | None, flags: dict[str, Any], extra: list[str]) -> dict[str, Any]:
    """Config file, then flags, then dotted overrides."""
    from megagen.config.load import apply_overrides, parse_overrides, read_yaml

    data = {**(read_yaml(config) if config else {}), **flags}
    for key in ("codec", "text_encoder"):
        if isinstance(data.get(key), str):
            data[key] = {"name": data[key]}
    return apply_overrides(data, parse_overrides(extra))


def _summary(output_dir: str, manifest: Manifest, seconds: float) -> str:
    lines = [f"{manifest.num_samples} samples in {output_dir} ({seconds:.1f} s)"]
    for bucket in manifest.buckets:
        size = f"{bucket.num_frames}x{bucket.height}x{bucket.width}"
        shape = "x".join(map(str, bucket.latent_shape))
        lines.append(f"  {size}: {bucket.num_samples} samples, latents {shape}")
    if manifest.num_quarantined:
        reasons = ", ".join(f"{count} {why}" for why, count in manifest.quarantine_reasons.items())
        lines.append(f"  left out: {reasons}; see {Path(output_dir) / 'quarantine.jsonl'}")
    return "\n".join(lines)


def _with_bar(work: Work, run: Callable[[Callable[[], None]], Manifest | None]) -> Manifest | None:
    """Run with a bar over clips, shown only on a terminal; ``run`` is given its ``on_clip``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("preprocess", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), disable=hidden) as bar:
        task = bar.add_task("preprocess", total=len(work.clips), completed=work.num_done())
        return run(lambda: bar.advance(task))


def _run_ranks(options: PreprocessOptions, nproc: int) -> Manifest | None:
    """Fork the ranks and wait; the first rank to fail stops the others and its error is raised."""
    from megagen.data.manifest import read_manifest
    from megagen.data.preprocess import plan

    context = multiprocessing.get_context("fork")
    counter, errors = context.Value("q", 0), context.SimpleQueue()
    work = plan(options)
    ranks = [
        context.Process(
            target=_rank_main, args=(options, rank, nproc, counter, errors), daemon=True
        )
        for rank in range(nproc)
    ]
    for rank in ranks:
        rank.start()

    def wait(on_clip: Callable[[], None]) -> Manifest | None:
        shown = 0
        while any(rank.is_alive() for rank in ranks):
            for _ in range(counter.value - shown):
                on_clip()
                shown += 1
            if any(rank.exitcode not in (None, 0) for rank in ranks):
                break
            time.sleep(0.05)
        _raise_first(ranks, errors)
        return read_manifest(options.output_dir)

    try:
        return _with_bar(work, wait)
    finally:
        for rank in ranks:
            rank.terminate()
            rank.join()


def _rank_main(
    options: PreprocessOptions, rank: int, nproc: int, counter: Any, errors: Any
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(nproc)}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the ranks

    import torch

    from megagen.data.preprocess import preprocess as run

    torch.set_num_threads(max(1, torch.get_num_threads() // nproc))

    def on_clip() -> None:
        with counter.get_lock():
            counter.value += 1

    try:
        run(options, rank=rank, num_ranks=nproc, on_clip=on_clip)
    except MegagenError as error:
        errors.put((type(error), error.message, error.remedy, error.where))
        raise SystemExit(error.exit_code) from None


def _raise_first(ranks: list[Any], errors: Any) -> None:
    if not errors.empty():
        kind, message, remedy, where = errors.get()
        raise kind(message, remedy=remedy, where=where)
    for index, rank in enumerate(ranks):
        if rank.exitcode not in (None, 0):
            how = f"signal {-rank.exitcode}" if rank.exitcode < 0 else f"code {rank.exitcode}"
            raise DataError(
                f"rank {index} ended with {how}.",
                remedy="What is done is kept: give the same command again to go on.",
            )
