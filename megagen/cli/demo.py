"""``megagen demo``: the main job on handwritten digits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CONFIGS = Path("configs/demo")


def demo(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of everything it makes.")] = Path("runs/demo"),
    teacher: Annotated[
        Path | None, typer.Option(help="Diffusers directory; default the weights in megagen.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Train the teacher first with this run config (configs/demo/sft.yaml)."),
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option(help="Train it from fresh weights (configs/demo/pretrain.yaml): longer.")
    ] = False,
    nproc: Annotated[int, typer.Option(min=1, help="Ranks of the trainings.")] = 2,
    num_samples: Annotated[int, typer.Option(min=20, help="Clips of each row to judge.")] = 1000,
    num_train: Annotated[int, typer.Option(min=40, help="Training clips.")] = 1437,
    num_held_out: Annotated[int, typer.Option(min=100, help="Held-out clips.")] = 1440,
    num_paths: Annotated[int, typer.Option(min=1, help="Teacher's paths of kd.")] = 320,
    kd_steps: Annotated[int | None, typer.Option(min=1, help="Default: the config's.")] = None,
    dmd2_steps: Annotated[int | None, typer.Option(min=1, help="Default: the config's.")] = None,
    judge_epochs: Annotated[int, typer.Option(min=1, help="Of the digit classifier.")] = 24,
) -> None:
    """Distil a small video model on moving handwritten digits to a few steps and write a report.

    Makes mp4 clips and preprocesses them, learns the teacher's paths (kd), matches its distribution
    (dmd2), samples teacher and student, measures both, and reads the student with diffusers. Keys
    of the teacher's run config can be overridden as in ``megagen train``:
    --training.loop.max_train_steps 200.
    """
    from megagen.core import log
    from megagen.core.errors import ConfigError
    from megagen.demo.distil import DistilOptions
    from megagen.demo.report import print_table, write_report
    from megagen.demo.run import WEIGHTS, DemoOptions, run_demo

    log.setup()
    chosen = CONFIGS / "pretrain.yaml" if from_scratch and config is None else config
    for file in filter(None, (chosen, CONFIGS / "kd.yaml", CONFIGS / "dmd2.yaml")):
        if not file.is_file():
            raise ConfigError(
                "no such file.",
                remedy="Run it from the root of megagen's repository, or give --config.",
                where=str(file),
            )
    if ctx.args and chosen is None:
        raise ConfigError(
            f"{' '.join(ctx.args)} is for the teacher's training, and none is trained.",
            remedy="Give --config configs/demo/sft.yaml too.",
        )
    options = DemoOptions(
        out=out,
        distil=DistilOptions(
            kd=CONFIGS / "kd.yaml",
            dmd2=CONFIGS / "dmd2.yaml",
            num_ranks=nproc,
            num_paths=num_paths,
            kd_steps=kd_steps,
            dmd2_steps=dmd2_steps,
        ),
        teacher=teacher or WEIGHTS,
        config=chosen,
        overrides=tuple(ctx.args),
        num_train=num_train,
        num_held_out=num_held_out,
        num_samples=num_samples,
        judge_epochs=judge_epochs,
    )
    result = run_demo(options)
    write_report(result, out)
    print_table(result)
    typer.echo(f"report: {out / 'report.html'}")
