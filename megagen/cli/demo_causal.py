"""``megagen demo-causal``: a causal, streaming student of the demo's teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo_causal(
    out: Annotated[Path, typer.Option(help="Folder of everything it makes.")] = Path(
        "runs/demo-causal"
    ),
    teacher: Annotated[
        Path | None, typer.Option(help="Diffusers directory; default the weights in megagen.")
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Ranks of the trainings.")] = 2,
    num_samples: Annotated[int, typer.Option(min=20, help="Clips of each row to judge.")] = 1000,
    num_train: Annotated[int, typer.Option(min=40, help="Training clips.")] = 2874,
    num_held_out: Annotated[int, typer.Option(min=100, help="Held-out clips.")] = 1440,
    num_paths: Annotated[int, typer.Option(min=20, help="Teacher's paths of kd.")] = 320,
    forcing_steps: Annotated[int | None, typer.Option(min=1, help="Default: the config's.")] = None,
    kd_steps: Annotated[int | None, typer.Option(min=1, help="Default: the config's.")] = None,
    self_forcing_steps: Annotated[
        int | None, typer.Option(min=1, help="Default: the config's.")
    ] = None,
    judge_epochs: Annotated[int, typer.Option(min=1, help="Of the digit classifier.")] = 24,
) -> None:
    """Make the demo's teacher causal, distil it and stream from it, with a report.

    Makes mp4 clips and preprocesses them, trains the teacher's weights with diffusion forcing,
    learns its paths (causal kd), goes on with the student's own clips (self-forcing), and streams
    clips block by block, judged beside the teacher's.
    """
    from megagen.core import log
    from megagen.core.errors import ConfigError
    from megagen.demo.causal import CausalOptions, run_causal_demo
    from megagen.demo.report import print_table, write_report
    from megagen.demo.run import WEIGHTS, DemoOptions

    log.setup()
    causal = CausalOptions(
        num_ranks=nproc,
        num_paths=num_paths,
        forcing_steps=forcing_steps,
        kd_steps=kd_steps,
        self_forcing_steps=self_forcing_steps,
    )
    for file in (causal.forcing, causal.kd, causal.self_forcing):
        if not file.is_file():
            raise ConfigError(
                "no such file.",
                remedy="Run it from the root of megagen's repository.",
                where=str(file),
            )
    options = DemoOptions(
        out=out,
        teacher=teacher or WEIGHTS,
        num_train=num_train,
        num_held_out=num_held_out,
        num_samples=num_samples,
        judge_epochs=judge_epochs,
    )
    result = run_causal_demo(options, causal)
    write_report(result, out)
    print_table(result)
    typer.echo(f"report: {out / 'report.html'}")
