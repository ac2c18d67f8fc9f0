"""Entry point of ``megagen``: a table of commands, and errors a user can act on.

Only the module of the command that was asked for is imported, so ``megagen --help`` loads neither
torch nor megatron.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import typer

import megagen
from megagen.core.errors import MegagenError


@dataclass(frozen=True)
class Command:
    """One line of the table.

    Args:
        target: ``module:attribute`` of a function with typer-style parameters, or of a
            ``typer.Typer`` where the command has sub-commands.
        summary: the line that ``megagen --help`` shows.
        takes_overrides: unknown options (``--training.loop.max_train_steps 5``) are left in the
            function's ``typer.Context.args`` instead of being refused.
    """

    target: str
    summary: str
    takes_overrides: bool = False


NOISE = (
    ".*Apex",
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",
    ".torch.distributed.*is deprecated",
)
"""Warnings of megatron-core at every start that say nothing to a user; ``megagen doctor`` does."""

COMMANDS: dict[str, Command] = {
    "train": Command(
        "megagen.cli.train:train", "Train a model from a YAML config.", takes_overrides=True
    ),
    "preprocess": Command(
        "megagen.cli.preprocess:preprocess",
        "Turn a folder of videos into a dataset of latents.",
        takes_overrides=True,
    ),
    "sample": Command("megagen.cli.sample:sample", "Generate videos from trained weights."),
    "convert": Command(
        "megagen.cli.convert:convert", "Convert between diffusers directories and checkpoints."
    ),
    "demo": Command(
        "megagen.cli.demo:demo",
        "Run the whole path on handwritten digits and write a report.",
        takes_overrides=True,
    ),
    "demo-causal": Command(
        "megagen.cli.demo_causal:demo_causal",
        "Make the demo's teacher causal, distil it, stream clips from it.",
    ),
    "doctor": Command(
        "megagen.cli.doctor:doctor", "Say what is installed, what is missing and what to do."
    ),
}


def build_app(wanted: str | None) -> typer.Typer:
    """The app with every command listed and ``wanted`` (a key of ``COMMANDS``) loaded."""
    app = typer.Typer(
        name="megagen",
        help=megagen.__doc__,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        no_args_is_help=True,
    )
    app.callback()(_root)
    for name, command in COMMANDS.items():
        target = _load(command.target) if name == wanted else _listed
        if isinstance(target, typer.Typer):
            app.add_typer(target, name=name, help=command.summary)
            continue
        extra = {"allow_extra_args": True, "ignore_unknown_options": True}
        app.command(
            name,
            help=_help(target) if name == wanted else command.summary,
            context_settings=extra if command.takes_overrides else None,
        )(target)
    return app


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; ``MegagenError`` becomes one paragraph on stderr and exit code 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    wanted = next((a for a in args if not a.startswith("-")), None)
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    # asking whether CUDA is there must not start it: --nproc forks ranks afterwards
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    # megatron-core warns at import of what is not installed, and of names that torch is renaming
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    try:
        app = build_app(wanted if wanted in COMMANDS else None)
        app(args=args, prog_name="megagen")
    except MegagenError as error:
        print(f"megagen: error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(megagen.__version__)
        raise typer.Exit


def _root(
    version: bool = typer.Option(
        False,
        "--version",
        callback=_print_version,
        is_eager=True,
        help="Print the version and exit.",
    ),
) -> None:
    pass


def _listed() -> None:
    """Stands in the list of ``--help`` for a command that was not asked for, so it is never run."""


def _help(function: Callable[..., Any]) -> str:
    """The docstring up to its list of arguments: the options describe themselves."""
    text = inspect.getdoc(function) or ""
    return re.split(r"^(?:Args|Returns|Raises):", text, flags=re.MULTILINE)[0].strip()


def _load(target: str) -> Callable[..., Any] | typer.Typer:
    module, _, attribute = target.partition(":")
    loaded: Callable[..., Any] | typer.Typer = getattr(importlib.import_module(module), attribute)
    return loaded


if __name__ == "__main__":
    main()
