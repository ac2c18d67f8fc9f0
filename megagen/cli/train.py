"""``megagen train``: check the config, start or join the ranks, train."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from megagen.core.errors import ConfigError, MegagenError


def train(
    context: typer.Context,
    config: Annotated[Path, typer.Option("--config", help="YAML run config.")],
    nproc: Annotated[
        int, typer.Option(min=0, help="Ranks to start here; 0: one, or torchrun's or SLURM's.")
    ] = 0,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check the config, print the plan: no GPU, no weights."),
    ] = False,
    world_size: Annotated[
        int, typer.Option(min=0, help="With --dry-run: plan for so many ranks.")
    ] = 0,
) -> None:
    """Train what a YAML config describes; any key can be overridden as --dotted.key VALUE.

    Examples: megagen train --config configs/demo/sft.yaml --nproc 2
    --training.distributed.tp_size 2; torchrun --nproc-per-node 8 -m megagen train --config run.yaml
    """
    from megagen.config.load import load_run_config, parse_overrides

    run_config = load_run_config(config, parse_overrides(context.args))
    joined = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))
    if nproc > 1 and joined > 1:
        raise ConfigError(
            f"is {nproc}, but this process is one of {joined} ranks of torchrun or SLURM already.",
            remedy="Drop it.",
            where="--nproc",
        )
    ranks = (world_size if dry_run else 0) or nproc or joined
    run_training(run_config, ranks=ranks, fork=nproc > 1, dry_run=dry_run)


def run_training(config: Any, *, ranks: int, fork: bool, dry_run: bool = False) -> None:
    """Train ``config`` on ``ranks`` ranks.

    Args:
        config: a ``RunConfig``.
        ranks: size of the run.
        fork: start the ranks here; else join the group of the environment (or run alone).
        dry_run: only check, and print the plan.

    Raises:
        MegagenError: before any rank is started, where the config or the data is wrong.
        SystemExit: with the ranks' exit code where it is not 0.
    """
    from megagen import builder, settings
    from megagen.checks import check
    from megagen.core.streams import Streams
    from megagen.plan.report import describe

    plugins = builder.build_plugins(config)
    check(config, plugins, ranks)
    asked = settings.passes(config), settings.heads_load(config, plugins)
    if dry_run:
        shape, text_len = builder.sample_shape(config, plugins["student"], required=False)
        print(describe(config, plugins, ranks, shape, text_len, *asked))
        return
    shape, text_len = builder.sample_shape(config, plugins["student"], required=True)
    for name, plugin in plugins.items():
        builder.weight_store(config, name, plugin, Streams(config.training.seed))
    if int(os.environ.get("RANK", "0")) == 0:
        print(describe(config, plugins, ranks, shape, text_len, *asked), file=sys.stderr)
    if fork:
        code = start_ranks(ranks, _train_here, config, plugins, timeout=_timeout(config))
    else:
        from megagen.parallel.launch import init_distributed

        init_distributed(timeout=_timeout(config))
        code = _train_here(config, plugins)
    if code:
        raise SystemExit(code)


def start_ranks(
    num_ranks: int, fn: Callable[..., int], *args: Any, timeout: timedelta = timedelta(minutes=30)
) -> int:
    """Fork ranks that run ``fn``; a ``MegagenError`` is printed by the first rank that meets it.

    Args:
        num_ranks: ranks.
        fn: called with ``args`` in each, returns an exit code.
        timeout: how long a collective waits for its peers.

    Returns:
        The exit code: 0, an error's own, or a failed rank's.
    """
    from megagen.parallel.launch import spawn

    with tempfile.TemporaryDirectory(prefix="megagen_") as folder:
        said = Path(folder) / "said"
        return spawn(num_ranks, _guarded, said, fn, args, collective_timeout=timeout)


def _guarded(said: Path, fn: Callable[..., int], args: tuple[Any, ...]) -> int:
    try:
        return fn(*args)
    except MegagenError as error:
        with contextlib.suppress(FileExistsError):
            said.open("x").close()
            print(f"megagen: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def _train_here(config: Any, plugins: Any) -> int:
    """What each rank does."""
    from megagen import builder
    from megagen.core import log
    from megagen.parallel.launch import shutdown
    from megagen.tracking.build import build_trackers
    from megagen.trainer import Trainer

    log.setup()
    run = builder.build_run(config, plugins)
    Trainer(run, lambda step: build_trackers(config, step)).run()
    shutdown()
    return 0


def _timeout(config: Any) -> timedelta:
    return timedelta(minutes=config.training.distributed.timeout_minutes)
