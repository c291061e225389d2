"""Build the typer application, which imports only the module of the requested command."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated

import typer

from mergekit_interleave._version import __version__
from mergekit_interleave.cli import text
from mergekit_interleave.cli._typer_internals import PlainCommand, PlainGroup

NAME = "mk-interleave"
ALIAS = "mergekit-interleave"
"""A second name of the program, which sorts next to mergekit's own programs."""

COMMANDS = (
    "gen",
    "run",
    "plan",
    "sample",
    "scan",
    "verify",
    "evaluate",
    "explain",
    "card",
    "train",
    "fix-config",
    "push",
    "schema",
)
"""The commands, in the order of the help. Each is a module of this package, with a function of
the same name."""


def application(command: str | None = None) -> typer.Typer:
    """Build the application.

    Args:
        command: The only command to build, one of `COMMANDS`; None builds all of them.
    """
    app = typer.Typer(
        name=NAME,
        cls=PlainGroup,
        help="Make a language model deeper: from one line to mergekit YAML or the finished model.",
        epilog="A directive is a file, - for standard input, or its text: "
        "'model: org/name, interleave: every 4, zero: \\[o_proj, down_proj]'",
        add_completion=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_program)
    for each in COMMANDS if command is None else (command,):
        name = each.replace("-", "_")
        module = import_module(f"mergekit_interleave.cli.{name}")
        register = app.command(each, cls=PlainCommand, epilog=f"Example: {module.EXAMPLE}")
        register(getattr(module, name))
    return app


def _program(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,  # noqa: ARG001 - `main` reads it
) -> None:
    if version:
        text.show(f"{NAME} {__version__}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        text.write(f"{ctx.get_help()}\n")
        raise typer.Exit(2)
