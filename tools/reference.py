"""Write docs/cli.md from the help of the commands, and docs/python.md from docstrings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import python_reference
import typer
from rich import markup

from mergekit_interleave.cli import _typer_internals
from mergekit_interleave.cli.app import application

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
EXAMPLE = "Example: "
ESCAPED = r"\|"
NAMED_SHELL = {_typer_internals.NAMED_SHELL: "1"}
"""Makes the completion options take the name of a shell, on every machine."""


def page() -> str:
    """Return the whole page: the program, then each command in the order of the help."""
    with mock.patch.dict(os.environ, NAMED_SHELL):
        group: Any = typer.main.get_command(application())
    program = group.make_context("mk-interleave", [], resilient_parsing=True)
    parts = ["<!-- Written by tools/reference.py: `make docs`. -->", *_section(group, program, 1)]
    for name in group.list_commands(program):
        command = group.get_command(program, name)
        if not command.hidden:
            context = type(program)(command, info_name=name, parent=program)
            parts += _section(command, context, 2)
    return "\n\n".join(parts) + "\n"


def _section(command: Any, context: Any, level: int) -> Iterator[str]:
    """Describe a command: its purpose, usage, parameters by panel, and an example."""
    yield f"{'#' * level} {context.command_path}"
    yield _plain(command.help)
    yield _fenced("text", " ".join([context.command_path, *command.collect_usage_pieces(context)]))
    if level == 1:
        yield _table("Command", _commands(command, context))
    panels: dict[str, list[str]] = {"Arguments": [], "Options": []}
    for param in command.get_params(context):
        if not getattr(param, "hidden", False):
            panel = param.rich_help_panel or f"{param.param_type_name.capitalize()}s"
            panels.setdefault(panel, []).append(_row(_spelling(param, context), _meaning(param)))
    for panel, rows in panels.items():
        if rows:
            yield _table(panel, rows)
    epilog = _plain(command.epilog)
    if epilog.startswith(EXAMPLE):
        yield _fenced("sh", epilog.removeprefix(EXAMPLE))
    elif epilog:
        yield epilog


def _commands(group: Any, context: Any) -> list[str]:
    commands = [group.get_command(context, name) for name in group.list_commands(context)]
    return [
        _row(f"[`{command.name}`](#mk-interleave-{command.name})", _plain(command.help))
        for command in commands
        if not command.hidden
    ]


def _spelling(param: Any, context: Any) -> str:
    """Return how to type a parameter: all names of an option, and the name of its value."""
    if param.param_type_name == "argument":
        return f"`{param.metavar or param.display_name_raw}`"
    value = "" if param.is_flag else param.metavar or param.display_type(context).strip("<>")
    # The names of the help option come from a set, so their order can change.
    names = sorted([*param.opts, *param.secondary_opts], key=lambda name: (len(name), name))
    names[-1] += f" {value}" if value else ""
    return ", ".join(f"`{name}`" for name in names)


def _meaning(param: Any) -> str:
    """Return the help of a parameter, and its default."""
    default = param.default if param.show_default else None
    if param.required and param.param_type_name == "option":
        return f"{_plain(param.help)} Required."
    if default is None or default is False:
        return _plain(param.help)
    return f"{_plain(param.help)} Default: `{default}`."


def _plain(text: str | None) -> str:
    """Return a help text on one line, without the markup of the terminal."""
    return " ".join(markup.render(text or "").plain.split())


def _fenced(kind: str, line: str) -> str:
    return f"```{kind}\n{line}\n```"


def _table(head: str, rows: list[str]) -> str:
    return "\n".join([_row(head, ""), "| --- | --- |", *rows])


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', ESCAPED) for cell in cells)} |"


def main() -> None:
    """Write both pages."""
    PAGE.write_text(page(), encoding="utf-8")
    python_reference.PAGE.write_text(python_reference.page(), encoding="utf-8")


if __name__ == "__main__":
    main()
