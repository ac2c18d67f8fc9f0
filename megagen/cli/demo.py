"""``megagen demo``: the main job on handwritten digits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CONFIGS = Path("configs/demo")


def demo(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of everything it makes.")] = Path("runs/demo"),
    config: Annotated[
        Path | None, typer.Option(help="Run config; default configs/demo/sft.yaml.")
    ] = None,
    from_scratch: Annotated[
        bool,
        typer.Option(help="Start from fresh weights (configs/demo/pretrain.yaml): takes longer."),
    ] = False,
    nproc: Annotated[int, typer.Option(min=1, help="Ranks of the training.")] = 2,
    num_samples: Annotated[int, typer.Option(min=20, help="Clips to sample and judge.")] = 640,
    num_train: Annotated[int, typer.Option(min=40, help="Training clips.")] = 2874,
    num_held_out: Annotated[int, typer.Option(min=100, help="Held-out clips.")] = 1440,
    judge_epochs: Annotated[int, typer.Option(min=1, help="Of the digit classifier.")] = 24,
) -> None:
    """Run the whole path on moving handwritten digits and write a report.

    Makes mp4 clips, preprocesses them, trains a small Wan, samples, measures, exports a diffusers
    directory and reads it with diffusers. Keys of the run config can be overridden as in
    ``megagen train``: --training.loop.max_train_steps 200.
    """
    from megagen.core import log
    from megagen.core.errors import ConfigError
    from megagen.demo.report import print_table, write_report
    from megagen.demo.run import DemoOptions, run_demo

    log.setup()
    chosen = config or CONFIGS / ("pretrain.yaml" if from_scratch else "sft.yaml")
    if not chosen.is_file():
        raise ConfigError(
            "no such file.",
            remedy="Run it from the root of megagen's repository, or give --config.",
            where=str(chosen),
        )
    options = DemoOptions(
        out=out,
        config=chosen,
        overrides=tuple(ctx.args),
        num_ranks=nproc,
        num_train=num_train,
        num_held_out=num_held_out,
        num_samples=num_samples,
        judge_epochs=judge_epochs,
    )
    result = run_demo(options)
    write_report(result, out)
    print_table(result)
    typer.echo(f"report: {out / 'report.html'}")
